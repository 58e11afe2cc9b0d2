"""One answer from the scores of several models: a weighted mean, or logistic regression on top of them.

Scores of all members stand in one array of shape `(members, rows, labels)`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax

Method = Literal["mean", "log-odds", "stacking"]
METHODS: tuple[str, ...] = get_args(Method)
# Below the resolution of fp32 next to 1, a probability says no more than "never": a member that is that sure and wrong
# would outweigh all others in a mean of logarithms.
FLOOR = float(np.log(np.finfo(np.float32).eps))
# Simulated, weights chosen by 50 rows are clearly better than equal ones where members differ in quality, and cost up
# to a tenth of the log-loss where they do not; fewer rows cost more.
MIN_ROWS = 50
FOLDS = 5
SEED = 42

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class Combination(Protocol):
    """Makes one score of those of all members."""

    def combine(self, scores: NDArray[np.floating[Any]]) -> Floats:
        """Return log-probabilities, shape `(rows, labels)`, of scores of shape `(members, rows, labels)`."""

    def facts(self) -> dict[str, Any]:
        """Return it as plain values, fit for JSON."""


@dataclass(frozen=True, slots=True)
class WeightedMean:
    """The weighted mean of probabilities, or of their logarithms, which for two labels is that of the log-odds."""

    method: Literal["mean", "log-odds"]
    weights: tuple[float, ...]
    """Of the members; they add up to 1."""

    def combine(self, scores: NDArray[np.floating[Any]]) -> Floats:
        """Return the mean, normalised."""
        logs = _log_probs(scores)
        weights = np.array(self.weights)
        if self.method == "mean":
            return np.log(np.tensordot(weights, np.exp(logs), 1))
        found: Floats = log_softmax(np.tensordot(weights, logs, 1), axis=1)
        return found

    def facts(self) -> dict[str, Any]:
        """Return method and weights."""
        return {"method": self.method, "weights": list(self.weights)}


@dataclass(frozen=True, slots=True)
class Stacking:
    """Logistic regression on the members' log-probabilities, each less its mean over the labels."""

    coefficients: tuple[tuple[float, ...], ...]
    """Shape `(labels, members * labels)`."""
    intercepts: tuple[float, ...]
    """By label."""

    def combine(self, scores: NDArray[np.floating[Any]]) -> Floats:
        """Return the model's log-probabilities."""
        logits = _features(scores) @ np.array(self.coefficients).T + np.array(self.intercepts)
        found: Floats = log_softmax(logits, axis=1)
        return found

    def facts(self) -> dict[str, Any]:
        """Return coefficients and intercepts."""
        coefficients = [list(row) for row in self.coefficients]
        return {"method": "stacking", "coefficients": coefficients, "intercepts": list(self.intercepts)}


def combination_of(facts: dict[str, Any], members: int, labels: int) -> Combination:
    """Return what `facts()` told of.

    Raises:
        ValueError: It is no combination of so many members and labels; also LookupError and TypeError.
    """
    if facts["method"] == "stacking":
        coefficients = np.array(facts["coefficients"], dtype=np.float64)
        intercepts = np.array(facts["intercepts"], dtype=np.float64)
        _require(coefficients, (labels, members * labels))
        _require(intercepts, (labels,))
        return Stacking(tuple(map(tuple, coefficients.tolist())), tuple(intercepts.tolist()))
    if facts["method"] not in METHODS:
        raise ValueError(f"the method is {facts['method']!r}")
    weights = np.array(facts["weights"], dtype=np.float64)
    _require(weights, (members,))
    return WeightedMean(facts["method"], tuple(weights.tolist()))


def _require(values: Floats, shape: tuple[int, ...]) -> None:
    if values.shape != shape or not np.isfinite(values).all():
        raise ValueError(f"found {values.shape} numbers where {shape} belong")


@dataclass(frozen=True, slots=True)
class Chosen:
    """How the members are combined, and what that gives for rows on which it was not chosen."""

    combination: Combination
    held_out: Floats
    """Log-probabilities, shape `(rows, labels)`: each row by what was chosen without it."""
    too_few: str | None
    """Why nothing was chosen and all members weigh the same; None where it was."""


def choose(method: Method, scores: Floats, truth: Indices) -> Chosen:
    """Choose weights by the log-loss on labelled rows, and score each row by a choice made without it.

    Args:
        method: Where rows are too few for it, the mean with equal weights is taken; of log-odds in place of stacking.
        scores: Of these rows, shape `(members, rows, labels)`.
        truth: Index of the label of each row.
    """
    too_few = _too_few(method, truth, labels=scores.shape[2])
    if too_few is not None:
        combination = equal_weights(method, len(scores))
        return Chosen(combination, combination.combine(scores), too_few)
    fit = _FITS[method]
    held_out = np.empty(scores.shape[1:])
    for train, rest in _folds(truth):
        held_out[rest] = fit(scores[:, train], truth[train]).combine(scores[:, rest])
    return Chosen(fit(scores, truth), held_out, None)


def equal_weights(method: Method, members: int) -> WeightedMean:
    """Return the mean in which all members weigh the same."""
    return WeightedMean("mean" if method == "mean" else "log-odds", (1 / members,) * members)


def _too_few(method: Method, truth: Indices, *, labels: int) -> str | None:
    """Return why rows do not suffice to choose by, None where they do."""
    if len(truth) < MIN_ROWS:
        return f"{len(truth):,} labelled validation rows are too few to choose by, at least {MIN_ROWS} are needed"
    rarest = int(np.bincount(truth, minlength=labels).min())
    if method == "stacking" and rarest < FOLDS:
        return f"stacking needs at least {FOLDS} validation rows of every label, and one has {rarest}"
    return None


def _folds(truth: Indices) -> Sequence[tuple[Indices, Indices]]:
    from sklearn.model_selection import StratifiedKFold

    with warnings.catch_warnings():
        # Where a label is rare, some folds go without it.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        return list(StratifiedKFold(FOLDS, shuffle=True, random_state=SEED).split(truth, truth))


def _fit_mean(scores: Floats, truth: Indices) -> WeightedMean:
    """Return the weights with the least log-loss of the mean probability."""
    own = np.exp(_log_probs(scores))[:, np.arange(len(truth)), truth]

    def loss(weights: Floats) -> tuple[float, Floats]:
        mixed = weights @ own
        return float(-np.log(mixed).mean()), -(own / mixed).mean(axis=1)

    return WeightedMean("mean", _least(loss, len(scores)))


def _fit_log_odds(scores: Floats, truth: Indices) -> WeightedMean:
    """Return the weights with the least log-loss of the mean logarithm."""
    logs = _log_probs(scores)
    own = logs[:, np.arange(len(truth)), truth]

    def loss(weights: Floats) -> tuple[float, Floats]:
        mixed = np.tensordot(weights, logs, 1)
        value = (logsumexp(mixed, axis=1) - weights @ own).mean()
        return float(value), ((softmax(mixed, axis=1) * logs).sum(axis=2) - own).mean(axis=1)

    return WeightedMean("log-odds", _least(loss, len(scores)))


def _least(loss: Callable[[Floats], tuple[float, Floats]], members: int) -> tuple[float, ...]:
    """Return the weights, none below 0 and 1 together, at which a convex loss is least; it returns its gradient too."""
    start = np.full(members, 1 / members)
    one = {"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": np.ones_like}
    found = minimize(loss, start, jac=True, method="SLSQP", bounds=[(0, 1)] * members, constraints=[one]).x
    # What is left of a member that counts for nothing is rounding.
    weights = np.where(found < 1e-6, 0, found)
    return tuple((weights / weights.sum()).tolist())


def _fit_stacking(scores: Floats, truth: Indices) -> Stacking:
    """Return logistic regression, with the usual L2 penalty."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=10_000).fit(_features(scores), truth)
    coefficients, intercepts = model.coef_, model.intercept_
    if len(coefficients) == 1:
        # Of two labels there is one row: for the second, against the first.
        coefficients = np.vstack([np.zeros_like(coefficients), coefficients])
        intercepts = np.append(0.0, intercepts)
    return Stacking(tuple(map(tuple, coefficients.tolist())), tuple(intercepts.tolist()))


_FITS: dict[str, Callable[[Floats, Indices], Combination]] = {
    "mean": _fit_mean,
    "log-odds": _fit_log_odds,
    "stacking": _fit_stacking,
}


def _log_probs(scores: NDArray[np.floating[Any]]) -> Floats:
    """Return normalised log-probabilities, none so low that it means never."""
    found: Floats = np.maximum(log_softmax(scores.astype(np.float64), axis=2), FLOOR)
    return found


def _features(scores: NDArray[np.floating[Any]]) -> Floats:
    """Return what logistic regression reads of each row, shape `(rows, members * labels)`."""
    logs = _log_probs(scores)
    centred = logs - logs.mean(axis=2, keepdims=True)
    found: Floats = centred.transpose(1, 0, 2).reshape(scores.shape[1], -1)
    return found
