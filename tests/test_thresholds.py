"""Thresholds and offsets against every other there could be, abstention and label sets against cases by hand."""

import itertools

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.metrics import f1_score, precision_score, recall_score

from llm_clf.decisions.rules import LeastCost, MostProbable, Offsets, Threshold, rule_of
from llm_clf.decisions.thresholds import (
    best_f1_threshold,
    best_macro_f1_offsets,
    confidence_for_error,
    conformal_probability,
    precision_threshold,
    recall_threshold,
)


def rows_of(rows: int, labels: int, seed: int, *, shares: tuple[float, ...] | None = None):
    """Return probabilities, coarse so that many are level, and gold labels."""
    random = np.random.default_rng(seed)
    truth = random.choice(labels, size=rows, p=shares)
    logits = random.normal(0, 1, (rows, labels)) + 1.2 * np.eye(labels)[truth]
    probs = softmax(logits, axis=1).round(2) + 1e-3
    return (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32), truth


def every_threshold(probs: np.ndarray) -> list[float]:
    return [*np.unique(probs[:, 1].astype(np.float64)).tolist(), 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_has_a_better_f1(seed: int) -> None:
    probs, truth = rows_of(80, 2, seed, shares=(0.8, 0.2))
    rule = best_f1_threshold(probs, truth, np.ones(80))
    best = max(f1_score(truth, Threshold(one).choose(probs)) for one in every_threshold(probs))
    assert f1_score(truth, rule.choose(probs)) == pytest.approx(best)


def test_weights_count_as_rows_that_are_repeated() -> None:
    probs, truth = rows_of(60, 2, 3)
    weights = np.random.default_rng(0).integers(1, 4, 60)
    repeated = np.repeat(np.arange(60), weights)
    one = best_f1_threshold(probs, truth, weights.astype(float))
    assert one == best_f1_threshold(probs[repeated], truth[repeated], np.ones(len(repeated)))


@pytest.mark.parametrize("target", [0.5, 0.8, 0.9])
def test_precision_and_recall_targets_leave_the_most_of_the_other(target: float) -> None:
    probs, truth = rows_of(120, 2, 1, shares=(0.7, 0.3))
    choices = [Threshold(one).choose(probs) for one in every_threshold(probs)]
    pairs = [(precision_score(truth, c, zero_division=0), recall_score(truth, c)) for c in choices if c.any()]
    rule, reached = precision_threshold(probs, truth, np.ones(120), target)
    found = rule.choose(probs)
    assert reached and precision_score(truth, found) >= target
    assert recall_score(truth, found) == pytest.approx(max(r for p, r in pairs if p >= target))
    found = recall_threshold(probs, truth, np.ones(120), target).choose(probs)
    assert recall_score(truth, found) >= target
    assert precision_score(truth, found) == pytest.approx(max(p for p, r in pairs if r >= target - 1e-9))


def test_a_precision_that_nothing_reaches_is_told() -> None:
    probs = np.array([[0.1, 0.9], [0.2, 0.8], [0.6, 0.4]], dtype=np.float32)
    rule, reached = precision_threshold(probs, np.array([0, 1, 1]), np.ones(3), 0.9)
    assert not reached and rule.choose(probs).tolist() == [1, 1, 1]


@pytest.mark.parametrize("seed", range(2))
def test_offsets_reach_the_macro_f1_of_a_fine_grid(seed: int) -> None:
    probs, truth = rows_of(90, 3, seed, shares=(0.75, 0.17, 0.08))
    rule = best_macro_f1_offsets(probs, truth, np.ones(90))
    found = f1_score(truth, rule.choose(probs), average="macro")
    grid = np.linspace(-4, 4, 17)
    best = max(
        f1_score(truth, Offsets((0.0, one, two)).choose(probs), average="macro")
        for one, two in itertools.product(grid, grid)
    )
    assert found >= f1_score(truth, probs.argmax(axis=1), average="macro")
    # The search goes label by label, so another hill may be a little higher.
    assert found >= best - 0.02
    assert sum(rule.offsets) == pytest.approx(0, abs=1e-9)


def test_offsets_of_a_label_that_no_row_has() -> None:
    probs, truth = rows_of(50, 2, 0)
    wider = np.concatenate([probs * 0.9, np.full((50, 1), 0.1, dtype=np.float32)], axis=1)
    rule = best_macro_f1_offsets(wider, truth, np.ones(50))
    assert f1_score(truth, rule.choose(wider), labels=[0, 1, 2], average="macro", zero_division=0) >= f1_score(
        truth, wider.argmax(axis=1), labels=[0, 1, 2], average="macro", zero_division=0
    )


def test_least_cost_by_hand() -> None:
    # To miss label 1 costs 5: it is worth it from the probability 1/6 on.
    rule = LeastCost(((0.0, 1.0), (5.0, 0.0)))
    probs = np.array([[0.84, 0.16], [0.83, 0.17], [0.5, 0.5]], dtype=np.float32)
    assert rule.choose(probs).tolist() == [0, 1, 1]
    assert LeastCost(((0.0, 1.0), (1.0, 0.0))).choose(probs).tolist() == [0, 0, 0]


def test_a_threshold_belongs_to_the_second_label() -> None:
    probs = np.array([[0.5, 0.5], [0.75, 0.25]], dtype=np.float32)
    assert Threshold(0.5).choose(probs).tolist() == [1, 0] and Threshold(0.25).choose(probs).tolist() == [1, 1]


def test_rules_come_back_from_what_they_say() -> None:
    for rule, labels in (
        (MostProbable(), 3),
        (Threshold(0.1 + 0.2), 2),
        (Offsets((0.1, -0.2, 1 / 3)), 3),
        (LeastCost(((0.0, 1.5), (2.0, 0.0))), 2),
    ):
        assert rule_of(rule.facts(), labels) == rule
    for facts in ({"rule": "threshold", "threshold": 0.5}, {"rule": "offsets", "offsets": [1]}, {"rule": "?"}):
        with pytest.raises(ValueError, match="for 3 labels"):
            rule_of(facts, 3)


def test_abstention_by_a_target_error_answers_as_much_as_it_can() -> None:
    confidence = np.array([0.9, 0.8, 0.7, 0.7, 0.6])
    right = np.array([True, True, False, True, True])
    smallest, coverage, error = confidence_for_error(confidence, right, np.ones(5), 0.25)
    assert (smallest, coverage, error) == (pytest.approx(0.3), 1.0, pytest.approx(0.2))
    smallest, coverage, error = confidence_for_error(confidence, right, np.ones(5), 0.1)
    assert (smallest, coverage, error) == (pytest.approx(0.75), pytest.approx(0.4), 0.0)
    assert confidence_for_error(confidence, ~right, np.ones(5), 0.1) == (2.0, 0.0, 0.0)


def test_conformal_probability_by_hand() -> None:
    # Nine rows: ceil(10 * 0.9) = 9, the least probable gold label; ceil(10 * 0.8) = 8, the second least. Then half way
    # to the next lower probability: 1 - 0.72 below 0.3, and 0.3 below 0.4.
    own = np.array([0.95, 0.9, 0.85, 0.8, 0.72, 0.58, 0.5, 0.4, 0.3], dtype=np.float32)
    probs = np.stack([1 - own, own], axis=1)
    truth = np.ones(9, dtype=np.int64)
    assert conformal_probability(probs, truth, 0.9) == pytest.approx(0.29)
    assert conformal_probability(probs, truth, 0.8) == pytest.approx(0.35)
    assert conformal_probability(probs, truth, 0.95) == 0.0


def test_no_row_lies_on_a_threshold_so_that_rounding_moves_none() -> None:
    probs, truth = rows_of(80, 2, 4, shares=(0.7, 0.3))
    ones = np.ones(80)
    bounds = [
        best_f1_threshold(probs, truth, ones).threshold,
        precision_threshold(probs, truth, ones, 0.6)[0].threshold,
        recall_threshold(probs, truth, ones, 0.8).threshold,
        confidence_for_error(probs.max(axis=1).astype(float), probs.argmax(axis=1) == truth, ones, 0.1)[0],
        conformal_probability(probs, truth, 0.9),
    ]
    for bound in bounds:
        assert abs(probs.astype(float) - bound).min() > 1e-3


def test_of_several_thresholds_with_the_best_f1_the_one_nearest_to_one_half() -> None:
    # 1 of 2, then 2 of 4 in front: F1 is 2/3 at 0.85 and at 0.45.
    second = np.array([0.9, 0.8, 0.7, 0.5, 0.4, 0.1])
    truth = np.array([1, 0, 0, 1, 0, 0])
    probs = np.stack([1 - second, second], axis=1).astype(np.float32)
    assert best_f1_threshold(probs, truth, np.ones(6)).threshold == pytest.approx(0.45)


@pytest.mark.parametrize(("coverage", "labels"), [(0.9, 4), (0.8, 2), (0.95, 4)])
def test_label_sets_cover_as_often_as_they_promise(coverage: float, labels: int) -> None:
    """2,000 draws of 300 rows from a model that is far too sure; each is tried on 300 fresh rows."""
    random = np.random.default_rng(7)
    covered = 0.0
    for _ in range(2000):
        logits = random.normal(0, 1.5, (600, labels))
        truth = (random.random(600)[:, None] > softmax(logits, axis=1).cumsum(axis=1)).sum(axis=1).clip(max=labels - 1)
        probs = np.exp(log_softmax(3 * logits, axis=1)).astype(np.float32)
        bound = conformal_probability(probs[:300], truth[:300], coverage)
        covered += (probs[np.arange(300, 600), truth[300:]].astype(np.float64) >= bound).mean() / 2000
    # Between the promise and 1 / 301 more.
    assert coverage - 0.003 < covered < coverage + 1 / 301 + 0.003
