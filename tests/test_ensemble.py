"""The ensemble: how scores are combined and weights chosen, and the run that stores it."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

import llm_clf
from llm_clf.baselines import ensemble as combining
from llm_clf.baselines.ensemble import WeightedMean, choose, combination_of, equal_weights
from llm_clf.commands import scoring
from llm_clf.decisions.predictions import read_predictions
from llm_clf.errors import ArtifactError, ConfigError, DataError, LlmClfError
from llm_clf.evaluation.intervals import measure
from llm_clf.files import file_hash, partial_name
from llm_clf.prompting.prompts import Prompt
from llm_clf.runs import KINDS, count_trained_rows, save_trained_rows

WORDS = {
    "0": ["steel", "star", "court", "bridge", "engine", "market"],
    "1": ["heart", "lung", "fever", "dose", "patient", "trial"],
}

# --- the mathematics --------------------------------------------------------------------------------------------------


def scores_of(*probs: Any) -> np.ndarray:
    """Return scores of members from their probabilities, shape `(members, rows, labels)`."""
    return np.log(np.array(probs, dtype=np.float32))


def some_scores(labels: int, rows: int, seed: int, sure: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return scores of members that know so much of the labels, and the labels."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(labels, size=rows)
    logits = draw.normal(size=(len(sure), rows, labels))
    logits[:, np.arange(rows), truth] += np.array(sure)[:, None]
    return logits.astype(np.float32), truth


def loss_of(log_probs: np.ndarray, truth: np.ndarray) -> float:
    return float(-log_probs[np.arange(len(truth)), truth].mean())


def test_means_by_hand() -> None:
    scores = scores_of([[0.9, 0.1]], [[0.5, 0.5]])
    assert np.exp(WeightedMean("mean", (0.25, 0.75)).combine(scores)) == pytest.approx(np.array([[0.6, 0.4]]))
    # The mean of the log-odds ln(9) and 0.
    expected = expit(0.25 * logit(0.9))
    assert np.exp(WeightedMean("log-odds", (0.25, 0.75)).combine(scores))[0, 0] == pytest.approx(expected)


def test_of_three_labels_the_mean_of_logarithms_is_normalised() -> None:
    one, other = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.2, 0.6])
    found = np.exp(WeightedMean("log-odds", (0.5, 0.5)).combine(scores_of([one], [other])))[0]
    assert found == pytest.approx(np.sqrt(one * other) / np.sqrt(one * other).sum(), rel=1e-5)


def test_scores_are_normalised_over_labels_first() -> None:
    scores = scores_of([[0.09, 0.01]], [[0.4, 0.4]])
    assert np.exp(equal_weights("mean", 2).combine(scores)) == pytest.approx(np.array([[0.7, 0.3]]))


@pytest.mark.parametrize("method", ["mean", "log-odds"])
def test_a_member_that_says_never_is_not_infinitely_wrong(method: Any) -> None:
    scores = np.array([[[0.0, -708.0]], [[np.log(0.01), np.log(0.99)]]], dtype=np.float32)
    found = equal_weights(method, 2).combine(scores)
    assert np.isfinite(found).all() and -9 < found[0, 1] < 0


@pytest.mark.parametrize("method", ["mean", "log-odds"])
@pytest.mark.parametrize("labels", [2, 4])
def test_the_chosen_weights_have_the_least_log_loss(method: Any, labels: int) -> None:
    scores, truth = some_scores(labels, 300, 1, (1.0, 2.0))
    found = choose(method, scores, truth).combination
    assert isinstance(found, WeightedMean) and sum(found.weights) == pytest.approx(1)
    losses = [
        loss_of(WeightedMean(method, (weight, 1 - weight)).combine(scores), truth) for weight in np.linspace(0, 1, 401)
    ]
    assert loss_of(found.combine(scores), truth) <= min(losses) + 1e-6
    assert found.weights[0] == pytest.approx(np.linspace(0, 1, 401)[int(np.argmin(losses))], abs=0.01)


@pytest.mark.parametrize("method", ["mean", "log-odds"])
def test_a_member_that_knows_nothing_weighs_nothing(method: Any) -> None:
    scores, truth = some_scores(2, 400, 2, (6.0, 0.0, 0.0))
    found = choose(method, scores, truth).combination
    assert isinstance(found, WeightedMean) and found.weights[0] > 0.95


@pytest.mark.parametrize("labels", [2, 3])
def test_stacking_is_logistic_regression_on_the_scores(labels: int) -> None:
    scores, truth = some_scores(labels, 200, 3, (1.0, 2.0))
    found = choose("stacking", scores, truth).combination
    logs = scores.astype(np.float64) - np.log(np.exp(scores.astype(np.float64)).sum(axis=2, keepdims=True))
    features = np.concatenate(list(logs - logs.mean(axis=2, keepdims=True)), axis=1)
    expected = LogisticRegression(max_iter=10_000).fit(features, truth).predict_proba(features)
    assert np.exp(found.combine(scores)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", ["mean", "log-odds", "stacking"])
def test_held_out_scores_are_of_choices_made_without_the_row(method: Any) -> None:
    scores, truth = some_scores(2, 100, 4, (0.5, 1.0, 1.5))
    chosen = choose(method, scores, truth)
    folds = combining._folds(truth)
    assert sorted(row for _, rest in folds for row in rest) == list(range(100)) and len(folds) == 5
    for train, rest in folds:
        alone = choose(method, scores[:, train], truth[train]).combination
        assert chosen.held_out[rest] == pytest.approx(alone.combine(scores[:, rest]))


def test_of_members_that_know_nothing_stacking_looks_good_on_its_own_rows_only() -> None:
    own, held_out = [], []
    for seed in range(10):
        scores, truth = some_scores(2, 60, seed, (0.0,) * 8)
        chosen = choose("stacking", scores, truth)
        own.append(loss_of(chosen.combination.combine(scores), truth))
        held_out.append(loss_of(chosen.held_out, truth))
    assert np.mean(own) < np.log(2) - 0.05 and np.mean(held_out) > np.log(2)


@pytest.mark.parametrize("method", ["mean", "log-odds", "stacking"])
def test_few_rows_give_equal_weights(method: Any) -> None:
    scores, truth = some_scores(2, 49, 6, (0.0, 3.0))
    chosen = choose(method, scores, truth)
    assert chosen.too_few == "49 labelled validation rows are too few to choose by, at least 50 are needed"
    assert chosen.combination == equal_weights(method, 2)
    assert chosen.held_out == pytest.approx(chosen.combination.combine(scores))


def test_a_rare_label_keeps_stacking_off_and_not_the_mean() -> None:
    scores, truth = some_scores(2, 80, 7, (1.0, 1.0, 1.0))
    three = np.concatenate([scores, np.full((3, 80, 1), -9, dtype=np.float32)], axis=2)
    truth[:2] = 2
    assert choose("stacking", three, truth).too_few == (
        "stacking needs at least 5 validation rows of every label, and one has 2"
    )
    assert choose("mean", three, truth).too_few is None


@pytest.mark.parametrize("method", ["mean", "log-odds", "stacking"])
def test_what_is_stored_is_what_was_chosen(method: Any) -> None:
    scores, truth = some_scores(3, 90, 8, (1.0, 2.0))
    chosen = choose(method, scores, truth).combination
    again = combination_of(json.loads(json.dumps(chosen.facts())), 2, 3)
    assert again == chosen and np.array_equal(again.combine(scores), chosen.combine(scores))
    for members, labels in ((3, 3), (2, 4)):
        if (members, labels) != (2, 4) or method == "stacking":
            with pytest.raises(ValueError, match="numbers where"):
                combination_of(chosen.facts(), members, labels)


# --- rows that a run learned from -------------------------------------------------------------------------------------


def test_trained_rows_are_known_by_their_texts(tmp_path: Path) -> None:
    def prompts(*texts: str) -> list[Prompt]:
        return [Prompt(str(number), text, None, {}) for number, text in enumerate(texts)]

    save_trained_rows(tmp_path, prompts("a b", "c", "c", "ｆｕｌｌ"))
    assert count_trained_rows(tmp_path, prompts("c", "d", "a  b\n", "full", "e")) == 3
    assert (tmp_path / "trained-rows.npy").stat().st_size == 128 + 3 * 8
    assert count_trained_rows(tmp_path / "nowhere", prompts("c")) is None
    for content in (b"", b"junk", (tmp_path / "trained-rows.npy").read_bytes()[:-5]):
        (tmp_path / "trained-rows.npy").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"trained-rows.npy: is damaged: "):
            count_trained_rows(tmp_path, prompts("c"))


# --- the run ----------------------------------------------------------------------------------------------------------


def noisy(folder: Path, *, count: int = 320) -> Path:
    """Write rows of two labels that words tell apart, one in eight of them wrong."""
    draw = random.Random(1)
    file = folder / "papers.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        for number in range(count):
            label = str(number % 2)
            words = [*draw.sample(WORDS[label], 2), *draw.sample(WORDS[str(1 - number % 2)], 1), f"n{number}"]
            told = label if draw.random() < 0.875 else str(1 - number % 2)
            row = {"uuid": f"r{number}", "title": words[0], "abstract": " ".join(words[1:]), "label": told}
            lines.write(json.dumps(row) + "\n")
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make prompts, two runs that learned from different rows, and an ensemble of both, once."""
    from conftest import SHORT_TASK

    folder = tmp_path_factory.mktemp("ensemble")
    (folder / "task.yaml").write_text(SHORT_TASK, encoding="utf-8")
    llm_clf.build_prompts(noisy(folder), task=folder / "task.yaml", out=folder / "prompts", split="0.5,0.25,0.25")
    lines = (folder / "prompts" / "train.jsonl").read_text().splitlines(keepends=True)
    for name, own in (("good", lines[:60]), ("poor", lines[60:])):
        shutil.copytree(folder / "prompts", folder / name)
        (folder / name / "train.jsonl").write_text("".join(own))
        llm_clf.baseline_tfidf(folder / name, out=folder / "runs" / name)
    llm_clf.ensemble(runs(folder), data=folder / "prompts", out=folder / "runs" / "both", method="mean")
    return folder


def runs(folder: Path) -> list[Path]:
    return [folder / "runs" / "good", folder / "runs" / "poor"]


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """Return a folder of one's own with all of it."""
    shutil.copytree(made, tmp_path / "place")
    return tmp_path / "place"


def json_of(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_run_folder_is_like_any_other(made: Path) -> None:
    run = made / "runs" / "both"
    assert {file.name for file in run.iterdir()} == {
        "task.yaml",
        "config.yaml",
        "run.json",
        "metrics.json",
        "predictions-valid.parquet",
        "scores-valid.npy",
        "ensemble.json",
        "trained-rows.npy",
    }
    facts, stored = json_of(run / "run.json"), json_of(run / "ensemble.json")
    assert facts["kind"] == "ensemble" and facts["name"] == "both" and facts["rows"] == {"train": 80, "valid": 80}
    assert facts["ensemble"]["hash"] == file_hash(run / "ensemble.json")
    assert [one["run"] for one in stored["members"]] == ["../good", "../poor"] and stored["method"] == "mean"
    assert stored["members"][0]["learned"] == file_hash(made / "runs" / "good" / "model.skops")
    members = sum(json_of(one / "run.json")["training"]["seconds"] for one in runs(made))
    assert facts["training"]["seconds"] >= members
    assert not list((made / "runs").glob("*.partial")) and not list((made / "runs").glob(".*"))


@pytest.mark.parametrize("method", ["mean", "log-odds", "stacking"])
def test_predict_on_the_validation_rows_gives_the_stored_file_exactly(made: Path, tmp_path: Path, method: Any) -> None:
    run = tmp_path / "run"
    metrics = llm_clf.ensemble(runs(made), data=made / "prompts", out=run, method=method)
    llm_clf.predict(run, made / "prompts" / "valid.jsonl", out=tmp_path / "valid.parquet")
    assert (tmp_path / "valid.parquet").read_bytes() == (run / "predictions-valid.parquet").read_bytes()
    # What it says at the top is of the same rows that chose the weights, and says so.
    again = llm_clf.evaluate(tmp_path / "valid.parquet")
    assert {name: metrics[name] for name in again} == again and metrics["in_sample"] is True
    assert metrics["cross_fitted"]["log_loss"] != metrics["log_loss"]
    assert metrics["cross_fitted"]["rows_with_gold"] == 80


def test_the_better_member_weighs_more_and_gain_is_tested(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = made / "runs" / "both", made / "told"
    weights = json_of(run / "ensemble.json")["weights"]
    assert weights[0] > weights[1] and sum(weights) == pytest.approx(1)
    metrics = json_of(run / "metrics.json")
    assert metrics["members"].keys() == {str(one) for one in runs(made)}
    for one in runs(made):
        own = measure(read_predictions(one / "predictions-valid.parquet"))
        assert metrics["members"][str(one)]["f1"] == own["f1"]
        assert metrics["members"][str(one)]["log_loss"] == pytest.approx(own["log_loss"], rel=1e-5)
    gain = metrics["gain"]["log_loss"]
    assert gain["a"] == str(runs(made)[0]) and gain["metrics"]["log_loss"]["b"] == metrics["cross_fitted"]["log_loss"]
    assert metrics["gain"]["f1"]["better"] is None
    capsys.readouterr()
    llm_clf.ensemble(runs(made), data=made / "prompts", out=out)
    shown = capsys.readouterr().err
    assert "chosen by log-loss on 80 validation rows. The ensemble's figures below are cross-fitted in 5 folds" in shown
    assert "No real difference in f1: " in shown and f"{runs(made)[0]} 0." in shown
    shutil.rmtree(out)


def test_the_prediction_is_the_mean_of_the_members(made: Path, tmp_path: Path) -> None:
    test = made / "prompts" / "test.jsonl"
    tables = []
    for run in (*runs(made), made / "runs" / "both"):
        llm_clf.predict(run, test, out=tmp_path / f"{run.name}.parquet")
        tables.append(read_predictions(tmp_path / f"{run.name}.parquet"))
    weights = json_of(made / "runs" / "both" / "ensemble.json")["weights"]
    expected = sum(weight * table.probs for weight, table in zip(weights, tables, strict=False))
    assert tables[2].probs == pytest.approx(expected, abs=1e-6) and tables[2].ids == tables[0].ids
    gold = [int(label) for label in tables[2].gold]
    measured = llm_clf.evaluate(tmp_path / "both.parquet")
    probs = tables[2].probs.astype(np.float64)
    expected_loss = log_loss(gold, probs / probs.sum(axis=1, keepdims=True))
    assert measured["log_loss"] == pytest.approx(expected_loss, rel=1e-4)
    assert llm_clf.compare(tmp_path / "good.parquet", tmp_path / "both.parquet")["rows"] == 80


def test_too_few_validation_rows_give_equal_weights(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (place / "prompts" / "valid.jsonl").read_text().splitlines(keepends=True)
    (place / "prompts" / "valid.jsonl").write_text("".join(lines[:20]))
    metrics = llm_clf.ensemble(runs(place), data=place / "prompts", out=place / "runs" / "new", method="stacking")
    stored = json_of(place / "runs" / "new" / "ensemble.json")
    assert stored["weights"] == [0.5, 0.5] and stored["method"] == "log-odds"
    shown = capsys.readouterr().err
    assert (
        "All members weigh the same: 20 labelled validation rows are too few" in shown and "cross-fitted" not in shown
    )
    assert metrics["in_sample"] is False and metrics["log_loss"] == pytest.approx(metrics["cross_fitted"]["log_loss"])
    # It learned from no row.
    assert count_trained_rows(place / "runs" / "new", [Prompt("0", "x", None, {})]) == 0
    llm_clf.predict(place / "runs" / "new", place / "prompts" / "valid.jsonl", out=place / "valid.parquet")
    stored_file = place / "runs" / "new" / "predictions-valid.parquet"
    assert (place / "valid.parquet").read_bytes() == stored_file.read_bytes()


def test_no_validation_rows_and_none_with_a_label(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    valid = place / "prompts" / "valid.jsonl"
    bare = "".join(
        json.dumps({name: cell for name, cell in json.loads(line).items() if name != "output"}) + "\n"
        for line in valid.read_text().splitlines()
    )
    for content, told in (("", "No validation rows"), (bare, "No validation row has a label")):
        valid.write_text(content)
        llm_clf.ensemble(runs(place), data=place / "prompts", out=place / "new", overwrite=True)
        assert told in capsys.readouterr().err
        assert json_of(place / "new" / "ensemble.json")["weights"] == [0.5, 0.5]
        llm_clf.predict(place / "new", place / "prompts" / "test.jsonl", out=place / "test.csv", overwrite=True)


def test_runs_and_members_may_move_together(place: Path) -> None:
    shutil.move(place / "runs", place / "elsewhere")
    run = place / "elsewhere" / "both"
    llm_clf.predict(run, place / "prompts" / "valid.jsonl", out=place / "valid.parquet")
    assert (place / "valid.parquet").read_bytes() == (run / "predictions-valid.parquet").read_bytes()


def predict_both(place: Path) -> None:
    llm_clf.predict(place / "runs" / "both", place / "prompts" / "test.jsonl", out=place / "out.csv")


def test_a_member_that_is_gone_is_refused(place: Path) -> None:
    shutil.move(place / "runs" / "poor", place / "moved")
    with pytest.raises(
        ArtifactError, match=r"both: was made of the run .*/runs/poor, and nothing is there. Move it back"
    ):
        predict_both(place)
    assert not (place / "out.csv").exists() and not partial_name(place / "out.csv").exists()


def test_a_member_that_is_another_run_now_is_refused(place: Path) -> None:
    llm_clf.baseline_tfidf(place / "prompts", out=place / "runs" / "poor", overwrite=True)
    with pytest.raises(ArtifactError, match="runs/poor, and what is there now has learned something else"):
        predict_both(place)


def test_a_member_that_was_changed_is_refused(place: Path) -> None:
    file = place / "runs" / "poor" / "model.skops"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ArtifactError, match="runs/poor, which cannot be used: .*has changed since the training"):
        predict_both(place)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop("weights"),
        lambda facts: facts.update(weights=[1.0]),
        lambda facts: facts.update(method="vote"),
        lambda facts: facts.update(weights=[float("nan"), 1.0]),
        lambda facts: facts.update(members=3),
    ],
)
def test_a_damaged_ensemble_file_is_refused(place: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file, run = place / "runs" / "both" / "ensemble.json", place / "runs" / "both" / "run.json"
    stored = json_of(file)
    change(stored)
    file.write_text(json.dumps(stored))
    with pytest.raises(ArtifactError, match=r"ensemble.json: has changed since the training"):
        predict_both(place)
    facts = json_of(run)
    facts["ensemble"]["hash"] = file_hash(file)
    run.write_text(json.dumps(facts))
    with pytest.raises(ArtifactError, match="ensemble.json: is not what `llm-clf ensemble` wrote: "):
        predict_both(place)


# --- interrupted ------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a test raises in place of a kill."""


def kill_at_member(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = scoring._score_alone, iter(range(100))

    def score(*words: Any, **named: Any) -> Any:
        if next(count) == number:
            raise Killed
        return original(*words, **named)

    monkeypatch.setattr(scoring, "_score_alone", score)


def test_a_killed_prediction_goes_on_with_the_next_member(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = place / "prompts" / "test.jsonl"
    llm_clf.predict(place / "runs" / "both", rows, out=place / "unbroken.csv")
    with monkeypatch.context() as patched:
        kill_at_member(1, patched)
        with pytest.raises(Killed):
            llm_clf.predict(place / "runs" / "both", rows, out=place / "out.csv")
    journal = partial_name(place / "out.csv")
    assert [file.name for file in journal.iterdir()] == ["member-0"]
    with pytest.raises(ConfigError, match="an interrupted job left this"):
        llm_clf.predict(place / "runs" / "both", rows, out=place / "out.csv")
    with pytest.raises(ArtifactError, match="is what another job left"):
        llm_clf.predict(place / "runs" / "good", rows, out=place / "out.csv", resume=True)
    before = (journal / "member-0").read_bytes()
    scorers: list[str] = []
    original = scoring._score_alone
    monkeypatch.setattr(
        scoring, "_score_alone", lambda source, *a, **k: scorers.append(k["journal"].name) or original(source, *a, **k)
    )
    llm_clf.predict(place / "runs" / "both", rows, out=place / "out.csv", resume=True)
    assert scorers == ["member-0", "member-1"] and before
    assert (place / "out.csv").read_bytes() == (place / "unbroken.csv").read_bytes() and not journal.exists()


def test_what_an_ensemble_left_is_overwritten_by_any_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = place / "prompts" / "test.jsonl"
    with monkeypatch.context() as patched:
        kill_at_member(1, patched)
        with pytest.raises(Killed):
            llm_clf.predict(place / "runs" / "both", rows, out=place / "out.csv")
    llm_clf.predict(place / "runs" / "good", rows, out=place / "out.csv", overwrite=True)
    assert (place / "out.csv").is_file() and not partial_name(place / "out.csv").exists()


def test_a_killed_ensemble_goes_on_and_is_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = place / "runs" / "new"
    with monkeypatch.context() as patched:
        kill_at_member(1, patched)
        with pytest.raises(Killed):
            llm_clf.ensemble(runs(place), data=place / "prompts", out=out, method="mean")
    assert (partial_name(out) / "checkpoints" / "member-0").is_file()
    with pytest.raises(ConfigError, match="an interrupted command left this"):
        llm_clf.ensemble(runs(place), data=place / "prompts", out=out)
    llm_clf.ensemble(runs(place), data=place / "prompts", out=out, method="mean", resume=True)
    for name in ("ensemble.json", "predictions-valid.parquet"):
        assert (out / name).read_bytes() == (place / "runs" / "both" / name).read_bytes()
    assert not (out / "checkpoints").exists() and not partial_name(out).exists()


def test_resume_changes_nothing_that_is_finished(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "runs" / "both"
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert llm_clf.ensemble(runs(place), data=place / "prompts", out=out, resume=True)["rows"] == 80
    assert "nothing to do" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_nothing_is_left_where_no_member_can_be_scored(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(place.rglob("*"))
    kill_at_member(0, monkeypatch)
    with pytest.raises(Killed):
        llm_clf.ensemble(runs(place), data=place / "prompts", out=place / "runs" / "new")
    assert sorted(place.rglob("*")) == before


def test_what_a_training_left_is_not_taken_for_an_ensembles(place: Path) -> None:
    checkpoint = partial_name(place / "runs" / "new") / "checkpoints" / "step-4"
    checkpoint.mkdir(parents=True)
    with pytest.raises(ConfigError, match="an interrupted command left this"):
        llm_clf.ensemble(runs(place), data=place / "prompts", out=place / "runs" / "new", resume=True)
    assert checkpoint.is_dir()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(place: Path, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return a function that asserts that an ensemble is refused, and that nothing was changed."""

    def check(kind: type[LlmClfError], told: str, members: list[Path], **named: Any) -> None:
        before = sorted(place.rglob("*"))
        with pytest.raises(kind, match=told):
            llm_clf.ensemble(members, **({"data": place / "prompts", "out": place / "runs" / "new"} | named))
        assert sorted(place.rglob("*")) == before

    return check


def test_fewer_than_two_runs_are_refused(place: Path, refused: Callable[..., None]) -> None:
    good = place / "runs" / "good"
    for members in ([], [good], [good, good], [good, place / "runs" / ".." / "runs" / "good"]):
        refused(ConfigError, "needs two different runs or more, each given once", members)


def test_an_ensemble_is_no_member(place: Path, refused: Callable[..., None]) -> None:
    refused(ConfigError, "both: is an ensemble itself", [place / "runs" / "good", place / "runs" / "both"])


def test_an_ensemble_does_not_replace_a_member(place: Path, refused: Callable[..., None]) -> None:
    refused(ConfigError, "is the input", runs(place), out=place / "runs" / "good", overwrite=True)


def test_other_arguments_are_refused(place: Path, refused: Callable[..., None]) -> None:
    refused(ConfigError, "--method 'vote': allowed are mean, log-odds, stacking", runs(place), method="vote")
    refused(ArtifactError, "nowhere: there is no such folder", [*runs(place), place / "nowhere"])
    refused(DataError, "has no task.yaml. Give --data a folder", runs(place), data=place / "runs")
    refused(ConfigError, "something is already there", runs(place), out=place / "runs" / "both")


def with_task(place: Path, name: str, old: str, new: str) -> Path:
    """Return a run that was trained on prompts of a changed task."""
    task = (place / "task.yaml").read_text()
    assert old in task
    (place / "other.yaml").write_text(task.replace(old, new))
    llm_clf.build_prompts(place / "papers.jsonl", task=place / "other.yaml", out=place / name, split="0.5,0.25,0.25")
    llm_clf.baseline_tfidf(place / name, out=place / "runs" / name)
    return place / "runs" / name


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('labels: ["0", "1"]', 'labels: ["0", "1", "2"]', "its labels are 0, 1, 2; those of .* are 0, 1"),
        ('labels: ["0", "1"]', 'labels: ["1", "0"]', "its labels are 1, 0; those of"),
        ("{title}:{abstract}", "{title} {abstract}", "was trained on inputs of the form '{title} {abstract}'"),
    ],
)
def test_members_of_another_task_are_refused(
    place: Path, refused: Callable[..., None], old: str, new: str, told: str
) -> None:
    other = with_task(place, "other", old, new)
    refused(ConfigError, told, [place / "runs" / "good", other])


def test_another_instruction_matters_to_language_models_alone(
    place: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = with_task(place, "other", "Medical? 1 or 0", "Is it?")
    llm_clf.ensemble([place / "runs" / "good", other], data=place / "prompts", out=place / "asked")
    monkeypatch.setitem(KINDS, "tfidf", replace(KINDS["tfidf"], reads_instruction=True))
    refused(ConfigError, "was trained on the instruction 'Is it.'; that of", [place / "runs" / "good", other])


def test_a_member_that_saw_validation_rows_is_refused(place: Path, refused: Callable[..., None]) -> None:
    shutil.copytree(place / "prompts", place / "leaky")
    with open(place / "leaky" / "train.jsonl", "a", encoding="utf-8") as lines:
        lines.write("".join((place / "prompts" / "valid.jsonl").read_text().splitlines(keepends=True)[:7]))
    (place / "leaky" / "valid.jsonl").write_text("")
    llm_clf.baseline_tfidf(place / "leaky", out=place / "runs" / "leaky")
    refused(
        ConfigError,
        "leaky: was trained on 7 of the 80 validation rows of",
        [place / "runs" / "good", place / "runs" / "leaky"],
    )


def test_a_run_that_does_not_tell_its_rows_is_taken_with_a_warning(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "runs" / "poor" / "trained-rows.npy").unlink()
    llm_clf.ensemble(runs(place), data=place / "prompts", out=place / "runs" / "new")
    shown = capsys.readouterr().err
    assert shown.count("does not tell which rows it was trained on") == 1 and "runs/poor does not tell" in shown


def test_settings_and_generation_are_refused(place: Path) -> None:
    rows = place / "prompts" / "test.jsonl"
    with pytest.raises(ConfigError, match="is a run of kind ensemble, which has no base"):
        llm_clf.predict(place / "runs" / "both", rows, out=place / "o.csv", set=["predict.batch_tokens=5"])
    with pytest.raises(ConfigError, match="writes no answers: it is no language model"):
        llm_clf.predict(place / "runs" / "both", rows, out=place / "o.csv", decode="generate")
    with pytest.raises(ConfigError, match="is no language model, so there is nobody to talk to"):
        llm_clf.chat(place / "runs" / "both", once="hello")
    with pytest.raises(ConfigError, match="is a run of kind ensemble"):
        llm_clf.merge(place / "runs" / "both", out=place / "model")


# --- with a language model --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_language_model_is_a_member_like_any_other(place: Path, base: Path) -> None:
    settings = ["train.epochs=1", "data.max_length=96", "model.dtype=fp32"]
    llm_clf.finetune(place / "prompts", out=place / "runs" / "llm", model=str(base), set=settings)
    members = [place / "runs" / "llm", place / "runs" / "good"]
    metrics = llm_clf.ensemble(members, data=place / "prompts", out=place / "runs" / "new")
    llm_clf.predict(place / "runs" / "new", place / "prompts" / "valid.jsonl", out=place / "valid.parquet")
    stored = place / "runs" / "new" / "predictions-valid.parquet"
    assert (place / "valid.parquet").read_bytes() == stored.read_bytes()
    assert metrics["members"][str(members[0])]["rows"] == 80
    assert json_of(place / "runs" / "new" / "ensemble.json")["members"][0]["kind"] == "lora"
