"""Intervals of the headline metrics by the bootstrap: rows are drawn with replacement, and the metrics counted anew.

Each resample draws as many rows as there are; a metric's interval lies between the percentiles of its values. Metrics
are computed for many resamples at once, from how often each row was drawn.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from llm_clf.decisions.predictions import ABSTAINED, PredictionTable
from llm_clf.evaluation.metrics import HEADLINES, NO_LABEL, compute_metrics, own_losses
from llm_clf.evaluation.reliability import expected_calibration_error

LEVEL = 0.95
RESAMPLES = 2_000
SEED = 42
# Counts that are held at once, 8 bytes each: a few arrays of this size are in use at the same time.
CHUNK = 2_000_000

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Judged:
    """The rows of a predictions file that have a gold label, as numbers."""

    labels: list[str]
    gold: NDArray[np.int64]
    """Index of the gold label of each row."""
    predicted: NDArray[np.int64]
    """Index of the predicted label, `len(labels)` where none was given."""
    probs: Floats | None
    """Shape `(rows, labels)`, None where the file has none."""

    @classmethod
    def of(cls, table: PredictionTable) -> "Judged":
        """Take them out of a predictions file."""
        place = {label: number for number, label in enumerate(table.labels)} | {NO_LABEL: len(table.labels)}
        known = [row for row, label in enumerate(table.gold) if label != NO_LABEL]
        return cls(
            table.labels,
            np.array([place[table.gold[row]] for row in known], dtype=np.int64),
            np.array([place[table.predicted[row]] for row in known], dtype=np.int64),
            table.probs[known].astype(np.float64) if table.probs is not None else None,
        )


@dataclass(frozen=True, slots=True)
class Interval:
    """Between which values a metric lies, with the probability LEVEL over samples of rows like these."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        """Whether a value lies within, ends included."""
        return self.low <= value <= self.high


def measure(table: PredictionTable) -> dict[str, Any]:
    """Return the metrics of a predictions file, with the intervals of those in the headline under `intervals`."""
    metrics = compute_metrics(table.gold, table.predicted, table.probs, table.labels, table.status)
    if not metrics["rows_with_gold"]:
        return metrics
    judged = Judged.of(table)
    if judged.probs is not None:
        metrics["ece"] = expected_calibration_error(judged.gold, judged.probs)
    (drawn,) = resample([judged])
    metrics["intervals"] = {
        "level": LEVEL,
        "resamples": RESAMPLES,
        "seed": SEED,
        "metrics": {name: as_list(interval_of(values)) for name, values in drawn.items()},
        "left_out": {name: left_out for name, values in drawn.items() if (left_out := int(np.isnan(values).sum()))},
    }
    if ABSTAINED in table.status:
        metrics["answered"] = _answered(table)
    if table.sets is not None:
        metrics["label_sets"] = _label_sets(table)
    return metrics


def _answered(table: PredictionTable) -> dict[str, Any]:
    """Return the share of rows with a gold label that got an answer (`coverage`), and the metrics of those."""
    gold = [row for row, label in enumerate(table.gold) if label != NO_LABEL]
    answered = [row for row in gold if table.status[row] != ABSTAINED]
    found: dict[str, Any] = {"rows": len(answered), "coverage": len(answered) / len(gold)}
    if not answered:
        return found
    measured = measure(
        replace(
            table,
            ids=[table.ids[row] for row in answered],
            predicted=[table.predicted[row] for row in answered],
            status=[table.status[row] for row in answered],
            gold=[table.gold[row] for row in answered],
            probs=table.probs[answered] if table.probs is not None else None,
            sets=None,
        )
    )
    return found | {name: measured[name] for name in (*HEADLINES, "intervals") if name in measured}


def _label_sets(table: PredictionTable) -> dict[str, Any]:
    """Return the share of label sets that hold the gold label (`coverage`), their mean size, and sets by size."""
    assert table.sets is not None
    pairs = [(label, one) for label, one in zip(table.gold, table.sets, strict=True) if label != NO_LABEL]
    sizes = Counter(len(one) for _, one in pairs)
    return {
        "coverage": sum(label in one for label, one in pairs) / len(pairs),
        "mean_size": sum(len(one) for _, one in pairs) / len(pairs),
        "sizes": {str(size): sizes[size] for size in sorted(sizes)},
    }


def as_list(interval: Interval | None) -> list[float] | None:
    """Return an interval as JSON has it."""
    return [interval.low, interval.high] if interval is not None else None


def interval_of(values: Floats) -> Interval | None:
    """Return the percentile interval of a metric's resampled values; None where it has none in any of them.

    A resample in which the metric is not defined (NaN; ROC-AUC of rows with one label) is left out.
    """
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def resample(
    judged: Sequence[Judged], *, resamples: int = RESAMPLES, seed: int = SEED
) -> list[dict[str, NDArray[np.float64]]]:
    """Return the headline metrics of resampled rows, by name, each of shape `(resamples,)`.

    Several predictions of the same rows in the same order are resampled together: the same rows are drawn for all of
    them, so that values may be subtracted from each other.

    Args:
        judged: Predictions of the same rows.
        resamples: How often rows are drawn.
        seed: Of the draws.
    """
    (rows,) = {len(one.gold) for one in judged}
    counters = [_Counter(one) for one in judged]
    parts = [[counter.metrics(draws) for counter in counters] for draws in _draws(rows, resamples, seed)]
    return [
        {name: np.concatenate([part[number][name] for part in parts]) for name in parts[0][number]}
        for number in range(len(counters))
    ]


def _draws(rows: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Yield how often each row is drawn, in parts of shape `(rows, some resamples)`; each column adds up to `rows`."""
    random = np.random.default_rng(seed)
    size = max(1, CHUNK // rows)
    for first in range(0, resamples, size):
        count = min(size, resamples - first)
        # Resample by resample, so that the draws do not depend on the size of the parts.
        drawn = random.integers(rows, size=(count, rows))
        cells = drawn * count + np.arange(count)[:, None]
        yield np.bincount(cells.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


class _Counter:
    """Computes the headline metrics of weighted rows, as `compute_metrics` does of rows that count once."""

    def __init__(self, judged: Judged) -> None:
        rows, labels = len(judged.gold), len(judged.labels)
        self._labels = labels
        self._gold = judged.gold
        self._hits = _indicator(np.where(judged.gold == judged.predicted, judged.gold, labels), labels)
        self._predicted = _indicator(judged.predicted, labels)
        self._support = _indicator(judged.gold, labels)
        self._losses = own_losses(judged.gold, judged.probs) if judged.probs is not None else None
        self._curves: list[_Curve] = []
        if judged.probs is not None:
            curves = range(1, 2) if labels == 2 else range(labels)
            self._curves = [_Curve(judged.gold == label, judged.probs[:, label]) for label in curves]
        self._rows = rows

    def metrics(self, weights: Floats) -> dict[str, Floats]:
        """Return the metrics by name, each of shape `(resamples,)`, for weights of shape `(rows, resamples)`."""
        hits, predicted, support = self._hits @ weights, self._predicted @ weights, self._support @ weights
        precision, recall = _ratio(hits, predicted), _ratio(hits, support)
        f1 = _ratio(2 * hits, predicted + support)
        shown = slice(1, None) if self._labels == 2 else slice(None)
        found = {
            "accuracy": hits.sum(axis=0) / self._rows,
            "precision": precision[shown].mean(axis=0),
            "recall": recall[shown].mean(axis=0),
            "f1": f1[shown].mean(axis=0),
            "macro_f1": f1.mean(axis=0),
            "weighted_f1": (f1 * support).sum(axis=0) / self._rows,
        }
        if self._losses is not None:
            found["roc_auc"] = _mean_defined(np.stack([curve.areas(weights) for curve in self._curves]))
            found["log_loss"] = self._losses @ weights / self._rows
        return found


class _Curve:
    """The area under the ROC curve of one label against the rest, for weighted rows.

    It is the share of pairs, one row of the label and one of the rest, in which the first has the higher probability;
    a pair of equal ones counts half.
    """

    def __init__(self, own: NDArray[np.bool_], scores: Floats) -> None:
        self._order = np.argsort(scores, kind="stable")
        self._own = own[self._order, None]
        _, self._starts = np.unique(scores[self._order], return_index=True)

    def areas(self, weights: Floats) -> Floats:
        """Return the areas, shape `(resamples,)`; NaN where rows of either side have no weight."""
        weights = weights[self._order]
        own, rest = (
            np.add.reduceat(np.where(side, weights, 0), self._starts, axis=0) for side in (self._own, ~self._own)
        )
        below = rest.cumsum(axis=0) - rest / 2
        pairs = own.sum(axis=0) * rest.sum(axis=0)
        areas: Floats = np.divide((own * below).sum(axis=0), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
        return areas


def _indicator(classes: NDArray[np.int64], labels: int) -> Any:
    """Return the matrix, shape `(labels, rows)`, that adds up rows by their class; other classes count nowhere."""
    rows = np.flatnonzero(classes < labels)
    return csr_array((np.ones(len(rows)), (classes[rows], rows)), shape=(labels, len(classes)))


def _ratio(part: Floats, whole: Floats) -> Floats:
    """Return `part / whole`, 0 where nothing is there to divide by."""
    result: Floats = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    return result


def _mean_defined(areas: Floats) -> Floats:
    """Return the mean over labels that occur, shape `(resamples,)`; NaN where none does."""
    defined = ~np.isnan(areas)
    count = defined.sum(axis=0)
    total = np.where(defined, areas, 0).sum(axis=0)
    result: Floats = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return result
