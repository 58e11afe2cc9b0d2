"""A cross-validation: who falls where, rows that are predicted by who did not see them, and a run like any other."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import word_prompts

import llm_clf
from llm_clf.baselines.ensemble import equal_weights
from llm_clf.commands import folds as folds_module
from llm_clf.commands import lora_training
from llm_clf.commands.leaderboard import leaderboard_text
from llm_clf.decisions.predictions import read_predictions
from llm_clf.errors import ArtifactError, ConfigError
from llm_clf.files import partial_name
from llm_clf.prompting.folds import fold_rows
from llm_clf.prompting.prompts import Prompt, read_split
from llm_clf.prompting.tasks import load_task
from llm_clf.runs import count_trained_rows

FAST = ["train.epochs=1", "train.batch_size=8", "train.learning_rate=0.004", "model.dtype=fp32"]


def rows_of(*labels: str) -> list[Prompt]:
    return [Prompt(str(number), f"text {number}", label, {}) for number, label in enumerate(labels)]


# --- who falls where --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 5])
def test_every_row_is_in_one_fold_and_labels_are_spread(count: int) -> None:
    rows = rows_of(*"0001" * 25)
    folds = fold_rows(rows, count, 42)
    assert sorted(row for fold in folds for row in fold) == list(range(100)) and len(folds) == count
    for fold in folds:
        assert fold == sorted(fold) and len(fold) == 100 // count
        ones = Counter(rows[row].label for row in fold)["1"]
        assert abs(ones - 25 / count) < 1


def test_folds_depend_on_texts_and_seed_alone() -> None:
    rows = rows_of(*"01" * 20)
    mixed = random.Random(1).sample(rows, len(rows))
    plain, other = fold_rows(rows, 4, 42), fold_rows(mixed, 4, 42)
    assert [{rows[n].id for n in fold} for fold in plain] == [{mixed[n].id for n in fold} for fold in other]
    assert fold_rows(rows, 4, 43) != plain


def test_equal_texts_stay_together_whatever_their_labels() -> None:
    texts = [f"text {number // 3}" for number in range(60)]
    rows = [Prompt(str(n), text + " " * (n % 3), str(n % 2), {}) for n, text in enumerate(texts)]
    for fold in fold_rows(rows, 5, 42):
        assert all(count == 3 for count in Counter(texts[row] for row in fold).values())


@pytest.mark.parametrize(("labels", "count"), [("0101", 5), ("0001", 2), ("0" * 9 + "1", 3)])
def test_rows_that_are_too_few_are_refused(labels: str, count: int) -> None:
    with pytest.raises(ConfigError, match=rf"--folds {count}: the {len(labels)} training rows, .* are too few"):
        fold_rows(rows_of(*labels), count, 42)


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_base: Callable[..., Path]) -> Path:
    """Make prompts and a run of three folds, once."""
    folder = tmp_path_factory.mktemp("folds")
    shutil.copytree(make_base("glm"), folder / "base")
    word_prompts(folder, rows=40, lengths=5, split="0.6,0.2,0.2")
    finetune(folder, folder / "run")
    return folder


def finetune(folder: Path, out: Path, **more: Any) -> dict[str, Any]:
    words: dict[str, Any] = {"model": str(folder / "base"), "set": FAST, "folds": 3} | more
    return llm_clf.finetune(folder / "prompts", out=out, **words)


def json_of(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def train_rows(folder: Path) -> list[Prompt]:
    return read_split(folder / "prompts", "train", load_task(folder / "task.yaml"))


def test_the_run_holds_the_runs_of_its_folds(made: Path) -> None:
    run = made / "run"
    assert {file.name for file in run.iterdir()} == {
        "task.yaml",
        "config.yaml",
        "run.json",
        "metrics.json",
        "predictions-valid.parquet",
        "scores-valid.npy",
        "decisions.json",
        "predictions-folds.parquet",
        "ensemble.json",
        "trained-rows.npy",
        "folds",
    }
    facts, stored = json_of(run / "run.json"), json_of(run / "ensemble.json")
    assert facts["kind"] == "ensemble" and facts["name"] == "run"
    assert facts["folds"] == {"count": 3, "rows": [8, 8, 8]} and facts["rows"]["train"] == 24
    each = [json_of(run / "folds" / str(number) / "run.json") for number in (1, 2, 3)]
    speeds = [fold["training"]["rows_per_second"] for fold in each]
    assert min(speeds) <= facts["training"]["rows_per_second"] <= max(speeds)
    assert facts["peak_memory"]["resident_bytes"] == max(fold["peak_memory"]["resident_bytes"] for fold in each)
    assert [one["run"] for one in stored["members"]] == ["folds/1", "folds/2", "folds/3"]
    assert stored["method"] == "log-odds" and stored["weights"] == [1 / 3] * 3
    assert not list(run.rglob("checkpoints")) and not list(run.rglob("inputs.json"))
    assert not partial_name(run).exists()


def test_every_row_is_predicted_by_the_model_that_did_not_see_it(made: Path, tmp_path: Path) -> None:
    rows, table = train_rows(made), read_predictions(made / "run" / "predictions-folds.parquet")
    assert table.ids == [row.id for row in rows] and table.gold == [row.label for row in rows]
    assert table.probs is not None
    for number, fold in enumerate(fold_rows(rows, 3, 42), 1):
        held_out, own = [rows[row] for row in fold], made / "run" / "folds" / str(number)
        assert count_trained_rows(own, held_out) == 0 and count_trained_rows(own, rows) == 16
        lines = (made / "prompts" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "held.jsonl").write_text("".join(lines[row] for row in fold), encoding="utf-8")
        llm_clf.predict(own, tmp_path / "held.jsonl", out=tmp_path / f"{number}.parquet")
        alone = read_predictions(tmp_path / f"{number}.parquet").probs
        assert alone is not None and np.array_equal(table.probs[fold], alone)


def test_metrics_are_those_of_the_folds(made: Path) -> None:
    metrics = json_of(made / "run" / "metrics.json")
    folds = metrics["folds"]
    assert folds["pooled"] == llm_clf.evaluate(made / "run" / "predictions-folds.parquet")
    own = llm_clf.evaluate(made / "run" / "predictions-valid.parquet")
    assert {name: metrics[name] for name in own} == own
    assert [each["rows"] for each in folds["each"]] == [8, 8, 8]
    for name in ("accuracy", "f1", "log_loss"):
        values = [each[name] for each in folds["each"]]
        assert folds["spread"][name]["mean"] == pytest.approx(np.mean(values))
        assert folds["spread"][name]["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert folds["pooled"]["accuracy"] == pytest.approx(folds["spread"]["accuracy"]["mean"])


def test_it_predicts_the_mean_of_its_folds_wherever_it_is(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "moved")
    valid = made / "prompts" / "valid.jsonl"
    llm_clf.predict(tmp_path / "moved", valid, out=tmp_path / "valid.parquet")
    assert (tmp_path / "valid.parquet").read_bytes() == (made / "run" / "predictions-valid.parquet").read_bytes()
    parts = []
    for number in (1, 2, 3):
        stored = read_predictions(made / "run" / "folds" / str(number) / "predictions-valid.parquet").probs
        assert stored is not None
        parts.append(np.log(stored))
    mean = np.exp(equal_weights("log-odds", 3).combine(np.array(parts)))
    assert read_predictions(tmp_path / "valid.parquet").probs == pytest.approx(mean, abs=1e-6)
    assert llm_clf.verify(made / "run")["outcome"] == "equal"
    assert llm_clf.verify(made / "run" / "folds" / "2")["outcome"] == "equal"
    board = llm_clf.leaderboard([made / "run"], data=made / "prompts", split="valid")
    assert "run kept what was best on validation rows, which flatters it here" in leaderboard_text(board)
    files = [file for folder in ("run", "base") for file in (made / folder).rglob("*") if file.is_file()]
    assert board["runs"][0]["size_bytes"] == sum(file.stat().st_size for file in files)


def test_what_is_asked_of_decisions_holds_for_the_mean_of_the_folds(made: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {"task": made / "task.yaml", "out": tmp_path / "prompts", "split": "0.4,0.6,0"}
    llm_clf.build_prompts([made / "rows.csv"], **words)
    shutil.copytree(made / "base", tmp_path / "base")
    settings, run = ["decide.objective=f1", "decide.calibration=temperature"], tmp_path / "run"
    metrics = finetune(tmp_path, run, folds=2, set=[*FAST, *settings])
    assert metrics["measured_on"] == "validation rows, cross-fitted in 5 folds" and "folds" in metrics
    found = json_of(run / "decisions.json")
    assert found["rule"] == "threshold" and found["calibration"]["method"] == "temperature"
    assert found["rows"]["fitted"] == metrics["rows_with_gold"] >= 20
    valid = tmp_path / "prompts" / "valid.jsonl"
    llm_clf.predict(run, valid, out=tmp_path / "valid.parquet")
    assert (tmp_path / "valid.parquet").read_bytes() == (run / "predictions-valid.parquet").read_bytes()
    llm_clf.predict(run, valid, out=tmp_path / "same.parquet", set=settings)
    assert (tmp_path / "same.parquet").read_bytes() == (run / "predictions-valid.parquet").read_bytes()
    llm_clf.predict(run, valid, out=tmp_path / "prior.parquet", prior={"1": 0.01})
    moved, bare = (read_predictions(tmp_path / f"{name}.parquet").probs for name in ("prior", "valid"))
    assert moved is not None and bare is not None and (moved[:, 1] < bare[:, 1]).all()
    (run / "decisions.json").unlink()
    with pytest.raises(ArtifactError, match="decisions.json is missing from the run"):
        llm_clf.predict(run, valid, out=tmp_path / "no.csv")


def test_decisions_that_need_validation_rows_are_refused_without_any(made: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {"task": made / "task.yaml", "out": tmp_path / "prompts", "split": "0.8,0,0.2"}
    llm_clf.build_prompts([made / "rows.csv"], **words)
    shutil.copytree(made / "base", tmp_path / "base")
    with pytest.raises(ConfigError, match="decide.objective: is fitted on validation rows, and 0 of them have a label"):
        finetune(tmp_path, tmp_path / "run", folds=2, set=[*FAST, "decide.objective=f1"])


def test_without_validation_rows_it_has_the_figures_of_its_folds(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: dict[str, Any] = {"task": made / "task.yaml", "out": tmp_path / "prompts", "split": "0.8,0,0.2"}
    llm_clf.build_prompts([made / "rows.csv"], **words)
    shutil.copytree(made / "base", tmp_path / "base")
    assert finetune(tmp_path, tmp_path / "run", folds=2).keys() == {"folds"}
    assert "Training rows, each by the model of the 2 that did not see it" in capsys.readouterr().err
    assert len(read_predictions(tmp_path / "run" / "predictions-folds.parquet").ids) == 32
    llm_clf.predict(tmp_path / "run", tmp_path / "prompts" / "test.jsonl", out=tmp_path / "test.csv")


# --- interrupted ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a test raises in place of a kill."""


def kill_in(name: str, number: int, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = getattr(place, name), iter(range(1, 100))

    def call(*words: Any, **named: Any) -> Any:
        if next(count) == number:
            raise Killed
        return original(*words, **named)

    monkeypatch.setattr(place, name, call)


@pytest.mark.parametrize(
    ("place", "name", "number", "trained"),
    [(lora_training, "_fit", 2, 2), (folds_module, "score_rows", 2, 1), (folds_module, "score_members", 1, 0)],
    ids=["second training", "second scoring", "validation rows"],
)
def test_a_killed_run_goes_on_with_the_fold_it_was_in(
    place: Any, name: str, number: int, trained: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_in(name, number, place, patched)
        finetune(made, out)
    unfinished = partial_name(out)
    assert (unfinished / "folds" / "1" / "run.json").is_file()
    assert not (unfinished / "folds" / "1" / "checkpoints").exists()
    with pytest.raises(ConfigError, match="an interrupted training left this"):
        finetune(made, out)
    with pytest.raises(ConfigError, match="an interrupted cross-validation left this. Give its --folds"):
        finetune(made, out, resume=True, folds=None)
    with pytest.raises(ConfigError, match=r"cross-validation.folds \(then 3, now 2\)"):
        finetune(made, out, resume=True, folds=2)
    fits: list[Path] = []
    fit = lora_training._fit

    def noted(*words: Any) -> Any:
        fits.append(words[2])
        return fit(*words)

    monkeypatch.setattr(lora_training, "_fit", noted)
    finetune(made, out, resume=True)
    assert len(fits) == trained and not unfinished.exists()
    predictions = ("predictions-folds.parquet", "predictions-valid.parquet", "scores-valid.npy")
    for file in (*predictions, "ensemble.json", "decisions.json", "metrics.json"):
        assert (out / file).read_bytes() == (made / "run" / file).read_bytes(), file


def test_resume_changes_nothing_that_is_finished(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in (made / "run").rglob("*") if file.is_file()}
    assert "folds" in finetune(made, made / "run", resume=True)
    assert "nothing to do" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in (made / "run").rglob("*") if file.is_file()} == before
    with pytest.raises(ConfigError, match="is a run of kind ensemble, and this command makes one of kind lora"):
        finetune(made, made / "run", resume=True, folds=None)


def test_other_arguments_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--folds: a sweep compares its trials by the validation rows"):
        finetune(made, tmp_path / "run", sweep=tmp_path / "sweep.yaml")
    with pytest.raises(ConfigError, match="--folds 1: .* give 2 up"):
        finetune(made, tmp_path / "run", folds=1)
    with pytest.raises(ConfigError, match="--folds 25: the 24 training rows"):
        finetune(made, tmp_path / "run", folds=25)
    assert not any(tmp_path.iterdir())
