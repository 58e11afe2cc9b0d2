"""How the cost of llm-clf grows with rows, row length, labels and the prompt that rows share."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from comparison.figures import Line, summarise
from comparison.speed import Bench
from comparison.tasks import MATMUL
from comparison.work import Row
from llm_clf.console import table

PART = "growth"
TASKS = ("ours: train", "ours: predict")
END = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of random tokens."""

    rows: int
    length: int = 300
    """Tokens of a row's own text; rows differ from it by up to half."""
    labels: int = 2
    shared: int = 40
    """Tokens of the prompt that all rows begin with."""


def shapes_to_try(rows: int) -> dict[str, list[tuple[int, Shape]]]:
    """Return what is varied, one at a time: the name, and its values with what they make of the rows."""
    usual = Shape(rows)
    return {
        "rows": [(value, replace(usual, rows=value)) for value in (rows, rows * 2, rows * 4, rows * 8)],
        "tokens of a row": [(value, replace(usual, length=value)) for value in (75, 150, 300, 600)],
        "labels": [(value, replace(usual, labels=value)) for value in (2, 8, 32, 128)],
        "shared tokens": [(value, replace(usual, shared=value)) for value in (40, 500, 1000, 2000)],
    }


def made_rows(shape: Shape, vocabulary: int) -> list[Row]:
    """Return such rows; every label is two tokens and the end token, and ten of them share their first."""
    draw = random.Random(0)
    beginning = draw.choices(range(10, vocabulary), k=shape.shared)
    answers = [[10 + label // 10, 10 + label % 10, END] for label in range(shape.labels)]
    rows = []
    for number in range(shape.rows):
        size = draw.randint(shape.length // 2, shape.length * 3 // 2)
        own = draw.choices(range(10, vocabulary), k=size)
        rows.append(Row([*beginning, *own], answers[number % shape.labels]))
    return rows


def compare_growth(bench: Bench, rows: int) -> None:
    """Train and predict with every shape; print a table for each thing that is varied."""
    for name, shapes in shapes_to_try(rows).items():
        found = [(value, _measure(bench, name, value, shape)) for value, shape in shapes]
        bench.report.show(PART, growth_text(name, found))


def _measure(bench: Bench, name: str, value: int, shape: Shape) -> list[Line]:
    rows = made_rows(shape, bench.shape.vocabulary)
    runs: list[dict[str, Any]] = []
    for repeat in range(1, bench.repeats + 1):
        runs += [bench.measure(PART, task, rows, varied=name, value=value, repeat=repeat) for task in (MATMUL, *TASKS)]
    return summarise(runs)


def growth_text(name: str, found: Sequence[tuple[int, list[Line]]]) -> str:
    """Return a table of times and peaks by the value of what is varied."""
    header = [name]
    for kind in ("train", "predict"):
        header += [f"{kind} ms a row", "tokens/s", "of matmul", "memory"]
    return table(header, [[f"{value:,}", *(cell for line in lines for cell in _cells(line))] for value, lines in found])


def _cells(line: Line) -> list[str]:
    if line.rate is None or line.tokens is None or line.peak is None:
        return ["failed", "-", "-", "-"]
    share = f"{line.share.median:.0%}" if line.share else "-"
    return [f"{1000 / line.rate.median:.1f}", f"{line.tokens.median:,.0f}", share, f"{line.peak / 1e9:.2f} GB"]
