"""Calibration against scipy and scikit-learn, and on rows whose true probabilities are known."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from llm_clf.decisions.calibration import MIN_ROWS, Calibration, fit_calibration, log_probs
from llm_clf.decisions.decide import probabilities
from llm_clf.evaluation.reliability import (
    brier_score,
    expected_calibration_error,
    probability_figures,
    risk_coverage,
)


def drawn(rows: int, labels: int, *, temperature: float = 1.0, bias: float = 0.0, seed: int = 0):
    """Return scores of a model, and gold labels drawn from what its scores would be at this temperature and bias."""
    random = np.random.default_rng(seed)
    scores = log_softmax(random.normal(0, 3, (rows, labels)), axis=1)
    logits = scores / temperature
    logits[:, -1] += bias
    truth = (random.random(rows)[:, None] > softmax(logits, axis=1).cumsum(axis=1)).sum(axis=1)
    return scores.astype(np.float32), truth.clip(max=labels - 1)


@pytest.mark.parametrize("labels", [2, 4])
def test_temperature_is_the_one_that_scipy_finds_and_near_the_true_one(labels: int) -> None:
    scores, truth = drawn(3000, labels, temperature=2.5)
    found = fit_calibration(scores, truth, "temperature", 0)

    def loss(values: np.ndarray) -> float:
        return log_loss(truth, softmax(scores.astype(np.float64) / values[0], axis=1))

    expected = minimize(loss, [1.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12}).x[0]
    assert 1 / found.factors[0] == pytest.approx(expected, rel=1e-3)
    assert 1 / found.factors[0] == pytest.approx(2.5, rel=0.1)
    assert len(set(found.factors)) == 1 and set(found.biases) == {0.0}
    assert found.text().startswith(f"temperature {expected:.2g}")


def test_vector_scaling_of_two_labels_is_logistic_regression_on_their_logarithms() -> None:
    scores, truth = drawn(2000, 2, temperature=1.7, bias=0.8)
    found = fit_calibration(scores, truth, "vector", 0)
    logs = log_probs(scores)
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000).fit(logs, truth)
    ours = np.exp(found.log_probs(scores))[:, 1]
    np.testing.assert_allclose(ours, model.predict_proba(logs)[:, 1], atol=2e-4)


def test_calibrated_probabilities_keep_the_most_probable_label_under_a_temperature() -> None:
    scores, truth = drawn(500, 5, temperature=3)
    logs = fit_calibration(scores, truth, "temperature", 0).log_probs(scores)
    assert (logs.argmax(axis=1) == scores.argmax(axis=1)).all()
    np.testing.assert_allclose(np.exp(logs).sum(axis=1), 1)


def test_auto_stays_off_with_few_rows_and_says_which_number_was_found() -> None:
    scores, truth = drawn(MIN_ROWS - 1, 2, temperature=5)
    found = fit_calibration(scores, truth, "auto", 0)
    assert found.method == "none" and "99 labelled validation rows are too few, at least 100" in found.text()
    assert (found.log_probs(scores).argmax(axis=1) == scores.argmax(axis=1)).all()
    one_sided = np.zeros(200, dtype=np.int64)
    one_sided[:9] = 1
    found = fit_calibration(drawn(200, 2)[0], one_sided, "auto", 0)
    assert found.method == "none" and "only 9 validation rows are of another label" in found.reason


@pytest.mark.parametrize(("temperature", "bias", "expected"), [(4.0, 0.0, "temperature"), (1.0, 2.5, "vector")])
def test_auto_takes_what_predicts_other_rows_best(temperature: float, bias: float, expected: str) -> None:
    scores, truth = drawn(600, 3, temperature=temperature, bias=bias)
    found = fit_calibration(scores, truth, "auto", 1)
    assert found.method == expected and "cross-fitted log-loss: none" in found.reason
    fresh, gold = drawn(5000, 3, temperature=temperature, bias=bias, seed=9)
    before = probability_figures(gold, probabilities(fresh))
    after = probability_figures(gold, np.exp(found.log_probs(fresh)))
    assert after["ece"] < before["ece"] / 2 and after["ece"] < 0.03
    assert after["brier"] < before["brier"] and after["log_loss"] < before["log_loss"]


def test_rows_that_are_all_right_or_saturated_give_finite_numbers() -> None:
    scores = np.array([[0.0, -700.0], [-700.0, 0.0]] * 60, dtype=np.float32)
    truth = np.array([0, 1] * 60)
    for method in ("temperature", "vector", "auto"):
        found = fit_calibration(scores, truth, method, 0)
        assert np.isfinite(found.log_probs(scores)).all() and np.isfinite(found.factors + found.biases).all()


def test_log_probs_are_normalised_and_never_infinite() -> None:
    found = log_probs(np.array([[5.0, 5.0], [0.0, -1000.0]]))
    np.testing.assert_allclose(found, [[math.log(0.5)] * 2, [0.0, math.log(np.finfo(np.float32).tiny)]], atol=1e-12)
    assert Calibration.off(3, "why").text() == "off: why"


def test_expected_calibration_error_by_hand() -> None:
    # Sorted by confidence, two to a bin: 0.6 and 0.7 with one right; 0.8 and 0.9 with both right.
    probs = np.array([[0.4, 0.6], [0.9, 0.1], [0.3, 0.7], [0.2, 0.8]])
    truth = np.array([1, 0, 0, 1])
    assert expected_calibration_error(truth, probs, bins=2) == pytest.approx((abs(0.65 - 0.5) + abs(0.85 - 1)) / 2)
    assert expected_calibration_error(truth, probs, bins=50) == pytest.approx((0.4 + 0.7 + 0.2 + 0.1) / 4)


@pytest.mark.parametrize("labels", [2, 4])
def test_brier_and_log_loss_are_those_of_scikit_learn(labels: int) -> None:
    scores, truth = drawn(200, labels)
    probs = probabilities(scores).astype(np.float64)
    own = probs[:, 1] if labels == 2 else probs / probs.sum(axis=1, keepdims=True)
    assert brier_score(truth, probs) == pytest.approx(brier_score_loss(truth, own), rel=1e-6)
    figures = probability_figures(truth, probs)
    assert figures["log_loss"] == pytest.approx(log_loss(truth, own), rel=1e-5)


def test_risk_and_coverage_by_hand() -> None:
    # Surest first: right, wrong and right (level), right, wrong.
    confidence = np.array([0.5, 0.9, 0.7, 0.7, 0.6])
    right = np.array([False, True, False, True, True])
    found = risk_coverage(confidence, right)
    assert found["coverage"] == pytest.approx([0.2, 0.6, 0.8, 1.0])
    assert found["risk"] == pytest.approx([0, 1 / 3, 1 / 4, 2 / 5])
    assert found["smallest_probability"] == pytest.approx([0.9, 0.7, 0.6, 0.5])
    assert found["area"] == pytest.approx((0 + 2 / 3 + 1 / 4 + 2 / 5) / 5)
    many = risk_coverage(np.linspace(0, 1, 5000), np.ones(5000, dtype=bool))
    assert len(many["coverage"]) == 100 and many["coverage"][-1] == 1.0 and many["area"] == 0.0
