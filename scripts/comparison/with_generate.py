"""transformers' `generate`: the model writes each answer."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from comparison.meter import TYPES, Marks, model_facts
from comparison.work import Row, Work


def one_row(work: Work) -> dict[str, Any]:
    """Write the answers one row at a time, as the project of 2023 did."""
    return _write(work, 1)


def batched(work: Work) -> dict[str, Any]:
    """Write the answers of 16 rows at a time, sorted by length and padded on the left."""
    return _write(work, 16)


def _write(work: Work, size: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(work.base, dtype=TYPES[work.job().dtype]).to(device).eval()
    model.requires_grad_(False)
    rows = sorted(work.rows(), key=lambda row: len(row.prompt))
    tokens = max(len(row.answer) for row in rows)
    _answer(model, rows[:1], tokens)
    marks = Marks()
    marks.note()
    for first in range(0, len(rows), size):
        _answer(model, rows[first : first + size], tokens)
    marks.note()
    return {**marks.span(), **model_facts(model)}


def _answer(model: Any, rows: list[Row], tokens: int) -> None:
    longest = max(len(row.prompt) for row in rows)
    padding = [longest - len(row.prompt) for row in rows]
    ids = torch.tensor([[0] * pad + row.prompt for pad, row in zip(padding, rows, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * len(row.prompt) for pad, row in zip(padding, rows, strict=True)])
    # A random base never ends its answer by itself; it writes as many tokens as a label has.
    model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
    )
