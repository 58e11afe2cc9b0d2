"""Labels that look wrong: those that were changed on purpose are found."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import llm_clf
from llm_clf.cli import app
from llm_clf.decisions.predictions import PredictionTable
from llm_clf.errors import ConfigError, DataError
from llm_clf.evaluation.suspects import find_suspects, rare_labels


def make_table(
    labels: list[str], rows: int, *, changed: float = 0.05, sure: float = 5.0
) -> tuple[PredictionTable, set[int]]:
    """Return predictions of a good model, and the rows whose gold label was changed to the next one."""
    random = np.random.default_rng(0)
    truth = random.integers(len(labels), size=rows)
    scores = random.normal(size=(rows, len(labels)))
    scores[np.arange(rows), truth] += sure
    probs = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    wrong = random.random(rows) < changed
    gold = [labels[label] for label in np.where(wrong, (truth + 1) % len(labels), truth)]
    predicted = [labels[label] for label in probs.argmax(axis=1)]
    ids = [f"r{row}" for row in range(rows)]
    return PredictionTable(labels, ids, predicted, ["ok"] * rows, gold, probs), set(np.flatnonzero(wrong).tolist())


@pytest.mark.parametrize("labels", [["0", "1"], ["a", "b", "c", "d"]])
def test_changed_labels_are_found_worst_first(labels: list[str]) -> None:
    table, changed = make_table(labels, 400)
    found = find_suspects(table, "p.csv")
    rows = {one.row for one in found}
    assert len(rows & changed) >= 0.9 * len(changed) and len(rows & changed) >= 0.9 * len(rows)
    assert [one.score for one in found] == sorted(one.score for one in found)
    for one in found:
        probs = dict(zip(labels, table.probs[one.row], strict=True))
        assert one.suggested == max(probs, key=probs.get) != one.gold == table.gold[one.row]
        assert (one.probability, one.score) == pytest.approx((probs[one.suggested], probs[one.gold]))


def test_rows_and_labels_without_gold_are_left_out() -> None:
    table, changed = make_table(["0", "1"], 300)
    labels = ["never", "0", "1"]
    probs = np.column_stack([np.zeros(300), table.probs])
    gold = ["" if row % 3 == 0 else label for row, label in enumerate(table.gold)]
    found = find_suspects(PredictionTable(labels, table.ids, table.predicted, table.status, gold, probs), "p.csv")
    rows = {one.row for one in found}
    assert rows and not any(row % 3 == 0 for row in rows) and {one.suggested for one in found} <= {"0", "1"}
    assert len(rows & changed) >= 0.8 * len({row for row in changed if row % 3})


def test_too_few_rows_are_told_of() -> None:
    table, _ = make_table(["0", "1"], 15)
    with pytest.raises(DataError, match=r"p.csv: .* at least 10 rows each, and found 0: \d+, 1: \d+"):
        find_suspects(table, "p.csv")
    without = PredictionTable(["0", "1"], ["a"], ["0"], ["ok"], ["1"], None)
    with pytest.raises(DataError, match="no probabilities"):
        find_suspects(without, "p.csv")
    assert rare_labels(PredictionTable(["0", "1", "2"], [], [], [], ["0"] * 12 + ["1"] * 3, None)) == ["1"]


def write_table(file: Path, table: PredictionTable) -> Path:
    with open(file, "w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["id", "label", *(f"prob_{label}" for label in table.labels), "gold"])
        for row, probs in enumerate(table.probs):
            writer.writerow([table.ids[row], table.predicted[row], *(f"{p:.6f}" for p in probs), table.gold[row]])
    return file


def test_the_command_writes_a_table_to_go_through(tmp_path: Path) -> None:
    table, changed = make_table(["0", "1"], 200)
    file = write_table(tmp_path / "p.csv", table)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": row_id, "text": f'say "{row_id}",\nso'}) + "\n" for row_id in table.ids))
    words = ["evaluate", str(file), "--suspects", str(tmp_path / "new" / "s.csv")]
    done = CliRunner().invoke(app, [*words, "--rows", str(rows)])
    assert done.exit_code == 0, done.output
    with open(tmp_path / "new" / "s.csv", encoding="utf-8", newline="") as opened:
        listed = list(csv.DictReader(opened))
    assert list(listed[0]) == ["id", "gold", "suggested", "probability", "score", "text"]
    assert f"{len(listed)} of 200 labels look wrong" in done.stderr and "accuracy" in done.stdout
    assert len({int(one["id"][1:]) for one in listed} & changed) >= 0.7 * len(changed)
    assert all(one["text"] == f'say "{one["id"]}",\nso' for one in listed)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["new", "p.csv", "rows.jsonl"]

    assert CliRunner().invoke(app, words).exit_code == 0
    assert (tmp_path / "new" / "s.csv").read_text().splitlines()[0] == "id,gold,suggested,probability,score"


def test_suspects_do_not_replace_what_they_are_found_in(tmp_path: Path) -> None:
    file = write_table(tmp_path / "p.csv", make_table(["0", "1"], 100)[0])
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="is what they are found in"):
        llm_clf.evaluate(file, suspects=tmp_path / "x" / ".." / "p.csv")
    with pytest.raises(ConfigError, match=r"found the ending '.xlsx'"):
        llm_clf.evaluate(file, suspects=tmp_path / "s.xlsx")
    with pytest.raises(ConfigError, match="--slice: only the report shows it"):
        llm_clf.evaluate(file, suspects=tmp_path / "s.csv", slice="gold")
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
