import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, precision_recall_fscore_support, roc_auc_score
from typer.testing import CliRunner

from llm_clf.cli import app
from llm_clf.commands.evaluate import evaluate
from llm_clf.errors import DataError
from llm_clf.evaluation.metrics import compute_metrics
from llm_clf.evaluation.tables import metrics_text

GOLD = ["0", "0", "0", "0", "1", "1"]
PREDICTED = ["0", "0", "1", "1", "1", "0"]
ONES = [0.1, 0.2, 0.6, 0.7, 0.8, 0.4]


def two_labels() -> dict[str, Any]:
    probs = np.array([[1 - one, one] for one in ONES])
    return compute_metrics(GOLD, PREDICTED, probs, ["0", "1"], ["ok"] * 6)


def write_predictions_csv(file: Path, **changes: str) -> Path:
    lines = ["id,label,prob_0,prob_1,status,cut,gold"]
    for number, (gold, label, one) in enumerate(zip(GOLD, PREDICTED, ONES, strict=True)):
        lines.append(f"{number},{label},{1 - one:.1f},{one},ok,false,{gold}")
    file.write_text("\n".join([*lines, *changes.values()]) + "\n", encoding="utf-8")
    return file


def rows_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_two_labels_by_hand() -> None:
    metrics = two_labels()
    assert metrics["accuracy"] == pytest.approx(3 / 6)
    assert metrics["per_label"]["0"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7, "support": 4})
    assert metrics["per_label"]["1"] == pytest.approx({"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5, "support": 2})
    assert metrics["macro_f1"] == pytest.approx((4 / 7 + 2 / 5) / 2)
    assert metrics["weighted_f1"] == pytest.approx((4 * 4 / 7 + 2 * 2 / 5) / 6)
    assert metrics["confusion_matrix"] == {"0": {"0": 2, "1": 2}, "1": {"0": 1, "1": 1}}
    assert metrics["roc_auc"] == pytest.approx(6 / 8)
    own = [0.9, 0.8, 0.4, 0.3, 0.8, 0.4]
    assert metrics["log_loss"] == pytest.approx(-sum(map(math.log, own)) / 6)
    assert (metrics["rows"], metrics["rows_with_gold"], metrics["labels"]) == (6, 6, ["0", "1"])
    assert metrics["status"] == {"ok": 6}


def test_of_two_labels_the_second_is_in_the_headline() -> None:
    metrics = two_labels()
    assert [metrics[name] for name in ("precision", "recall", "f1")] == pytest.approx([1 / 3, 1 / 2, 2 / 5])
    swapped = compute_metrics(GOLD, PREDICTED, np.array([[one, 1 - one] for one in ONES]), ["1", "0"])
    assert [swapped[name] for name in ("precision", "recall", "f1")] == pytest.approx([2 / 3, 2 / 4, 4 / 7])
    assert swapped["roc_auc"] == pytest.approx(metrics["roc_auc"])
    assert swapped["log_loss"] == pytest.approx(metrics["log_loss"])


def test_three_labels_with_an_empty_class_by_hand() -> None:
    gold, predicted = ["a", "a", "b", "b", "b"], ["a", "b", "b", "b", "a"]
    metrics = compute_metrics(gold, predicted, None, ["a", "b", "c"])
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["per_label"] == {
        "a": pytest.approx({"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2}),
        "b": pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3}),
        "c": {"precision": 0, "recall": 0, "f1": 0, "support": 0},
    }
    assert metrics["f1"] == metrics["macro_f1"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert metrics["weighted_f1"] == pytest.approx((2 * 1 / 2 + 3 * 2 / 3) / 5)
    assert metrics["confusion_matrix"] == {
        "a": {"a": 1, "b": 1, "c": 0},
        "b": {"a": 1, "b": 2, "c": 0},
        "c": {"a": 0, "b": 0, "c": 0},
    }
    assert "roc_auc" not in metrics and "log_loss" not in metrics and "status" not in metrics


def test_a_label_that_is_never_predicted_has_no_precision() -> None:
    metrics = compute_metrics(["a", "b", "c"], ["a", "a", "a"], None, ["a", "b", "c"])
    assert metrics["per_label"]["b"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert metrics["per_label"]["a"]["precision"] == pytest.approx(1 / 3)


def test_labels_that_are_missing_count_as_wrong() -> None:
    metrics = compute_metrics(
        ["0", "1", "1", "0"], ["0", "", "1", ""], None, ["0", "1"], ["ok", "abstained", "ok", "x"]
    )
    assert metrics["accuracy"] == pytest.approx(2 / 4)
    assert [metrics[name] for name in ("precision", "recall", "f1")] == pytest.approx([1, 1 / 2, 2 / 3])
    assert metrics["per_label"]["0"] == pytest.approx({"precision": 1, "recall": 1 / 2, "f1": 2 / 3, "support": 2})
    assert metrics["confusion_matrix"] == {"0": {"0": 1, "1": 0, "(none)": 1}, "1": {"0": 0, "1": 1, "(none)": 1}}
    assert metrics["status"] == {"abstained": 1, "ok": 2, "x": 1}


def test_a_file_without_any_predicted_label_has_accuracy_0() -> None:
    metrics = compute_metrics(["0", "1"], ["", ""], None, ["0", "1"])
    assert (metrics["accuracy"], metrics["f1"], metrics["macro_f1"]) == (0, 0, 0)


@pytest.mark.parametrize("labels", [["0", "1"], ["0", "1", "2"]])
def test_one_label_alone_in_gold_has_no_roc_auc(labels: list[str]) -> None:
    probs = np.full((3, len(labels)), 1 / len(labels))
    metrics = compute_metrics(["1", "1", "1"], ["1", "0", "1"], probs, labels)
    assert metrics["roc_auc"] is None
    assert metrics["log_loss"] == pytest.approx(math.log(len(labels)))
    assert metrics["recall"] == pytest.approx(2 / 3 if len(labels) == 2 else 2 / 9)


def test_the_roc_auc_leaves_out_labels_that_do_not_occur() -> None:
    gold = ["a", "a", "b", "b"]
    probs = np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.3, 0.6, 0.1], [0.1, 0.3, 0.6]])
    metrics = compute_metrics(gold, gold, probs, ["a", "b", "c"])
    assert metrics["roc_auc"] == pytest.approx((3 / 4 + 3 / 4) / 2)


def test_rows_without_gold_are_counted_and_left_out() -> None:
    probs = np.array([[0.9, 0.1], [1.0, 0.0], [0.2, 0.8]])
    metrics = compute_metrics(["0", "", "1"], ["0", "1", "1"], probs, ["0", "1"], ["ok", "unparsed", "ok"])
    assert (metrics["rows"], metrics["rows_with_gold"], metrics["accuracy"]) == (3, 2, 1)
    assert metrics["log_loss"] == pytest.approx(-(math.log(0.9) + math.log(0.8)) / 2)
    assert metrics["status"] == {"ok": 2, "unparsed": 1}


def test_rows_all_without_gold_have_no_metrics() -> None:
    metrics = compute_metrics(["", ""], ["0", "1"], np.full((2, 2), 0.5), ["0", "1"], ["ok", "ok"])
    assert metrics == {"rows": 2, "rows_with_gold": 0, "labels": ["0", "1"], "status": {"ok": 2}}
    assert metrics_text(metrics) == "2 rows, none with a gold label: nothing to measure."


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_log_loss_is_finite_on_confident_mistakes(kind: type[np.floating[Any]]) -> None:
    probs = np.array([[1, 0], [0, 1]], dtype=kind)
    loss = compute_metrics(["1", "1"], ["0", "1"], probs, ["0", "1"])["log_loss"]
    assert loss == pytest.approx(-math.log(np.finfo(np.float32).tiny) / 2)
    assert math.isfinite(loss) and loss > 40


@pytest.mark.parametrize("labels", [["no", "yes"], ["d", "a", "c", "b"]])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_scikit_learn(labels: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet([1.0] * len(labels), 80)
    truth = np.array([rng.choice(len(labels), p=row) for row in probs])
    best = probs.argmax(axis=1)
    gold, predicted = [labels[i] for i in truth], [labels[i] for i in best]
    metrics = compute_metrics(gold, predicted, probs, labels)

    precision, recall, f1, support = precision_recall_fscore_support(truth, best, labels=range(len(labels)))
    assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, best))
    for number, label in enumerate(labels):
        assert list(metrics["per_label"][label].values()) == pytest.approx(
            [precision[number], recall[number], f1[number], support[number]]
        )
    assert metrics["macro_f1"] == pytest.approx(f1.mean())
    assert metrics["weighted_f1"] == pytest.approx(np.average(f1, weights=support))
    headline = [precision[1], recall[1], f1[1]] if len(labels) == 2 else [precision.mean(), recall.mean(), f1.mean()]
    assert [metrics[name] for name in ("precision", "recall", "f1")] == pytest.approx(headline)
    area = roc_auc_score(truth, probs[:, 1]) if len(labels) == 2 else roc_auc_score(truth, probs, multi_class="ovr")
    assert metrics["roc_auc"] == pytest.approx(area)
    assert metrics["log_loss"] == pytest.approx(log_loss(truth, probs))
    assert [list(row.values()) for row in metrics["confusion_matrix"].values()] == confusion_matrix(
        truth, best
    ).tolist()


def test_metrics_are_plain_values() -> None:
    metrics = two_labels()
    assert json.loads(json.dumps(metrics)) == metrics


def test_the_order_of_rows_does_not_matter() -> None:
    order = [3, 5, 0, 4, 1, 2]
    probs = np.array([[1 - ONES[row], ONES[row]] for row in order])
    mixed = compute_metrics(
        [GOLD[row] for row in order], [PREDICTED[row] for row in order], probs, ["0", "1"], ["ok"] * 6
    )
    assert mixed.pop("log_loss") == pytest.approx(two_labels()["log_loss"])
    assert mixed == {name: value for name, value in two_labels().items() if name != "log_loss"}


def test_the_table_shows_every_figure() -> None:
    text = metrics_text(two_labels())
    assert text.startswith("6 rows, 6 with a gold label; 6 ok")
    rows = rows_of(text)
    assert ["accuracy", "0.5000"] in rows and ["f1", "0.4000"] in rows and ["roc_auc", "0.7500"] in rows
    assert ["0", "0.6667", "0.5000", "0.5714", "4"] in rows
    assert ["1", "0.3333", "0.5000", "0.4000", "2"] in rows
    assert ["gold", "\\", "predicted", "0", "1"] in rows
    assert ["0", "2", "2"] in rows and ["1", "1", "1"] in rows
    assert "count as wrong" not in text


def test_the_table_says_what_has_no_value_and_what_counts_as_wrong() -> None:
    text = metrics_text(compute_metrics(["1", "1"], ["1", ""], np.full((2, 2), 0.5), ["0", "1"], ["ok", "abstained"]))
    assert ["roc_auc", "-"] in rows_of(text)
    assert "1 abstained, 1 ok" in text and "Rows without a label (1) count as wrong." in text


def test_evaluate_measures_a_predictions_file(tmp_path: Path) -> None:
    metrics = evaluate(write_predictions_csv(tmp_path / "p.csv"), out=tmp_path / "new" / "report")
    assert json.loads((tmp_path / "new" / "report" / "metrics.json").read_text(encoding="utf-8")) == metrics
    assert metrics.pop("intervals")["level"] == 0.95
    assert metrics["log_loss"] == pytest.approx(two_labels()["log_loss"])
    assert metrics.pop("ece") == pytest.approx((0.1 + 0.2 + 0.6 + 0.7 + 0.2 + 0.6) / 6)
    assert {k: v for k, v in metrics.items() if k != "log_loss"} == {
        k: v for k, v in two_labels().items() if k != "log_loss"
    }


def test_evaluate_writes_nothing_unless_it_is_asked(tmp_path: Path) -> None:
    file = write_predictions_csv(tmp_path / "p.csv")
    evaluate(file)
    assert list(tmp_path.iterdir()) == [file]


def test_evaluate_counts_rows_without_a_label(tmp_path: Path) -> None:
    file = write_predictions_csv(tmp_path / "p.csv", one="6,,0.5,0.5,abstained,false,1", two="7,1,0.5,0.5,ok,true,")
    metrics = evaluate(file)
    assert (metrics["rows"], metrics["rows_with_gold"]) == (8, 7)
    assert metrics["status"] == {"abstained": 1, "ok": 7}
    assert metrics["accuracy"] == pytest.approx(3 / 7)


def test_the_evaluate_command_prints_the_table_and_writes_metrics(tmp_path: Path) -> None:
    file = write_predictions_csv(tmp_path / "p.csv")
    result = CliRunner().invoke(app, ["evaluate", str(file), "--out", str(tmp_path / "report")])
    assert result.exit_code == 0
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert result.stdout == metrics_text(metrics) + "\n"
    assert ["f1", "0.4000"] in [row[:2] for row in rows_of(result.stdout)]
    assert result.stderr == f"The report is {tmp_path / 'report' / 'report.html'}.\n"


def test_the_evaluate_command_refuses_what_is_no_predictions_file(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("id,title\n1,a\n", encoding="utf-8")
    result = CliRunner().invoke(app, ["evaluate", str(file), "--out", str(tmp_path / "report")])
    assert isinstance(result.exception, DataError)
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == [file]
