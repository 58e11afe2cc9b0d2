"""Decisions in a run: fitted, stored, applied by predict as in validation, refitted for other settings, refused."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from scipy.stats import binom
from sklearn.metrics import f1_score
from typer.testing import CliRunner, Result

import llm_clf
from llm_clf.cli import app
from llm_clf.commands.leaderboard import leaderboard_text
from llm_clf.config import DecideSettings
from llm_clf.config_loading import load_settings
from llm_clf.decisions.decide import probabilities
from llm_clf.decisions.decisions import Decisions, load_decisions
from llm_clf.decisions.fitting import cross_fit, fit_decisions
from llm_clf.decisions.predictions import read_predictions
from llm_clf.decisions.rules import MostProbable, Threshold
from llm_clf.decisions.stored import trained_shares
from llm_clf.errors import ArtifactError, ConfigError, DataError
from llm_clf.prompting.rows import read_rows

LABELS = ("0", "1")
WORDS = {"1": ["heart", "lung", "fever", "dose"], "0": ["steel", "star", "court", "bridge"]}


def scored(rows: int, labels: int = 2, *, temperature: float = 3.0, bias: float = 0.0, seed: int = 0):
    """Return scores that are too sure, and gold labels."""
    random = np.random.default_rng(seed)
    scores = log_softmax(random.normal(0, 3, (rows, labels)), axis=1).astype(np.float32)
    logits = scores / temperature + bias * np.eye(labels)[-1]
    truth = (random.random(rows)[:, None] > softmax(logits, axis=1).cumsum(axis=1)).sum(axis=1).clip(max=labels - 1)
    return scores, [str(label) for label in truth]


def fitted(scores: np.ndarray, gold: list[str], seed: int = 0, **settings: Any) -> Decisions:
    labels = [str(number) for number in range(scores.shape[1])]
    return fit_decisions(scores, gold, labels, DecideSettings.model_validate(settings), seed=seed)


def test_bare_decisions_are_softmax_and_the_most_probable_label() -> None:
    scores, _ = scored(50, 3)
    decided = Decisions.bare(["a", "b", "c"]).apply(scores)
    np.testing.assert_array_equal(decided.probs, probabilities(scores))
    assert (decided.choices == scores.argmax(axis=1)).all() and decided.answered.all() and decided.sets is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"calibration": "vector", "objective": "f1"},
        {"objective": {"costs": {"0": {"1": 1.0}, "1": {"0": 7.0}}}},
        {"abstain": {"error": 0.2}, "priors": {"1": 0.1}},
        {"abstain": {"coverage": 0.9}},
        {"threshold": 0.3, "abstain": 0.6},
    ],
    ids=str,
)
def test_decisions_come_back_from_their_file_to_the_last_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    scores, gold = scored(300)
    decisions = fitted(scores, gold, **settings)
    decisions.save(tmp_path / "decisions.json")
    again = load_decisions(tmp_path / "decisions.json", LABELS)
    assert again == decisions
    fresh, _ = scored(99, seed=5)
    one, other = decisions.apply(fresh), again.apply(fresh)
    assert one.probs.tobytes() == other.probs.tobytes() and (one.choices == other.choices).all()
    # Row by row as together.
    alone = [decisions.apply(fresh[row : row + 1]) for row in range(99)]
    assert b"".join(each.probs.tobytes() for each in alone) == one.probs.tobytes()
    assert [bool(each.answered[0]) for each in alone] == one.answered.tolist()


def test_files_that_are_damaged_or_for_other_labels_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "decisions.json"
    Decisions.bare(LABELS).save(file)
    with pytest.raises(ArtifactError, match="is for the labels 0, 1"):
        load_decisions(file, ("0", "2"))
    facts = json.loads(file.read_text())
    for broken in (
        {"rule": "?"},
        {"format": 99},
        {"calibration": {}},
        {"shift": [1]},
        {"calibration": {**facts["calibration"], "factors": [float("nan"), 1]}},
    ):
        file.write_text(json.dumps(facts | broken))
        with pytest.raises(ArtifactError, match="Train again|train again|Upgrade"):
            load_decisions(file, LABELS)


def test_a_fitted_threshold_beats_one_half_on_other_rows() -> None:
    scores, gold = scored(600, bias=-2.0)
    decisions = fitted(scores, gold, objective="f1")
    fresh, truth = scored(5000, bias=-2.0, seed=3)
    found = [str(choice) for choice in decisions.apply(fresh).choices]
    bare = [str(choice) for choice in fresh.argmax(axis=1)]
    assert f1_score(truth, found, pos_label="1") > f1_score(truth, bare, pos_label="1") + 0.05


def test_least_cost_holds_on_other_rows() -> None:
    scores, gold = scored(600)
    decisions = fitted(scores, gold, objective={"costs": {"0": {"1": 1.0}, "1": {"0": 5.0}}})
    fresh, labels = scored(5000, seed=3)
    truth = np.array(labels, dtype=int)

    def cost(choices: np.ndarray) -> float:
        return float(np.where(choices == truth, 0, np.where(truth == 1, 5.0, 1.0)).mean())

    probs = decisions.apply(fresh).probs[:, 1]
    found = cost(decisions.apply(fresh).choices)
    assert found < cost(fresh.argmax(axis=1)) - 0.1
    assert found < min(cost((probs >= threshold).astype(int)) for threshold in np.linspace(0.02, 0.98, 49)) + 0.03


def test_a_target_error_is_kept_about_on_other_rows_and_by_cross_fitting() -> None:
    scores, gold = scored(1000, 3, temperature=1.5)
    settings = DecideSettings.model_validate({"abstain": {"error": 0.1}})
    decisions = fit_decisions(scores, gold, ["0", "1", "2"], settings, seed=0)
    assert "would mean, with confidence 95 %, at most " in decisions.text()
    fresh, truth = scored(8000, 3, temperature=1.5, seed=4)
    decided = decisions.apply(fresh)
    right = decided.choices == np.array(truth, dtype=int)
    assert 0.05 < 1 - right[decided.answered].mean() < 0.14 and 0.1 < decided.answered.mean() < 0.95
    folds, _ = cross_fit(decisions, scores, gold, settings, seed=0)
    assert folds.answered.mean() == pytest.approx(decided.answered.mean(), abs=0.08)


def test_a_target_error_that_nothing_keeps_answers_nothing_and_says_so() -> None:
    scores, _ = scored(200)
    wrong = [str(1 - choice) for choice in scores.argmax(axis=1)]
    decisions = fitted(scores, wrong, calibration="none", abstain={"error": 0.01})
    assert not decisions.apply(scores).answered.any() and "nothing is answered" in decisions.text()


def test_cross_fitted_figures_are_not_those_in_sample() -> None:
    """On labels drawn without regard to the scores, what is fitted looks better than it is on the rows it saw."""
    scores, _ = scored(120)
    gold = [str(label) for label in np.random.default_rng(1).permutation([0] * 90 + [1] * 30)]
    settings = DecideSettings.model_validate({"calibration": "vector", "objective": "f1"})
    decisions = fit_decisions(scores, gold, LABELS, settings, seed=0)
    folds, _ = cross_fit(decisions, scores, gold, settings, seed=0)
    inside, outside = (
        f1_score(gold, [str(choice) for choice in one.choices], pos_label="1")
        for one in (decisions.apply(scores), folds)
    )
    assert outside < inside


def test_folds_of_labels_with_few_rows_each() -> None:
    scores, _ = scored(24, 8)
    gold = [str(number % 8) for number in range(24)]
    settings = DecideSettings(calibration="temperature", objective="f1")
    decisions = fit_decisions(scores, gold, [str(number) for number in range(8)], settings, seed=0)
    folds, calibrated = cross_fit(decisions, scores, gold, settings, seed=0)
    assert folds.probs.shape == calibrated.shape == (24, 8) and np.isfinite(folds.probs).all()


def test_rows_without_a_label_are_decided_as_predict_does() -> None:
    scores, gold = scored(200)
    some: list[str | None] = [label if row % 4 else None for row, label in enumerate(gold)]
    settings = DecideSettings(objective="f1")
    decisions = fit_decisions(scores, some, LABELS, settings, seed=0)
    folds, _ = cross_fit(decisions, scores, some, settings, seed=0)
    whole = decisions.apply(scores)
    assert (folds.choices[::4] == whole.choices[::4]).all() and (folds.probs[::4] == whole.probs[::4]).all()
    assert (folds.probs[1::4] != whole.probs[1::4]).any()


def test_priors_move_probabilities_as_bayes_says() -> None:
    scores, gold = scored(300)
    bare = fitted(scores, gold, calibration="none")
    trained = {"0": 0.5, "1": 0.5}
    settings = DecideSettings.model_validate({"calibration": "none", "priors": {"1": 0.02}})
    shifted = fit_decisions(scores, gold, LABELS, settings, seed=0, trained=trained)
    before, after = (one.apply(scores).probs.astype(np.float64) for one in (bare, shifted))
    expected = before * [0.98 / 0.5, 0.02 / 0.5]
    np.testing.assert_allclose(after, expected / expected.sum(axis=1, keepdims=True), rtol=1e-4, atol=1e-7)
    same = fit_decisions(scores, gold, LABELS, settings.model_copy(update={"priors": trained}), seed=0, trained=trained)
    np.testing.assert_allclose(same.apply(scores).probs, before, atol=1e-6)


def test_the_bound_of_a_target_error_is_said_to_count_rows_as_they_are() -> None:
    scores, gold = scored(300)
    assert "by decide.priors" not in fitted(scores, gold, abstain={"error": 0.2}).text()
    assert "by decide.priors" in fitted(scores, gold, abstain={"error": 0.2}, priors={"1": 0.1}).text()


def test_the_bound_of_a_target_error_is_that_of_the_binomial_distribution() -> None:
    scores = np.log(np.tile(np.array([[0.9, 0.1], [0.1, 0.9]], dtype=np.float32), (50, 1)))
    gold = ["1", *["1" if row % 2 else "0" for row in range(1, 100)]]
    told = fitted(scores, gold, calibration="none", abstain={"error": 0.05}).text()
    found = re.search(r"1 wrong among 100 answers of other rows .* at most ([\d.]+)%", told)
    # The share at which one mistake or none among 100 comes 5 times in 100.
    assert found is not None and binom.cdf(1, 100, float(found[1]) / 100) == pytest.approx(0.05, abs=0.003)


def test_biases_that_were_fitted_have_replaced_the_shares_of_training() -> None:
    scores, gold = scored(400, bias=-1.0)
    settings = DecideSettings.model_validate({"calibration": "vector", "priors": {"1": 0.05}})
    told, untold = (
        fit_decisions(scores, gold, LABELS, settings, seed=0, trained=shares) for shares in ({"0": 0.5, "1": 0.5}, None)
    )
    assert told.shift == untold.shift != (0.0, 0.0)


def test_rows_for_label_sets_are_kept_from_calibration() -> None:
    scores, gold = scored(301)
    decisions = fitted(scores, gold, calibration="temperature", abstain={"coverage": 0.9})
    assert decisions.rows == (151, 150)


def test_a_probability_that_is_just_reached_is_enough() -> None:
    level = np.zeros((1, 2), dtype=np.float32)
    assert replace(Decisions.bare(LABELS), smallest=0.5).apply(level).answered.all()
    sets = replace(Decisions.bare(LABELS), in_set=0.5).apply(level).sets
    assert sets is not None and sets.all()


def test_priors_correct_what_another_base_rate_breaks() -> None:
    scores, gold = scored(3000)
    fresh, labels = scored(30000, seed=8)
    truth = np.array(labels, dtype=int)
    keep = (truth == 0) | (np.random.default_rng(0).random(30000) < 0.05)
    fresh, truth = fresh[keep], truth[keep]
    share = float(truth.mean())
    settings = DecideSettings.model_validate({"priors": {"1": share}})
    shifted = fit_decisions(scores, gold, LABELS, settings, seed=0)
    plain = fit_decisions(scores, gold, LABELS, DecideSettings(), seed=0)
    assert shifted.apply(fresh).probs[:, 1].mean() == pytest.approx(share, abs=0.01)
    assert plain.apply(fresh).probs[:, 1].mean() > share + 0.1
    # A threshold is chosen for the rows that the run is for.
    aimed = fit_decisions(
        scores,
        gold,
        LABELS,
        DecideSettings.model_validate({"priors": {"1": share}, "objective": {"precision": 0.3}}),
        seed=0,
    )
    found = aimed.apply(fresh).choices
    assert truth[found == 1].mean() == pytest.approx(0.3, abs=0.08)


def test_shares_of_training_are_those_that_the_loss_weighed() -> None:
    counts = {"0": 90, "1": 10}
    train = load_settings().train
    assert trained_shares(counts, train) == {"0": 0.9, "1": 0.1}
    assert trained_shares(counts, train.model_copy(update={"class_weights": "balanced"})) == {"0": 0.5, "1": 0.5}
    assert trained_shares(counts, train.model_copy(update={"sampling": "balanced"})) == {"0": 0.5, "1": 0.5}
    assert trained_shares(counts, train.model_copy(update={"class_weights": {"1": 9.0}})) == {"0": 0.5, "1": 0.5}
    assert trained_shares(None, train) is None
    # A label that no row has was not trained on, however the others are weighed.
    balanced = train.model_copy(update={"class_weights": "balanced"})
    assert trained_shares({"0": 90, "1": 10, "2": 0}, balanced) == {"0": 0.5, "1": 0.5, "2": 0.0}


REFUSED = {
    "{threshold: 0.4, objective: f1}": "stands in place of decide.objective",
    "{threshold: 1.2}": "less than 1",
    "{objective: {precision: 1.5}}": r"expected none, f1, \{precision: 0.95\}",
    "{objective: best}": r"expected none, f1, \{precision: 0.95\}",
    "{abstain: {error: 2}}": r"\{error: 0.05\} or \{coverage: 0.9\}",
    "{abstain: {coverage: 0.9}, threshold: 0.5}": "a label set of one label is the answer",
    "{abstain: {coverage: 0.9}, priors: {a: 0.1}}": "rows like the validation rows only",
    "{calibration: platt}": "'auto', 'none', 'temperature' or 'vector'",
    "{priors: {a: 0}}": "greater than 0",
    "{costs: 5}": "no such setting",
}


@pytest.mark.parametrize("text", REFUSED)
def test_settings_that_cannot_be(text: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"decide: {text}\n")
    with pytest.raises(ConfigError, match=REFUSED[text]):
        load_settings([file])


UNFIT = [
    ({"objective": {"recall": 0.9}}, 3, 300, "chooses between two labels, and the task has 3"),
    ({"threshold": 0.4}, 3, 300, "chooses between two labels"),
    ({"objective": {"costs": {"0": {"1": 1}}}}, 2, 300, "nothing says what it costs to call a '1' a '0'"),
    ({"objective": {"costs": {"0": {"2": 1}}}}, 2, 300, "'2' is no label; the labels are 0, 1"),
    ({"priors": {"7": 0.1}}, 2, 300, "'7' is no label"),
    ({"priors": {"0": 0.5, "1": 0.6}}, 2, 300, "add up to 1.1; expected 1"),
    ({"priors": {"0": 0.7, "1": 0.5}}, 3, 300, "and less, as the other labels have a share too"),
    ({"objective": "f1"}, 2, 19, "19 of them have a label, of 2 kinds; at least 20"),
    ({"calibration": "temperature"}, 2, 10, "decide.calibration temperature: is fitted on validation rows"),
    ({"abstain": {"error": 0.1}}, 2, 0, "0 of them have a label"),
    (
        {"abstain": {"coverage": 0.99}},
        2,
        100,
        "takes 99 validation rows for itself in each of 5 folds, and 40 are left",
    ),
]


@pytest.mark.parametrize(("settings", "labels", "rows", "message"), UNFIT)
def test_settings_that_do_not_fit_task_or_rows(settings: dict[str, Any], labels: int, rows: int, message: str) -> None:
    scores, gold = scored(rows, labels) if rows else (np.empty((0, labels), dtype=np.float32), [])
    with pytest.raises(ConfigError, match=message):
        fitted(scores, gold, **settings)


def test_without_rows_what_needs_none_still_holds() -> None:
    empty = np.empty((0, 2), dtype=np.float32)
    decisions = fitted(empty, [], threshold=0.2, abstain=0.9)
    assert decisions.rule == Threshold(0.2) and decisions.smallest == 0.9 and not decisions.fitted
    with pytest.raises(ConfigError, match="neither training nor validation rows tell how frequent"):
        fitted(empty, [], priors={"1": 0.1})


@pytest.mark.slow
def test_label_sets_cover_as_often_as_they_promise_after_calibration() -> None:
    """2,000 draws of 300 validation rows; each is tried on 300 fresh rows."""
    covered = []
    for draw in range(2000):
        scores, gold = scored(600, 3, seed=draw)
        decisions = fitted(scores[:300], gold[:300], seed=draw, calibration="temperature", abstain={"coverage": 0.9})
        sets = decisions.apply(scores[300:]).sets
        assert sets is not None
        covered.append(sets[np.arange(300), np.array(gold[300:], dtype=int)].mean())
    assert np.mean(covered) == pytest.approx(0.9, abs=0.02)


# In a run.


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a prompts folder whose labels are wrong in a part of the rows, half of them to validate."""
    folder = tmp_path_factory.mktemp("noisy")
    random = np.random.default_rng(0)
    (folder / "task.yaml").write_text(
        'instruction: "Medical?"\ninput: "{text}"\nid_column: id\nlabel_column: label\nlabels: ["0", "1"]\ncut: text\n'
    )
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as lines:
        for number in range(400):
            meant = str(int(random.random() < 0.4))
            words = [random.choice(WORDS[meant if random.random() < 0.7 else str(1 - int(meant))]) for _ in range(3)]
            lines.write(json.dumps({"id": str(number), "text": f"{' '.join(words)} {number}", "label": meant}) + "\n")
    llm_clf.build_prompts(
        [folder / "rows.jsonl"], task=folder / "task.yaml", out=folder / "prompts", split="0.4,0.5,0.1"
    )
    return folder / "prompts"


Train = Callable[..., Path]


@pytest.fixture(scope="module")
def tfidf(noisy: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that makes a TF-IDF run with some settings; the same one for the same words."""
    made: dict[tuple[str, ...], Path] = {}

    def train(*settings: str) -> Path:
        if settings not in made:
            made[settings] = tmp_path_factory.mktemp("runs") / "run"
            llm_clf.baseline_tfidf(noisy, out=made[settings], set=settings)
        return made[settings]

    return train


EVERY_WAY = [
    (),
    ("decide.calibration=vector", "decide.objective=f1"),
    ("decide.objective={costs: {1: {0: 5}, 0: {1: 1}}}", "decide.abstain=0.7"),
    ("decide.abstain={error: 0.1}",),
    ("decide.abstain={coverage: 0.9}",),
    ("decide.priors={1: 0.1}", "decide.objective={recall: 0.9}"),
]


@pytest.mark.parametrize("settings", EVERY_WAY, ids=str)
def test_predict_gives_the_validation_predictions_byte_for_byte(
    settings: tuple[str, ...], tfidf: Train, noisy: Path, tmp_path: Path
) -> None:
    run = tfidf(*settings)
    llm_clf.predict(run, noisy / "valid.jsonl", out=tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == (run / "predictions-valid.parquet").read_bytes()


@pytest.mark.parametrize("settings", EVERY_WAY[1:], ids=str)
def test_settings_given_to_predict_decide_as_if_the_run_had_been_made_with_them(
    settings: tuple[str, ...], tfidf: Train, noisy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm_clf.predict(tfidf(), noisy / "test.jsonl", out=tmp_path / "one.csv", set=settings)
    shown = capsys.readouterr().err
    assert "Decisions fitted anew on the run's validation rows" in shown and "Validation rows, scored" in shown
    llm_clf.predict(tfidf(*settings), noisy / "test.jsonl", out=tmp_path / "other.csv")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "other.csv").read_bytes()


def test_raw_gives_what_comes_before_all_decisions(tfidf: Train, noisy: Path, tmp_path: Path) -> None:
    rows = noisy / "test.jsonl"
    llm_clf.predict(tfidf(*EVERY_WAY[2]), rows, out=tmp_path / "raw.csv", raw=True)
    llm_clf.predict(tfidf("decide.calibration=none"), rows, out=tmp_path / "bare.csv")
    assert (tmp_path / "raw.csv").read_bytes() == (tmp_path / "bare.csv").read_bytes()
    with pytest.raises(ConfigError, match="--raw: gives what comes before all decisions"):
        llm_clf.predict(tfidf(), rows, out=tmp_path / "no.csv", raw=True, prior={"1": 0.1})


def test_prior_is_the_setting_of_its_name(tfidf: Train, noisy: Path, tmp_path: Path) -> None:
    rows = noisy / "test.jsonl"
    llm_clf.predict(tfidf(), rows, out=tmp_path / "one.csv", prior={"1": 0.05})
    llm_clf.predict(tfidf(), rows, out=tmp_path / "other.csv", set=["decide.priors={1: 0.05}"])
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "other.csv").read_bytes()
    means = [
        read_predictions(file).probs[:, 1].mean()
        for file in (tmp_path / "one.csv", tfidf() / "predictions-valid.parquet")
    ]
    assert means[0] < means[1] / 2
    with pytest.raises(ConfigError, match="'2' is no label"):
        llm_clf.predict(tfidf(), rows, out=tmp_path / "no.csv", prior={"2": 0.05})


def test_the_command_line_takes_raw_and_prior(tfidf: Train, noisy: Path, tmp_path: Path) -> None:
    def command(name: str, *more: str) -> Result:
        words = ["predict", str(tfidf(*EVERY_WAY[1])), str(noisy / "test.jsonl"), "--out", str(tmp_path / name), *more]
        return CliRunner().invoke(app, words)

    assert command("raw.csv", "--raw").exit_code == command("prior.csv", "--prior", "0=0.9,1=0.1").exit_code == 0
    llm_clf.predict(tfidf(*EVERY_WAY[1]), noisy / "test.jsonl", out=tmp_path / "one.csv", prior={"0": 0.9, "1": 0.1})
    assert (tmp_path / "prior.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    for text, message in (
        ("1", "expected LABEL=SHARE"),
        ("1=2", "a share between 0 and 1"),
        ("=0.1", "expected LABEL=SHARE"),
        ("1=0.1,1=0.2", "names '1' more than once"),
        ("1=x", "such as 1=0.02"),
    ):
        with pytest.raises(ConfigError, match=message):
            raise command("no.csv", "--prior", text).exception or AssertionError


def test_figures_that_are_in_sample_are_called_so(
    tfidf: Train, noisy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    llm_clf.evaluate(tfidf(*EVERY_WAY[1]) / "predictions-valid.parquet")
    assert "these figures are in-sample" in capsys.readouterr().err
    shown = leaderboard_text(llm_clf.leaderboard([tfidf(*EVERY_WAY[1])], data=noisy, split="valid"))
    assert "were fitted on validation rows: in-sample" in shown
    assert "in-sample" not in leaderboard_text(llm_clf.leaderboard([tfidf(*EVERY_WAY[1])], data=noisy))


def test_headline_figures_are_cross_fitted_and_say_so(tfidf: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run = tfidf("decide.calibration=vector", "decide.objective=f1")
    metrics = json.loads((run / "metrics.json").read_text())
    inside = llm_clf.evaluate(run / "predictions-valid.parquet")
    assert metrics["measured_on"] == "validation rows, cross-fitted in 5 folds"
    assert metrics["rows_with_gold"] == inside["rows_with_gold"] == 200
    assert metrics["log_loss"] > inside["log_loss"]
    found = metrics["calibration"]
    assert found["method"] == "vector" and found["after_cross_fitted"]["log_loss"] == pytest.approx(metrics["log_loss"])
    bare = llm_clf.evaluate(tfidf("decide.calibration=none") / "predictions-valid.parquet")
    assert found["before"]["log_loss"] == pytest.approx(bare["log_loss"], rel=1e-5)
    curve = metrics["risk_coverage"]
    assert curve["coverage"][-1] == 1 and curve["risk"][-1] == pytest.approx(1 - metrics["accuracy"])


def test_what_is_printed_says_where_figures_come_from(noisy: Path, tmp_path: Path, capsys: Any) -> None:
    llm_clf.baseline_tfidf(noisy, out=tmp_path / "run", set=["decide.calibration=temperature", "decide.abstain=0.8"])
    shown = capsys.readouterr().err
    assert "Calibration: temperature " in shown and "calibrated (temperature), cross-fitted" in shown
    assert "cross-fitted in 5 folds: each is decided by what was fitted without it" in shown
    assert "% are answered" in shown


def test_without_anything_fitted_figures_are_those_of_the_stored_predictions(tfidf: Train) -> None:
    run = tfidf("decide.calibration=none")
    metrics, again = json.loads((run / "metrics.json").read_text()), llm_clf.evaluate(run / "predictions-valid.parquet")
    assert metrics["measured_on"] == "validation rows" and metrics["calibration"]["after_cross_fitted"] is None
    assert {name: metrics[name] for name in again} == again


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_label_sets_stand_in_every_format(suffix: str, tfidf: Train, noisy: Path, tmp_path: Path) -> None:
    file = tmp_path / f"sets{suffix}"
    llm_clf.predict(tfidf("decide.abstain={coverage: 0.9}"), noisy / "valid.jsonl", out=file)
    cells = [row.cells for row in read_rows([file])]
    assert list(cells[0])[-1] == "label_set" and {cell["label_set"] for cell in cells} <= {
        "[]",
        '["0"]',
        '["1"]',
        '["0", "1"]',
    }
    for cell in cells:
        held = json.loads(cell["label_set"])
        assert cell["status"] == ("ok" if len(held) == 1 else "abstained")
        assert cell["label"] == (held[0] if len(held) == 1 else "")
    found = llm_clf.evaluate(file)
    assert found["label_sets"]["coverage"] >= 0.85
    assert sum(found["label_sets"]["sizes"].values()) == len(cells)
    assert found["answered"]["coverage"] == pytest.approx(found["label_sets"]["sizes"]["1"] / len(cells))


def test_evaluate_measures_answered_rows_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.csv"
    rows = [
        "a,1,0.1,0.9,ok,false,1",
        "b,0,0.8,0.2,ok,false,0",
        "c,,0.5,0.5,abstained,false,1",
        "d,1,0.4,0.6,ok,false,0",
    ]
    file.write_text(
        "id,label,prob_0,prob_1,status,cut,gold\n" + "\n".join([*rows, "e,,0.5,0.5,abstained,false,"]) + "\n"
    )
    found = llm_clf.evaluate(file)
    assert found["accuracy"] == pytest.approx(2 / 4) and found["answered"]["coverage"] == pytest.approx(3 / 4)
    assert found["answered"]["accuracy"] == pytest.approx(2 / 3) and found["answered"]["rows"] == 3
    assert found["answered"]["intervals"]["metrics"]["accuracy"][1] == 1.0
    file.write_text("id,label,status,cut,gold\na,,abstained,false,1\n")
    assert llm_clf.evaluate(file)["answered"] == {"rows": 0, "coverage": 0.0}
    file.write_text("id,label,status,cut,gold,label_set\na,1,ok,false,1,oops\n")
    with pytest.raises(DataError, match="label_set is 'oops'; expected a JSON list"):
        llm_clf.evaluate(file)


def test_a_run_without_its_decisions_is_refused_and_an_older_one_is_not(
    tfidf: Train, noisy: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tfidf("decide.calibration=temperature"), run)
    text = (run / "decisions.json").read_text()
    (run / "decisions.json").write_text(text.replace('"most probable"', '"least cost"'))
    with pytest.raises(ArtifactError, match="has changed since the training"):
        llm_clf.predict(run, noisy / "test.jsonl", out=tmp_path / "p.csv")
    (run / "decisions.json").unlink()
    with pytest.raises(ArtifactError, match=r"decisions\.json is missing from the run"):
        llm_clf.predict(run, noisy / "test.jsonl", out=tmp_path / "p.csv")
    # As a former version left it.
    facts = json.loads((run / "run.json").read_text())
    del facts["decisions"], facts["rows"]["labels"]
    (run / "run.json").write_text(json.dumps(facts))
    (run / "scores-valid.npy").unlink()
    shutil.copy(tfidf("decide.calibration=none") / "predictions-valid.parquet", run)
    (run / "config.yaml").write_text("train:\n  seed: 42\n")
    llm_clf.predict(run, noisy / "valid.jsonl", out=tmp_path / "p.parquet")
    assert (tmp_path / "p.parquet").read_bytes() == (run / "predictions-valid.parquet").read_bytes()
    # It can still be decided otherwise, by the probabilities that it stored.
    llm_clf.predict(run, noisy / "test.jsonl", out=tmp_path / "f1.csv", set=["decide.objective=f1"])
    new = tmp_path / "new.csv"
    llm_clf.predict(tfidf(), noisy / "test.jsonl", out=new, set=["decide.objective=f1"])
    one, other = read_predictions(tmp_path / "f1.csv"), read_predictions(new)
    assert one.predicted == other.predicted


def test_scores_that_are_damaged_are_refused(tfidf: Train, noisy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tfidf(), run)
    for content, message in ((b"no", "is damaged"), (None, "is missing from the run")):
        if content is None:
            (run / "scores-valid.npy").unlink()
        else:
            (run / "scores-valid.npy").write_bytes(content)
        with pytest.raises(ArtifactError, match=message):
            llm_clf.predict(run, noisy / "test.jsonl", out=tmp_path / "p.csv", set=["decide.objective=f1"])


def test_settings_that_do_not_fit_are_refused_before_training(noisy: Path, tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match="takes 99 validation rows for itself"):
        llm_clf.baseline_tfidf(noisy, out=tmp_path / "run", set=["decide.abstain={coverage: 0.99}"])
    with pytest.raises(ConfigError, match="'2' is no label"):
        llm_clf.finetune(noisy, out=tmp_path / "run", model=str(base), set=["decide.priors={2: 0.5}"])
    with pytest.raises(ConfigError, match="heeds train.seed and decide.calibration"):
        llm_clf.baseline_tfidf(noisy, out=tmp_path / "run", set=["train.epochs=2"])
    assert not (tmp_path / "run").exists()


def test_an_ensemble_is_decided_by_rows_that_did_not_choose_its_weights(
    tfidf: Train, noisy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rows = tmp_path / "ensemble", noisy / "test.jsonl"
    runs = [tfidf(), tfidf("train.seed=1")]
    metrics = llm_clf.ensemble(runs, data=noisy, out=run, method="stacking")
    # Of each row by what was chosen without it, as the cross-fitted figures are.
    held_out, gold = np.load(run / "scores-valid.npy"), read_predictions(run / "predictions-valid.parquet").gold
    probs = probabilities(held_out)
    losses = -np.log(probs[np.arange(len(gold)), np.array(gold, dtype=int)])
    assert losses.mean() == pytest.approx(metrics["cross_fitted"]["log_loss"], rel=1e-5) != metrics["log_loss"]
    llm_clf.predict(run, rows, out=tmp_path / "p.csv", set=["decide.objective=f1", "decide.calibration=temperature"])
    assert "cross-fitted in 5 folds" in capsys.readouterr().err
    settings = DecideSettings(objective="f1", calibration="temperature")
    expected = fit_decisions(held_out, gold, LABELS, settings, seed=42)
    llm_clf.predict(run, rows, out=tmp_path / "bare.parquet")
    llm_clf.predict(run, rows, out=tmp_path / "raw.parquet", raw=True)
    assert (tmp_path / "bare.parquet").read_bytes() == (tmp_path / "raw.parquet").read_bytes()
    bare, found = read_predictions(tmp_path / "bare.parquet"), read_predictions(tmp_path / "p.csv")
    assert bare.probs is not None and found.probs is not None
    decided = expected.apply(np.log(bare.probs))
    assert found.probs == pytest.approx(decided.probs, abs=1e-5)
    assert found.predicted == [LABELS[choice] for choice in decided.choices]
    with pytest.raises(ConfigError, match="is an ensemble, and the shares of labels that its members were trained"):
        llm_clf.predict(run, rows, out=tmp_path / "no.csv", prior={"1": 0.1})
    (run / "scores-valid.npy").unlink()
    with pytest.raises(ArtifactError, match=r"has no scores-valid\.npy, .* Make it again"):
        llm_clf.predict(run, rows, out=tmp_path / "no.csv", set=["decide.objective=f1"])


def test_a_bare_adapter_has_no_decisions_to_fit(noisy: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a bare adapter, without validation rows"):
        llm_clf.predict(tmp_path / "adapter", noisy / "test.jsonl", out=tmp_path / "p.csv", prior={"1": 0.1})


def test_a_language_model_decides_alike_in_validation_prediction_and_chat(
    noisy: Path, base: Path, tmp_path: Path
) -> None:
    from llm_clf.commands.chat import _load

    run, settings = tmp_path / "run", ["train.epochs=1", "model.dtype=fp32", "train.sampling=balanced"]
    deciding = ["decide.calibration=vector", "decide.objective=f1", "decide.abstain={error: 0.4}"]
    llm_clf.finetune(noisy, out=run, model=str(base), set=[*settings, *deciding])
    llm_clf.predict(run, noisy / "valid.jsonl", out=tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == (run / "predictions-valid.parquet").read_bytes()
    table = read_predictions(run / "predictions-valid.parquet")
    loaded = _load(run, None, None, ())
    prompts = [json.loads(line) for line in (noisy / "valid.jsonl").read_text().splitlines()[:5]]
    for row, prompt in enumerate(prompts):
        label, probs = loaded.classify(prompt["input"])
        assert (label or "") == table.predicted[row]
        assert [prob for _, prob in probs] == pytest.approx(table.probs[row], abs=1e-4)
    decisions = load_decisions(run / "decisions.json", LABELS)
    assert decisions.calibration.method == "vector" and decisions.rule != MostProbable()
