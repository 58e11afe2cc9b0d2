"""Packed rows against the plainest reference: one row at a time, no beginning shared, nothing packed."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_clf.config import LoraSettings
from llm_clf.engine.packing import (
    FAMILIES,
    NOTHING,
    AnswerShape,
    Row,
    allows_packing,
    enable_packing,
    packed_logits,
    read_beginning,
    without_adapter_dropout,
)
from llm_clf.models.adapters import new_adapter, trainable

SHARED = [30, 31, 32, 33, 34]
TREE = AnswerShape([0, 1, 1, 0], torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).bool())
NODES = [17, 40, 41, 50]
rows_of_tokens = st.lists(st.lists(st.integers(5, 260), min_size=1, max_size=20), min_size=1, max_size=6)


def one_by_one(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits of all places of one row, by the model as transformers made it."""
    return model(input_ids=torch.tensor([list(ids)])).logits[0]


def packed(family: str = "glm") -> tuple[Any, Any]:
    """Return two equal models: one as transformers made it, one that reads packed rows."""
    model = tiny_model(family)
    enable_packing(model)
    return tiny_model(family), model


@pytest.mark.parametrize("shared", [[], SHARED], ids=["nothing shared", "beginning shared"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_equal_one_row_at_a_time(family: str, shared: list[int]) -> None:
    plain, model = packed(family)
    rows = [[60, 61, 62], [70], [80, 81, 82, 83, 84, 85, 86, 87]]
    with torch.no_grad():
        found = packed_logits(
            model, [Row(row) for row in rows], read_beginning(model, shared), [range(len(row)) for row in rows]
        )
        expected = torch.cat([one_by_one(plain, [*shared, *row])[len(shared) :] for row in rows])
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@given(rows=rows_of_tokens, shared=st.lists(st.integers(5, 260), max_size=9))
@settings(max_examples=30, deadline=None)
def test_any_rows_equal_one_at_a_time(rows: list[list[int]], shared: list[int]) -> None:
    plain, model = packed()
    with torch.no_grad():
        found = packed_logits(
            model, [Row(row) for row in rows], read_beginning(model, shared), [[len(r) - 1] for r in rows]
        )
        expected = torch.stack([one_by_one(plain, [*shared, *row])[-1] for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [[], SHARED], ids=["nothing shared", "beginning shared"])
def test_nodes_see_their_row_and_their_ancestors_only(shared: list[int]) -> None:
    plain, model = packed()
    rows = [[60, 61, 62], [70], [80, 81, 82, 83]]
    paths = [[17], [17, 40], [17, 41], [50]]
    with torch.no_grad():
        found = packed_logits(
            model,
            [Row(row, NODES) for row in rows],
            read_beginning(model, shared),
            [range(len(row), len(row) + 4) for row in rows],
            TREE,
        )
        expected = torch.stack([one_by_one(plain, [*shared, *row, *path])[-1] for row in rows for path in paths])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_row_sees_another() -> None:
    _, model = packed()
    beginning = read_beginning(model, SHARED)
    rows = [[60, 61, 62], [70, 71], [80, 81, 82, 83]]

    def logits(rows: list[list[int]]) -> list[torch.Tensor]:
        sizes = [len(row) for row in rows]
        with torch.no_grad():
            return list(
                packed_logits(model, [Row(row) for row in rows], beginning, [range(n) for n in sizes]).split(sizes)
            )

    before = logits(rows)
    for changed in range(3):
        others = [row if number != changed else [token + 100 for token in row] for number, row in enumerate(rows)]
        for number, (old, new) in enumerate(zip(before, logits(others), strict=True)):
            assert torch.equal(old, new) == (number != changed)


def adapted(*, dropout: float = 0.0, pack: bool = True) -> Any:
    model = new_adapter(tiny_model("glm").requires_grad_(False), LoraSettings(dropout=dropout), seed=1).train()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    if pack:
        enable_packing(model)
    return model


@given(rows=rows_of_tokens)
@settings(max_examples=10, deadline=None)
def test_gradients_through_a_beginning_read_once_equal_one_row_at_a_time(rows: list[list[int]]) -> None:
    # In fp64, so that only the packed path's rounding counts.
    plain, model = adapted(pack=False).double(), adapted()
    for row in rows:
        one_by_one(plain, [*SHARED, *row])[-1].square().sum().backward()
    made = read_beginning(model, SHARED)
    leaves = made.leaves()
    # Two micro-batches gather on the same leaves.
    for some in (rows[:1], rows[1:]):
        if some:
            wanted = [[len(row) - 1] for row in some]
            packed_logits(model, [Row(row) for row in some], leaves, wanted).square().sum().backward()
    made.backward(leaves)
    for expected, found in zip(trainable(plain), trainable(model), strict=True):
        assert expected.grad is not None and found.grad is not None
        largest = expected.grad.abs().max()
        assert (found.grad - expected.grad).abs().max() <= 1e-5 * largest


def test_what_is_not_packed_is_read_as_before() -> None:
    plain, model = packed()
    ids = torch.tensor([[3, 3, 60, 61, 62], [70, 71, 72, 73, 74]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        expected, found = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (plain, model))
    assert torch.equal(found, expected)
    answers = [
        m.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=8) for m in (plain, model)
    ]
    assert torch.equal(*answers)


def test_dropout_is_off_for_a_while_only() -> None:
    model = adapted(dropout=0.5)
    parts = [part for part in model.modules() if isinstance(part, torch.nn.Dropout)]
    assert parts and all(part.training for part in parts)
    with without_adapter_dropout(model):
        assert not any(part.training for part in parts)
        assert torch.equal(*(read_beginning(model, SHARED).layers[1][0] for _ in range(2)))
    assert all(part.training for part in parts)


def test_families_with_a_window_or_unknown_ones_are_not_packed() -> None:
    assert allows_packing(tiny_config("glm")) and allows_packing(tiny_config("mistral"))
    assert not allows_packing(tiny_config("mistral-window")) and not allows_packing(tiny_config("bloom"))


def test_nothing_shared_is_no_forward() -> None:
    assert read_beginning(None, []) is NOTHING
