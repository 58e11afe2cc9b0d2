"""Probabilities that mean what they say: scores are rescaled so that the log-loss on validation rows is least.

Temperature scaling divides all log-probabilities by one number ([Guo et al. 2017](https://arxiv.org/abs/1706.04599)).
Vector scaling has a factor and a bias for each label; of two labels that is beta calibration
([Kull et al. 2017](https://proceedings.mlr.press/v54/kull17a.html)).
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, softmax

from llm_clf.decisions.folds import Floats, Indices, folds_of

Method = Literal["none", "temperature", "vector"]

# Fewer rows say little of how sure a model may be: of 100 rows whose probabilities hold, the expected calibration error
# is up to 0.05 by chance alone.
MIN_ROWS = 100
# Rows outside the most frequent label, and rows of each label before labels get numbers of their own.
MIN_OTHERS = 10
# A factor beyond these, or a bias, only says that rows were too few.
FACTORS, BIAS = (0.05, 20.0), 20.0
# No log-probability counts as lower: the smallest fp32 number.
FLOOR = float(np.log(np.finfo(np.float32).tiny))


@dataclass(frozen=True, slots=True)
class Calibration:
    """Factors and biases on log-probabilities."""

    method: Method
    factors: tuple[float, ...]
    """By label; of temperature scaling one over the temperature, for all."""
    biases: tuple[float, ...]
    """By label."""
    reason: str
    """Why this method, for people."""

    @classmethod
    def off(cls, labels: int, reason: str) -> "Calibration":
        """Return one that leaves probabilities as they are."""
        return cls("none", (1.0,) * labels, (0.0,) * labels, reason)

    def log_probs(self, scores: NDArray[np.floating[Any]]) -> Floats:
        """Return calibrated log-probabilities, shape `(rows, labels)`, for log-probabilities of that shape."""
        found: Floats = log_softmax(log_probs(scores) * np.array(self.factors) + np.array(self.biases), axis=1)
        return found

    def text(self) -> str:
        """Return in a few words what it does."""
        if self.method == "none":
            return f"off: {self.reason}"
        if self.method == "temperature":
            return f"temperature {1 / self.factors[0]:.3g} ({self.reason})"
        return f"a factor and a bias for each label ({self.reason})"


def log_probs(scores: NDArray[np.floating[Any]]) -> Floats:
    """Return normalised log-probabilities, none below that of the smallest fp32 number."""
    found: Floats = np.maximum(log_softmax(scores.astype(np.float64), axis=1), FLOOR)
    return found


def why_too_few(truth: Indices, labels: int) -> str | None:
    """Return why rows do not suffice to calibrate by, None where they do."""
    if len(truth) < MIN_ROWS:
        return (
            f"{len(truth):,} labelled validation rows are too few, at least {MIN_ROWS} are needed: fewer look "
            "badly calibrated by chance alone"
        )
    others = len(truth) - int(np.bincount(truth, minlength=labels).max())
    if others < MIN_OTHERS:
        return f"only {others} validation rows are of another label than the most frequent one, {MIN_OTHERS} are needed"
    return None


def fit_calibration(scores: Floats, truth: Indices, method: str, seed: int) -> Calibration:
    """Fit a method; `auto` takes the one that predicts rows best on which it was not fitted.

    Vector scaling has many numbers to fit, so it must beat temperature scaling by more than the standard error of the
    difference.

    Args:
        scores: Log-probabilities, shape `(rows, labels)`.
        truth: Index of the label of each row.
        method: `auto`, or a Method.
        seed: Of the folds.
    """
    labels = scores.shape[1]
    if method != "auto":
        return _fit(scores, truth, method, f"decide.calibration is {method}")
    reason = why_too_few(truth, labels)
    if reason is not None:
        return Calibration.off(labels, reason)
    losses = {name: _held_out_losses(scores, truth, name, seed) for name in ("none", "temperature")}
    chosen = min(losses, key=lambda name: float(losses[name].mean()))
    if np.bincount(truth, minlength=labels).min() >= MIN_OTHERS:
        losses["vector"] = _held_out_losses(scores, truth, "vector", seed)
        gain = losses[chosen] - losses["vector"]
        if gain.mean() > gain.std(ddof=1) / np.sqrt(len(gain)):
            chosen = "vector"
    found = ", ".join(f"{name} {values.mean():.4f}" for name, values in losses.items())
    return _fit(scores, truth, chosen, f"cross-fitted log-loss: {found}")


def _fit(scores: Floats, truth: Indices, method: str, reason: str) -> Calibration:
    labels = scores.shape[1]
    if method == "none":
        return Calibration.off(labels, reason)
    logs = log_probs(scores)
    factor = _best_factor(logs, truth)
    if method == "temperature":
        return Calibration("temperature", (factor,) * labels, (0.0,) * labels, reason)
    factors, biases = _best_vector(logs, truth, factor)
    return Calibration("vector", factors, biases, reason)


def _best_factor(logs: Floats, truth: Indices) -> float:
    """Return the factor for all labels with the least log-loss, which is convex in it."""

    def loss(factor: float) -> float:
        return _mean_loss(logs * factor, truth)

    return float(minimize_scalar(loss, bounds=FACTORS, method="bounded", options={"xatol": 1e-6}).x)


def _best_vector(logs: Floats, truth: Indices, start: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return factors and biases with the least log-loss, which is convex in them; biases sum up to 0."""
    rows, labels = logs.shape
    own = np.zeros_like(logs)
    own[np.arange(rows), truth] = 1

    def loss(values: Floats) -> tuple[float, Floats]:
        logits = logs * values[:labels] + values[labels:]
        wrong = (softmax(logits, axis=1) - own) / rows
        return _mean_loss(logits, truth), np.concatenate([(wrong * logs).sum(axis=0), wrong.sum(axis=0)])

    first = np.concatenate([np.full(labels, start), np.zeros(labels)])
    bounds = [FACTORS] * labels + [(-BIAS, BIAS)] * labels
    found = minimize(loss, first, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500}).x
    biases = found[labels:] - found[labels:].mean()
    return tuple(found[:labels].tolist()), tuple(biases.tolist())


def _mean_loss(logits: Floats, truth: Indices) -> float:
    return float(-log_softmax(logits, axis=1)[np.arange(len(truth)), truth].mean())


def _held_out_losses(scores: Floats, truth: Indices, method: str, seed: int) -> Floats:
    """Return the log-loss of each row in nats, by what was fitted without it."""
    found = np.empty(len(truth))
    for train, rest in folds_of(truth, seed):
        logs = _fit(scores[train], truth[train], method, "").log_probs(scores[rest])
        found[rest] = -logs[np.arange(len(rest)), truth[rest]]
    return found
