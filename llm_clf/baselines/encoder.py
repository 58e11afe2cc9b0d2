"""The training loop of an encoder with its head: rows of like length together, evaluation, best checkpoint, resume."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from llm_clf.baselines.encoder_checkpoints import Checkpoints
from llm_clf.baselines.encoder_model import FusionClassifier, losses, padded_tokens, plan_rows
from llm_clf.config import EncoderTrainSettings
from llm_clf.console import progress
from llm_clf.engine.course import (
    MAX_GRAD_NORM,
    Evaluate,
    Progress,
    evaluate_step,
    evaluation_steps,
    prepared,
    require_finite,
)
from llm_clf.engine.fitting import TRIED, TokenBudget, Work
from llm_clf.engine.transfer import to_device

# Steps whose rows are drawn together and sorted by length: little is padded, and each step still has rows by chance.
SORTED_STEPS = 50


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A row to learn."""

    ids: Sequence[int]
    """Token ids."""
    label: int
    """Its number in the task's order."""
    weight: float
    """Share in the loss, by its label's class weight."""


def train(
    model: FusionClassifier,
    rows: Sequence[LabelledRow],
    settings: EncoderTrainSettings,
    *,
    accelerator: Accelerator,
    evaluate: Evaluate | None,
    folder: Path,
    found: Callable[[int], None],
) -> Progress:
    """Train encoder and head, and leave the weights of the best evaluation in the model.

    Goes on from the last checkpoint in `folder` where there is one. Where memory runs out, the optimiser step is done
    again in smaller micro-batches.

    Args:
        model: With fresh weights in its head.
        rows: What to learn, in the order of the prompts file.
        settings: The `train` section, without `auto`.
        accelerator: Scales fp16 gradients, saves and loads state, logs to TensorBoard.
        evaluate: Returns the validation metrics of the model as it is now; None: no validation rows.
        folder: Where checkpoints go.
        found: Is told the token budget of micro-batches that is gone on with where memory ran out.

    Raises:
        ArtifactError: The checkpoint that is there is damaged.
        ConfigError: Memory runs out on a single row.
        DataError: A checkpoint cannot be written.
        TrainingError: The loss or the gradient is not a number.
    """
    per_epoch = math.ceil(len(rows) / settings.batch_size)
    total = per_epoch * settings.epochs
    optimizer, schedule = _prepare(model, settings, total, accelerator)
    checkpoints = Checkpoints(folder, model, accelerator)
    state = checkpoints.restore()
    due = evaluation_steps(per_epoch, total, settings.eval_every) if evaluate else set()
    work = _work(model, accelerator)
    lengths = [len(row.ids) for row in rows]

    def shrunk(tokens: int) -> None:
        if state.step:
            # First, so that a training that goes on makes none of the former steps again with another budget.
            checkpoints.write(state)
        found(tokens)

    budget = TokenBudget(int(settings.micro_batch_tokens), accelerator.device, shrunk)
    model.train()
    if accelerator.device.type in TRIED and state.step == 0:
        budget.try_largest(work, [[max(rows, key=lambda row: len(row.ids))] * settings.batch_size])
    with progress("training", total, "steps", done=state.step) as advance:
        epoch, steps = -1, []
        while state.step < total and not state.stopped_early:
            started = time.monotonic()
            if state.step // per_epoch != epoch:
                epoch = state.step // per_epoch
                steps = steps_of_epoch(lengths, settings.batch_size, settings.seed + epoch)
            batch = [rows[number] for number in steps[state.step % per_epoch]]
            loss = budget.fit(work, batch)
            norm = accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            require_finite(loss, norm, state.step, settings, scaled=accelerator.scaler is not None)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            state.step += 1
            state.seconds += time.monotonic() - started
            state.rows += len(batch)
            state.tokens += sum(len(row.ids) for row in batch)
            accelerator.log({"train/loss": loss, "train/learning_rate": schedule.get_last_lr()[0]}, step=state.step)
            advance(1, f"loss {loss:.4f}")

            if state.step in due and evaluate:
                evaluate_step(
                    model, evaluate, state, settings, per_epoch, lambda: checkpoints.keep_best(state), accelerator
                )
            if state.step in due or state.step == total or checkpoints.due:
                checkpoints.write(state)
    checkpoints.load_best(state)
    model.eval()
    return state


def steps_of_epoch(lengths: Sequence[int], batch_size: int, seed: int) -> list[list[int]]:
    """Return the rows of each optimiser step of an epoch: every row once, rows of like length together.

    Args:
        lengths: Of the rows, in tokens.
        batch_size: Rows of a step; one step has what is left.
        seed: Gives the order.
    """
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(len(lengths), generator=draw).tolist()
    steps = []
    for start in range(0, len(order), SORTED_STEPS * batch_size):
        drawn = sorted(order[start : start + SORTED_STEPS * batch_size], key=lambda row: lengths[row])
        steps += [drawn[first : first + batch_size] for first in range(0, len(drawn), batch_size)]
    return [steps[number] for number in torch.randperm(len(steps), generator=draw).tolist()]


def _prepare(
    model: FusionClassifier, settings: EncoderTrainSettings, total: int, accelerator: Accelerator
) -> tuple[Any, Any]:
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return prepared(torch.optim.AdamW(groups, lr=settings.learning_rate), settings, total, accelerator)


def _work(model: FusionClassifier, accelerator: Accelerator) -> Work[LabelledRow, float]:
    """Return what adds up the gradients of one optimiser step in micro-batches, and gives its loss.

    The loss is the mean over the step's rows, weighted: how the step is cut does not change it.
    """

    def plan(batch: Sequence[LabelledRow], budget: int) -> list[list[int]]:
        return plan_rows([row.ids for row in batch], budget)

    def backward(batch: Sequence[LabelledRow], budget: int) -> float:
        whole = sum(row.weight for row in batch)
        parts = []
        for numbers in plan(batch, budget):
            loss = weighted_loss(model, [batch[number] for number in numbers]) / whole
            accelerator.backward(loss)
            parts.append(loss.detach())
        return torch.stack(parts).sum().item()

    return Work(plan, lambda batch: padded_tokens([row.ids for row in batch]), backward, model.zero_grad)


def weighted_loss(model: FusionClassifier, batch: Sequence[LabelledRow]) -> torch.Tensor:
    """Return the weighted sum over rows of the loss in nats, a scalar in fp32."""
    logits = model([row.ids for row in batch])
    targets = to_device([row.label for row in batch], logits.device)
    weights = to_device([row.weight for row in batch], logits.device)
    return (losses(logits, targets) * weights).sum()
