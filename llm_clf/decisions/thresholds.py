"""Thresholds and offsets that serve an objective best on some rows; abstention by a target error; label sets."""

from dataclasses import dataclass

import numpy as np

from llm_clf.decisions.decide import Floats as Probs
from llm_clf.decisions.folds import Floats, Indices
from llm_clf.decisions.rules import Offsets, Threshold, logs_of

# Passes over the labels in the search for offsets; it ends sooner where one changes nothing.
PASSES = 20


@dataclass(frozen=True, slots=True)
class _Cuts:
    """What each threshold between two neighbouring probabilities gives, the highest threshold first."""

    thresholds: Floats
    hits: Floats
    """Rows of the second label above it, weighted."""
    taken: Floats
    """Rows above it, weighted."""
    positives: float
    """Rows of the second label, weighted."""

    @property
    def precision(self) -> Floats:
        return np.divide(self.hits, self.taken, out=np.zeros_like(self.hits), where=self.taken > 0)

    @property
    def recall(self) -> Floats:
        return self.hits / max(self.positives, np.finfo(float).tiny)

    @property
    def f1(self) -> Floats:
        return 2 * self.hits / np.maximum(self.taken + self.positives, np.finfo(float).tiny)


def _cuts(probs: Probs, truth: Indices, weights: Floats) -> _Cuts:
    second = probs[:, 1].astype(np.float64)
    order = np.argsort(-second, kind="stable")
    values = second[order]
    last = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)
    hits = np.cumsum(np.where(truth[order] == 1, weights[order], 0))[last]
    taken = np.cumsum(weights[order])[last]
    # Half way to the next lower probability, so that rounding decides nothing.
    below = np.append(values[last[1:]], 0.0)
    return _Cuts((values[last] + below) / 2, hits, taken, float(weights[truth == 1].sum()))


def best_f1_threshold(probs: Probs, truth: Indices, weights: Floats) -> Threshold:
    """Return the threshold with the best F1 of the second label; of several the one nearest to one half.

    Args:
        probs: Of two labels, shape `(rows, 2)`.
        truth: Index of the label of each row.
        weights: Of the rows.
    """
    cuts = _cuts(probs, truth, weights)
    best = np.flatnonzero(np.isclose(cuts.f1, cuts.f1.max(), rtol=1e-12, atol=0))
    return Threshold(float(min(cuts.thresholds[best], key=lambda threshold: abs(threshold - 0.5))))


def precision_threshold(probs: Probs, truth: Indices, weights: Floats, target: float) -> tuple[Threshold, bool]:
    """Return the threshold with the most recall at a precision of the second label of at least `target`.

    Returns:
        The threshold, and whether the target is reached; where it is not, it is the most precise one.
    """
    cuts = _cuts(probs, truth, weights)
    reached = cuts.precision >= target
    if not reached.any():
        return Threshold(float(cuts.thresholds[cuts.precision.argmax()])), False
    return Threshold(float(cuts.thresholds[np.flatnonzero(reached)[-1]])), True


def recall_threshold(probs: Probs, truth: Indices, weights: Floats, target: float) -> Threshold:
    """Return the threshold with the best precision at a recall of the second label of at least `target`."""
    cuts = _cuts(probs, truth, weights)
    reached = np.flatnonzero(cuts.recall >= target - 1e-12)
    return Threshold(float(cuts.thresholds[reached[cuts.precision[reached].argmax()]]))


def best_macro_f1_offsets(probs: Probs, truth: Indices, weights: Floats) -> Offsets:
    """Return offsets by label that raise macro F1: one label after the other takes its best, until none gains.

    Args:
        probs: Shape `(rows, labels)`.
        truth: Index of the label of each row.
        weights: Of the rows.
    """
    logs, labels = logs_of(probs), probs.shape[1]
    offsets = np.zeros(labels)
    best = _macro_f1(logs.argmax(axis=1), truth, weights, labels)
    for _ in range(PASSES):
        before = best
        for label in range(labels):
            offset, value = _best_offset(logs + offsets, label, truth, weights)
            if value > best + 1e-9:
                offsets[label] += offset
                best = value
        if best == before:
            break
    return Offsets(tuple((offsets - offsets.mean()).tolist()))


def _best_offset(logits: Floats, label: int, truth: Indices, weights: Floats) -> tuple[float, float]:
    """Return what to add to one label's column, and the macro F1 that this gives."""
    rows, labels = logits.shape
    others = logits.copy()
    others[:, label] = -np.inf
    rival = others.argmax(axis=1)
    margins = others.max(axis=1) - logits[:, label]
    order = np.argsort(margins, kind="stable")
    margins, rival, gold, weight = margins[order], rival[order], truth[order], weights[order]
    # With the label taken in the first n rows of this order, its rival in the others.
    own = np.zeros((rows + 1, labels))
    hit = np.zeros((rows + 1, labels))
    taken = np.zeros((rows, labels))
    taken[np.arange(rows), rival] = weight
    own[0], hit[0] = taken.sum(axis=0), np.where((rival == gold)[:, None], taken, 0).sum(axis=0)
    own[1:] = own[0] - taken.cumsum(axis=0)
    hit[1:] = hit[0] - np.where((rival == gold)[:, None], taken, 0).cumsum(axis=0)
    own[1:, label] += weight.cumsum()
    hit[1:, label] += np.where(gold == label, weight, 0).cumsum()
    support = _totals(truth, weights, labels)
    values = _f1(hit, own, support).mean(axis=1)
    # Rows of the same margin go over together.
    allowed = np.append(True, np.append(np.diff(margins) > 0, True))
    place = int(np.where(allowed, values, -1).argmax())
    if place == 0:
        return float(margins[0] - 1), float(values[0])
    if place == rows:
        return float(margins[-1] + 1), float(values[-1])
    return float((margins[place - 1] + margins[place]) / 2), float(values[place])


def _macro_f1(choices: Indices, truth: Indices, weights: Floats, labels: int) -> float:
    own = _totals(choices, weights, labels)
    support = _totals(truth, weights, labels)
    hit = _totals(truth, np.where(choices == truth, weights, 0), labels)
    return float(_f1(hit, own, support).mean())


def _totals(classes: Indices, weights: Floats, labels: int) -> Floats:
    """Return the weight of the rows of each class."""
    return np.bincount(classes, weights=weights, minlength=labels).astype(np.float64)


def _f1(hit: Floats, own: Floats, support: Floats) -> Floats:
    # What sums leave of nothing is rounding.
    whole = np.where(own + support < 1e-9, np.inf, own + support)
    return 2 * hit / whole


def confidence_for_error(
    confidence: Floats, right: np.ndarray, weights: Floats, target: float
) -> tuple[float, float, float]:
    """Return the smallest confidence to answer with so that at most `target` of the answers are wrong.

    Of all that keep the target it is the one that answers most. Where none does, nothing is answered.

    Args:
        confidence: Probability of each row's decision.
        right: Whether the decision is right.
        weights: Of the rows.
        target: Largest share of wrong answers.

    Returns:
        The confidence, the share of rows answered with it, and the share of those that is wrong.
    """
    order = np.argsort(-confidence, kind="stable")
    values = confidence[order]
    last = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)
    answered = np.cumsum(weights[order])[last]
    wrong = np.cumsum(np.where(right[order], 0, weights[order]))[last]
    kept = np.flatnonzero(wrong <= target * answered + 1e-12)
    if not len(kept):
        # Above every probability.
        return 2.0, 0.0, 0.0
    place = kept[-1]
    below = values[last[place] + 1] if last[place] + 1 < len(values) else 0.0
    return (
        float((values[last[place]] + below) / 2),
        float(answered[place] / answered[-1]),
        float(wrong[place] / answered[place]),
    )


def conformal_probability(probs: Probs, truth: Indices, coverage: float) -> float:
    """Return the probability from which on a label belongs to a row's set: split conformal prediction.

    A set holds the gold label of a new row with a probability of at least `coverage`, whatever the model, if the row
    comes from where these came from and these served for nothing else. A row's score is 1 - the probability of its gold
    label (LAC, [Sadinle et al. 2019](https://arxiv.org/abs/1609.00451)); the bound is the score at the place
    ceil((rows + 1) * coverage), from the smallest on. What is returned lies half way below it to the next probability
    of any label, so that rounding takes no label out of a set.

    Args:
        probs: Shape `(rows, labels)`.
        truth: Index of the label of each row.
        coverage: Between 0 and 1.

    Returns:
        The probability; 0, so that every label belongs to it, where rows are too few.
    """
    rank = int(np.ceil((len(truth) + 1) * coverage - 1e-9))
    if rank > len(truth):
        return 0.0
    own = np.sort(probs[np.arange(len(truth)), truth].astype(np.float64))
    bound = own[len(truth) - rank]
    return float(bound + probs[probs < bound].max(initial=0.0)) / 2
