"""The rows that were judged wrong, the surest first."""

from collections.abc import Sequence
from dataclasses import dataclass

from llm_clf.decisions.predictions import PredictionTable
from llm_clf.evaluation.metrics import NO_LABEL


@dataclass(frozen=True, slots=True)
class Mistake:
    """A row whose predicted label is not its gold label."""

    row: int
    """Number in the predictions file."""
    id: str
    gold: str
    predicted: str
    """Empty text where no label was given."""
    status: str
    prob: float | None
    """Of the predicted label, or of the most probable one where none was given; None without probabilities."""


def surest_mistakes(table: PredictionTable) -> list[Mistake]:
    """Return all mistakes, those with the highest probability first; without probabilities in the file's order."""
    place = {label: number for number, label in enumerate(table.labels)}
    mistakes = []
    for row, (gold, predicted) in enumerate(zip(table.gold, table.predicted, strict=True)):
        if gold not in (NO_LABEL, predicted):
            prob = None
            if table.probs is not None:
                prob = float(table.probs[row, place[predicted]] if predicted else table.probs[row].max())
            mistakes.append(Mistake(row, table.ids[row], gold, predicted, table.status[row], prob))
    return sorted(mistakes, key=lambda one: (-(one.prob or 0.0), one.row))


def label_names(mistakes: Sequence[Mistake], labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the gold and the predicted labels of mistakes, each in the task's order; no label comes last."""
    order = [*labels, NO_LABEL]
    gold, predicted = {one.gold for one in mistakes}, {one.predicted for one in mistakes}
    return [name for name in order if name in gold], [name for name in order if name in predicted]
