"""Bootstrap intervals: the mathematics against scikit-learn, scipy and hand-computed cases, and their coverage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import accuracy_score, f1_score
from typer.testing import CliRunner

from llm_clf.cli import app
from llm_clf.decisions.predictions import PredictionTable
from llm_clf.evaluation import intervals
from llm_clf.evaluation.intervals import Interval, Judged, interval_of, measure, resample
from llm_clf.evaluation.metrics import HEADLINES, compute_metrics
from llm_clf.evaluation.tables import metrics_text


def some_table(labels: list[str], rows: int, seed: int, *, probs: bool = True, good: float = 0.7) -> PredictionTable:
    """Return predictions of which most are right, a few of rows without gold or without a predicted label."""
    random = np.random.default_rng(seed)
    gold = random.choice(labels[: max(2, len(labels) - 1)], rows).tolist()
    predicted = [name if random.random() < good else str(random.choice(labels)) for name in gold]
    for row in range(rows):
        if random.random() < 0.05:
            predicted[row] = ""
        if random.random() < 0.05:
            gold[row] = ""
    # Rounded, so that some are equal.
    chances = np.round(random.dirichlet([1.0] * len(labels), rows), 1)
    status = ["ok" if name else "unparsed" for name in predicted]
    ids = [str(row) for row in range(rows)]
    return PredictionTable(labels, ids, predicted, status, gold, chances if probs else None)


def counted(judged: Judged, weights: np.ndarray) -> dict[str, np.ndarray]:
    return intervals._Counter(judged).metrics(weights.astype(np.float64))


@pytest.mark.parametrize("labels", [["0", "1"], ["a", "b", "c"], ["never", "a", "b", "c", "absent"]], ids=len)
@pytest.mark.parametrize("probs", [True, False])
def test_metrics_of_drawn_rows_are_those_of_rows_written_so_often(labels: list[str], probs: bool) -> None:
    random = np.random.default_rng(1)
    for seed in range(4):
        table = some_table(labels, 25, seed, probs=probs)
        judged = Judged.of(table)
        known = [row for row, label in enumerate(table.gold) if label]
        weights = random.multinomial(len(known), [1 / len(known)] * len(known), size=6).T
        weights[:, 0] = 1
        # Rows of one label alone have no ROC-AUC.
        weights[:, 1] = 0
        weights[0, 1] = len(known)
        found = counted(judged, weights)
        for column in range(weights.shape[1]):
            rows = [row for place, row in enumerate(known) for _ in range(weights[place, column])]
            expected = compute_metrics(
                [table.gold[row] for row in rows],
                [table.predicted[row] for row in rows],
                table.probs[rows] if table.probs is not None else None,
                labels,
            )
            assert found.keys() == expected.keys() & set(HEADLINES)
            for name, values in found.items():
                value = np.nan if expected[name] is None else expected[name]
                assert values[column] == pytest.approx(value, nan_ok=True), (name, column)


@pytest.mark.parametrize(("name", "score"), [("accuracy", accuracy_score), ("f1", f1_score)])
def test_intervals_are_those_of_scipy(name: str, score: Any) -> None:
    table = some_table(["0", "1"], 150, 3)
    rows = [row for row in range(150) if table.gold[row] and table.predicted[row]]
    gold, predicted = (np.array([int(names[row]) for row in rows]) for names in (table.gold, table.predicted))
    expected = bootstrap(
        (gold, predicted), score, paired=True, vectorized=False, n_resamples=1_000, method="percentile", rng=1
    ).confidence_interval
    both = PredictionTable(
        ["0", "1"],
        [str(row) for row in rows],
        list(map(str, predicted)),
        ["ok"] * len(rows),
        list(map(str, gold)),
        None,
    )
    low, high = measure(both)["intervals"]["metrics"][name]
    assert (low, high) == pytest.approx(tuple(expected), abs=0.015)


def test_two_rows_of_which_one_is_right_by_hand() -> None:
    judged = Judged(["0", "1"], np.array([0, 1]), np.array([0, 0]), None)
    (drawn,) = resample([judged], resamples=4_000)
    values, counts = np.unique(drawn["accuracy"], return_counts=True)
    assert values.tolist() == [0, 0.5, 1] and counts / 4_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert interval_of(drawn["accuracy"]) == Interval(0, 1)


def test_rows_that_are_all_right_leave_no_doubt() -> None:
    table = PredictionTable(["0", "1"], list("ab"), ["0", "1"], ["ok"] * 2, ["0", "1"], None)
    found = measure(table)["intervals"]["metrics"]
    assert found["accuracy"] == [1, 1]
    # Half of the resamples lack the second label, and f1 is 0 there, as compute_metrics has it.
    assert found["f1"] == [0, 1]


def test_the_interval_is_between_percentiles() -> None:
    values = np.arange(1001) / 1000
    assert interval_of(values) == Interval(pytest.approx(0.025), pytest.approx(0.975))
    assert interval_of(np.append(values, [np.nan] * 500)) == interval_of(values)
    assert interval_of(np.array([np.nan])) is None


def test_resamples_without_a_value_are_left_out_and_counted() -> None:
    rows = 20
    gold = ["1"] + ["0"] * (rows - 1)
    probs = np.linspace(0.9, 0.1, rows)
    table = PredictionTable(
        ["0", "1"], list(map(str, range(rows))), gold, ["ok"] * rows, gold, np.stack([1 - probs, probs], axis=1)
    )
    found = measure(table)
    lacking = found["intervals"]["left_out"]["roc_auc"]
    assert lacking / 2_000 == pytest.approx((1 - 1 / rows) ** rows, abs=0.03)
    assert found["intervals"]["left_out"].keys() == {"roc_auc"} and found["intervals"]["metrics"]["roc_auc"] == [1, 1]
    assert f"roc_auc has no value in {lacking} of 2,000 resamples; they are left out." in metrics_text(found)


def test_one_label_alone_has_no_interval_of_the_roc_auc() -> None:
    table = PredictionTable(["0", "1"], ["a", "b"], ["1", "0"], ["ok"] * 2, ["1", "1"], np.full((2, 2), 0.5))
    found = measure(table)
    assert found["intervals"]["metrics"]["roc_auc"] is None and found["intervals"]["left_out"] == {"roc_auc": 2_000}
    assert ["roc_auc", "-", "-"] in [line.split() for line in metrics_text(found).splitlines()]


def test_rows_without_gold_have_no_intervals() -> None:
    table = PredictionTable(["0", "1"], ["a"], ["1"], ["ok"], [""], None)
    assert "intervals" not in measure(table)


def test_draws_are_seeded_and_do_not_depend_on_the_size_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Judged.of(some_table(["a", "b", "c"], 40, 5))
    (one,), (other,) = resample([judged], resamples=50), resample([judged], resamples=50, seed=1)
    monkeypatch.setattr(intervals, "CHUNK", 300)
    (parts,) = resample([judged], resamples=50)
    for name, values in one.items():
        assert parts[name] == pytest.approx(values, nan_ok=True)
    assert not np.array_equal(one["accuracy"], other["accuracy"])


def test_the_same_rows_are_drawn_for_predictions_that_are_resampled_together() -> None:
    judged = Judged.of(some_table(["0", "1"], 30, 6))
    wrong = Judged(judged.labels, judged.gold, 1 - judged.gold, None)
    right = Judged(judged.labels, judged.gold, judged.gold, None)
    one, two, three = resample([judged, wrong, right], resamples=20)
    assert np.array_equal(two["accuracy"], np.zeros(20)) and np.array_equal(three["accuracy"], np.ones(20))
    assert np.array_equal(one["accuracy"], resample([judged], resamples=20)[0]["accuracy"])


def test_evaluate_saves_and_prints_intervals(tmp_path: Path) -> None:
    lines = ["id,label,prob_0,prob_1,status,cut,gold"]
    lines += [f"{row},{row % 2},{1 - row % 2},{row % 2},ok,false,{(row % 7 > 0) * row % 2}" for row in range(40)]
    (tmp_path / "p.csv").write_text("\n".join(lines) + "\n")
    shown = CliRunner().invoke(app, ["evaluate", str(tmp_path / "p.csv"), "--out", str(tmp_path / "scores")])
    saved = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert saved["intervals"].keys() == {"level", "resamples", "seed", "metrics", "left_out"}
    assert saved["intervals"]["metrics"].keys() == set(HEADLINES)
    rows = [line.split() for line in shown.stdout.splitlines()]
    for name, (low, high) in saved["intervals"]["metrics"].items():
        assert low <= saved[name] <= high
        assert [name, f"{saved[name]:.4f}", f"[{low:.4f},", f"{high:.4f}]"] in rows
    assert "95% interval" in shown.stdout


@pytest.mark.slow
def test_intervals_cover_the_true_values_as_often_as_they_say() -> None:
    """2,000 samples of 300 rows: intervals for accuracy and F1 hold the true value 95 times in 100, to two points."""
    samples, rows = 2_000, 300
    positive, recall, false_alarms = 0.42, 0.91, 0.06
    chances = [(1 - positive) * (1 - false_alarms), (1 - positive) * false_alarms]
    chances += [positive * (1 - recall), positive * recall]
    truth = {
        "accuracy": chances[0] + chances[3],
        "f1": 2 * chances[3] / (2 * chances[3] + chances[1] + chances[2]),
    }
    random = np.random.default_rng(0)
    held = dict.fromkeys(truth, 0)
    for sample in range(samples):
        cells = random.choice(4, size=rows, p=chances)
        (drawn,) = resample([Judged(["0", "1"], cells // 2, cells % 2, None)], seed=sample)
        for name, value in truth.items():
            interval = interval_of(drawn[name])
            held[name] += interval is not None and value in interval
    for name, count in held.items():
        assert count / samples == pytest.approx(0.95, abs=0.02), name
