"""The TF-IDF baseline: a run like any other, made and used without a language model."""

import csv
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import llm_clf
from llm_clf.baselines import tfidf
from llm_clf.baselines.tfidf import LOGISTIC, SVM, fit, telling_features
from llm_clf.baselines.tfidf_model import BATCH_ROWS, TfidfScorer, load_pipeline, save_pipeline
from llm_clf.engine.journal import Journal
from llm_clf.engine.scores import Scored
from llm_clf.errors import ArtifactError, ConfigError, DataError
from llm_clf.files import file_hash, partial_name
from llm_clf.prompting.prompts import Prompt

ROOT = Path(__file__).resolve().parent.parent
WORDS = {
    "0": ["steel", "star", "court", "bridge", "engine", "market"],
    "1": ["heart", "lung", "fever", "dose", "patient", "trial"],
}
TOPICS = {
    "体育": ["比赛", "球队", "进球", "冠军"],
    "财经": ["股市", "利率", "央行", "经济"],
    "科技": ["芯片", "软件", "互联网", "火箭"],
    "娱乐": ["电影", "歌手", "导演", "票房"],
    "健康": ["疾病", "疫苗", "医生", "睡眠"],
}
FILLER = "今天我们在城市里看到许多人说这件事情非常重要而且值得继续关注"


def papers(folder: Path, *, count: int = 120, **more: str) -> Path:
    """Write rows of two labels that words tell apart; columns in `more` hold a text with `{label}` in it."""
    draw = random.Random(1)
    file = folder / "papers.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        for number in range(count):
            label = str(number % 2)
            words = [*draw.sample(WORDS[label], 2), draw.choice(WORDS[str(1 - number % 2)]), f"n{number}"]
            row = {"uuid": f"r{number}", "title": words[0], "abstract": " ".join(words[1:] * 2), "label": label}
            lines.write(json.dumps(row | {name: text.format(label=label) for name, text in more.items()}) + "\n")
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make prompts and a run once; every test that changes them takes a copy."""
    from conftest import SHORT_TASK

    folder = tmp_path_factory.mktemp("tfidf")
    (folder / "task.yaml").write_text(SHORT_TASK, encoding="utf-8")
    rows = papers(folder)
    llm_clf.build_prompts(rows, task=folder / "task.yaml", out=folder / "prompts", split="0.6,0.2,0.2")
    llm_clf.baseline_tfidf(folder / "prompts", out=folder / "run")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """Return a folder with task, rows, prompts and run of one's own."""
    shutil.copytree(made, tmp_path / "place")
    return tmp_path / "place"


def facts_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def put_model(run: Path, content: bytes) -> None:
    """Put another model into a run whose run.json vouches for it."""
    (run / "model.skops").write_bytes(content)
    facts = facts_of(run)
    facts["model"]["hash"] = file_hash(run / "model.skops")
    (run / "run.json").write_text(json.dumps(facts), encoding="utf-8")


# --- the run ----------------------------------------------------------------------------------------------------------


def test_the_run_folder_is_like_any_other(made: Path) -> None:
    run = made / "run"
    assert {file.name for file in run.iterdir()} == {
        "task.yaml",
        "config.yaml",
        "run.json",
        "metrics.json",
        "predictions-valid.parquet",
        "decisions.json",
        "scores-valid.npy",
        "model.skops",
        "features.csv",
        "trained-rows.npy",
    }
    facts = facts_of(run)
    assert facts["kind"] == "tfidf" and facts["name"] == "run" and facts["seed"] == 42
    assert facts["rows"] == {"train": 72, "train_unlabelled": 0, "valid": 24, "labels": {"0": 36, "1": 36}}
    assert facts["model"]["hash"] == file_hash(run / "model.skops") and facts["model"]["calibrated"]
    assert facts["training"]["rows_per_second"] > 0 and facts["peak_memory"]["resident_bytes"] > 10**7
    assert facts["versions"].keys() >= {"llm-clf", "scikit-learn", "skops"} and facts["hardware"]["threads"] >= 1
    assert facts["prompts"]["train"] == file_hash(made / "prompts" / "train.jsonl")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["train"] == {"seed": 42} and set(config) == {"train", "decide"}
    assert not partial_name(run).exists() and not list(made.glob(".*"))


def test_the_search_keeps_the_best_by_f1(made: Path) -> None:
    facts = facts_of(made / "run")
    assert len(facts["search"]) == 6 and {one["model"] for one in facts["search"]} == {LOGISTIC, SVM}
    best = max(facts["search"], key=lambda one: one["f1"])
    assert (facts["model"]["model"], facts["model"]["C"]) == (best["model"], best["C"])


def test_a_learnable_task_is_learned_and_measured(made: Path, tmp_path: Path) -> None:
    llm_clf.predict(made / "run", made / "prompts" / "test.jsonl", out=tmp_path / "test.csv")
    metrics = llm_clf.evaluate(tmp_path / "test.csv")
    assert metrics["accuracy"] >= 0.9 and metrics["log_loss"] < 0.4 and metrics["status"] == {"ok": 24}


def test_predict_on_the_validation_rows_gives_the_stored_file_exactly(made: Path, tmp_path: Path) -> None:
    llm_clf.predict(made / "run", made / "prompts" / "valid.jsonl", out=tmp_path / "valid.parquet")
    assert (tmp_path / "valid.parquet").read_bytes() == (made / "run" / "predictions-valid.parquet").read_bytes()
    metrics = json.loads((made / "run" / "metrics.json").read_text())
    found = llm_clf.evaluate(tmp_path / "valid.parquet")
    assert found == {name: metrics[name] for name in found}


def test_the_same_seed_gives_the_same_run_and_validation_rows_take_no_part(made: Path, place: Path) -> None:
    (place / "prompts" / "valid.jsonl").write_text("")
    llm_clf.baseline_tfidf(place / "prompts", out=place / "again")
    assert facts_of(place / "again")["search"] == facts_of(made / "run")["search"]
    assert not (place / "again" / "metrics.json").exists()
    for run in (made / "run", place / "again"):
        llm_clf.predict(run, made / "prompts" / "test.jsonl", out=place / f"{run.name}.csv")
    assert (place / "run.csv").read_bytes() == (place / "again.csv").read_bytes()
    assert (place / "again" / "features.csv").read_bytes() == (made / "run" / "features.csv").read_bytes()


def test_another_seed_makes_other_folds(made: Path, tmp_path: Path) -> None:
    llm_clf.baseline_tfidf(made / "prompts", out=tmp_path / "other", set=["train.seed=7"])
    facts = facts_of(tmp_path / "other")
    assert facts["seed"] == 7 and yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())["train"]["seed"] == 7
    assert file_hash(tmp_path / "other" / "predictions-valid.parquet") != file_hash(
        made / "run" / "predictions-valid.parquet"
    )


def test_the_seed_decides_which_rows_the_search_holds_out() -> None:
    draw = random.Random(6)
    labels = [draw.choice("xy") for _ in range(60)]
    texts = [" ".join(draw.choices(WORDS["0"] + WORDS["1"], k=6)) for _ in labels]
    one, same, other = (fit(texts, labels, ["x", "y"], seed=seed).tried for seed in (1, 1, 2))
    assert one == same and one != other


def test_columns_that_the_template_does_not_name_are_never_read(made: Path, tmp_path: Path) -> None:
    rows = papers(tmp_path, author="leak{label}", Keywords="medical {label} " * 5)
    llm_clf.build_prompts(rows, task=made / "task.yaml", out=tmp_path / "prompts", split="0.6,0.2,0.2")
    llm_clf.baseline_tfidf(tmp_path / "prompts", out=tmp_path / "run")
    assert "leak" not in (tmp_path / "run" / "features.csv").read_text()
    for run, name in ((made / "run", "plain"), (tmp_path / "run", "leaking")):
        llm_clf.predict(run, rows, out=tmp_path / f"{name}.csv", columns="id,label,prob_0,prob_1")
    assert (tmp_path / "plain.csv").read_bytes() == (tmp_path / "leaking.csv").read_bytes()


def test_the_instruction_takes_no_part(made: Path, place: Path) -> None:
    features = (made / "run" / "features.csv").read_text()
    assert "medical" not in features.lower()


def test_the_table_and_the_prompts_file_give_the_same_predictions(made: Path, tmp_path: Path) -> None:
    ids = {json.loads(line)["id"] for line in (made / "prompts" / "test.jsonl").read_text().splitlines()}
    table = [line for line in (made / "papers.jsonl").read_text().splitlines() if json.loads(line)["uuid"] in ids]
    (tmp_path / "table.jsonl").write_text("\n".join(table))
    for name, rows in (("a", tmp_path / "table.jsonl"), ("b", made / "prompts" / "test.jsonl")):
        llm_clf.predict(made / "run", rows, out=tmp_path / f"{name}.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_the_telling_features_of_a_label_are_its_words(made: Path) -> None:
    with open(made / "run" / "features.csv", encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {(row["label"], row["kind"]) for row in rows} == {
        (label, kind) for label in "01" for kind in ("words", "characters")
    }
    for label in "01":
        words = [row for row in rows if row["label"] == label and row["kind"] == "words"]
        # A telling word, or a pair of words with one in it.
        assert all(set(row["n_gram"].split()) & set(WORDS[label]) for row in words[:4])
        weights = [float(row["weight"]) for row in words]
        assert weights == sorted(weights, reverse=True) and weights[-1] > 0


def test_a_few_features_and_the_search_are_printed(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm_clf.baseline_tfidf(made / "prompts", out=tmp_path / "run")
    shown = capsys.readouterr()
    assert shown.out == "" and "logistic regression, C 10 " in shown.err and "is taken" in shown.err
    line = next(line for line in shown.err.splitlines() if line.startswith("  1: "))
    assert set(line.removeprefix("  1: ").split(", ")) & set(WORDS["1"])


# --- texts and labels -------------------------------------------------------------------------------------------------


def news(folder: Path, count: int = 100) -> Path:
    """Write Chinese rows without a space or a mark, five labels, two telling words in each."""
    draw = random.Random(2)
    with open(folder / "news.csv", "w", encoding="utf-8") as lines:
        lines.write("编号,标题,正文,栏目\n")
        for number in range(count):
            label = list(TOPICS)[number % 5]
            around = ["".join(draw.sample(FILLER, 8)) for _ in range(3)]
            first, second = draw.sample(TOPICS[label], 2)
            lines.write(f"{number},{around[0]}{first},{around[1]}{second}{around[2]},{label}\n")
    return folder / "news.csv"


def test_chinese_without_spaces_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ROOT / "prompts" / "news_topic_zh.yaml"
    llm_clf.build_prompts(news(tmp_path), task=task, out=tmp_path / "prompts", split="0.6,0.2,0.2")
    metrics = llm_clf.baseline_tfidf(tmp_path / "prompts", out=tmp_path / "run")
    assert metrics["accuracy"] >= 0.9
    with open(tmp_path / "run" / "features.csv", encoding="utf-8", newline="") as lines:
        found = [row["n_gram"] for row in csv.DictReader(lines) if row["label"] == "体育"]
    assert set(TOPICS["体育"]) & set(found[:10])
    llm_clf.predict(tmp_path / "run", tmp_path / "prompts" / "valid.jsonl", out=tmp_path / "valid.parquet")
    assert (tmp_path / "valid.parquet").read_bytes() == (tmp_path / "run" / "predictions-valid.parquet").read_bytes()


def some_texts(counts: dict[str, int]) -> tuple[list[str], list[str]]:
    draw = random.Random(3)
    rows = [
        (f"{label}word {label}other {draw.choice('abcdef')} filler text {number}", label)
        for label, count in counts.items()
        for number in range(count)
    ]
    draw.shuffle(rows)
    return [text for text, _ in rows], [label for _, label in rows]


def probabilities(pipeline: object, text: str, names: list[str]) -> dict[str, float]:
    scored: list[Scored] = []
    TfidfScorer(pipeline, names).score([Prompt("0", text, None, {})], scored.append)
    return dict(zip(names, np.exp(scored[0].scores[0]).tolist(), strict=True))


@pytest.mark.parametrize(
    ("counts", "searched", "calibrated"),
    [
        ({"x": 20, "y": 20}, True, True),
        ({"x": 20, "y": 3, "z": 2}, True, True),
        ({"x": 20, "y": 20, "z": 1}, True, False),
        ({"x": 9, "y": 2}, True, True),
        ({"x": 9, "y": 1}, False, False),
        ({"x": 1, "y": 1}, False, False),
        ({"x": 2, "y": 2}, True, True),
        ({name: 1 for name in "uvwxyz"}, False, False),
    ],
    ids=str,
)
def test_labels_with_few_rows_are_fitted_with_what_they_allow(
    counts: dict[str, int], searched: bool, calibrated: bool
) -> None:
    texts, labels = some_texts(counts)
    names = [*counts, "never"]
    fitted = fit(texts, labels, names, seed=1)
    assert bool(fitted.tried) == searched and fitted.calibrated == calibrated
    if not calibrated:
        assert fitted.chosen.model == LOGISTIC and all(one.candidate.model == LOGISTIC for one in fitted.tried)
    probs = probabilities(fitted.pipeline, "xword xother filler", names)
    assert sum(probs.values()) == pytest.approx(1, abs=1e-5) and probs["never"] == 0
    if max(counts.values()) > 1:
        assert max(probs, key=lambda name: probs[name]) == "x"
    assert {one.label for one in telling_features(fitted.pipeline, names, 5)} == set(counts)


def test_labels_with_few_rows_are_told_of(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = (place / "task.yaml").read_text().replace('["0", "1"]', '["0", "1", "2", "3"]')
    (place / "task.yaml").write_text(task)
    lines = (place / "papers.jsonl").read_text()
    rare = {"uuid": "rare", "title": "court", "abstract": "a court and a bridge", "label": "3"}
    (place / "papers.jsonl").write_text(lines + json.dumps(rare) + "\n")
    llm_clf.build_prompts(place / "papers.jsonl", task=place / "task.yaml", out=place / "four", split="1,0,0")
    llm_clf.baseline_tfidf(place / "four", out=place / "run4")
    shown = capsys.readouterr().err
    assert "no row of '2': it will never be predicted" in shown
    assert "1 row of '3': the linear SVM is not tried, and probabilities are not calibrated" in shown
    llm_clf.predict(place / "run4", place / "papers.jsonl", out=place / "four.csv")
    assert len((place / "four.csv").read_text().splitlines()) == 122


def test_the_search_looks_at_a_sample_of_many_rows_and_the_model_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, labels = some_texts({"x": 60, "y": 60})
    looked_at: list[int] = []
    original = tfidf._tried
    monkeypatch.setattr(tfidf, "SEARCH_ROWS", 30)
    monkeypatch.setattr(
        tfidf, "_tried", lambda one, truth, *rest: looked_at.append(len(truth)) or original(one, truth, *rest)
    )
    fitted = fit(texts, labels, ["x", "y"], seed=1)
    assert looked_at == [30] * 6
    words = fitted.pipeline.named_steps["features"].transformer_list[0][1].named_steps["counts"].vocabulary_
    # Numbers 0 to 59 stand in a row of each label; a sample of 30 rows would not have them twice.
    assert {str(number) for number in range(60)} <= words.keys()


def test_empty_texts_are_predicted_like_any_other(made: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("uuid,title,abstract\na,,\nb,heart,dose\nc,,\nd,心脏,药物\n", encoding="utf-8")
    llm_clf.predict(made / "run", tmp_path / "rows.csv", out=tmp_path / "p.csv", columns="id,label,prob_1,status")
    with open(tmp_path / "p.csv", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["id"] for row in rows] == ["a", "b", "c", "d"] and {row["status"] for row in rows} == {"ok"}
    assert rows[0]["prob_1"] == rows[2]["prob_1"] and rows[1]["label"] == "1"


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline() -> object:
    texts, labels = some_texts({"x": 12, "y": 12, "z": 12})
    return fit(texts, labels, ["x", "y", "z"], seed=1).pipeline


def test_a_pipeline_comes_back_from_its_file_as_it_was(pipeline: object, tmp_path: Path) -> None:
    texts = ["xword filler", "yword zother", "", "未知", "xword " * 50]
    before = pipeline.predict_proba(texts)
    save_pipeline(tmp_path / "model.skops", pipeline)
    assert (load_pipeline(tmp_path / "model.skops").predict_proba(texts) == before).all()
    assert (pipeline.predict_proba(texts) == before).all(), "saving leaves the model whole"
    assert b"pickle" not in (tmp_path / "model.skops").read_bytes()


def test_the_file_is_small_also_with_many_n_grams(tmp_path: Path) -> None:
    draw = random.Random(4)
    words = ["".join(draw.choices("abcdefghij", k=7)) for _ in range(3000)]
    texts = [" ".join(draw.sample(words, 60)) for _ in range(200)]
    fitted = fit(texts, [str(number % 2) for number in range(200)], ["0", "1"], seed=1)
    count = sum(
        len(block.named_steps["counts"].vocabulary_)
        for _, block in fitted.pipeline.named_steps["features"].transformer_list
    )
    save_pipeline(tmp_path / "model.skops", fitted.pipeline)
    assert count > 10_000 and (tmp_path / "model.skops").stat().st_size < 30 * count


def test_scores_are_the_pipelines_in_the_tasks_order_whatever_the_batches(pipeline: object) -> None:
    texts, _ = some_texts({"x": 300, "y": 300, "z": 300})
    prompts = [Prompt(str(number), text, None, {}) for number, text in enumerate(texts)]
    whole, resumed = (Journal(None, key="", rows=len(texts), labels=3, resume=False) for _ in range(2))
    scorer = TfidfScorer(pipeline, ["z", "x", "y"])
    scorer.score(prompts, whole.record)
    assert len(texts) > BATCH_ROWS
    np.testing.assert_allclose(np.exp(whole.scores)[:, [1, 2, 0]], pipeline.predict_proba(texts), atol=1e-6)
    batches: list[Scored] = []
    scorer.score(prompts, batches.append)
    resumed.record(batches[-1])
    scorer.score(iter(prompts), resumed.record, resumed.finished)
    assert (resumed.scores == whole.scores).all() and len(resumed.finished) == len(texts)


class Killed(BaseException):
    """Stands for a kill: nothing gets to clean up."""


def test_a_killed_prediction_goes_on_and_ends_with_the_same_bytes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = papers(place, count=2000)
    llm_clf.predict(place / "run", rows, out=place / "whole.parquet")
    original, calls = TfidfScorer._scores, []

    def dies(self: TfidfScorer, texts: list[str]) -> np.ndarray:
        calls.append(len(texts))
        if len(calls) == 3:
            raise Killed
        return original(self, texts)

    monkeypatch.setattr(TfidfScorer, "_scores", dies)
    with pytest.raises(Killed):
        llm_clf.predict(place / "run", rows, out=place / "broken.parquet")
    assert partial_name(place / "broken.parquet").exists()
    llm_clf.predict(place / "run", rows, out=place / "broken.parquet", resume=True)
    assert (place / "broken.parquet").read_bytes() == (place / "whole.parquet").read_bytes()
    assert calls == [512, 512, 512, 512, 464]


def test_what_another_model_left_is_not_gone_on_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = papers(place, count=2000)
    llm_clf.baseline_tfidf(place / "prompts", out=place / "other", set=["train.seed=7"])

    def dies(self: TfidfScorer, texts: list[str]) -> np.ndarray:
        if len(texts) < BATCH_ROWS:
            raise Killed
        return original(self, texts)

    original = TfidfScorer._scores
    monkeypatch.setattr(TfidfScorer, "_scores", dies)
    with pytest.raises(Killed):
        llm_clf.predict(place / "run", rows, out=place / "out.csv")
    with pytest.raises(ArtifactError, match="is what another job left"):
        llm_clf.predict(place / "other", rows, out=place / "out.csv", resume=True)


def foreign_types() -> bytes:
    import skops.io

    return skops.io.dumps({"pipeline": random.Random(1), "n_grams": {}})


def another_model() -> bytes:
    import skops.io
    from sklearn.linear_model import LogisticRegression

    return skops.io.dumps({"pipeline": LogisticRegression(), "n_grams": {"words": "a"}})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda whole: whole[: len(whole) // 2], "model.skops: is damaged"),
        (lambda whole: b"", "model.skops: is damaged"),
        (lambda whole: whole.replace(b"PK", b"KP"), "model.skops: is damaged"),
        (lambda whole: foreign_types(), "holds what a model of this kind does not, and it is not loaded"),
        (lambda whole: another_model(), "is no model that `llm-clf baseline tfidf` wrote"),
    ],
    ids=["cut", "empty", "no zip", "foreign types", "another model"],
)
def test_a_model_file_that_is_none_is_refused(place: Path, damage: Callable[[bytes], bytes], told: str) -> None:
    content = damage((place / "run" / "model.skops").read_bytes())
    put_model(place / "run", content)
    with pytest.raises(ArtifactError, match=told):
        llm_clf.predict(place / "run", place / "prompts" / "test.jsonl", out=place / "out.csv")
    assert not (place / "out.csv").exists() and not partial_name(place / "out.csv").exists()


def test_a_model_file_with_accidents_loads_as_it_was_or_is_refused(pipeline: object, tmp_path: Path) -> None:
    file, draw, refused = tmp_path / "model.skops", random.Random(5), 0
    save_pipeline(file, pipeline)
    whole = file.read_bytes()
    for _ in range(150):
        content = bytearray(whole)
        content[draw.randrange(len(whole))] = draw.randrange(256)
        start = draw.randrange(len(whole))
        del content[start : start + draw.choice([0, 0, 9])]
        file.write_bytes(content)
        try:
            assert load_pipeline(file).predict_proba(["xword"]).shape == (1, 3)
        except ArtifactError as error:
            assert (str(file) in str(error) and "Train again" in str(error)) or "train again" in str(error)
            refused += 1
    assert refused > 75


def test_a_model_of_another_version_is_told_of(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sklearn.base.__version__", "99.0")
    llm_clf.predict(place / "run", place / "prompts" / "test.jsonl", out=place / "out.csv")
    shown = capsys.readouterr().err
    assert shown.count("was made with scikit-learn") == 1 and "this is 99.0" in shown


# --- a submission -----------------------------------------------------------------------------------------------------


def test_a_submission_has_the_contests_columns_in_their_order(made: Path, tmp_path: Path) -> None:
    lines = ["uuid,title,author,abstract", "9,heart,A B,dose patient trial", '3,"star, dwarf",C,market bridge steel']
    (tmp_path / "test.csv").write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "submit.csv"
    llm_clf.predict(
        made / "run", tmp_path / "test.csv", out=out, columns="uuid,Keywords,label", fill={"Keywords": "tmp"}
    )
    assert out.read_text(encoding="utf-8") == "uuid,Keywords,label\n9,tmp,1\n3,tmp,0\n"


# --- no language model ------------------------------------------------------------------------------------------------

# skops loads all of scikit-learn to know its classes, and torch with it.
LIBRARIES = ("transformers", "peft", "accelerate", "tokenizers", "datasets", "bitsandbytes")
COMMANDS = """
import sys
from llm_clf.cli import app
app(["baseline", "tfidf", "prompts", "--out", "new"], standalone_mode=False)
app(["predict", "new", "papers.jsonl", "--out", "new.csv"], standalone_mode=False)
print("loaded:", *sorted(set(sys.modules) & set(sys.argv[1:])))
"""


def test_no_library_of_language_models_is_loaded(place: Path) -> None:
    words = [sys.executable, "-c", COMMANDS, *LIBRARIES]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "loaded:\n" and (place / "new.csv").is_file()


# --- refusals of the functions; those of the command line are in test_bad_input.py ------------------------------------


def test_resume_changes_nothing_that_is_finished_and_makes_what_is_not(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file.name: file.read_bytes() for file in (place / "run").iterdir()}
    assert llm_clf.baseline_tfidf(place / "prompts", out=place / "run", resume=True)["rows"] == 24
    assert "nothing to do" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (place / "run").iterdir()} == before
    partial_name(place / "new").mkdir()
    with pytest.raises(ConfigError, match="an interrupted command left this"):
        llm_clf.baseline_tfidf(place / "prompts", out=place / "new")
    llm_clf.baseline_tfidf(place / "prompts", out=place / "new", resume=True)
    assert (place / "new" / "run.json").is_file() and not partial_name(place / "new").exists()


def test_what_an_interrupted_training_of_another_kind_left_is_not_resumed(place: Path) -> None:
    (partial_name(place / "new") / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="an interrupted command left this"):
        llm_clf.baseline_tfidf(place / "prompts", out=place / "new", resume=True)
    assert (partial_name(place / "new") / "checkpoints").is_dir()


def test_a_run_of_another_kind_is_not_taken_for_finished(place: Path) -> None:
    with pytest.raises(ConfigError, match="run of kind tfidf, and this command makes one of kind lora"):
        llm_clf.finetune(place / "prompts", out=place / "run", resume=True)


def test_nothing_is_left_where_fitting_fails(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(tfidf, "telling_features", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        llm_clf.baseline_tfidf(place / "prompts", out=place / "new")
    assert sorted(place.rglob("*")) == before


def test_texts_of_white_space_alone_are_refused() -> None:
    with pytest.raises(DataError, match="the 2 training rows are empty"):
        fit(["  ", "\n"], ["x", "y"], ["x", "y"], seed=1)
