"""Sweeps: what a file may say, which trials are drawn, and that the best becomes the run, also after a kill."""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SHORT_TASK

import llm_clf
from llm_clf.commands import sweep as command
from llm_clf.config import Settings
from llm_clf.config_loading import load_settings
from llm_clf.engine import training
from llm_clf.errors import ConfigError, DataError, TrainingError
from llm_clf.files import partial_name
from llm_clf.sweeping.space import FIXED, Range, Sweep, load_sweep
from llm_clf.sweeping.trials import Trial, Trials, open_trials

# 36 training rows: three optimiser steps an epoch. Log-loss, because accuracy and F1 of a few rows are often equal.
FAST = ["model.dtype=fp32", "lora.dropout=0", "train.batch_size=12", "train.epochs=2", "data.max_length=64"]
FAST += ["train.metric=log_loss"]
RATES = "train.learning_rate: {low: 1e-5, high: 1e-2, log: true}"


def write(folder: Path, text: str, name: str = "sweep.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def load(folder: Path, text: str) -> Sweep:
    return load_sweep(write(folder, text), Settings())


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return str(caught.value)


# The file.


def test_a_file_is_read_with_numbers_as_the_settings_read_them(tmp_path: Path) -> None:
    sweep = load(
        tmp_path,
        "settings:\n  train.learning_rate: [1e-4, 0.001]\n  lora.alpha: {low: 1e1, high: 64}\n"
        "  train.class_weights: [null, balanced, {1: 3}]\n  lora.target_modules: [all-linear, [q_proj]]\n",
    )
    assert (sweep.trials, sweep.seed, sweep.startup_trials) == (20, 42, 5)
    assert sweep.settings["train.learning_rate"] == [1e-4, 1e-3]
    assert sweep.settings["lora.alpha"] == Range(low=10, high=64)
    assert sweep.settings["train.class_weights"] == [None, "balanced", {"1": 3.0}]
    assert sweep.settings["lora.target_modules"] == ["all-linear", ["q_proj"]]


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(
        tmp_path,
        """\
trials: 0
colour: red
settings:
  train.learning_rates: [1]
  lora.r: 8
  lora.dropout: {low: 0, high: 1.5}
  lora.alpha: {low: 0, high: 64, log: true, setp: 2}
  train.epochs: [0, 2, many]
  train.seed: [1, 2]
  train.schedule: {low: 1, high: 2}
  train.warmup: {low: 0.5, high: 0.1}
  data.max_length: {low: 16, high: 100.5}
  lora.use_dora: []
  train.patience: [1, 1]
""",
    )
    lines = message.splitlines()
    assert lines[0] == f"The sweep ({tmp_path / 'sweep.yaml'}) is wrong:"
    told = [line.strip() for line in lines[1:]]
    for start, end in (
        ("trials: found 0", "greater than or equal to 1."),
        ("colour: there is no such setting", "settings."),
        ("train.learning_rates: there is no such setting", "did you mean train.learning_rate?"),
        ("lora.r: found 8; expected a list of choices, or a range", "}."),
        ("lora.dropout: found 1.5", "less than 1."),
        ("lora.alpha.setp: there is no such setting", "did you mean lora.alpha.step?"),
        ("train.epochs: found 0", "equal to 1."),
        ("train.epochs: found 'many'", "integer."),
        ("train.seed: would choose the seed that is luckiest", "."),
        ("train.schedule: is no number, so it takes no range", "choices."),
        ("train.warmup: found low 0.5 and high 0.1", "below high."),
        ("data.max_length: found high 100.5", "whole number."),
        ("lora.use_dora: found []", "."),
        ("train.patience: found [1, 1]", "once."),
    ):
        assert [line for line in told if line.startswith(start) and line.endswith(end)], (start, message)
    assert len(told) == 14


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "settings: is missing"),
        ("settings:\n", "settings: found None"),
        ("settings: {}\n", "settings: found {}"),
        ("- lora.r\n", "found list, expected `settings:`"),
        ("settings: {lora.r: [1, 2}", "is not YAML"),
        ("settings: {lora.alpha: {low: 0, high: 8, log: true}}", "a range with log begins above 0"),
        ("settings: {lora.alpha: {low: 1, high: 8, log: true, step: 1}}", "found log and step"),
        ("settings: {lora.alpha: {low: 1, high: 8, step: 8}}", "found step 8, larger than the range"),
        ("settings: {lora.r: {low: 0, high: 8}}", "lora.r: found 0"),
        ("settings: {data.token_cache: [true, false]}", "data.token_cache: changes no result"),
        ("settings: {predict.batch_tokens: [1024, 2048]}", "predict.batch_tokens: changes no result"),
        ("settings: {decide.calibration: [none, auto]}", "decide.calibration: is fitted when a training is over"),
        ("settings: {lora.alpha: {low: .nan, high: 8}}", "lora.alpha.low: found nan"),
        ("settings: {lora.r: {low: 4}}", "lora.r.high: is missing"),
        ("trials: 7\nsettings: {lora.r: [1, 2], train.epochs: {low: 1, high: 3}}", "have 6 combinations"),
        ("trials: 4\nsettings: {lora.alpha: {low: 0.1, high: 0.3, step: 0.1}}", "have 3 combinations"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(tmp_path, text)


@pytest.mark.parametrize("key", FIXED)
def test_settings_that_no_sweep_may_change_are_refused_with_the_reason(tmp_path: Path, key: str) -> None:
    section, _, name = key.partition(".")
    value = getattr(getattr(Settings(), section), name)
    assert f"{key}: {FIXED[key]}." in refusal(tmp_path, f"settings: {{{key}: [{json.dumps(value)}]}}")


# The trials, without a training.


def peak(settings: dict[str, Any]) -> float:
    """Return a metric that is best at a rate of 1e-3 and a rank of 8."""
    return 1 / (1 + abs(math.log10(settings["train.learning_rate"]) + 3)) - 0.01 * abs(settings["lora.r"] - 8)


def turn(trials: Trials, measure: Callable[..., float]) -> bool:
    """Run the next trial with a made-up metric, measured twice; trial 2 fails. Return whether there was one."""
    trial = trials.next()
    if trial is None:
        return False
    value = measure(trial.settings)
    if trials.report(trial, 1, value / 2) or trials.report(trial, 2, value):
        trials.prune(trial, 1.0)
    elif trial.number == 2:
        trials.fail(trial, "no number", 1.0)
    else:
        trials.complete(trial, value, 0.5, 1.0)
    return True


def play(file: Path, sweep: Sweep, *, measure: Callable[..., float] = peak) -> list[Trial]:
    """Run all trials."""
    with open_trials(file, sweep, maximize=True) as trials:
        while turn(trials, measure):
            pass
        return trials.all()


def play_with_kills(file: Path, sweep: Sweep) -> list[Trial]:
    """Run all trials, each by two processes: the first is killed when one evaluation was noted."""
    going = True
    while going:
        with open_trials(file, sweep, maximize=True) as trials:
            trial = trials.next()
            if trial is not None:
                trials.report(trial, 1, peak(trial.settings) / 2)
        with open_trials(file, sweep, maximize=True) as trials:
            assert trial is None or trials.next() == trials.all()[trial.number]
            going = turn(trials, peak)
            made = trials.all()
    return made


TWO = {"train.learning_rate": Range(low=1e-5, high=1e-1, log=True), "lora.r": Range(low=2, high=32)}


def drawn(trials: list[Trial]) -> list[dict[str, Any]]:
    return [trial.settings for trial in trials]


def test_the_same_seed_draws_the_same_trials_also_when_every_step_is_broken_off(tmp_path: Path) -> None:
    sweep = Sweep(trials=12, settings=TWO)
    whole = play(tmp_path / "a.db", sweep)
    assert play_with_kills(tmp_path / "b.db", sweep) == whole
    assert {trial.state for trial in whole} == {"complete", "pruned", "failed"}
    other = play(tmp_path / "c.db", sweep.model_copy(update={"seed": 43}))
    assert not [settings for settings in drawn(other) if settings in drawn(whole)]


def test_more_trials_begin_with_the_same_ones(tmp_path: Path) -> None:
    few = play(tmp_path / "a.db", Sweep(trials=6, settings=TWO))
    assert play(tmp_path / "a.db", Sweep(trials=12, settings=TWO)) == play(
        tmp_path / "b.db", Sweep(trials=12, settings=TWO)
    )
    assert play(tmp_path / "b.db", Sweep(trials=12, settings=TWO))[:6] == few


def test_later_trials_are_nearer_to_the_best_than_blind_ones(tmp_path: Path) -> None:
    means = []
    for startup in (5, 20):
        sweep = Sweep(trials=20, startup_trials=startup, settings={"train.learning_rate": TWO["train.learning_rate"]})
        with open_trials(tmp_path / f"{startup}.db", sweep, maximize=False) as trials:
            while (trial := trials.next()) is not None:
                trials.complete(trial, abs(math.log10(trial.settings["train.learning_rate"]) + 4), 0.5, 1.0)
            means.append(sum(trial.value or 0.0 for trial in trials.all()[10:]) / 10)
    assert means[0] < means[1] - 0.4


def test_values_keep_to_their_ranges_and_steps(tmp_path: Path) -> None:
    sweep = load(
        tmp_path,
        "trials: 20\nsettings:\n  lora.r: {low: 4, high: 31, step: 8}\n  lora.dropout: {low: 0.1, high: 0.35, step: 0.1}\n"
        "  train.learning_rate: {low: 1e-4, high: 1e-2, log: true}\n  lora.alpha: [16, 32]\n",
    )
    found = drawn(play(tmp_path / "study.db", sweep, measure=lambda settings: settings["lora.r"]))
    assert {settings["lora.r"] for settings in found} == {4, 12, 20, 28}
    assert {round(settings["lora.dropout"], 9) for settings in found} == {0.1, 0.2, 0.3}
    assert {settings["lora.alpha"] for settings in found} == {16.0, 32.0}
    assert all(1e-4 <= settings["train.learning_rate"] <= 1e-2 for settings in found)


def test_no_two_trials_are_alike(tmp_path: Path) -> None:
    sweep = load(tmp_path, "trials: 12\nsettings: {lora.r: [2, 4, 8], train.epochs: {low: 1, high: 4}}")
    found = drawn(play(tmp_path / "study.db", sweep, measure=lambda settings: settings["lora.r"]))
    assert len({tuple(settings.values()) for settings in found}) == 12


@pytest.mark.parametrize("maximize", [True, False])
def test_a_trial_worse_than_the_median_is_broken_off(tmp_path: Path, maximize: bool) -> None:
    sweep = Sweep(trials=9, startup_trials=3, warmup_evaluations=0, settings=TWO)
    sign = 1 if maximize else -1
    with open_trials(tmp_path / "study.db", sweep, maximize=maximize) as trials:
        for value in (1.0, 2.0, 3.0):
            trial = trials.next()
            assert trial is not None and not trials.report(trial, 1, sign * value)
            trials.complete(trial, sign * value, 0.1, 1.0)
        trial = trials.next()
        assert trial is not None and trials.report(trial, 1, sign * 1.9)
        trials.prune(trial, 1.0)
        trial = trials.next()
        assert trial is not None and not trials.report(trial, 1, sign * 2.1)
        trials.complete(trial, sign * 2.1, 0.1, 1.0)
        assert [trial.state for trial in trials.all()] == ["complete"] * 3 + ["pruned", "complete"]
        best = trials.best()
        assert best is not None and best.number == 2


def test_log_loss_settles_ties_and_then_the_earlier_trial(tmp_path: Path) -> None:
    with open_trials(tmp_path / "study.db", Sweep(trials=3, settings=TWO), maximize=True) as trials:
        assert trials.best() is None
        for log_loss in (0.5, 0.3, 0.3):
            trial = trials.next()
            assert trial is not None
            trials.complete(trial, 0.9, log_loss, 1.0)
        best = trials.best()
        assert best is not None and best.number == 1


def test_a_folder_may_have_any_name_and_a_broken_file_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "100% {a}?b=#c"
    folder.mkdir()
    assert len(play(folder / "study.db", Sweep(trials=4, settings=TWO))) == 4
    (folder / "study.db").write_bytes(b"no database" * 1000)
    with pytest.raises(DataError, match=r"study\.db: cannot be written: .*not a database"):
        play(folder / "study.db", Sweep(trials=4, settings=TWO))


# The command.

# Trial 1 is pruned after one epoch, and the last one is the best: 6 + 3 + 6 + 6 steps.
PLAN = f"trials: 4\nseed: 1\nstartup_trials: 1\nwarmup_evaluations: 0\nsettings:\n  {RATES}\n  lora.r: [2, 4]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with prompts that a tiny base learns, and a sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    words = {"1": ["heart", "lung", "fever", "dose"], "0": ["steel", "star", "court", "bridge"]}
    with open(folder / "rows.csv", "w", encoding="utf-8") as lines:
        lines.write("uuid,title,abstract,label\n")
        for number in range(60):
            word = words[str(number % 2)][number // 2 % 4]
            lines.write(f"r{number},{word},{word} {number},{number % 2}\n")
    task = write(folder, SHORT_TASK, "task.yaml")
    llm_clf.build_prompts([folder / "rows.csv"], task=task, out=folder / "prompts", split="0.6,0.2,0.2")
    write(folder, PLAN)
    return folder


def start_sweep(
    folder: Path, out: Path, base: Path, *, plan: str | None = "sweep.yaml", **options: Any
) -> dict[str, Any]:
    more = options.pop("set", [])
    sweep = folder / plan if plan is not None else None
    return llm_clf.finetune(folder / "prompts", out=out, model=str(base), set=[*FAST, *more], sweep=sweep, **options)


@pytest.fixture(scope="module")
def whole(folder: Path, base: Path) -> Path:
    """Return the run of a sweep that nothing interrupted."""
    start_sweep(folder, folder / "whole", base)
    return folder / "whole"


def table(run: Path) -> list[dict[str, str]]:
    with open(run / "sweep" / "trials.csv", encoding="utf-8", newline="") as lines:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(lines)]


def facts(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "run.json").read_text())
    return content


def same_run(one: Path, other: Path) -> bool:
    files = ("adapter/adapter_model.safetensors", "predictions-valid.parquet", "metrics.json", "config.yaml")
    return table(one) == table(other) and all(
        (one / file).read_bytes() == (other / file).read_bytes() for file in files
    )


def test_the_best_trial_becomes_the_run(folder: Path, whole: Path, base: Path, tmp_path: Path) -> None:
    rows, sweep = table(whole), facts(whole)["sweep"]
    assert facts(whole)["name"] == "whole" and sweep["trials"] == len(rows) == 4
    assert (sweep["complete"], sweep["pruned"], sweep["failed"]) == (3, 1, 0)
    best = min((row for row in rows if row["state"] == "complete"), key=lambda row: float(row["log_loss"]))
    assert sweep["best"] == int(best["number"]) == 3 and sweep["metric"] == "log_loss"
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["log_loss"] == sweep["value"] == float(best["log_loss"])
    config = load_settings([whole / "config.yaml"])
    assert config.train.learning_rate == float(best["train.learning_rate"]) and config.lora.r == int(best["lora.r"])
    assert {place.name for place in whole.iterdir()} == {
        "adapter",
        "config.yaml",
        "decisions.json",
        "log",
        "metrics.json",
        "predictions-valid.parquet",
        "run.json",
        "scores-valid.npy",
        "sweep",
        "task.yaml",
        "trained-rows.npy",
    }
    assert {place.name for place in (whole / "sweep").iterdir()} == {"study.db", "sweep.yaml", "trials.csv"}
    assert not partial_name(whole).exists()

    again = tmp_path / "valid.parquet"
    llm_clf.predict(whole, [folder / "prompts" / "valid.jsonl"], out=again)
    assert again.read_bytes() == (whole / "predictions-valid.parquet").read_bytes()
    alone = [f"train.learning_rate={best['train.learning_rate']}", f"lora.r={best['lora.r']}"]
    start_sweep(folder, tmp_path / "alone", base, plan=None, set=alone)
    for file in ("adapter/adapter_model.safetensors", "predictions-valid.parquet", "config.yaml"):
        assert (tmp_path / "alone" / file).read_bytes() == (whole / file).read_bytes()


def test_a_pruned_trial_ends_before_its_last_epoch(whole: Path) -> None:
    assert [(row["state"], row["evaluations"]) for row in table(whole)] == [
        ("complete", "2"),
        ("pruned", "1"),
        ("complete", "2"),
        ("complete", "2"),
    ]


def test_the_sweep_that_the_run_keeps_repeats_it(folder: Path, whole: Path, base: Path, tmp_path: Path) -> None:
    llm_clf.finetune(
        folder / "prompts", out=tmp_path / "again", model=str(base), set=FAST, sweep=whole / "sweep" / "sweep.yaml"
    )
    assert same_run(tmp_path / "again", whole)


def test_a_finished_sweep_is_left_alone(
    folder: Path, whole: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*")}
    metrics = start_sweep(folder, whole, base, resume=True)
    assert "is finished; nothing to do" in capsys.readouterr().err
    assert metrics == json.loads((whole / "metrics.json").read_text())
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*")} == before


class Killed(BaseException):
    """Stands for a kill: nothing gets to clean up."""


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, after: bool = False) -> None:
    """Let the process end at a call of a function, before it does anything or after it did all."""
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise Killed
        done = original(*args, **options)
        if calls == call:
            raise Killed
        return done

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("where", "name", "call", "after"),
    [
        ("llm_clf.engine.training", "_add_up", 1, False),
        ("llm_clf.engine.training", "_checkpoint", 3, True),
        ("llm_clf.sweeping.trials.Trials", "next", 4, True),
        ("llm_clf.sweeping.trials.Trials", "report", 3, True),
        ("llm_clf.sweeping.trials.Trials", "complete", 2, False),
        ("llm_clf.sweeping.trials.Trials", "prune", 1, True),
        ("llm_clf.commands.lora_training", "score_validation", 2, False),
        ("llm_clf.commands.sweep", "save_facts", 1, False),
        ("llm_clf.commands.sweep", "save_facts", 1, True),
    ],
)
def test_a_sweep_that_was_killed_ends_as_the_unbroken_one(
    folder: Path,
    whole: Path,
    base: Path,
    tmp_path: Path,
    where: str,
    name: str,
    call: int,
    after: bool,
) -> None:
    from pydoc import locate

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, locate(where), name, call, after=after)
        start_sweep(folder, tmp_path / "run", base)
    assert not (tmp_path / "run").exists() and partial_name(tmp_path / "run").is_dir()
    start_sweep(folder, tmp_path / "run", base, resume=True)
    assert same_run(tmp_path / "run", whole)


def test_finished_trials_are_not_trained_again(
    folder: Path, whole: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, training, "_add_up", 14)
        start_sweep(folder, tmp_path / "run", base)
    steps, original = 0, training._add_up

    def counted(*args: Any) -> float:
        nonlocal steps
        steps += 1
        return original(*args)

    monkeypatch.setattr(training, "_add_up", counted)
    start_sweep(folder, tmp_path / "run", base, resume=True)
    # Of 21 steps, 13 were done, and one since the last checkpoint.
    assert sum(int(row["evaluations"]) for row in table(whole)) * 3 == 21
    assert steps == 21 - 13 + 1


def test_big_leftovers_do_not_pile_up(
    folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noted(unfinished: Path, *kept: Trial | None) -> None:
        original(unfinished, *kept)
        seen.append(sorted(place.name for place in command.trial_folders(unfinished)))
        assert not [place for place in command.trial_folders(unfinished) if (place / "checkpoints").exists()]

    original = command._clear
    monkeypatch.setattr(command, "_clear", noted)
    start_sweep(folder, tmp_path / "run", base)
    assert len(seen) == 4 and all(len(places) <= 1 for places in seen)


def test_going_on_with_another_sweep_is_refused_and_with_more_trials_is_not(
    folder: Path, base: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, training, "_add_up", 12)
        start_sweep(folder, run, base)
    for text, told in (
        (PLAN.replace("1e-2", "1e-1"), "sweep.settings.train.learning_rate (then {'low': 1e-05, 'high': 0.01"),
        (PLAN.replace("  lora.r: [2, 4]\n", ""), "sweep.settings.lora.r (then [2, 4], now None)"),
        (PLAN + "  lora.use_rslora: [true, false]\n", "sweep.settings.lora.use_rslora (then None"),
        (PLAN.replace("seed: 1", "seed: 7"), "sweep.seed (then 1, now 7)"),
    ):
        write(folder, text, "changed.yaml")
        with pytest.raises(ConfigError) as caught:
            start_sweep(folder, run, base, plan="changed.yaml", resume=True)
        assert told in str(caught.value) and "cannot go on" in str(caught.value)
    with pytest.raises(ConfigError, match=r"train.batch_size \(then 12, now 4\)"):
        start_sweep(folder, run, base, set=["train.batch_size=4"], resume=True)
    with pytest.raises(ConfigError, match="--resume goes on with it, --overwrite starts anew"):
        start_sweep(folder, run, base)
    with pytest.raises(ConfigError, match="an interrupted sweep left this. Give its --sweep"):
        start_sweep(folder, run, base, plan=None, resume=True)
    write(folder, PLAN.replace("trials: 4", "trials: 3", 1), "fewer.yaml")
    start_sweep(folder, run, base, plan="fewer.yaml", resume=True)
    assert len(table(run)) == 3


def test_a_single_training_is_not_gone_on_with_as_a_sweep(folder: Path, base: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, training, "_add_up", 4)
        start_sweep(folder, tmp_path / "run", base, plan=None)
    with pytest.raises(ConfigError, match="an interrupted single training left this. Leave out --sweep"):
        start_sweep(folder, tmp_path / "run", base, resume=True)
    start_sweep(folder, tmp_path / "run", base, plan=None, resume=True)
    start_sweep(folder, tmp_path / "run", base, overwrite=True)
    assert "sweep" in facts(tmp_path / "run")


def test_a_trial_that_fails_is_counted_and_told(
    folder: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder, "trials: 3\nsettings: {train.learning_rate: [0.004, 1e30, 1e-3]}", "diverges.yaml")
    start_sweep(folder, tmp_path / "run", base, plan="diverges.yaml")
    states = {row["train.learning_rate"]: row["state"] for row in table(tmp_path / "run")}
    assert states == {"0.004": "complete", "1e+30": "failed", "0.001": "complete"}
    assert facts(tmp_path / "run")["sweep"]["failed"] == 1
    error = next(row["error"] for row in table(tmp_path / "run") if row["state"] == "failed")
    assert "is not a number" in error and f"failed: {error}" in capsys.readouterr().err


def test_a_trial_that_memory_does_not_suffice_for_is_counted(
    folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = training._prepare

    def prepare(model: Any, settings: Any, *more: Any) -> Any:
        if settings.batch_size == 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(model, settings, *more)

    monkeypatch.setattr(training, "_prepare", prepare)
    write(folder, "trials: 2\nsettings: {train.batch_size: [6, 8]}", "large.yaml")
    start_sweep(folder, tmp_path / "run", base, plan="large.yaml")
    row = next(row for row in table(tmp_path / "run") if row["train.batch_size"] == "6")
    assert row["state"] == "failed" and row["error"].startswith("Memory ran out: CUDA out of memory.")


def test_where_all_trials_fail_there_is_no_run(folder: Path, base: Path, tmp_path: Path) -> None:
    write(folder, "trials: 2\nsettings: {train.learning_rate: [1e29, 1e30]}", "all.yaml")
    with pytest.raises(TrainingError, match=r"All 2 trials of the sweep failed:\n.*not a number"):
        start_sweep(folder, tmp_path / "run", base, plan="all.yaml")
    assert not list(tmp_path.iterdir())


def test_what_another_trial_would_not_mend_ends_the_sweep(folder: Path, base: Path, tmp_path: Path) -> None:
    write(folder, "trials: 1\nsettings: {lora.target_modules: [[c_attn]]}", "wrong.yaml")
    with pytest.raises(ConfigError, match="linear layers are"):
        start_sweep(folder, tmp_path / "run", base, plan="wrong.yaml")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data.cut: [abstract, body]", "data.cut: 'body' is no column"),
        ("train.class_weights: [balanced, {medical: 2}]", "'medical' is no label"),
        ("lora.rank: [4]", "lora.rank: there is no such setting"),
    ],
)
def test_what_does_not_fit_the_task_is_refused_before_a_model_is_loaded(
    folder: Path, tmp_path: Path, text: str, told: str
) -> None:
    write(folder, f"trials: 1\nsettings: {{{text}}}", "wrong.yaml")
    with pytest.raises(ConfigError, match=told):
        start_sweep(folder, tmp_path / "run", tmp_path / "no-such-base", plan="wrong.yaml")
    assert not list(tmp_path.iterdir())


def test_a_sweep_needs_validation_rows(folder: Path, base: Path, tmp_path: Path) -> None:
    llm_clf.build_prompts([folder / "rows.csv"], task=folder / "task.yaml", out=tmp_path / "p", split="0.8,0,0.2")
    with pytest.raises(ConfigError, match="compares its trials by the validation rows"):
        llm_clf.finetune(tmp_path / "p", out=tmp_path / "run", model=str(base), sweep=folder / "sweep.yaml")


def test_f1_is_made_large(folder: Path, base: Path, tmp_path: Path) -> None:
    write(folder, "trials: 2\nsettings: {train.learning_rate: [1e-5, 1e-2]}", "f1.yaml")
    start_sweep(folder, tmp_path / "run", base, plan="f1.yaml", set=["train.metric=f1", "train.epochs=6"])
    scores = [float(row["f1"]) for row in table(tmp_path / "run")]
    assert facts(tmp_path / "run")["sweep"]["value"] == max(scores) > min(scores)


# From the command line, with real kills.


def process(folder: Path, out: Path, base: Path, *more: str) -> subprocess.Popen[str]:
    words = ["finetune", folder / "prompts", "--out", out, "--model", base, "--sweep", folder / "sweep.yaml", *more]
    words += [word for setting in FAST for word in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-m", "llm_clf", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_trial(started: subprocess.Popen[str], out: Path, number: int) -> None:
    place = partial_name(out) / "checkpoints" / f"trial-{number:04d}"
    deadline = time.monotonic() + 120
    while started.poll() is None and not place.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_kills_at_random_moments_lose_nothing(
    folder: Path, whole: Path, base: Path, tmp_path: Path
) -> None:
    run, moments = tmp_path / "run", random.Random(3)
    for number in (0, 2, 3):
        started = process(folder, run, base, "--resume")
        wait_for_trial(started, run, number)
        time.sleep(moments.uniform(0, 0.6))
        started.send_signal(signal.SIGINT if number == 0 else signal.SIGKILL)
        told = started.communicate()[1]
        if number == 0:
            # Where Ctrl-C falls into code that Python made of a string (a dataclass in an import), Python itself ends
            # the process by the signal, which a shell shows as 130 too.
            assert started.returncode in (130, -signal.SIGINT), told
            assert "the same command with --resume goes on" in told, told
    started = process(folder, run, base, "--resume")
    told = started.communicate()[1]
    assert started.returncode == 0, told
    assert "becomes the run: log_loss " in told and "Best so far: trial " in told
    assert table(run) == table(whole) and yaml.safe_load((run / "sweep" / "sweep.yaml").read_text())["trials"] == 4
