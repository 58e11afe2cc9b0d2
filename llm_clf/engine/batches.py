"""Rows to batches: by the tokens that they have together, or padded to about equal length."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm_clf.engine.transfer import to_device


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded on the left, so that their ends stand under each other."""

    input_ids: torch.Tensor
    """Token ids, shape `(rows, tokens)`."""
    attention_mask: torch.Tensor
    """1 on real tokens, 0 on padding, shape `(rows, tokens)`."""
    position_ids: torch.Tensor
    """Positions from 0 at the first real token, shape `(rows, tokens)`."""


def plan_batches(lengths: Sequence[int], budget: int, max_rows: int | None = None) -> list[list[int]]:
    """Group indices so that rows times the longest length stay within `budget` tokens; the longest come first.

    The plan depends on the lengths alone. A row longer than the budget is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        current = batches[-1] if batches else []
        longest = lengths[current[0]] if current else 0
        if current and longest * (len(current) + 1) <= budget and (max_rows is None or len(current) < max_rows):
            current.append(index)
        else:
            batches.append([index])
    return batches


def plan_packed(lengths: Sequence[int], budget: int, max_rows: int | None = None) -> list[list[int]]:
    """Group indices so that the lengths of a group sum up to at most `budget` tokens; the longest come first.

    The plan depends on the lengths alone. A row longer than the budget is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    tokens = 0
    for index in order:
        if not batches or tokens + lengths[index] > budget or len(batches[-1]) == max_rows:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return batches


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Return the sequences as one batch on the device."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(to_device(ids, device), to_device(mask, device), to_device(positions, device))
