"""Whether probabilities hold, and what answering only the surer rows gains."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_clf.evaluation.metrics import own_losses

# Of the expected calibration error; each holds as many rows as any other.
BINS = 15
# Points of a stored risk-coverage curve.
POINTS = 100

Floats = NDArray[np.floating[Any]]


def probability_figures(truth: NDArray[np.int64], probs: Floats) -> dict[str, float]:
    """Return expected calibration error (`ece`), Brier score (`brier`) and log-loss in nats (`log_loss`).

    Args:
        truth: Index of the gold label of each row.
        probs: Shape `(rows, labels)`.
    """
    return {
        "ece": expected_calibration_error(truth, probs),
        "brier": brier_score(truth, probs),
        "log_loss": float(own_losses(truth, probs).mean()),
    }


def expected_calibration_error(truth: NDArray[np.int64], probs: Floats, bins: int = BINS) -> float:
    """Return the mean gap between how sure the most probable label is and how often it is right.

    Rows are sorted by its probability and cut into bins of equal size, fewer where there are fewer rows.
    """
    confidence = probs.max(axis=1).astype(np.float64)
    right = probs.argmax(axis=1) == truth
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    gaps = [abs(confidence[part].mean() - right[part].mean()) * len(part) for part in parts]
    return float(sum(gaps) / len(order))


def brier_score(truth: NDArray[np.int64], probs: Floats) -> float:
    """Return the mean squared error of probabilities: of two labels of the second one, of more summed over labels."""
    wrong = probs.astype(np.float64).copy()
    wrong[np.arange(len(truth)), truth] -= 1
    summed = (wrong**2).sum(axis=1).mean()
    return float(summed / 2 if probs.shape[1] == 2 else summed)


def risk_coverage(confidence: Floats, right: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the share of wrong answers (`risk`) where only the surest share of rows (`coverage`) is answered.

    Rows that are equally sure are answered together. `area` is the mean risk over all coverages.

    Args:
        confidence: Probability of each row's decision.
        right: Whether it is right.
    """
    order = np.argsort(-confidence, kind="stable")
    values = confidence[order]
    last = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)
    counts = last + 1
    risks = np.cumsum(~right[order])[last] / counts
    area = float((risks * np.diff(counts, prepend=0)).sum() / len(values))
    shown = np.unique(np.linspace(0, len(last) - 1, min(POINTS, len(last))).round().astype(int))
    return {
        "coverage": (counts[shown] / len(values)).tolist(),
        "risk": risks[shown].tolist(),
        "smallest_probability": values[last[shown]].astype(float).tolist(),
        "area": area,
    }
