"""compare: is one of two predictions of the same rows really better?"""

import csv
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binom
from typer.testing import CliRunner

import llm_clf
from llm_clf.cli import app
from llm_clf.decisions.predictions import PredictionTable
from llm_clf.errors import ConfigError, DataError
from llm_clf.evaluation.comparison import compare_tables, verdict
from llm_clf.evaluation.intervals import Judged, resample
from llm_clf.evaluation.metrics import compute_metrics

NAMES = ("one.csv", "two.csv")


def table(gold: str, predicted: str, *, ids: list[str] | None = None, probs: bool = False) -> PredictionTable:
    """Return predictions from one character a row; `-` is no label."""
    labels = ["0", "1"]
    names = ["" if name == "-" else name for name in predicted]
    chances = np.array([[0.5, 0.5] if not name else [0.8, 0.2] if name == "0" else [0.2, 0.8] for name in names])
    return PredictionTable(
        labels,
        ids or [str(row) for row in range(len(gold))],
        names,
        ["ok" if name else "abstained" for name in names],
        ["" if name == "-" else name for name in gold],
        chances if probs else None,
    )


def two_models(rows: int, seed: int, wrong: tuple[float, float]) -> tuple[PredictionTable, PredictionTable]:
    """Return predictions of two models that are wrong so often."""
    random = np.random.default_rng(seed)
    gold = random.integers(2, size=rows)
    both = [np.where(random.random(rows) < share, 1 - gold, gold) for share in wrong]
    one, two = (table("".join(map(str, gold)), "".join(map(str, labels)), probs=True) for labels in both)
    return one, two


def test_counts_and_mcnemar_by_hand() -> None:
    #                      0123456789
    compared = compare_tables(table("0000011111", "0000011100"), table("0000011111", "0111011111"), NAMES)
    assert (compared.rows, compared.rows_with_gold, len(compared.flips)) == (10, 10, 5)
    assert (compared.right_only_in("a"), compared.right_only_in("b"), compared.right_only_in(None)) == (3, 2, 0)
    # Two-sided: twice the chance of 2 or fewer of 5 with a fair coin, at most 1.
    assert compared.p == 1.0
    accuracy = compared.differences["accuracy"]
    assert (accuracy.a, accuracy.b) == pytest.approx((0.8, 0.7)) and accuracy.value == pytest.approx(-0.1)
    assert [(flip.id, flip.gold, flip.a, flip.b, flip.right) for flip in compared.flips[:1] + compared.flips[-1:]] == [
        ("1", "0", "0", "1", "a"),
        ("9", "1", "0", "1", "b"),
    ]


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 1), (1, 8), (12, 3), (0, 0), (20, 20)])
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    gold = "0" * (only_a + only_b + 5)
    one = "0" * only_a + "1" * only_b + "00000"
    two = "1" * only_a + "0" * only_b + "00000"
    n, k = only_a + only_b, min(only_a, only_b)
    expected = min(1.0, 2 * binom.cdf(k, n, 0.5)) if n else 1.0
    assert compare_tables(table(gold, one), table(gold, two), NAMES).p == pytest.approx(expected)


def test_the_difference_is_that_of_the_metrics_and_its_interval_is_paired() -> None:
    one, two = two_models(200, 1, (0.2, 0.1))
    compared = compare_tables(one, two, NAMES)
    metrics = [compute_metrics(part.gold, part.predicted, part.probs, part.labels) for part in (one, two)]
    drawn = resample([Judged.of(one), Judged.of(two)])
    for name, found in compared.differences.items():
        assert (found.a, found.b) == (metrics[0][name], metrics[1][name])
        low, high = np.quantile(drawn[1][name] - drawn[0][name], [0.025, 0.975])
        assert found.interval is not None
        assert (found.interval.low, found.interval.high) == pytest.approx((low, high))
    # The same predictions on both sides: paired, their difference is 0 in every resample.
    same = compare_tables(one, one, NAMES)
    assert all((d.interval.low, d.interval.high) == (0, 0) for d in same.differences.values() if d.interval)
    assert same.better("f1") is None and same.p == 1 and not same.flips


def test_a_better_one_is_found_whichever_side_it_stands_on() -> None:
    bad, good = two_models(400, 2, (0.3, 0.1))
    compared, swapped = compare_tables(bad, good, NAMES), compare_tables(good, bad, NAMES)
    for metric in ("f1", "accuracy", "log_loss", "roc_auc"):
        assert compared.better(metric) == "b" and swapped.better(metric) == "a"
    assert verdict(compared, "log_loss").startswith("B is better in log_loss: A 0.")
    assert verdict(swapped, "f1").startswith("A is better in f1: A 0.9") and "B - A is -0." in verdict(swapped, "f1")


def test_equals_are_told_apart_as_rarely_as_the_level_says() -> None:
    differ = 0
    for seed in range(120):
        one, two = (replace(part, probs=None) for part in two_models(120, seed, (0.2, 0.2)))
        differ += compare_tables(one, two, NAMES).better("accuracy") is not None
    assert differ / 120 == pytest.approx(0.05, abs=0.04)


def test_a_verdict_that_mcnemar_does_not_share_says_so() -> None:
    # Of 300 rows 20 are positive; B finds 10 more of them, and has 4 false alarms more.
    gold = "1" * 20 + "0" * 280
    one, two = "1" * 6 + "0" * 294, "1" * 16 + "0" * 4 + "1" * 4 + "0" * 276
    compared = compare_tables(table(gold, one), table(gold, two), NAMES)
    assert compared.better("f1") == "b" and compared.p > 0.05
    assert "McNemar's test, which looks at accuracy, does not confirm it (p 0.18)." in verdict(compared, "f1")


def test_rows_in_another_order_are_put_in_order() -> None:
    one, two = table("0011", "0111"), table("1010", "1010", ids=["3", "0", "2", "1"])
    compared = compare_tables(one, two, NAMES)
    assert [flip.id for flip in compared.flips] == ["1"] and compared.differences["accuracy"].b == 1
    with_probs = table("1010", "1010", ids=["3", "0", "2", "1"], probs=True)
    assert compare_tables(table("0011", "0111", probs=True), with_probs, NAMES).differences["roc_auc"].b == 1


def test_rows_without_gold_are_left_out_and_rows_without_a_label_are_wrong() -> None:
    compared = compare_tables(table("01-1", "0-11"), table("01-1", "010-"), NAMES)
    assert (compared.rows, compared.rows_with_gold) == (4, 3) and compared.without_label == {"a": 1, "b": 1}
    assert [(flip.id, flip.a, flip.b, flip.right) for flip in compared.flips] == [
        ("1", "", "1", "b"),
        ("3", "1", "", "a"),
    ]
    nothing = compare_tables(table("--", "01"), table("--", "11"), NAMES)
    assert nothing.better("f1") is None and "nothing to compare" in verdict(nothing, "f1")


def test_probabilities_count_where_both_have_them() -> None:
    one, two = table("0011", "0111", probs=True), table("0011", "0011")
    assert "roc_auc" not in compare_tables(one, two, NAMES).differences
    with pytest.raises(ConfigError, match="--metric log_loss: needs the probabilities of both"):
        compare_tables(one, two, NAMES).better("log_loss")


@pytest.mark.parametrize(
    ("ids", "gold", "told"),
    [
        (["0", "1", "2"], "001", ["1 of the 4 rows of one.csv are not in two.csv: '3'"]),
        (["0", "1", "2", "3", "4"], "00111", ["1 of the 5 rows of two.csv are not in one.csv: '4'"]),
        (["a", "b", "c", "d"], "0011", ["4 of the 4 rows of one.csv", "'0', '1', '2', …", "'a', 'b', 'c', …"]),
        (["0", "1", "2", "3"], "0101", ["2 of 4 rows have another gold label, first '1': '0' and '1'"]),
        (["0", "1", "1", "3"], "0011", ["two.csv: the id '1' stands twice"]),
    ],
)
def test_other_rows_are_refused_by_name(ids: list[str], gold: str, told: list[str]) -> None:
    with pytest.raises(DataError) as refused:
        compare_tables(table("0011", "0011"), table(gold, gold, ids=ids), NAMES)
    for word in told:
        assert word in str(refused.value)


def test_other_labels_are_refused() -> None:
    three = PredictionTable(["0", "1", "2"], ["0"], ["0"], ["ok"], ["0"], np.array([[1.0, 0, 0]]))
    with pytest.raises(DataError, match="one.csv has the labels 0, 1, two.csv has 0, 1, 2"):
        compare_tables(table("0", "0", probs=True), three, NAMES)
    bare = PredictionTable(["0", "9"], ["0"], ["9"], ["ok"], ["0"], None)
    with pytest.raises(DataError, match="one has the label '9', the other's labels are 0, 1"):
        compare_tables(table("0", "0", probs=True), bare, NAMES)


# --- the command ------------------------------------------------------------------------------------------------------


def write(file: Path, part: PredictionTable) -> Path:
    lines = ["id,label,prob_0,prob_1,status,cut,gold"]
    assert part.probs is not None
    for row_id, label, probs, status, gold in zip(
        part.ids, part.predicted, part.probs, part.status, part.gold, strict=True
    ):
        lines.append(f"{row_id},{label},{probs[0]},{probs[1]},{status},false,{gold}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_the_command_prints_a_verdict_and_writes_the_flipped_rows(tmp_path: Path) -> None:
    bad, good = two_models(300, 4, (0.3, 0.1))
    a, b = write(tmp_path / "bad.csv", bad), write(tmp_path / "good.csv", good)
    shown = CliRunner().invoke(app, ["compare", str(a), str(b), "--out", str(tmp_path / "new" / "comparison")])
    assert shown.exit_code == 0, shown.output
    facts = json.loads((tmp_path / "new" / "comparison" / "comparison.json").read_text())
    assert facts["better"] == "b" and facts["verdict"] in shown.stdout and facts["a"] == str(a)
    assert facts == llm_clf.compare(a, b)
    with open(tmp_path / "new" / "comparison" / "flips.csv", newline="", encoding="utf-8") as opened:
        flips = list(csv.DictReader(opened))
    assert len(flips) == facts["flips"]["rows"]
    assert sum(flip["right"] == "b" for flip in flips) == facts["flips"]["right_only_in_b"] > 0
    for flip in flips:
        assert flip["gold"] == good.gold[int(flip["id"])] and flip["label_b"] == good.predicted[int(flip["id"])]
        assert flip["label_a"] != flip["label_b"]


def test_rows_that_a_run_was_chosen_by_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = two_models(30, 5, (0.2, 0.2))
    test, valid = write(tmp_path / "test.csv", one), tmp_path / "run" / "predictions-valid.parquet"
    valid.parent.mkdir()
    assert two.probs is not None
    columns = {"id": two.ids, "label": two.predicted, "prob_0": two.probs[:, 0], "prob_1": two.probs[:, 1]}
    pq.write_table(pa.table(columns | {"status": two.status, "gold": two.gold}), valid)
    llm_clf.compare(test, valid)
    assert "flatters it on them" not in capsys.readouterr().err
    (tmp_path / "run" / "run.json").write_text("{}")
    llm_clf.compare(test, valid)
    assert f"Note: {valid}: a run chooses by its validation rows" in capsys.readouterr().err


def test_without_out_nothing_is_written(tmp_path: Path) -> None:
    one, two = two_models(30, 5, (0.2, 0.2))
    a, b = write(tmp_path / "a.csv", one), write(tmp_path / "b.csv", two)
    llm_clf.compare(a, b, metric="log_loss")
    assert sorted(tmp_path.iterdir()) == [a, b]


def test_an_unknown_metric_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--metric 'F1': there is no such metric; there are f1, macro_f1"):
        llm_clf.compare(tmp_path / "a.csv", tmp_path / "b.csv", metric="F1")


def test_twenty_thousand_rows_take_seconds(tmp_path: Path) -> None:
    one, two = two_models(20_000, 6, (0.1, 0.1))
    started = time.perf_counter()
    compare_tables(one, two, NAMES)
    assert time.perf_counter() - started < 20
