"""Decisions fitted on validation rows: calibration, the rule for the label, when to abstain; also cross-fitted."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_clf.config import CostMatrix, CoverageTarget, DecideSettings, ErrorTarget, PrecisionTarget, RecallTarget
from llm_clf.decisions.calibration import Calibration, fit_calibration
from llm_clf.decisions.decide import Floats as Probs
from llm_clf.decisions.decisions import Decided, Decisions
from llm_clf.decisions.folds import FOLDS, Floats, Indices, folds_of
from llm_clf.decisions.rules import LeastCost, MostProbable, Rule, Threshold
from llm_clf.decisions.thresholds import (
    best_f1_threshold,
    best_macro_f1_offsets,
    confidence_for_error,
    conformal_probability,
    precision_threshold,
    recall_threshold,
)
from llm_clf.errors import ConfigError

# Fewer labelled rows fit nothing that anybody should rely on.
MIN_ROWS = 20


def require_decidable(settings: DecideSettings, labels: Sequence[str], gold: Sequence[str | None]) -> None:
    """Refuse settings that do not fit the task or its validation rows, before any model is loaded.

    Args:
        settings: What is asked for.
        labels: In the task's order.
        gold: Labels of the validation rows, None where a row has none.

    Raises:
        ConfigError: All faults at once.
    """
    faults = [*_task_faults(settings, labels), *_row_faults(settings, labels, gold)]
    if faults:
        raise ConfigError("\n".join(faults))


def _task_faults(settings: DecideSettings, labels: Sequence[str]) -> list[str]:
    faults = []
    two = f"chooses between two labels, and the task has {len(labels)}: {', '.join(labels)}."
    if isinstance(settings.objective, PrecisionTarget | RecallTarget) and len(labels) != 2:
        faults.append(f"decide.objective: a precision or recall to reach {two} f1 gives each label an offset.")
    if settings.threshold is not None and len(labels) != 2:
        faults.append(f"decide.threshold {settings.threshold:g}: {two} Leave it out.")
    if isinstance(settings.objective, CostMatrix):
        faults += _cost_faults(settings.objective.costs, labels)
    if settings.priors is not None:
        faults += _prior_faults(settings.priors, labels)
    return faults


def _cost_faults(costs: Mapping[str, Mapping[str, float]], labels: Sequence[str]) -> list[str]:
    named = {*costs, *(label for row in costs.values() for label in row)}
    unknown = sorted(named - {*labels})
    if unknown:
        return [f"decide.objective costs: {unknown[0]!r} is no label; the labels are {', '.join(labels)}."]
    missing = [
        (gold, other) for gold in labels for other in labels if gold != other and other not in costs.get(gold, {})
    ]
    if missing:
        gold, other = missing[0]
        return [
            f"decide.objective costs: nothing says what it costs to call a {gold!r} a {other!r}. Give each mistake its "
            f"cost, {len(labels) * (len(labels) - 1)} in all; what is right costs 0 unless it is given."
        ]
    return []


def _prior_faults(priors: Mapping[str, float], labels: Sequence[str]) -> list[str]:
    unknown = sorted(priors.keys() - {*labels})
    if unknown:
        return [f"decide.priors: {unknown[0]!r} is no label; the labels are {', '.join(labels)}."]
    total, whole = sum(priors.values()), len(priors) == len(labels)
    if (whole and abs(total - 1) > 1e-3) or (not whole and total >= 1):
        rest = "" if whole else " and less, as the other labels have a share too"
        return [f"decide.priors: the shares add up to {total:g}; expected 1{rest}."]
    return []


def _fitted_parts(settings: DecideSettings) -> dict[str, bool]:
    """Return which settings are such that something is fitted for them on validation rows."""
    return {
        f"decide.calibration {settings.calibration}": settings.calibration in ("temperature", "vector"),
        "decide.objective": settings.objective is not None and not isinstance(settings.objective, CostMatrix),
        "decide.abstain": isinstance(settings.abstain, ErrorTarget | CoverageTarget),
    }


def _row_faults(settings: DecideSettings, labels: Sequence[str], gold: Sequence[str | None]) -> list[str]:
    """Return what the validation rows are too few for, of what was asked for by name."""
    counts = Counter(label for label in gold if label is not None)
    rows, faults = sum(counts.values()), []
    advice = "Build the prompts with a larger share for validation, or leave it out."
    for name in [name for name, asked in _fitted_parts(settings).items() if asked]:
        if rows < MIN_ROWS or len(counts) < 2:
            faults.append(
                f"{name}: is fitted on validation rows, and {rows:,} of them have a label, of {len(counts)} kinds; at "
                f"least {MIN_ROWS} of two are needed. {advice}"
            )
    rarest = min(labels, key=lambda label: counts[label])
    if settings.calibration == "vector" and counts[rarest] < FOLDS and not faults:
        faults.append(
            f"decide.calibration vector: fits numbers for each label, and {counts[rarest]} validation rows have "
            f"{rarest!r}; at least {FOLDS} are needed. Take temperature."
        )
    if isinstance(settings.abstain, CoverageTarget) and not faults:
        apart = rows * (FOLDS - 1) // FOLDS // 2
        needed = int(np.ceil(1 / (1 - settings.abstain.coverage) - 1e-9)) - 1
        if apart < needed:
            faults.append(
                f"decide.abstain coverage {settings.abstain.coverage:g}: takes {needed:,} validation rows for itself "
                f"in each of {FOLDS} folds, and {apart:,} are left of {rows:,}. {advice}"
            )
    return faults


def fit_decisions(
    scores: NDArray[np.floating[Any]],
    gold: Sequence[str | None],
    labels: Sequence[str],
    settings: DecideSettings,
    *,
    seed: int,
    trained: Mapping[str, float] | None = None,
) -> Decisions:
    """Fit on validation rows how scores become probabilities and labels.

    Args:
        scores: Log-probabilities in nats, shape `(rows, labels)`.
        gold: Label of each row, None where it has none.
        labels: In the task's order.
        settings: What is asked for.
        seed: Of folds, and of the rows that label sets take for themselves.
        trained: Share of each label in training, as the loss weighed it; None: as in these rows.

    Raises:
        ConfigError: The settings do not fit the labels or the rows.
    """
    require_decidable(settings, labels, gold)
    rows, truth = _labelled(gold, labels)
    return _fit(scores[rows], truth, labels, settings, seed, trained)


def cross_fit(
    decisions: Decisions,
    scores: NDArray[np.floating[Any]],
    gold: Sequence[str | None],
    settings: DecideSettings,
    *,
    seed: int,
    trained: Mapping[str, float] | None = None,
) -> tuple[Decided, Probs]:
    """Return each row as decided by what was fitted without it, and its calibrated probabilities before any shift.

    Which way to calibrate is chosen once, on all rows; its numbers, thresholds and the rest are fitted in each fold.
    Rows without a label are decided as predict decides them.

    Args:
        decisions: What `fit_decisions` gave for the same arguments, which are as there.
        scores: As there.
        gold: As there.
        settings: As there.
        seed: As there.
        trained: As there.
    """
    rows, truth = _labelled(gold, decisions.labels)
    settings = settings.model_copy(update={"calibration": decisions.calibration.method})
    whole = decisions.apply(scores)
    probs, choices, answered = whole.probs.copy(), whole.choices.copy(), whole.answered.copy()
    sets = whole.sets.copy() if whole.sets is not None else None
    calibrated = decisions.calibrated(scores)
    for train, rest in folds_of(truth, seed):
        fold = _fit(scores[rows[train]], truth[train], decisions.labels, settings, seed, trained)
        places = rows[rest]
        found = fold.apply(scores[places])
        probs[places], choices[places], answered[places] = found.probs, found.choices, found.answered
        calibrated[places] = fold.calibrated(scores[places])
        if sets is not None and found.sets is not None:
            sets[places] = found.sets
    return Decided(probs, choices, answered, sets), calibrated


def _labelled(gold: Sequence[str | None], labels: Sequence[str]) -> tuple[Indices, Indices]:
    """Return the rows that have a label, and its index."""
    place = {label: number for number, label in enumerate(labels)}
    rows = [row for row, label in enumerate(gold) if label]
    return np.array(rows, dtype=np.int64), np.array([place[gold[row] or ""] for row in rows], dtype=np.int64)


def _fit(
    scores: NDArray[np.floating[Any]],
    truth: Indices,
    labels: Sequence[str],
    settings: DecideSettings,
    seed: int,
    trained: Mapping[str, float] | None,
) -> Decisions:
    """Fit on rows that all have a label."""
    apart = np.empty(0, dtype=np.int64)
    rows = np.arange(len(truth))
    if isinstance(settings.abstain, CoverageTarget):
        mixed = np.random.default_rng(seed).permutation(len(truth))
        apart, rows = np.sort(mixed[: len(truth) // 2]), np.sort(mixed[len(truth) // 2 :])
    calibration = fit_calibration(scores[rows].astype(np.float64), truth[rows], settings.calibration, seed)
    shares = np.bincount(truth[rows], minlength=len(labels)) / max(len(rows), 1)
    shift, deployed = _shift(settings.priors, labels, calibration, shares, trained)
    found = Decisions(tuple(labels), calibration, shift=shift)
    # Rows stand for those where the run is used.
    weights = np.ones(len(rows)) if deployed is None else (deployed / np.maximum(shares, 1e-9))[truth[rows]]
    probs = found.apply(scores[rows]).probs
    rule, notes = _fit_rule(settings, labels, probs, truth[rows], weights)
    smallest, in_set = None, None
    if isinstance(settings.abstain, float):
        smallest = settings.abstain
    elif isinstance(settings.abstain, ErrorTarget):
        smallest, note = _fit_error(settings.abstain.error, rule, probs, truth[rows], weights)
        notes.append(note)
        if deployed is not None:
            notes.append("Note: that share counts rows by decide.priors; the numbers of rows and the bound do not.")
    elif isinstance(settings.abstain, CoverageTarget):
        in_set = conformal_probability(found.apply(scores[apart]).probs, truth[apart], settings.abstain.coverage)
        notes.append(
            f"Label sets: labels of probability {in_set:.4g} and more; a set holds the right label of "
            f"{settings.abstain.coverage:.4g} of rows like the validation rows, by {len(apart):,} of them that no "
            "calibration has seen."
        )
    asked = [name for name, wanted in _fitted_parts(settings).items() if wanted]
    chosen = asked or calibration.method != "none"
    counts = (len(rows), len(apart)) if chosen else (0, 0)
    return Decisions(tuple(labels), calibration, rule, shift, smallest, in_set, counts, tuple(notes))


def _shift(
    priors: Mapping[str, float] | None,
    labels: Sequence[str],
    calibration: Calibration,
    shares: Floats,
    trained: Mapping[str, float] | None,
) -> tuple[tuple[float, ...] | None, Floats | None]:
    """Return what is added to log-probabilities where labels have other shares than in training, and those shares.

    Probabilities are multiplied by the new share over the former and normalised
    ([Saerens et al. 2002](https://doi.org/10.1162/089976602753284446)). Biases that were fitted on validation rows have
    replaced the shares of training by those of validation.
    """
    if priors is None:
        return None, None
    former = (
        shares
        if trained is None or calibration.method == "vector"
        else np.array([trained.get(label, 0.0) for label in labels])
    )
    if not former.sum():
        raise ConfigError(
            "decide.priors: neither training nor validation rows tell how frequent the labels were, so nothing can be "
            "corrected. Leave it out."
        )
    # A label without a row is taken for one that had half of one among a thousand.
    former = np.maximum(former / former.sum(), 5e-4)
    left = 1 - sum(priors.values())
    others = sum(former[number] for number, label in enumerate(labels) if label not in priors)
    deployed = np.array(
        [priors.get(label, left * former[number] / max(others, 1e-9)) for number, label in enumerate(labels)]
    )
    return tuple(np.log(deployed / former).tolist()), deployed


def _fit_rule(
    settings: DecideSettings, labels: Sequence[str], probs: Probs, truth: Indices, weights: Floats
) -> tuple[Rule, list[str]]:
    """Return the rule that serves the objective best on these rows, and what a person should know of it."""
    objective = settings.objective
    if settings.threshold is not None:
        return Threshold(settings.threshold), []
    if objective is None:
        return MostProbable(), []
    if isinstance(objective, CostMatrix):
        costs = tuple(tuple(objective.costs.get(gold, {}).get(other, 0.0) for other in labels) for gold in labels)
        return LeastCost(costs), []
    if isinstance(objective, PrecisionTarget):
        rule, reached = precision_threshold(probs, truth, weights, objective.precision)
        note = f"Note: no threshold reaches precision {objective.precision:g}; the most precise one is taken."
        return rule, [] if reached else [note]
    if isinstance(objective, RecallTarget):
        return recall_threshold(probs, truth, weights, objective.recall), []
    if len(labels) == 2:
        return best_f1_threshold(probs, truth, weights), []
    return best_macro_f1_offsets(probs, truth, weights), []


def _fit_error(target: float, rule: Rule, probs: Probs, truth: Indices, weights: Floats) -> tuple[float, str]:
    """Return the smallest probability that is answered with, and what it is worth."""
    from scipy.stats import beta

    choices = rule.choose(probs)
    confidence = probs[np.arange(len(truth)), choices].astype(np.float64)
    right = choices == truth
    smallest, coverage, error = confidence_for_error(confidence, right, weights, target)
    if not coverage:
        return smallest, f"Note: no probability keeps the share of wrong answers at {target:g}: nothing is answered."
    answered = confidence >= smallest
    wrong = int((answered & ~right).sum())
    # Clopper and Pearson's bound, one-sided.
    bound = float(beta.ppf(0.95, wrong + 1, max(int(answered.sum()) - wrong, 1)))
    return smallest, (
        f"Abstention: below the probability {smallest:.4g}, which answers {coverage:.1%} of the rows by which it was "
        f"chosen, with {error:.1%} wrong. {wrong:,} wrong among {int(answered.sum()):,} answers of other rows "
        f"would mean, with confidence 95 %, at most {bound:.1%}."
    )
