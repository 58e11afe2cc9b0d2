"""The LoRA training loop: answer-only loss, evaluation, best checkpoint, and a state that survives a kill."""

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from llm_clf.config import SpeedSettings, TrainSettings
from llm_clf.console import progress, say
from llm_clf.engine.batches import plan_batches, plan_packed
from llm_clf.engine.course import (
    CHECKPOINT_SECONDS,
    MAX_GRAD_NORM,
    PROGRESS,
    Evaluate,
    Progress,
    checkpoints_in,
    evaluate_step,
    evaluation_steps,
    prepared,
    reading_checkpoint,
    require_finite,
    writing_checkpoint,
)
from llm_clf.engine.fitting import TRIED, TokenBudget, Work
from llm_clf.engine.heads import Head
from llm_clf.engine.packing import common_beginning, without_adapter_dropout
from llm_clf.engine.sampling import balanced_order, shuffled_order
from llm_clf.engine.speed import speed_up
from llm_clf.engine.tokens import TrainingExample
from llm_clf.files import read_json, replace_folder, write_json
from llm_clf.models.adapters import adapter_state, load_adapter_state, trainable

Watch = Callable[[int, dict[str, float]], None]


def train(
    model: Any,
    head: Head,
    examples: Sequence[TrainingExample],
    settings: TrainSettings,
    speed: SpeedSettings,
    *,
    accelerator: Accelerator,
    pad_id: int,
    evaluate: Evaluate | None,
    folder: Path,
    found: Callable[[int], None] = lambda tokens: None,
    watch: Watch | None = None,
) -> Progress:
    """Train the adapter, and leave the weights of the best evaluation in the model.

    Goes on from the last checkpoint in `folder` where there is one. Where memory runs out, the optimiser step is done
    again in smaller micro-batches.

    Args:
        model: The base with a fresh adapter.
        head: Reads labels from the model.
        examples: What to learn, in the order of the prompts file.
        settings: The `train` section, without `auto`.
        speed: Which work is spared.
        accelerator: Gives the device, scales fp16 gradients, saves and loads state, logs to TensorBoard.
        pad_id: Token on padded places.
        evaluate: Returns the validation metrics of the model as it is now; None: no validation rows.
        folder: Where checkpoints go.
        found: Is told the token budget of micro-batches that is gone on with where memory ran out.
        watch: Is told the number of each evaluation, from 1, and its metrics, before the checkpoint is written: one
            that is made again after a kill is told again. What it raises breaks the training off.

    Raises:
        ArtifactError: The checkpoint that is there is damaged.
        ConfigError: Memory runs out on a single row.
        DataError: A checkpoint cannot be written.
        TrainingError: The loss or the gradient is not a number.
    """
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    total = per_epoch * settings.epochs
    optimizer, schedule = _prepare(model, settings, total, accelerator)
    state = _restore(folder, model, accelerator)
    due = evaluation_steps(per_epoch, total, settings.eval_every) if evaluate else set()
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable()
    gradients = _backward_of(model, head, examples, speed, pad_id, accelerator)
    labels = _labels_to_balance(examples) if settings.sampling == "balanced" else None

    def shrunk(tokens: int) -> None:
        if state.step:
            # First, so that a training that goes on makes none of the former steps again with another budget.
            _checkpoint(folder, model, state, accelerator)
        found(tokens)

    def keep_best() -> None:
        with writing_checkpoint(folder):
            save_file(adapter_state(model), folder / f"best-{state.best_step}.safetensors")

    budget = TokenBudget(int(settings.micro_batch_tokens), accelerator.device, shrunk)
    if accelerator.device.type in TRIED and state.step == 0:
        model.train()
        steps = [_rows_of_step(step, len(examples), settings, labels) for step in range(total)]
        budget.try_largest(gradients, [[examples[row] for row in rows] for rows in steps])
    saved = time.monotonic()

    with progress("training", total, "steps", done=state.step) as advance:
        model.train()
        while state.step < total and not state.stopped_early:
            started = time.monotonic()
            rows = _rows_of_step(state.step, len(examples), settings, labels)
            batch = [examples[row] for row in rows]
            loss = budget.fit(gradients, batch)
            norm = accelerator.clip_grad_norm_(trainable(model), MAX_GRAD_NORM)
            require_finite(loss, norm, state.step, settings, scaled=accelerator.scaler is not None)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            state.step += 1
            state.seconds += time.monotonic() - started
            state.rows += len(batch)
            state.tokens += sum(len(example.ids) + len(example.answer) for example in batch)
            accelerator.log({"train/loss": loss, "train/learning_rate": schedule.get_last_lr()[0]}, step=state.step)
            advance(1, f"loss {loss:.4f}")

            evaluated = state.step in due
            if evaluated and evaluate:
                evaluate_step(model, evaluate, state, settings, per_epoch, keep_best, accelerator)
                if watch:
                    watch(len(state.evaluations), state.evaluations[-1])
            if evaluated or state.step == total or time.monotonic() - saved >= CHECKPOINT_SECONDS:
                _checkpoint(folder, model, state, accelerator)
                saved = time.monotonic()
    if state.best_step is not None:
        with reading_checkpoint(folder):
            load_adapter_state(model, load_file(folder / f"best-{state.best_step}.safetensors"))
    model.eval()
    return state


def row_weights(labels: Sequence[str], class_weights: str | dict[str, float] | None) -> list[float]:
    """Return the weight of every row by its label; a label that `class_weights` does not name weighs 1.

    `balanced` gives each label the same total: rows / (labels x rows of the label), as scikit-learn does.
    """
    if class_weights is None:
        return [1.0] * len(labels)
    if isinstance(class_weights, str):
        counts = Counter(labels)
        class_weights = {label: len(labels) / (len(counts) * count) for label, count in counts.items()}
    return [class_weights.get(label, 1.0) for label in labels]


def _backward_of(
    model: Any,
    head: Head,
    examples: Sequence[TrainingExample],
    speed: SpeedSettings,
    pad_id: int,
    accelerator: Accelerator,
) -> Work[TrainingExample, float]:
    """Return what adds up the gradients of one optimiser step in micro-batches, and gives its loss.

    The loss is the mean over the step's answers, weighted: how the step is cut does not change it.
    """
    if not speed_up(model, speed, every_state=head.reads_every_state):

        def cut_padded(batch: Sequence[TrainingExample], budget: int) -> list[list[int]]:
            return plan_batches([len(example.ids) + len(example.answer) for example in batch], budget)

        def padded(batch: Sequence[TrainingExample]) -> int:
            return len(batch) * max(len(example.ids) + len(example.answer) for example in batch)

        def plain(batch: Sequence[TrainingExample], budget: int) -> float:
            return _add_up(
                batch, cut_padded(batch, budget), lambda rows: head.padded_loss(model, rows, pad_id), accelerator
            )

        return Work(cut_padded, padded, plain, model.zero_grad)
    shared = common_beginning(example.ids for example in examples) if speed.shared_prefix else []

    def length(example: TrainingExample) -> int:
        return len(example.ids) + len(example.answer) - 1 - len(shared)

    def cut(batch: Sequence[TrainingExample], budget: int) -> list[list[int]]:
        return plan_packed([length(example) for example in batch], budget)

    def packed(batch: Sequence[TrainingExample], budget: int) -> float:
        with without_adapter_dropout(model):
            made = head.read_beginning(model, shared)
        leaves = made.leaves()
        loss = _add_up(batch, cut(batch, budget), lambda rows: head.packed_loss(model, rows, leaves), accelerator)
        # Where activations are computed again, that too is done without dropout.
        with without_adapter_dropout(model):
            made.backward(leaves)
        return loss

    return Work(cut, lambda batch: sum(map(length, batch)), packed, model.zero_grad)


def _add_up(
    batch: Sequence[TrainingExample],
    cut: Sequence[Sequence[int]],
    loss_of: Callable[[list[TrainingExample]], torch.Tensor],
    accelerator: Accelerator,
) -> float:
    whole = sum(example.weight for example in batch)
    losses = []
    for rows in cut:
        part = loss_of([batch[row] for row in rows]) / whole
        accelerator.backward(part)
        losses.append(part.detach())
    return torch.stack(losses).sum().item()


def _prepare(model: Any, settings: TrainSettings, total: int, accelerator: Accelerator) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(trainable(model), lr=settings.learning_rate, weight_decay=0.0)
    return prepared(optimizer, settings, total, accelerator)


def _rows_of_step(step: int, rows: int, settings: TrainSettings, labels: tuple[int, ...] | None = None) -> list[int]:
    """Return the rows of one optimiser step; every epoch has an order of its own, given by the seed."""
    epoch, within = divmod(step, math.ceil(rows / settings.batch_size))
    order = _order_of_epoch(rows, settings.seed + epoch, labels)
    return order[within * settings.batch_size : (within + 1) * settings.batch_size]


@lru_cache(maxsize=1)
def _order_of_epoch(rows: int, seed: int, labels: tuple[int, ...] | None) -> list[int]:
    return shuffled_order(rows, seed) if labels is None else balanced_order(labels, seed)


def _labels_to_balance(examples: Sequence[TrainingExample]) -> tuple[int, ...]:
    """Return a number for the label of each example: each label has its own answer."""
    numbers: dict[tuple[int, ...], int] = {}
    return tuple(numbers.setdefault(tuple(example.answer), len(numbers)) for example in examples)


def _checkpoint(folder: Path, model: Any, state: Progress, accelerator: Accelerator) -> None:
    """Write all that training needs to go on; the former checkpoint stays until the new one is whole."""
    unfinished = folder / "last.writing"
    shutil.rmtree(unfinished, ignore_errors=True)
    with writing_checkpoint(folder):
        accelerator.save_state(str(unfinished))
        save_file(adapter_state(model), unfinished / "adapter.safetensors")
    write_json(unfinished / PROGRESS, asdict(state))
    replace_folder(unfinished, folder / "last")
    for stale in folder.glob("best-*.safetensors"):
        if stale.name != f"best-{state.best_step}.safetensors":
            stale.unlink()


def _restore(folder: Path, model: Any, accelerator: Accelerator) -> Progress:
    """Return where training stood at the last checkpoint, with model, optimiser and random state as they were."""
    places = checkpoints_in(folder)
    if not places:
        return Progress()
    with reading_checkpoint(places[0]):
        state = Progress(**read_json(places[0] / PROGRESS))
        load_adapter_state(model, load_file(places[0] / "adapter.safetensors"))
        accelerator.load_state(str(places[0]))
    say(f"Going on from step {state.step}.")
    return state
