"""Labels that look wrong, by confident learning.

Rows are counted in which a model that did not learn from them is as sure of another label as it is of that label's own
rows on average. So many labels of each kind are taken to be wrong: those of the rows in which the other label is most
ahead of the gold one (Northcutt, Jiang and Chuang, https://arxiv.org/abs/1911.00068, through cleanlab).
"""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_clf.decisions.predictions import PredictionTable
from llm_clf.errors import DataError
from llm_clf.evaluation.intervals import Judged
from llm_clf.evaluation.metrics import NO_LABEL
from llm_clf.files import replacing

FEW = 10
"""Rows of a label below which its average says little."""
COLUMNS = ("id", "gold", "suggested", "probability", "score")


@dataclass(frozen=True, slots=True)
class Suspect:
    """A row whose gold label looks wrong."""

    row: int
    """Number in the predictions file."""
    id: str
    gold: str
    suggested: str
    """The most probable label."""
    probability: float
    """Of the suggested label."""
    score: float
    """Probability of the gold label: the lower, the more the label is suspected."""


def find_suspects(table: PredictionTable, name: str) -> list[Suspect]:
    """Return the rows whose gold label looks wrong, the worst first.

    Args:
        table: Predictions by a model that did not learn from these rows.
        name: What messages call them.

    Raises:
        DataError: There are no probabilities, or not two labels with enough rows.
    """
    if table.probs is None:
        raise DataError(f"{name}: has no probabilities (columns prob_LABEL), and --suspects goes by them.")
    judged = Judged.of(table)
    counts = Counter(label for label in table.gold if label != NO_LABEL)
    if sum(count >= FEW for count in counts.values()) < 2:
        found = ", ".join(f"{label}: {counts[label]:,}" for label in table.labels)
        raise DataError(
            f"{name}: wrong labels show against many right ones; --suspects needs two labels with at least {FEW} rows "
            f"each, and found {found}. Give more labelled rows."
        )
    from cleanlab.filter import find_label_issues

    # Labels without rows have no average to be compared with; cleanlab numbers the others without a gap.
    here = [label for label, text in enumerate(table.labels) if counts[text]]
    assert judged.probs is not None
    probs = judged.probs[:, here]
    gold = [here.index(label) for label in judged.gold]
    suspected = find_label_issues(gold, probs, return_indices_ranked_by="self_confidence", n_jobs=1)
    known = [row for row, label in enumerate(table.gold) if label != NO_LABEL]
    return [
        Suspect(
            row=known[place],
            id=table.ids[known[place]],
            gold=table.gold[known[place]],
            suggested=table.labels[here[probs[place].argmax()]],
            probability=float(probs[place].max()),
            score=float(probs[place, gold[place]]),
        )
        for place in suspected.tolist()
    ]


def rare_labels(table: PredictionTable) -> list[str]:
    """Return the labels with so few rows that suspicion about them is weak."""
    counts = Counter(table.gold)
    return [label for label in table.labels if 0 < counts[label] < FEW]


def write_suspects(file: Path, suspects: Sequence[Suspect], texts: Sequence[str] | None) -> None:
    """Write suspects as CSV, with the rows' texts where they are known."""
    with replacing(file) as temporary, open(temporary, "w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow([*COLUMNS, *(["text"] if texts is not None else [])])
        for one in suspects:
            cells = [one.id, one.gold, one.suggested, f"{one.probability:.6f}", f"{one.score:.6f}"]
            writer.writerow([*cells, *([texts[one.row]] if texts is not None else [])])
