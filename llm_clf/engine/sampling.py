"""Which rows an epoch trains on, and in which order: given by the seed, so that a resumed training goes on alike."""

from collections.abc import Sequence

import torch


def shuffled_order(rows: int, seed: int) -> list[int]:
    """Return each of so many rows once."""
    order: list[int] = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def balanced_order(labels: Sequence[int], seed: int) -> list[int]:
    """Return as many rows as there are, as near as can be the same number of each label.

    A frequent label gives some of its rows, drawn anew by each seed; a rare one gives each of its rows as often as any
    other of them, or once more.

    Args:
        labels: Of the rows.
        seed: Of the draws; a training has one for each epoch.
    """
    draw = torch.Generator().manual_seed(seed)
    groups: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        groups.setdefault(label, []).append(row)
    order: list[int] = []
    # What cannot be shared out evenly goes to other labels in each epoch.
    turns = torch.randperm(len(groups), generator=draw).tolist()
    for turn, (_, group) in zip(turns, sorted(groups.items()), strict=True):
        wanted = len(labels) // len(groups) + (turn < len(labels) % len(groups))
        drawn: list[int] = []
        while len(drawn) < wanted:
            drawn += [group[place] for place in torch.randperm(len(group), generator=draw).tolist()]
        order += drawn[:wanted]
    return [order[place] for place in torch.randperm(len(order), generator=draw).tolist()]
