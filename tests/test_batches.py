"""Plans of batches and left padding."""

import random

from hypothesis import given
from hypothesis import strategies as st

from llm_clf.engine.batches import pad_left, plan_batches, plan_packed


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000), st.none() | st.integers(1, 8))
def test_every_row_once_within_the_budget_longest_first(lengths: list[int], budget: int, max_rows: int | None) -> None:
    batches = plan_batches(lengths, budget, max_rows)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
        assert max_rows is None or len(batch) <= max_rows
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(flat, reverse=True)


def test_plan_depends_on_lengths_alone() -> None:
    lengths = [random.Random(1).randrange(1, 99) for _ in range(50)]
    assert plan_batches(lengths, 200) == plan_batches(list(lengths), 200)


def test_left_padding_keeps_ends_together_and_positions_at_zero() -> None:
    batch = pad_left([[5, 6, 7], [8]], pad_id=9)
    assert batch.input_ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]


@given(lengths=st.lists(st.integers(1, 50), max_size=40), budget=st.integers(1, 120), most=st.integers(1, 5))
def test_packed_plan_keeps_the_budget_and_leaves_no_row_out(lengths: list[int], budget: int, most: int) -> None:
    batches = plan_packed(lengths, budget, most)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= most
        assert sum(lengths[index] for index in batch) <= budget or len(batch) == 1
    assert batches == plan_packed(lengths, budget, most)
