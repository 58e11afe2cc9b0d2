"""The loop of pre-training: resumable to the last step, with a log that a plot is made from."""

import csv
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from pretraining.model import Worker, rate
from pretraining.rows import Batch, Rows, batches_forever, load_batch

LOG_FIELDS = ("step", "tokens", "seconds", "learning_rate", "loss", "held_out_loss", "held_out_answers")
CHECKPOINT_SECONDS = 240
HELD_OUT_BATCHES = 24


@dataclass(frozen=True, slots=True)
class Plan:
    """What the loop is told."""

    tokens: int
    """Tokens to train on; the learning rate falls towards the last."""
    step_batches: int
    """Batches of an optimiser step."""
    batch_tokens: int
    """Tokens of a batch."""
    learning_rate: float
    warmup: float
    decay: float
    answer_weight: float
    seed: int
    log_every: int = 50
    measure_every: int = 250


@dataclass
class Progress:
    """Where the training stands."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    lost: float = 0.0
    """Sum of the losses since the last line of the log."""
    log: list[dict[str, Any]] = field(default_factory=list)


def train(worker: Worker, optimizers: Sequence[Any], rows: Rows, held_out: Rows, plan: Plan, folder: Path) -> Progress:
    """Train the worker's model to the plan's end, from the checkpoint in `folder` if there is one."""
    state = _restore(worker, optimizers, folder)
    steps = plan.tokens // (plan.batch_tokens * plan.step_batches)
    highest = [[group["lr"] for group in optimizer.param_groups] for optimizer in _fresh_rates(optimizers, plan)]
    held = [load_batch(held_out, *some, plan.answer_weight) for some in _held_out(held_out, plan)]
    batches = islice(batches_forever(rows, plan.batch_tokens, plan.seed), state.step * plan.step_batches, None)
    saved = started = time.monotonic()
    before = state.seconds
    while state.step < steps:
        share = rate(state.step, steps, plan.warmup, plan.decay)
        some = [load_batch(rows, *next(batches), plan.answer_weight) for _ in range(plan.step_batches)]
        state.lost += worker.backward(some, state.step)
        _update(worker.model, optimizers, highest, share)
        state.step += 1
        state.tokens += sum(batch.ids.numel() for batch in some)
        state.seconds = before + time.monotonic() - started
        last = state.step == steps
        if state.step % plan.log_every == 0 or last:
            _log(state, worker, held, plan, share, measured=state.step % plan.measure_every == 0 or last)
        if time.monotonic() - saved > CHECKPOINT_SECONDS or last:
            _checkpoint(worker, optimizers, state, folder)
            saved = time.monotonic()
    return state


def write_log(state: Progress, file: Path) -> None:
    """Write the losses as CSV, one line for every few steps."""
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, LOG_FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(state.log)


def _fresh_rates(optimizers: Sequence[Any], plan: Plan) -> Sequence[Any]:
    """Return the optimisers with their highest rates again: a checkpoint holds those of its step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * group["share"]
    return optimizers


def _update(model: Any, optimizers: Sequence[Any], highest: Sequence[Sequence[float]], share: float) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, rates in zip(optimizers, highest, strict=True):
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * share
        optimizer.step()


def _held_out(rows: Rows, plan: Plan) -> list[tuple[int, Any]]:
    return list(islice(batches_forever(rows, plan.batch_tokens, 0), HELD_OUT_BATCHES)) if len(rows) else []


def _log(state: Progress, worker: Worker, held: Sequence[Batch], plan: Plan, share: float, *, measured: bool) -> None:
    since = state.step - (state.log[-1]["step"] if state.log else 0)
    loss, answers = worker.measure(held) if measured else (None, None)
    state.log.append(
        {
            "step": state.step,
            "tokens": state.tokens,
            "seconds": round(state.seconds),
            "learning_rate": round(plan.learning_rate * share, 6),
            "loss": round(state.lost / since, 4),
            "held_out_loss": "" if loss is None else round(loss, 4),
            "held_out_answers": "" if answers is None else round(answers, 4),
        }
    )
    state.lost = 0.0
    print("  ".join(f"{name} {value}" for name, value in state.log[-1].items() if value != ""), flush=True)


def _checkpoint(worker: Worker, optimizers: Sequence[Any], state: Progress, folder: Path) -> None:
    """Write all that training needs to go on; the former checkpoint stays until the new one is whole."""
    unfinished, place = folder / "checkpoint.writing", folder / "checkpoint"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_model(worker.model, str(unfinished / "model.safetensors"))
    torch.save([optimizer.state_dict() for optimizer in optimizers], unfinished / "optimizers.pt")
    (unfinished / "progress.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
    old = folder / "checkpoint.old"
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    unfinished.rename(place)


def has_checkpoint(folder: Path) -> bool:
    """Whether a training that was interrupted can go on from here."""
    return _latest(folder) is not None


def _latest(folder: Path) -> Path | None:
    # A kill between the two renames leaves the former checkpoint under its other name.
    places = [folder / "checkpoint", folder / "checkpoint.old"]
    return next((place for place in places if (place / "progress.json").is_file()), None)


def _restore(worker: Worker, optimizers: Sequence[Any], folder: Path) -> Progress:
    place = _latest(folder)
    if place is None:
        return Progress()
    load_model(worker.model, place / "model.safetensors")
    states = torch.load(place / "optimizers.pt", weights_only=True)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    progress = Progress(**json.loads((place / "progress.json").read_text(encoding="utf-8")))
    print(f"Going on from step {progress.step}, {progress.tokens:,} tokens.", flush=True)
    return progress
