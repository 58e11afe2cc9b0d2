"""How good predictions are in parts of the rows: by length of the text, by the values of a column."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_clf.decisions.predictions import PredictionTable
from llm_clf.evaluation.curves import wilson
from llm_clf.evaluation.intervals import Interval, Judged
from llm_clf.evaluation.metrics import NO_LABEL

MOST_VALUES = 20
SMALL = 30
"""Rows; of fewer, a figure says little."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows that have something in common."""

    name: str
    rows: int
    """With a gold label."""
    accuracy: float
    interval: Interval
    """Of the accuracy, by Wilson: at few rows it is wide, also where all rows are right."""
    f1: float | None
    """Of the second label of two, None where no row has it, or there are more labels."""
    positive: float | None
    """Share of rows with the second gold label of two."""


@dataclass(frozen=True, slots=True)
class Slicing:
    """All slices by one thing."""

    by: str
    slices: list[Slice]


def slice_by_length(table: PredictionTable, texts: Sequence[str]) -> Slicing:
    """Return slices by quartiles of the texts' lengths in characters."""
    return Slicing("length of the text, in characters", _slices(table, _quartiles([len(text) for text in texts])))


def slice_by_column(table: PredictionTable, name: str, cells: Sequence[str]) -> Slicing:
    """Return slices by a column's values: by quartiles where these are many numbers, else the most frequent ones."""
    counts = Counter(cells)
    if len(counts) > MOST_VALUES and (numbers := _numbers(cells)) is not None:
        return Slicing(name, _slices(table, _quartiles(numbers)))
    frequent = {value for value, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:MOST_VALUES]}
    rest = f"({len(counts) - MOST_VALUES:,} other values)"
    groups = [(value or "(empty)") if value in frequent else rest for value in cells]
    order = sorted(set(groups), key=lambda group: (group == rest, group))
    return Slicing(name, _slices(table, (groups, order)))


def _numbers(cells: Sequence[str]) -> list[float] | None:
    try:
        numbers = [float(cell) for cell in cells]
    except ValueError:
        return None
    return numbers if all(np.isfinite(numbers)) else None


def _quartiles(values: Sequence[float]) -> tuple[list[str], list[str]]:
    """Return the name of each value's quarter, and the names in order; equal values are never apart."""
    numbers = np.asarray(values, dtype=np.float64)
    quarters = np.searchsorted(np.quantile(numbers, [0.25, 0.5, 0.75]), numbers)
    names = {
        int(quarter): _range(numbers[quarters == quarter].min(), numbers[quarters == quarter].max())
        for quarter in np.unique(quarters)
    }
    return [names[int(quarter)] for quarter in quarters], list(names.values())


def _range(low: float, high: float) -> str:
    return f"{low:,g}" if low == high else f"{low:,.6g} to {high:,.6g}"


def _slices(table: PredictionTable, groups: tuple[Sequence[str], Sequence[str]]) -> list[Slice]:
    """Return a slice for each name in order that rows with a gold label have."""
    of_row, order = groups
    judged = Judged.of(table)
    known = np.array([group for group, gold in zip(of_row, table.gold, strict=True) if gold != NO_LABEL], dtype=object)
    return [_slice(judged, name, known == name) for name in order if (known == name).any()]


def _slice(judged: Judged, name: str, own: np.ndarray) -> Slice:
    gold, predicted = judged.gold[own], judged.predicted[own]
    rows, hits = len(gold), int((gold == predicted).sum())
    f1 = positive = None
    if len(judged.labels) == 2:
        positive = float((gold == 1).mean())
        found = int(((gold == 1) & (predicted == 1)).sum())
        f1 = 2 * found / int((gold == 1).sum() + (predicted == 1).sum()) if positive else None
    return Slice(name, rows, hits / rows, wilson(hits, rows), f1, positive)
