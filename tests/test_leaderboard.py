"""The leaderboard: runs measured on the same rows."""

import csv
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT_TASK
from typer.testing import CliRunner

import llm_clf
from llm_clf.cli import app
from llm_clf.commands import leaderboard as command
from llm_clf.errors import ArtifactError, ConfigError, DataError, LlmClfError
from llm_clf.files import partial_name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make prompts, a run that learned, one that learned from wrong labels, and an ensemble of both, once."""
    folder = tmp_path_factory.mktemp("leaderboard")
    (folder / "task.yaml").write_text(SHORT_TASK, encoding="utf-8")
    draw, words = random.Random(1), {"0": ["steel", "star", "court"], "1": ["heart", "lung", "fever"]}
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as lines:
        for number in range(240):
            label = str(number % 2)
            text = " ".join([draw.choice(words[label]), draw.choice(words[str(1 - number % 2)] * 2 + words[label])])
            row = {"uuid": f"r{number}", "title": text, "abstract": f"n{number}", "label": label}
            lines.write(json.dumps(row) + "\n")
    llm_clf.build_prompts(
        folder / "rows.jsonl", task=folder / "task.yaml", out=folder / "prompts", split="0.5,0.25,0.25"
    )
    shutil.copytree(folder / "prompts", folder / "wrong")
    records = [json.loads(line) for line in (folder / "prompts" / "train.jsonl").read_text().splitlines()]
    wrong = [record | {"output": str(draw.randrange(2))} for record in records]
    (folder / "wrong" / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in wrong))
    llm_clf.baseline_tfidf(folder / "prompts", out=folder / "good")
    llm_clf.baseline_tfidf(folder / "wrong", out=folder / "bad")
    llm_clf.ensemble([folder / "good", folder / "bad"], data=folder / "prompts", out=folder / "both")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """Return a folder of one's own with all of it."""
    shutil.copytree(made, tmp_path / "place")
    return tmp_path / "place"


def board(place: Path, *names: str, **named: Any) -> dict[str, Any]:
    return llm_clf.leaderboard([place / name for name in names], **({"data": place / "prompts"} | named))


def test_the_best_comes_first_and_each_is_tested_against_it(made: Path) -> None:
    found = board(made, "bad", "good", "both")
    names = [Path(entry["run"]).name for entry in found["runs"]]
    assert names[-1] == "bad" and set(names[:2]) == {"good", "both"}
    assert [entry["against_best"]["found"] for entry in found["runs"]] == ["best", "no real difference", "worse"]
    values = [entry["metrics"]["f1"] for entry in found["runs"]]
    assert values == sorted(values, reverse=True) and (found["rows"], found["split"], found["metric"]) == (
        60,
        "test",
        "f1",
    )
    worst = found["runs"][-1]["against_best"]
    assert worst["difference"] == pytest.approx(values[2] - values[0]) and worst["interval"][1] < 0
    assert 0 < worst["mcnemar_p"] < 0.05


def test_figures_are_those_of_predict_and_evaluate_and_costs_those_of_the_run(made: Path, tmp_path: Path) -> None:
    (entry,) = board(made, "both", metric="log_loss")["runs"]
    llm_clf.predict(made / "both", made / "prompts" / "test.jsonl", out=tmp_path / "test.parquet")
    assert entry["metrics"] == llm_clf.evaluate(tmp_path / "test.parquet")
    facts = json.loads((made / "both" / "run.json").read_text())
    assert entry["kind"] == "ensemble" and entry["training_seconds"] == facts["training"]["seconds"]
    sizes = {name: sum(f.stat().st_size for f in (made / name).iterdir()) for name in ("good", "bad", "both")}
    assert entry["size_bytes"] == sum(sizes.values()) and entry["rows_per_second"] > 0


def test_log_loss_is_sorted_from_below(made: Path) -> None:
    found = board(made, "bad", "good", metric="log_loss")
    values = [entry["metrics"]["log_loss"] for entry in found["runs"]]
    assert values[0] < values[1] and [entry["against_best"]["found"] for entry in found["runs"]] == ["best", "worse"]


def test_the_command_prints_the_table_and_writes_three_forms(place: Path) -> None:
    words = ["leaderboard", str(place / "good"), str(place / "bad"), "--data", str(place / "prompts")]
    shown = CliRunner().invoke(app, [*words, "--out", str(place / "out")])
    assert shown.exit_code == 0, shown.output
    found = json.loads((place / "out" / "leaderboard.json").read_text())
    assert command.leaderboard_text(found) + "\n" == shown.stdout
    assert f"60 test rows of {place / 'prompts'}, sorted by f1" in shown.stdout
    with open(place / "out" / "leaderboard.csv", newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    for row, entry in zip(rows, found["runs"], strict=True):
        assert row["run"] == entry["run"] and float(row["f1"]) == entry["metrics"]["f1"]
        assert [float(row["f1_low"]), float(row["f1_high"])] == entry["metrics"]["intervals"]["metrics"]["f1"]
        assert float(row["size_bytes"]) == entry["size_bytes"] and row["against_best"] == entry["against_best"]["found"]
    lines = (place / "out" / "leaderboard.md").read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("| run | f1 | accuracy |") and "worse" in lines[3]
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_predictions_are_made_once_and_anew_where_run_or_rows_change(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted: list[str] = []
    original = command.predict_prompts

    def predict(source: Any, prompts: Any, out: Path, **named: Any) -> Any:
        predicted.append(out.name.rpartition("-")[0])
        return original(source, prompts, out, **named)

    monkeypatch.setattr(command, "predict_prompts", predict)
    first = board(place, "good", "bad", "both", out=place / "out")
    assert predicted == ["good", "bad", "both"] and len(list((place / "out" / "predictions").iterdir())) == 6
    assert board(place, "good", "bad", "both", out=place / "out") == first and len(predicted) == 3
    # Another metric needs no other predictions.
    board(place, "both", "good", metric="accuracy", out=place / "out")
    assert len(predicted) == 3
    llm_clf.baseline_tfidf(place / "prompts", out=place / "good", set=["train.seed=7"], overwrite=True)
    board(place, "good", "bad", out=place / "out")
    assert predicted[3:] == ["good"]
    lines = (place / "prompts" / "test.jsonl").read_text().splitlines(keepends=True)
    (place / "prompts" / "test.jsonl").write_text("".join(lines[:50]))
    assert board(place, "good", "bad", out=place / "out")["rows"] == 50
    assert predicted[4:] == ["good", "bad"]
    board(place, "bad", split="valid", out=place / "out")
    assert predicted[6:] == ["bad"]


def test_a_killed_leaderboard_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("llm_clf.commands.predict.write_predictions", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            board(place, "good", out=place / "out")
    (left,) = (place / "out" / "predictions").iterdir()
    assert left.name.endswith(".parquet.partial")
    board(place, "good", out=place / "out")
    assert not left.exists() and not list((place / "out").rglob("*.partial"))


def test_without_out_nothing_is_written(place: Path) -> None:
    before = sorted(place.rglob("*"))
    board(place, "good")
    assert sorted(place.rglob("*")) == before and not partial_name(place / "good").exists()


def test_rows_that_a_run_learned_from_are_told_of(place: Path) -> None:
    found = board(place, "both", "good", split="valid")
    seen = {Path(entry["run"]).name: entry["rows_seen_in_training"] for entry in found["runs"]}
    assert seen == {"both": 60, "good": 0}
    text = command.leaderboard_text(found)
    assert (
        f"Note: {place / 'both'} learned from 60 of these rows, which flatters it." in text and text.count("Note") == 1
    )
    (place / "good" / "trained-rows.npy").unlink()
    assert board(place, "good")["runs"][0]["rows_seen_in_training"] is None


@pytest.mark.parametrize(
    ("kind", "told", "names", "named"),
    [
        (ConfigError, "give each run once; found none", [], {}),
        (ConfigError, "give each run once; found .*good, .*good", ["good", "good"], {}),
        (ArtifactError, "nowhere: there is no such folder", ["nowhere"], {}),
        (ConfigError, "--split 'train': allowed are test and valid", ["good"], {"split": "train"}),
        (ConfigError, "--metric 'f2': there is no such metric", ["good"], {"metric": "f2"}),
        (DataError, "has no task.yaml. Give --data", ["good"], {"data": "nowhere"}),
        (ConfigError, "is a run, and its figures are those of its own validation", ["good"], {"out": "bad"}),
        (ConfigError, "lies in the input", ["good"], {"out": "prompts/board"}),
    ],
)
def test_wrong_arguments_are_refused(
    place: Path, kind: type[LlmClfError], told: str, names: list[str], named: dict[str, str]
) -> None:
    before = sorted(place.rglob("*"))
    paths = {name: place / value if name in ("data", "out") else value for name, value in named.items()}
    with pytest.raises(kind, match=told):
        board(place, *names, **paths)
    assert sorted(place.rglob("*")) == before


def test_runs_of_other_labels_and_instructions_are_refused(place: Path) -> None:
    for name, old, new, told in (
        ("labels", '["0", "1"]', '["0", "1", "2"]', "its labels are 0, 1, 2; those of"),
        ("asked", "Medical? 1 or 0", "Is it?", "asked cannot take part: .*the instruction is 'Medical"),
    ):
        (place / "other.yaml").write_text((place / "task.yaml").read_text().replace(old, new))
        llm_clf.build_prompts(place / "rows.jsonl", task=place / "other.yaml", out=place / f"p-{name}")
        llm_clf.baseline_tfidf(place / f"p-{name}", out=place / name)
        with pytest.raises(LlmClfError, match=told):
            board(place, "good", name)


def test_rows_without_any_label_are_refused(place: Path) -> None:
    file = place / "prompts" / "test.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        del record["output"]
    for content in ("", "".join(json.dumps(record) + "\n" for record in records)):
        file.write_text(content)
        with pytest.raises(DataError, match="has no row with a label, so nothing can be measured"):
            board(place, "good")


@pytest.mark.slow
def test_a_language_model_takes_part_with_its_base(place: Path, base: Path) -> None:
    settings = ["train.epochs=1", "data.max_length=96", "model.dtype=fp32"]
    llm_clf.finetune(place / "prompts", out=place / "llm", model=str(base), set=settings)
    found = board(place, "llm", "good")
    (entry,) = [entry for entry in found["runs"] if entry["kind"] == "lora"]
    sizes = [sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in (place / "llm", base)]
    assert entry["size_bytes"] == sum(sizes)
    valid = board(place, "llm", split="valid")
    assert (
        f"Note: {place / 'llm'} kept what was best on validation rows, which flatters it here."
        in command.leaderboard_text(valid)
    )
