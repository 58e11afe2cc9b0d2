"""The numbers behind the report's plots: of rows that have a gold label, and mostly of their probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llm_clf.evaluation.intervals import Floats, Interval, Judged
from llm_clf.evaluation.reliability import expected_calibration_error

BINS = 10
HISTOGRAM_BINS = 20
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve of one label against the rest."""

    label: str
    x: Floats
    y: Floats
    area: float
    """Under the ROC curve, or average precision."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows whose probability lies in one bin."""

    low: float
    high: float
    rows: int
    mean: float
    """Of the probabilities."""
    share: float
    """Of rows that turned out as the probability is about."""
    interval: Interval
    """Of the share, by Wilson."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """How often what has a probability happens."""

    of: str
    """What the probability is of."""
    bins: list[Bin]
    """Those with rows in them."""
    error: float
    """Expected calibration error, as metrics.json has it: of the most probable label, in bins of as many rows each."""


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """The share of errors among the rows that are answered, when only the surest are."""

    coverage: Floats
    """Share of rows answered, rising to 1."""
    risk: Floats

    def coverage_at(self, risk: float) -> float:
        """Return the largest share of rows that can be answered with at most this share of errors, 0 where none can."""
        within = self.coverage[self.risk <= risk]
        return float(within.max()) if len(within) else 0.0


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of a probability for the rows of each gold label."""

    of: str
    edges: Floats
    counts: dict[str, NDArray[np.int64]]
    """By gold label that occurs, in the task's order."""


def occurring(judged: Judged) -> list[int]:
    """Return the indices of the labels that some rows have, and others not."""
    counts = np.bincount(judged.gold, minlength=len(judged.labels))
    return [label for label, count in enumerate(counts) if 0 < count < len(judged.gold)]


def drawn_labels(judged: Judged, most: int) -> list[int]:
    """Return the labels that get a curve: the second of two, else the most frequent ones, in the task's order."""
    labels = occurring(judged)
    if len(judged.labels) == 2:
        return [label for label in labels if label == 1]
    counts = np.bincount(judged.gold, minlength=len(judged.labels))
    return sorted(sorted(labels, key=lambda label: (-counts[label], label))[:most])


def roc_curves(judged: Judged, labels: Sequence[int]) -> list[Curve]:
    """Return false against true positive rate of each label against the rest; each must occur and not alone."""
    from sklearn.metrics import auc, roc_curve

    curves = []
    for label in labels:
        false, true, _ = roc_curve(judged.gold == label, _probs(judged)[:, label])
        curves.append(Curve(judged.labels[label], false, true, float(auc(false, true))))
    return curves


def pr_curves(judged: Judged, labels: Sequence[int]) -> list[Curve]:
    """Return recall against precision of each label against the rest; each must occur and not alone."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    curves = []
    for label in labels:
        own, probs = judged.gold == label, _probs(judged)[:, label]
        precision, recall, _ = precision_recall_curve(own, probs)
        curves.append(Curve(judged.labels[label], recall, precision, float(average_precision_score(own, probs))))
    return curves


def reliability(judged: Judged) -> Reliability:
    """Return bins of equal width: of the second label's probability where there are two labels, else of the largest."""
    probs = _probs(judged)
    if len(judged.labels) == 2:
        of, values, happened = f"label {judged.labels[1]}", probs[:, 1], judged.gold == 1
    else:
        of, values, happened = "the most probable label", probs.max(axis=1), judged.gold == probs.argmax(axis=1)
    # A probability of exactly 1 belongs to the last bin.
    places = np.minimum((values * BINS).astype(int), BINS - 1)
    bins = []
    for place in np.unique(places):
        own = places == place
        rows, hits = int(own.sum()), int(happened[own].sum())
        bins.append(
            Bin(place / BINS, (place + 1) / BINS, rows, float(values[own].mean()), hits / rows, wilson(hits, rows))
        )
    return Reliability(of, bins, expected_calibration_error(judged.gold, probs))


def wilson(hits: int, rows: int) -> Interval:
    """Return Wilson's interval of a share; unlike a resampled one it has a width where all rows or none are hits."""
    from scipy.stats import binomtest

    found = binomtest(hits, rows).proportion_ci(LEVEL, method="wilson")
    return Interval(float(found.low), float(found.high))


def answered(judged: Judged) -> tuple[NDArray[np.int64], Floats]:
    """Return the label of every row and its probability; a row without a label gets its most probable one."""
    probs = _probs(judged)
    label = np.where(judged.predicted < len(judged.labels), judged.predicted, probs.argmax(axis=1))
    return label, probs[np.arange(len(label)), label]


def risk_coverage(judged: Judged) -> RiskCoverage:
    """Return the share of errors when the rows with the most probable labels are answered; equal ones come together."""
    label, sure = answered(judged)
    order = np.argsort(-sure, kind="stable")
    errors = np.cumsum(label[order] != judged.gold[order])
    last = np.flatnonzero(np.append(np.diff(sure[order]) != 0, True))
    return RiskCoverage((last + 1) / len(sure), errors[last] / (last + 1))


def histogram(judged: Judged, labels: Sequence[int]) -> Histogram:
    """Return counts of the second label's probability where there are two labels, else of the gold label's own."""
    probs = _probs(judged)
    two = len(judged.labels) == 2
    values = probs[:, 1] if two else probs[np.arange(len(judged.gold)), judged.gold]
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    return Histogram(
        f"label {judged.labels[1]}" if two else "the gold label",
        edges,
        {judged.labels[label]: np.histogram(values[judged.gold == label], edges)[0] for label in labels},
    )


def _probs(judged: Judged) -> Floats:
    assert judged.probs is not None
    return judged.probs
