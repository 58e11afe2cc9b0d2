"""A run against itself: every probability the same again, or the reason why it is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import CHAT_TEMPLATE, word_prompts
from typer.testing import CliRunner

import llm_clf
from llm_clf.commands import lora_training
from llm_clf.commands.parity import MeasuredRows
from llm_clf.decisions.predictions import PredictionTable
from llm_clf.errors import ArtifactError, ConfigError, DataError, LlmClfError
from llm_clf.evaluation.parity import Parity, compare_predictions, compare_probabilities
from llm_clf.files import file_hash

FAST = ["train.epochs=2", "train.batch_size=8", "train.learning_rate=0.004", "model.dtype=fp32"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_base: Callable[..., Path]) -> Path:
    """Make a folder with a base, prompts and a run that was trained on them, once."""
    folder = tmp_path_factory.mktemp("verify")
    shutil.copytree(make_base("glm"), folder / "base")
    word_prompts(folder, rows=40, lengths=5, split="0.6,0.3,0.1")
    llm_clf.finetune(folder / "prompts", out=folder / "runs" / "run", model=str(folder / "base"), set=FAST)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """Return a run of one's own; prompts and base are where they were."""
    shutil.copytree(made / "runs" / "run", tmp_path / "run")
    return tmp_path / "run"


def facts_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text(encoding="utf-8")))


def change_facts(run: Path, **changes: Any) -> None:
    facts = facts_of(run)
    for name, value in changes.items():
        facts[name] = facts[name] | value if isinstance(value, dict) else value
    (run / "run.json").write_text(json.dumps(facts), encoding="utf-8")


def nudge(run: Path, by: float) -> None:
    """Move the probabilities of the third stored row, as if the run had been scored elsewhere."""
    file = run / "predictions-valid.parquet"
    table = pq.read_table(file)
    records = table.to_pylist()
    sign = 1 if records[2]["prob_0"] < 0.5 else -1
    records[2]["prob_0"] += sign * by
    records[2]["prob_1"] -= sign * by
    pq.write_table(pa.Table.from_pylist(records, table.schema), file)
    change_facts(run, scored_with={"predictions": file_hash(file)})


# --- what is compared -------------------------------------------------------------------------------------------------


def test_probabilities_are_compared_bit_by_bit() -> None:
    one = np.array([[0.75, 0.25], [0.5, 0.5], [0.2, 0.8]], dtype=np.float32)
    other = one.copy()
    assert compare_probabilities(one, other) == Parity(3, 0, 0, 0.0) and compare_probabilities(one, other).equal
    other[0, 0] = np.nextafter(np.float32(0.75), np.float32(1))
    found = compare_probabilities(one, other)
    assert (found.rows_differ, found.labels_changed) == (1, 0) and not found.equal
    assert found.largest_probability_change == pytest.approx(2**-24) and found.within(1e-6) and not found.within(1e-8)
    other[2] = [0.7, 0.3]
    found = compare_probabilities(one, other)
    assert (found.rows_differ, found.labels_changed) == (2, 1) and not found.within(1.0)


def table_of(**changes: Any) -> PredictionTable:
    columns: dict[str, Any] = {"labels": ["0", "1"], "ids": ["a", "b"], "predicted": ["0", "1"], "gold": ["0", "1"]}
    probs = np.array([[0.9, 0.1], [0.4, 0.6]])
    return PredictionTable(**(columns | {"status": ["ok", "ok"], "probs": probs} | changes))


def test_labels_and_statuses_are_compared_too() -> None:
    same = table_of()
    assert compare_predictions(same, table_of(), "f").equal
    assert compare_predictions(same, table_of(predicted=["1", "1"]), "f").labels_changed == 1
    assert compare_predictions(same, table_of(status=["ok", "unparsed"]), "f").rows_differ == 1
    for other in (table_of(ids=["b", "a"]), table_of(gold=["0", "0"]), table_of(labels=["1", "0"])):
        with pytest.raises(ArtifactError, match="f: holds other rows, gold labels or labels"):
            compare_predictions(same, other, "f")


def test_the_rows_of_the_kept_checkpoint_are_found_again(tmp_path: Path) -> None:
    probs = [np.full((2, 2), value, dtype=np.float32) for value in (0.1, 0.2)]
    for number, found in enumerate(probs):
        MeasuredRows(tmp_path).keep({"f1": 0.5, "log_loss": 1 / 3 + number}, found)
    evaluations = [{"step": 4 * n + 4, "epoch": n + 1.0, "f1": 0.5, "log_loss": 1 / 3 + n} for n in range(2)]
    again = json.loads(json.dumps(evaluations))
    for number, found in enumerate(probs):
        kept = MeasuredRows(tmp_path).of(4 * number + 4, again)
        assert kept is not None and np.array_equal(kept, found)
    assert MeasuredRows(tmp_path).of(None, []) is None and MeasuredRows(tmp_path).of(12, again) is None


# --- a run that is what it was ----------------------------------------------------------------------------------------


def test_a_run_repeats_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    found = llm_clf.verify(run)
    rows = facts_of(run)["rows"]["valid"]
    assert rows == 12 and found == {
        "run": str(run),
        "outcome": "equal",
        "rows": rows,
        "rows_differ": 0,
        "labels_changed": 0,
        "largest_probability_change": 0.0,
        "tolerance": 0.0,
        "elsewhere": [],
    }
    assert f"Verified: {run} gives all 12 validation rows what it stores, bit for bit." in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} == before


def test_a_training_ends_with_it(made: Path) -> None:
    found = facts_of(made / "runs" / "run")["verified"]
    # This adapter is merged, so the saved model rounds otherwise than the one in training.
    assert found["rows"] == 12 and found["labels_changed"] == 0 and found["outcome"] in ("equal", "rounding")
    assert found["largest_probability_change"] < 1e-4
    assert not list((made / "runs" / "run").rglob("measured-*"))


def test_an_adapter_beside_its_base_is_exactly_what_was_trained(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*FAST, "predict.merge=false"]
    llm_clf.finetune(made / "prompts", out=tmp_path / "run", model=str(made / "base"), set=settings)
    told = "Verified: the saved model gives 12 validation rows the probabilities that training measured, bit for bit."
    assert told in capsys.readouterr().err and facts_of(tmp_path / "run")["verified"]["outcome"] == "equal"


def test_a_saved_adapter_that_is_another_one_is_told_of(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm_clf.models import adapters

    save = adapters.save_adapter

    def damage(model: Any, *words: Any, **named: Any) -> None:
        for parameter in adapters.trainable(model):
            parameter.data.mul_(3)
        save(model, *words, **named)

    monkeypatch.setattr(adapters, "save_adapter", damage)
    llm_clf.finetune(made / "prompts", out=tmp_path / "run", model=str(made / "base"), set=FAST)
    assert "Warning: the saved model does not predict what training measured" in capsys.readouterr().err
    found = facts_of(tmp_path / "run")["verified"]
    assert found["outcome"] == "differs" and found["rows_differ"] == 12


def test_a_training_that_goes_on_after_its_last_step_still_ends_with_it(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: dict[str, Any] = {"out": tmp_path / "run", "model": str(made / "base"), "set": FAST}

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(lora_training, "score_validation", kill)
        llm_clf.finetune(made / "prompts", **words)
    llm_clf.finetune(made / "prompts", resume=True, **words)
    assert facts_of(tmp_path / "run")["verified"] == facts_of(made / "runs" / "run")["verified"]


# --- where the rows are -----------------------------------------------------------------------------------------------


def test_prompts_are_found_where_they_moved_with_the_run(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "moved")
    run = tmp_path / "moved" / "runs" / "run"
    assert facts_of(run)["data"] == {"path": "../../prompts", "given": str(made / "prompts")}
    change_facts(run, data={"given": "/nowhere"})
    assert llm_clf.verify(run)["outcome"] == "equal"


def test_prompts_that_are_gone_are_asked_for(made: Path, run: Path) -> None:
    change_facts(run, data={"given": "/nowhere"})
    told = r"run: was trained on the prompts in /nowhere, and they are not there now. Tell where they are: --data DIR"
    with pytest.raises(ConfigError, match=told):
        llm_clf.verify(run)
    assert llm_clf.verify(run, data=made / "prompts")["outcome"] == "equal"
    with pytest.raises(DataError, match=r"runs: has no valid.jsonl. Give --data"):
        llm_clf.verify(run, data=made / "runs")
    facts = facts_of(run)
    del facts["data"]
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="as runs of older versions do not. Give the prompts folder .*--data DIR"):
        llm_clf.verify(run)


def test_other_rows_are_refused(made: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "prompts", tmp_path / "other")
    lines = (tmp_path / "other" / "valid.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other" / "valid.jsonl").write_text("".join(lines[:-1]))
    change_facts(run, data={"given": str(tmp_path / "other")})
    for data in (None, tmp_path / "other"):
        with pytest.raises(DataError, match=r"valid.jsonl: holds other rows than those that .*run was validated on"):
            llm_clf.verify(run, data=data)


def test_a_run_without_validation_rows_has_nothing_to_be_verified_by(run: Path) -> None:
    change_facts(run, rows={"valid": 0})
    with pytest.raises(ConfigError, match="was trained without validation rows"):
        llm_clf.verify(run)


# --- why a run predicts otherwise -------------------------------------------------------------------------------------


def differs(run: Path, **words: Any) -> str:
    with pytest.raises(LlmClfError) as raised:
        llm_clf.verify(run, **words)
    return str(raised.value)


def test_another_base_is_named(run: Path, make_base: Callable[..., Path]) -> None:
    told = differs(run, model=str(make_base("glm", seed=1)))
    assert "is not the one that the run was trained on" in told and "other tokens" not in told


def test_another_tokenizer_is_named(run: Path, make_base: Callable[..., Path]) -> None:
    told = differs(run, model=str(make_base("glm", template=CHAT_TEMPLATE)))
    assert "is not the one that the run was trained on" in told
    assert told.endswith("Its tokenizer makes other tokens of the validation rows.")


def test_another_task_is_named(run: Path) -> None:
    (run / "task.yaml").write_text((run / "task.yaml").read_text().replace("{title}:{abstract}", "{title} {abstract}"))
    assert "task.yaml: is not the task that the run was trained on: its instruction, template" in differs(run)


def test_a_damaged_adapter_is_named(run: Path) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert "adapter_model.safetensors: has changed since the training" in differs(run)


def test_damaged_predictions_are_named(run: Path) -> None:
    expected = facts_of(run)["scored_with"]["predictions"]
    nudge(run, 1e-3)
    change_facts(run, scored_with={"predictions": expected})
    assert "predictions-valid.parquet: has changed since the training" in differs(run)
    (run / "predictions-valid.parquet").unlink()
    assert "predictions-valid.parquet is missing from the run" in differs(run)


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("model", "dtype", "bf16", "the setting model.dtype (then 'fp32', now 'bf16')"),
        ("data", "max_length", 40, "the setting data.max_length (then 1024, now 40)"),
    ],
)
def test_other_settings_are_named(run: Path, section: str, key: str, value: Any, told: str) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings[section][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    found = differs(run)
    assert "of 12 rows differ" in found and "What is not as it was in the training:" in found
    assert told in found


def test_what_has_no_reason_is_said_to_have_none(run: Path) -> None:
    nudge(run, 1e-5)
    found = differs(run)
    assert "1 of 12 rows differ, 0 in their label; the largest change of a probability is 1e-05." in found
    assert "it is none of these. Predict twice" in found


def test_elsewhere_rounding_is_allowed_and_more_is_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_facts(run, versions={"torch": "0.1"}, hardware={"processor": "another"})
    found = llm_clf.verify(run)
    assert found["outcome"] == "equal" and len(found["elsewhere"]) == 2
    assert "bit for bit. Other than in the training: torch (then 0.1, now " in capsys.readouterr().err
    nudge(run, 5e-4)
    found = llm_clf.verify(run)
    assert found["outcome"] == "rounding" and found["rows_differ"] == 1 and found["tolerance"] == 1e-3
    assert "Verified but for rounding: " in capsys.readouterr().err
    nudge(run, 0.02)
    told = differs(run)
    assert "and 0.001 is allowed on other hardware or versions" in told
    assert "  torch (then 0.1, now " in told and "  the processor (then another, now " in told


def test_elsewhere_a_changed_setting_is_no_rounding(run: Path) -> None:
    nudge(run, 1e-6)
    change_facts(run, versions={"torch": "0.1"}, scored_with={"settings": {"predict.batch_tokens": 5}})
    assert "the setting predict.batch_tokens (then 5, now 8192)" in differs(run)


def test_the_command_line_tells_by_its_exit(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llm_clf.cli

    assert CliRunner().invoke(llm_clf.cli.app, ["verify", str(run)]).exit_code == 0
    nudge(run, 1e-3)
    monkeypatch.setattr("sys.argv", ["llm-clf", "verify", str(run)])
    with pytest.raises(SystemExit) as left:
        llm_clf.cli.main()
    assert left.value.code == 2


# --- runs of other kinds ----------------------------------------------------------------------------------------------


def test_every_kind_of_run_is_verified(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(made / "runs", runs)
    llm_clf.baseline_tfidf(made / "prompts", out=runs / "tfidf")
    assert "Verified: the saved model gives 12 validation rows" in capsys.readouterr().err
    settings = ["train.epochs=1", "model.dtype=fp32"]
    llm_clf.baseline_encoder(made / "prompts", out=runs / "encoder", set=settings)
    assert "Verified: the saved model gives 12 validation rows" in capsys.readouterr().err
    llm_clf.ensemble([runs / "tfidf", runs / "run"], data=made / "prompts", out=runs / "both")
    for name in ("tfidf", "encoder", "both"):
        assert llm_clf.verify(runs / name)["outcome"] == "equal", name
        assert facts_of(runs / name).get("verified", {"outcome": "equal"})["outcome"] == "equal"
    nudge(runs / "both", 1e-3)
    change_facts(runs / "run", versions={"torch": "0.1"}, scored_with={"settings": {"model.dtype": "bf16"}})
    assert f"{runs / 'run'}: the setting model.dtype (then 'bf16', now 'fp32')" in differs(runs / "both")


def test_an_encoders_other_tokenizer_is_named(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "encoder"
    llm_clf.baseline_encoder(made / "prompts", out=run, set=["train.epochs=1", "model.dtype=fp32"])
    file = run / "encoder" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Lowercase"} if tokenizer.get("normalizer") is None else None
    tokenizer["pre_tokenizer"] = None
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "the tokenizer, which makes other tokens of the validation rows" in differs(run)
