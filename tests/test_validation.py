"""The run's validation rows: scored as predict will, with the adapter merged where that changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import byte_tokenizer, tied_base, trainer, word_prompts

import llm_clf
from llm_clf.commands import lora_training, training_run
from llm_clf.config import ModelSettings, Settings
from llm_clf.config_loading import load_settings
from llm_clf.decisions.predictions import read_predictions
from llm_clf.engine import classifier as classifier_module
from llm_clf.engine.classifier import Classifier
from llm_clf.errors import ArtifactError, ConfigError
from llm_clf.files import partial_name
from llm_clf.models.bases import load_model
from llm_clf.prompting.tasks import load_task

MakeBase = Callable[..., Path]
Train = Callable[..., Path]
FAST = ["train.epochs=2", "train.batch_size=8", "train.learning_rate=0.004", "lora.dropout=0"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return word_prompts(tmp_path_factory.mktemp("prompts"), rows=60, lengths=9, split="0.6,0.3,0.1")


@pytest.fixture(scope="module")
def train(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that trains a run on a base; the same one for the same words."""
    return trainer(prompts, tmp_path_factory, FAST)


@pytest.fixture(scope="module")
def merged_run(train: Train, base: Path) -> Path:
    run = train(base, "model.dtype=fp32")
    assert settings_of(run).predict.merge is True
    return run


@pytest.fixture(scope="module")
def unmerged_run(train: Train, base: Path) -> Path:
    """Return a run in bf16 whose adapter is so large that rounding the merged weights shows."""
    run = train(base, "model.dtype=bf16", "train.learning_rate=0.02")
    assert settings_of(run).predict.merge is False
    return run


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that grows by how each saved adapter is attached from now on."""
    seen: list[bool] = []
    original = classifier_module.attach_adapter

    def attach(*arguments: Any, merge: bool, **more: Any) -> Any:
        seen.append(merge)
        return original(*arguments, merge=merge, **more)

    monkeypatch.setattr(classifier_module, "attach_adapter", attach)
    return seen


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the name of each base that is loaded to score from now on."""
    names: list[str] = []
    original = classifier_module.load_model

    def load(base: ModelSettings, **more: Any) -> Any:
        names.append(base.name)
        return original(base, **more)

    monkeypatch.setattr(classifier_module, "load_model", load)
    return names


def settings_of(run: Path) -> Settings:
    return load_settings([run / "config.yaml"])


def choice_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text(encoding="utf-8"))["merge"])


def predicted(run: Path, prompts: Path, out: Path, *overrides: str, **more: Any) -> bytes:
    llm_clf.predict(run, prompts / "valid.jsonl", out=out, set=overrides, overwrite=True, **more)
    return out.read_bytes()


def stored(run: Path) -> bytes:
    return (run / "predictions-valid.parquet").read_bytes()


def largest_change(one: Path, other: Path) -> float:
    first, second = read_predictions(one).probs, read_predictions(other).probs
    assert first is not None and second is not None
    return float(abs(first - second).max())


def words(value: object) -> str:
    """Return a name for a test: settings without their sections."""
    return ",".join(word.partition(".")[2] for word in value) or "as it is" if isinstance(value, list) else str(value)


# What is chosen, and that predict does the same


def base_of(kind: str, make_base: MakeBase, make_chatglm: MakeBase, folder: Path) -> Path:
    if kind == "tied":
        return tied_base(folder / "tied")
    return make_chatglm("chatglm2") if kind == "chatglm2" else make_base(kind)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("glm", ["model.dtype=fp32"]),
        ("glm", ["model.dtype=bf16", "train.learning_rate=0.02"]),
        ("glm", ["model.dtype=fp32", "lora.use_dora=true"]),
        ("glm", ["model.dtype=bf16", "train.learning_rate=0.02", "lora.use_dora=true"]),
        ("glm", ["model.dtype=fp32", "speed.packing=false", "speed.fast_lora=false"]),
        ("glm", ["model.dtype=bf16", "predict.merge=true"]),
        ("glm", ["model.dtype=fp32", "predict.merge=false"]),
        ("bloom", ["model.dtype=fp32"]),
        ("tied", ["model.dtype=fp32", "lora.target_modules=[q_proj,lm_head]"]),
        ("tied", ["model.dtype=bf16", "lora.target_modules=[q_proj,lm_head]", "train.learning_rate=0.02"]),
        ("chatglm2", ["model.dtype=fp32", "lora.target_modules=[query_key_value]"]),
        ("chatglm2", ["model.dtype=bf16"]),
    ],
    ids=words,
)
def test_predict_gives_the_stored_file_exactly_and_merges_by_the_rule(
    kind: str,
    more: list[str],
    train: Train,
    prompts: Path,
    make_base: MakeBase,
    make_chatglm: MakeBase,
    tmp_path: Path,
    merges: list[bool],
) -> None:
    run = train(base_of(kind, make_base, make_chatglm, tmp_path), *more)
    merges.clear()
    assert predicted(run, prompts, tmp_path / "again.parquet") == stored(run)
    assert merges == [settings_of(run).predict.merge]
    metrics = json.loads((run / "metrics.json").read_text())
    found = llm_clf.evaluate(tmp_path / "again.parquet")
    assert found == {name: metrics[name] for name in found}
    choice, set_by_hand = choice_of(run), any("predict.merge" in word for word in more)
    assert choice["merged"] is settings_of(run).predict.merge
    for merge in ("true", "false"):
        predicted(run, prompts, tmp_path / f"{merge}.parquet", f"predict.merge={merge}")
    change = largest_change(tmp_path / "true.parquet", tmp_path / "false.parquet")
    if set_by_hand:
        assert choice == {"merged": "predict.merge=true" in more, "largest_probability_change": None} | {
            "reason": "predict.merge was set"
        }
    else:
        assert choice["largest_probability_change"] == change and choice["merged"] is (change <= 1e-3)
        assert f"by more than {change:.2g}" in choice["reason"]


def test_fp32_is_merged_and_a_large_adapter_in_bf16_is_not(
    merged_run: Path, unmerged_run: Path, prompts: Path, tmp_path: Path
) -> None:
    assert choice_of(merged_run)["largest_probability_change"] < 1e-5
    assert choice_of(unmerged_run)["largest_probability_change"] > 1e-3
    for run, other in ((merged_run, "false"), (unmerged_run, "true")):
        assert predicted(run, prompts, tmp_path / "other.parquet", f"predict.merge={other}") != stored(run)


@pytest.mark.parametrize("allowed", [0.99, 1.0])
def test_exactly_the_allowed_change_is_allowed(
    allowed: float, unmerged_run: Path, base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = choice_of(unmerged_run)["largest_probability_change"]
    monkeypatch.setattr("llm_clf.commands.validation.TOLERANCE", change * allowed)
    more = [*FAST, "model.dtype=bf16", "train.learning_rate=0.02"]
    llm_clf.finetune(prompts, out=tmp_path / "run", model=str(base), set=more)
    assert choice_of(tmp_path / "run")["merged"] is settings_of(tmp_path / "run").predict.merge is (allowed == 1.0)
    merged = predicted(unmerged_run, prompts, tmp_path / "merged.parquet", "predict.merge=true")
    assert stored(tmp_path / "run") == (merged if allowed == 1.0 else stored(unmerged_run))


def test_the_base_is_loaded_once_and_changed_in_place(
    base: Path, merged_run: Path, prompts: Path, tmp_path: Path, loads: list[str]
) -> None:
    llm_clf.finetune(prompts, out=tmp_path / "run", model=str(base), set=[*FAST, "model.dtype=fp32"])
    assert loads == [str(base)] and choice_of(tmp_path / "run")["largest_probability_change"] is not None
    settings = settings_of(merged_run).merging(False)
    beside = Classifier.from_adapter(merged_run / "adapter", load_task(merged_run / "task.yaml"), settings)
    before = beside._model.get_base_model()
    embeddings = before.get_input_embeddings().weight
    after = beside.merged()._model
    assert after is before and after.get_input_embeddings().weight is embeddings


def test_the_trained_model_is_gone_before_the_base_is_loaded_again(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    from llm_clf.models import bases

    trained: list[Any] = []
    alive: list[bool] = []
    load = bases.load_model

    def load_to_train(*arguments: Any, **more: Any) -> Any:
        model = load(*arguments, **more)
        trained.extend(weakref.ref(parameter) for parameter in model.parameters())
        return model

    def load_to_score(*arguments: Any, **more: Any) -> Any:
        alive.append(any(weight() is not None for weight in trained))
        return load(*arguments, **more)

    monkeypatch.setattr(bases, "load_model", load_to_train)
    monkeypatch.setattr(classifier_module, "load_model", load_to_score)
    llm_clf.finetune(prompts, out=tmp_path / "run", model=str(base), set=FAST)
    assert trained and alive == [False]


def test_what_cannot_be_merged_stays_beside_the_base(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unmerged_run: Path
) -> None:
    def refuse(_: Any) -> None:
        raise ArtifactError("its weights hold infinite numbers")

    monkeypatch.setattr(classifier_module, "merge_adapter", refuse)
    more = [*FAST, "model.dtype=bf16", "train.learning_rate=0.02"]
    llm_clf.finetune(prompts, out=tmp_path / "run", model=str(base), set=more)
    choice = choice_of(tmp_path / "run")
    assert choice["merged"] is settings_of(tmp_path / "run").predict.merge is False
    assert choice["largest_probability_change"] is None and "its weights hold infinite numbers" in choice["reason"]
    assert stored(tmp_path / "run") == stored(unmerged_run)


def test_without_validation_rows_the_adapter_stays_beside_the_base(base: Path, prompts: Path, tmp_path: Path) -> None:
    rows = prompts.parent / "rows.csv"
    llm_clf.build_prompts([rows], task=prompts / "task.yaml", out=tmp_path / "p", split="0.8,0,0.2")
    llm_clf.finetune(tmp_path / "p", out=tmp_path / "run", model=str(base), set=FAST)
    assert settings_of(tmp_path / "run").predict.merge is False
    assert choice_of(tmp_path / "run") == {
        "merged": False,
        "largest_probability_change": None,
        "reason": "there are no validation rows",
    }


# Quantised bases


@pytest.mark.parametrize("mode", ["4bit", "8bit"])
def test_a_quantised_base_stays_as_it_is(
    mode: str, wide: Path, train: Train, prompts: Path, tmp_path: Path, merges: list[bool]
) -> None:
    run = train(wide, f"model.quantization={mode}")
    assert merges == [False] and settings_of(run).predict.merge is False
    assert choice_of(run) == {
        "merged": False,
        "largest_probability_change": None,
        "reason": "the base is quantised",
    }
    assert predicted(run, prompts, tmp_path / "again.parquet") == stored(run)


def test_a_base_that_is_quantised_on_disk_stays_as_it_is_too(
    wide: Path, prompts: Path, tmp_path: Path, merges: list[bool]
) -> None:
    packed = tmp_path / "packed"
    settings = ModelSettings(name=str(wide), quantization="4bit")
    load_model(settings, dtype="fp32", device=torch.device("cpu")).save_pretrained(packed)
    byte_tokenizer(packed)
    llm_clf.finetune(prompts, out=tmp_path / "run", model=str(packed), set=FAST)
    assert merges == [False] and choice_of(tmp_path / "run")["reason"] == "the base is quantised"
    with pytest.raises(ConfigError, match=r"packed is quantised \(as it lies on disk\).*predict.merge to false"):
        llm_clf.finetune(prompts, out=tmp_path / "no", model=str(packed), set=[*FAST, "predict.merge=true"])


def test_merging_into_a_quantised_base_is_refused_before_it_is_loaded(
    wide: Path, train: Train, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(wide, "model.dtype=fp32")

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("llm_clf.models.bases.load_model", loaded)
    monkeypatch.setattr(classifier_module, "load_model", loaded)
    told = r"predict.merge true: .*wide.* is quantised \(model.quantization 4bit\).*Set predict.merge to false"
    wanted = ["model.quantization=4bit", "predict.merge=true"]
    with pytest.raises(ConfigError, match=told):
        llm_clf.finetune(prompts, out=tmp_path / "run", model=str(wide), set=[*FAST, *wanted])
    with pytest.raises(ConfigError, match=told):
        predicted(run, prompts, tmp_path / "run.csv", *wanted)
    with pytest.raises(ConfigError, match=told):
        more: dict[str, Any] = {"task": run / "task.yaml", "model": str(wide)}
        predicted(run / "adapter", prompts, tmp_path / "bare.csv", *wanted, **more)
    assert not any(tmp_path.iterdir())


# Other settings for a prediction


@pytest.mark.parametrize(
    ("overrides", "merged"),
    [
        ([], True),
        (["predict.merge=auto"], True),
        (["predict.batch_tokens=100"], True),
        (["predict.merge=false"], False),
        # Nothing was found of these.
        (["model.dtype=bf16"], False),
        (["model.quantization=8bit"], False),
        (["model.dtype=bf16", "predict.merge=true"], True),
    ],
    ids=words,
)
def test_a_run_that_is_merged_says_so_where_a_prediction_is_not(
    overrides: list[str],
    merged: bool,
    wide: Path,
    train: Train,
    prompts: Path,
    tmp_path: Path,
    merges: list[bool],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train(wide, "model.dtype=fp32")
    assert settings_of(run).predict.merge is True
    merges.clear()
    capsys.readouterr()
    predicted(run, prompts, tmp_path / "out.parquet", *overrides)
    told = [line for line in capsys.readouterr().err.splitlines() if "validation rows were scored" in line]
    line = "The adapter is beside the base here; the run's validation rows were scored with it merged into the base."
    assert merges == [merged] and told == ([] if merged else [line])


def test_an_unmerged_run_says_so_where_a_prediction_is_merged(
    unmerged_run: Path, prompts: Path, tmp_path: Path, merges: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    predicted(unmerged_run, prompts, tmp_path / "out.parquet", "predict.merge=true")
    told = [line for line in capsys.readouterr().err.splitlines() if "validation rows were scored" in line]
    line = "The adapter is merged into the base here; the run's validation rows were scored with it beside the base."
    assert merges == [True] and told == [line]


@pytest.mark.parametrize(("overrides", "merged"), [([], False), (["predict.merge=true"], True)])
def test_a_bare_adapter_is_merged_only_where_that_is_asked_for(
    overrides: list[str], merged: bool, merged_run: Path, base: Path, prompts: Path, tmp_path: Path, merges: list[bool]
) -> None:
    more: dict[str, Any] = {"task": merged_run / "task.yaml", "model": str(base)}
    bare = predicted(merged_run / "adapter", prompts, tmp_path / "bare.parquet", "model.dtype=fp32", *overrides, **more)
    same = predicted(merged_run, prompts, tmp_path / "run.parquet", f"predict.merge={str(merged).lower()}")
    assert bare == same and merges == [merged, merged]


def test_a_former_run_predicts_as_it_says(
    merged_run: Path, prompts: Path, tmp_path: Path, merges: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs made before the choice was recorded say true or false, and run.json nothing."""
    former = tmp_path / "former"
    former.mkdir()
    for place in merged_run.iterdir():
        (former / place.name).symlink_to(place)
    config, facts = (former / name for name in ("config.yaml", "run.json"))
    tree, told = yaml.safe_load(config.read_text()), json.loads(facts.read_text())
    tree["predict"]["merge"] = False
    del told["merge"]
    for place, text in ((config, yaml.safe_dump(tree)), (facts, json.dumps(told))):
        place.unlink()
        place.write_text(text)
    beside = predicted(former, prompts, tmp_path / "former.parquet")
    assert "validation rows were scored" not in capsys.readouterr().err
    assert beside == predicted(merged_run, prompts, tmp_path / "run.parquet", "predict.merge=false")
    assert merges == [False, False]


# Kills between the training and the end


class Killed(BaseException):
    """Stands for a kill: nothing gets to clean up."""


def kill(*_: Any, **__: Any) -> None:
    raise Killed


KILLS = {
    "before the rows are scored": (lora_training, "score_validation"),
    "between the two ways": (classifier_module, "merge_adapter"),
    "before the choice is recorded": (lora_training, "asdict"),
    "before run.json": (lora_training, "save_facts"),
    "before the run has its name": (training_run, "replace_folder"),
}


@pytest.mark.parametrize("moment", KILLS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_killed_after_training_resumes_to_the_same_files(
    moment: str, dtype: str, base: Path, prompts: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["model.dtype=fp32"] if dtype == "fp32" else ["model.dtype=bf16", "train.learning_rate=0.02"]
    whole, run = train(base, *more), tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(*KILLS[moment], kill)
        llm_clf.finetune(prompts, out=run, model=str(base), set=[*FAST, *more])
    assert not run.exists() and partial_name(run).is_dir()
    llm_clf.finetune(prompts, out=run, model=str(base), set=[*FAST, *more], resume=True)
    assert {place.name for place in run.iterdir()} == {place.name for place in whole.iterdir()}
    for name in ("config.yaml", "predictions-valid.parquet", "metrics.json", "adapter/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert choice_of(run) == choice_of(whole)
