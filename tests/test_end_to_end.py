"""The main job from the command line on a tiny base: build-prompts, finetune, predict, evaluate, and kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

import llm_clf
import llm_clf.commands.predict as predict_command
from llm_clf.engine import scoring
from llm_clf.errors import ArtifactError, ConfigError, DataError, TrainingError
from llm_clf.files import partial_name

FAST = ["train.learning_rate=0.004", "model.dtype=fp32", "lora.dropout=0", "train.batch_size=8", "data.max_length=96"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, Path]:
    """Return prompts and a run that learned them, made through the command line."""
    from conftest import SHORT_TASK

    folder = tmp_path_factory.mktemp("trained")
    words = {"1": ["heart", "lung", "fever", "dose"], "0": ["steel", "star", "court", "bridge"]}
    with open(folder / "rows.csv", "w", encoding="utf-8") as lines:
        lines.write("uuid,title,abstract,label\n")
        for number in range(60):
            word = words[str(number % 2)][number // 2 % 4]
            lines.write(f'r{number},{word},"{(word + " ") * (number % 9 + 1)}, {number}",{number % 2}\n')
    (folder / "task.yaml").write_text(SHORT_TASK, encoding="utf-8")
    prompts, run = folder / "prompts", folder / "run"
    command(
        [
            "build-prompts",
            folder / "rows.csv",
            "--task",
            folder / "task.yaml",
            "--out",
            prompts,
            "--split",
            "0.6,0.2,0.2",
        ]
    )
    settings = [word for setting in [*FAST, "train.epochs=12"] for word in ("--set", setting)]
    command(["finetune", prompts, "--out", run, "--model", base, *settings])
    return prompts, run


def command(words: list[object], *, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "llm_clf", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == expect, done.stderr
    return done


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


def test_a_learnable_task_is_learned(trained: tuple[Path, Path]) -> None:
    prompts, run = trained
    done = command(["predict", run, prompts / "test.jsonl", "--out", prompts / "test.csv"])
    assert done.stdout == "" and "12 rows predicted, 0 of them cut" in done.stderr
    shown = command(["evaluate", prompts / "test.csv", "--out", prompts / "scores"]).stdout
    metrics = json.loads((prompts / "scores" / "metrics.json").read_text())
    assert metrics["accuracy"] >= 0.9 and metrics["f1"] >= 0.9 and metrics["log_loss"] < 0.5
    assert f"{metrics['accuracy']:.4f}" in shown and "gold \\ predicted" in shown


def test_run_folder_holds_what_the_contract_says(trained: tuple[Path, Path], base: Path) -> None:
    _, run = trained
    names = {place.name for place in run.iterdir()}
    assert names == {
        "adapter",
        "task.yaml",
        "config.yaml",
        "run.json",
        "metrics.json",
        "predictions-valid.parquet",
        "decisions.json",
        "scores-valid.npy",
        "log",
        "trained-rows.npy",
    }
    facts = json.loads((run / "run.json").read_text())
    assert facts["kind"] == "lora" and facts["base"]["name"] == str(base) and len(facts["base"]["hash"]) == 64
    assert facts["seed"] == 42 and facts["versions"]["torch"] == torch.__version__
    assert facts["training"]["rows_per_second"] > 0 and facts["peak_memory"]["resident_bytes"] > 10**7
    assert len(facts["evaluations"]) == 12
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["train"]["epochs"] == 12 and config["model"]["dtype"] == "fp32" and config["lora"]["r"] == 8
    assert any((run / "log").glob("events.out.tfevents.*"))
    assert not partial_name(run).exists()


def test_adapter_loads_in_plain_peft_and_scores_the_same(trained: tuple[Path, Path], base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts, run = trained
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in (prompts / "valid.jsonl").read_text().splitlines()]
    stored = pq.read_table(run / "predictions-valid.parquet").to_pylist()
    for row, prediction in zip(rows, stored, strict=True):
        ids = tokenizer.encode(f"{row['instruction']}\n{row['input']}\n", add_special_tokens=False)
        scores = []
        for word in ("0", "1"):
            answer = [*tokenizer.encode(word, add_special_tokens=False), tokenizer.eos_token_id]
            with torch.no_grad():
                log_probs = model(input_ids=torch.tensor([ids + answer])).logits[0].log_softmax(dim=-1)
            scores.append(sum(log_probs[len(ids) - 1 + place, token] for place, token in enumerate(answer)))
        probs = torch.stack(scores).softmax(dim=0)
        assert prediction["prob_0"] == pytest.approx(probs[0].item(), abs=1e-5)
        assert prediction["prob_1"] == pytest.approx(probs[1].item(), abs=1e-5)


def test_predict_on_the_validation_rows_gives_the_stored_file_exactly(trained: tuple[Path, Path]) -> None:
    prompts, run = trained
    again = prompts / "valid-again.parquet"
    llm_clf.predict(run, [prompts / "valid.jsonl"], out=again, overwrite=True)
    assert again.read_bytes() == (run / "predictions-valid.parquet").read_bytes()
    metrics = json.loads((run / "metrics.json").read_text())
    found = llm_clf.evaluate(again)
    assert found == {name: metrics[name] for name in found}


def test_the_table_and_the_prompts_file_give_the_same_predictions(trained: tuple[Path, Path]) -> None:
    prompts, run = trained
    rows = [json.loads(line) for line in (prompts / "test.jsonl").read_text().splitlines()]
    ids = {row["id"] for row in rows}
    table = [line for line in (prompts.parent / "rows.csv").read_text().splitlines(keepends=True)]
    chosen = prompts / "test-rows.csv"
    chosen.write_text(table[0] + "".join(line for line in table[1:] if line.split(",")[0] in ids))
    for name, source in (("a", chosen), ("b", prompts / "test.jsonl")):
        llm_clf.predict(run, [source], out=prompts / f"{name}.jsonl", overwrite=True)
    assert (prompts / "a.jsonl").read_text() == (prompts / "b.jsonl").read_text()


def test_the_kept_checkpoint_is_the_best_by_f1(trained: tuple[Path, Path]) -> None:
    _, run = trained
    facts = json.loads((run / "run.json").read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    best = max(facts["evaluations"], key=lambda e: (e["f1"], -e["log_loss"], -e["step"]))
    assert facts["training"]["best_step"] == best["step"]
    assert metrics["f1"] == best["f1"] and metrics["log_loss"] == pytest.approx(best["log_loss"], abs=1e-5)


def test_rows_without_labels_are_all_predicted_in_order(trained: tuple[Path, Path], tmp_path: Path) -> None:
    _, run = trained
    rows = tmp_path / "new.csv"
    rows.write_text("title,abstract\nheart,dose\n,\nstar,star star\n", encoding="utf-8")
    llm_clf.predict(run, [rows], out=tmp_path / "new.jsonl", columns=["id", "title", "label", "prob_1", "gold"])
    written = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == ["0", "1", "2"]
    assert [row["title"] for row in written] == ["heart", "", "star"]
    assert written[0]["label"] == "1" and written[0]["prob_1"] > 0.5 and written[2]["label"] == "0"
    assert all(row["gold"] is None for row in written)


def test_predictions_on_standard_output_are_json_lines_and_nothing_else(trained: tuple[Path, Path]) -> None:
    prompts, run = trained
    done = command(["predict", run, prompts / "test.jsonl", "--out", "-"])
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["ok"] * 12


def test_merged_adapter_gives_the_same_probabilities(trained: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    prompts, run = trained
    rows, task = [prompts / "test.jsonl"], run / "task.yaml"
    llm_clf.predict(
        run / "adapter", rows, out=tmp_path / "bare.csv", task=task, model=str(base), set=["model.dtype=fp32"]
    )
    llm_clf.predict(run, rows, out=tmp_path / "beside.csv", set=["predict.merge=false"])
    llm_clf.predict(run, rows, out=tmp_path / "merged.csv", set=["predict.merge=true"])
    assert (tmp_path / "bare.csv").read_bytes() == (tmp_path / "beside.csv").read_bytes()
    columns = [
        np.loadtxt(tmp_path / f"{name}.csv", delimiter=",", skiprows=1, usecols=3) for name in ("beside", "merged")
    ]
    np.testing.assert_allclose(columns[0], columns[1], atol=1e-5)


def test_swapped_labels_would_show(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """The probabilities belong to the labels that they are named after."""
    prompts, run = trained
    llm_clf.predict(run, [prompts / "train.jsonl"], out=tmp_path / "train.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    own = np.mean([row[f"prob_{row['gold']}"] for row in rows])
    assert own > 0.8 and all(row["label"] == max("01", key=lambda name, row=row: row[f"prob_{name}"]) for row in rows)


def settings(*more: str) -> list[str]:
    return [*FAST, "train.epochs=3", *more]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_training_twice_gives_the_same_adapter_and_another_seed_another(
    prompts: Path, base: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        more = settings(f"train.seed={seed}", "lora.dropout=0.2")
        llm_clf.finetune(prompts, out=tmp_path / name, model=str(base), set=more)
    one, same, other = (adapter(tmp_path / name) for name in "abc")
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_micro_batches_do_not_change_the_result(prompts: Path, base: Path, tmp_path: Path) -> None:
    for name, tokens in (("whole", 10_000), ("cut", 64)):
        llm_clf.finetune(
            prompts, out=tmp_path / name, model=str(base), set=settings(f"train.micro_batch_tokens={tokens}")
        )
    whole, cut = adapter(tmp_path / "whole"), adapter(tmp_path / "cut")
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, atol=1e-4, rtol=1e-3)


class Killed(BaseException):
    """Stands for a kill between two steps: nothing gets to clean up."""


@pytest.mark.parametrize("step", [1, 4, 7])
def test_interrupted_training_resumes_to_the_same_adapter(
    prompts: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    from llm_clf.engine import training

    more = settings("lora.dropout=0.2")
    llm_clf.finetune(prompts, out=tmp_path / "whole", model=str(base), set=more)

    steps = 0
    original = training._add_up

    def counted(*args: object) -> float:
        nonlocal steps
        steps += 1
        if steps > step:
            raise Killed
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training, "_add_up", counted)
    run = tmp_path / "broken"
    with pytest.raises(Killed):
        llm_clf.finetune(prompts, out=run, model=str(base), set=more)
    monkeypatch.setattr(training, "_add_up", original)
    assert not run.exists() and partial_name(run).is_dir()
    with pytest.raises(ConfigError, match="--resume goes on"):
        llm_clf.finetune(prompts, out=run, model=str(base), set=more)
    with pytest.raises(ConfigError, match=r"train.learning_rate \(then 0.004, now 0.5\)"):
        llm_clf.finetune(prompts, out=run, model=str(base), set=[*more, "train.learning_rate=0.5"], resume=True)
    llm_clf.finetune(prompts, out=run, model=str(base), set=more, resume=True)
    whole, resumed = adapter(tmp_path / "whole"), adapter(run)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=0)
    assert (run / "predictions-valid.parquet").read_bytes() == (
        tmp_path / "whole" / "predictions-valid.parquet"
    ).read_bytes()


def start(words: list[object]) -> subprocess.Popen[str]:
    """Start a command that hears Ctrl-C, also where the tests run in the background and it is ignored."""
    return subprocess.Popen(
        [sys.executable, "-m", "llm_clf", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_training_killed_at_random_moments_resumes_to_the_same_adapter(
    prompts: Path, base: Path, tmp_path: Path
) -> None:
    words = ["finetune", prompts, "--model", base]
    words += [word for setting in settings("lora.dropout=0.2", "train.epochs=40") for word in ("--set", setting)]
    command([*words, "--out", tmp_path / "whole"])
    run, moments = tmp_path / "killed", random.Random(11)
    for _ in range(3):
        process = start([*words, "--out", run, "--resume"])
        progress = partial_name(run) / "checkpoints" / "last" / "progress.json"
        before = progress.stat().st_mtime_ns if progress.is_file() else 0
        wait_for(
            lambda before=before, progress=progress, process=process: (
                (progress.is_file() and progress.stat().st_mtime_ns > before) or process.poll() is not None
            )
        )
        time.sleep(moments.uniform(0, 0.5))
        kill(process)
    command([*words, "--out", run, "--resume"])
    whole, resumed = adapter(tmp_path / "whole"), adapter(run)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=0)
    assert (run / "predictions-valid.parquet").read_bytes() == (
        tmp_path / "whole" / "predictions-valid.parquet"
    ).read_bytes()


@pytest.mark.slow
def test_prediction_killed_at_random_moments_resumes_to_the_same_bytes(
    prompts: Path, base: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    llm_clf.finetune(prompts, out=run, model=str(base), set=settings("train.epochs=1", "predict.batch_tokens=64"))
    rows = tmp_path / "rows.jsonl"
    with open(rows, "w", encoding="utf-8") as lines:
        for number in range(3000):
            lines.write(
                json.dumps({"uuid": str(number), "title": f"t{number}", "abstract": "x" * (number % 23)}) + "\n"
            )
    llm_clf.predict(run, rows, out=tmp_path / "whole.csv")
    out, moments = tmp_path / "killed.csv", random.Random(12)
    journal = partial_name(out)
    for _ in range(3):
        process = start(["predict", run, rows, "--out", out, "--resume"])
        before = journal.stat().st_size if journal.is_file() else 0
        wait_for(
            lambda before=before, process=process: (
                (journal.is_file() and journal.stat().st_size > before + 200) or process.poll() is not None
            )
        )
        time.sleep(moments.uniform(0, 0.3))
        kill(process)
        assert not out.exists()
    command(["predict", run, rows, "--out", out, "--resume"])
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_ctrl_c_leaves_a_run_that_resumes(prompts: Path, base: Path, tmp_path: Path) -> None:
    words = ["finetune", prompts, "--model", base, "--out", tmp_path / "run"]
    words += [word for setting in settings("train.epochs=5000") for word in ("--set", setting)]
    started = start(words)
    wait_for(lambda: (partial_name(tmp_path / "run") / "checkpoints" / "last").is_dir() or started.poll() is not None)
    started.send_signal(signal.SIGINT)
    _, shown = started.communicate(timeout=60)
    assert started.returncode == 130 and "Traceback" not in shown and "with --resume goes on" in shown
    assert (partial_name(tmp_path / "run") / "checkpoints" / "last" / "progress.json").is_file()


def wait_for(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("batches", [0, 1, 3])
def test_interrupted_prediction_resumes_to_the_same_bytes(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, batches: int
) -> None:
    prompts, run = trained
    rows = [prompts.parent / "rows.csv"]
    monkeypatch.setattr("llm_clf.engine.classifier.WINDOW", 16)
    llm_clf.predict(run, rows, out=tmp_path / f"whole.{ending}")

    scored = 0
    original = scoring.LabelScorer.score

    def counted(self: scoring.LabelScorer, texts: list[list[int]]) -> torch.Tensor:
        nonlocal scored
        scored += 1
        if scored > batches:
            raise Killed
        return original(self, texts)

    out = tmp_path / f"broken.{ending}"
    monkeypatch.setattr(scoring.LabelScorer, "score", counted)
    with pytest.raises(Killed):
        llm_clf.predict(run, rows, out=out)
    assert not out.exists() and partial_name(out).is_file()
    # A kill may cut the line that was being written.
    with open(partial_name(out), "ab") as lines:
        lines.write(b'{"rows": [59], "sco')
    scored = -100
    with pytest.raises(ConfigError, match="--resume goes on"):
        llm_clf.predict(run, rows, out=out)
    llm_clf.predict(run, rows, out=out, resume=True)
    assert scored == -100 + 4 - batches
    assert out.read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    assert not partial_name(out).exists()
    before = out.stat().st_mtime_ns
    llm_clf.predict(run, rows, out=out, resume=True)
    assert out.stat().st_mtime_ns == before


def test_resuming_with_other_rows_is_refused(trained: tuple[Path, Path], tmp_path: Path) -> None:
    prompts, run = trained
    out = tmp_path / "out.csv"
    partial_name(out).write_text('{"key": "another job"}\n')
    with pytest.raises(ArtifactError, match="what another job left"):
        llm_clf.predict(run, [prompts / "test.jsonl"], out=out, resume=True)
    assert partial_name(out).read_text() == '{"key": "another job"}\n'


def test_places_that_are_taken_are_refused(trained: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    prompts, run = trained
    out = tmp_path / "taken.csv"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="already there"):
        llm_clf.predict(run, [prompts / "test.jsonl"], out=out)
    assert out.read_text() == "mine"
    with pytest.raises(ConfigError, match="already there"):
        llm_clf.finetune(prompts, out=run, model=str(base))
    with pytest.raises(ConfigError, match="is no run, so --overwrite leaves it alone"):
        llm_clf.finetune(prompts, out=prompts, model=str(base), overwrite=True)
    before = (run / "run.json").stat().st_mtime_ns
    llm_clf.finetune(prompts, out=run, model=str(base), resume=True)
    assert (run / "run.json").stat().st_mtime_ns == before


def test_a_base_that_changed_is_refused(
    trained: tuple[Path, Path], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    prompts, run = trained
    changed = tmp_path / "changed"
    changed.mkdir()
    for place in run.iterdir():
        (changed / place.name).symlink_to(place)
    (changed / "config.yaml").unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["name"] = str(make_base("glm", seed=9))
    (changed / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ArtifactError, match="is not the one that the run was trained on"):
        llm_clf.predict(changed, [prompts / "test.jsonl"], out=tmp_path / "out.csv")


def test_loss_that_is_no_number_exits_2_with_advice(prompts: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"Lower train.learning_rate"):
        llm_clf.finetune(prompts, out=tmp_path / "run", model=str(base), set=settings("train.learning_rate=1e30"))
    assert not (tmp_path / "run").exists()


def test_early_stopping_class_weights_and_metric(prompts: Path, base: Path, tmp_path: Path) -> None:
    more = settings("train.learning_rate=1e-9", "train.epochs=20", "train.patience=2", "train.metric=accuracy")
    llm_clf.finetune(prompts, out=tmp_path / "run", model=str(base), set=[*more, "train.class_weights={'1': 2.0}"])
    training = json.loads((tmp_path / "run" / "run.json").read_text())["training"]
    assert training["stopped_early"] and training["steps"] < 60
    with pytest.raises(ConfigError, match="'medical' is no label; the labels are 0, 1"):
        llm_clf.finetune(prompts, out=tmp_path / "b", model=str(base), set=["train.class_weights={medical: 2.0}"])


def test_gradient_checkpointing_changes_no_result(prompts: Path, base: Path, tmp_path: Path) -> None:
    for name, value in (("off", "false"), ("on", "true")):
        llm_clf.finetune(
            prompts, out=tmp_path / name, model=str(base), set=settings(f"train.gradient_checkpointing={value}")
        )
    off, on = adapter(tmp_path / "off"), adapter(tmp_path / "on")
    for name, tensor in off.items():
        torch.testing.assert_close(on[name], tensor, atol=1e-5, rtol=1e-4)


def test_unlabelled_training_rows_are_left_out_and_counted(
    many_rows: Path, short_task: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(many_rows, "a", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"uuid": f"u{i}", "title": "?", "abstract": str(i)}) + "\n" for i in range(10))
    llm_clf.build_prompts([many_rows], task=short_task, out=tmp_path / "p", split="0.8,0.2,0")
    metrics = llm_clf.finetune(
        tmp_path / "p", out=tmp_path / "run", model=str(base), set=[*settings(), "train.epochs=1"]
    )
    assert "32 training rows (0 cut to fit, 8 without a label left out)" in capsys.readouterr().err
    assert metrics["rows"] == 10 and metrics["rows_with_gold"] == 8


def test_no_validation_rows_keeps_the_last_step(many_rows: Path, short_task: Path, base: Path, tmp_path: Path) -> None:
    llm_clf.build_prompts([many_rows], task=short_task, out=tmp_path / "p", split="0.8,0,0.2")
    llm_clf.finetune(tmp_path / "p", out=tmp_path / "run", model=str(base), set=[*settings(), "train.epochs=1"])
    assert not (tmp_path / "run" / "metrics.json").exists()
    llm_clf.predict(tmp_path / "run", [tmp_path / "p" / "test.jsonl"], out=tmp_path / "test.csv")


@pytest.mark.parametrize(
    ("split", "message"), [("0,0.5,0.5", "found 0 labelled rows with 0 labels; training needs rows")]
)
def test_prompts_without_training_rows_are_refused(
    many_rows: Path, short_task: Path, base: Path, tmp_path: Path, split: str, message: str
) -> None:
    llm_clf.build_prompts([many_rows], task=short_task, out=tmp_path / "p", split=split)
    with pytest.raises(DataError, match=message):
        llm_clf.finetune(tmp_path / "p", out=tmp_path / "run", model=str(base))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_other_decoders_train_and_predict(
    prompts: Path, make_base: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    base = make_base(family, padding_side="left")
    metrics = llm_clf.finetune(prompts, out=tmp_path / "run", model=str(base), set=settings())
    assert metrics["rows"] == 8
    llm_clf.predict(tmp_path / "run", [prompts / "valid.jsonl"], out=tmp_path / "valid.parquet")
    assert (tmp_path / "valid.parquet").read_bytes() == (tmp_path / "run" / "predictions-valid.parquet").read_bytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_cuda_trains_and_predicts(prompts: Path, base: Path, tmp_path: Path, dtype: str) -> None:
    metrics = llm_clf.finetune(prompts, out=tmp_path / "run", model=str(base), set=settings(f"model.dtype={dtype}"))
    assert np.isfinite(metrics["log_loss"])


@pytest.mark.parametrize("change", [lambda rows: rows[:-1], lambda rows: [*rows, rows[0].replace("a9", "new")], sorted])
def test_rows_that_change_while_they_are_predicted_are_not_paired_with_other_scores(
    trained: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list[str]], list[str]],
) -> None:
    rows = tmp_path / "rows.csv"
    lines = ["uuid,title,abstract", *(f"a{9 - number},heart {number},lung" for number in range(6))]
    rows.write_text("\n".join(lines), encoding="utf-8")
    surveyed = predict_command.survey_rows

    def survey(prompts: object) -> object:
        found = surveyed(prompts)
        rows.write_text("\n".join([lines[0], *change(lines[1:])]), encoding="utf-8")
        return found

    monkeypatch.setattr(predict_command, "survey_rows", survey)
    with pytest.raises(DataError, match="changed while they were predicted"):
        llm_clf.predict(trained[1], rows, out=tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
