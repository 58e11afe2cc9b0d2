"""The course of any training: how far it is, when it is measured, what was best, and how its files fail."""

import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from llm_clf.config import EncoderTrainSettings, TrainSettings
from llm_clf.console import say
from llm_clf.errors import ArtifactError, TrainingError
from llm_clf.files import cannot_write

MAX_GRAD_NORM = 1.0
CHECKPOINT_SECONDS = 60.0
LOWER_IS_BETTER = frozenset({"log_loss"})
PROGRESS = "progress.json"

AnyTrainSettings = TrainSettings | EncoderTrainSettings
Evaluate = Callable[[], dict[str, float]]


@dataclass
class Progress:
    """Where training stands; written with every checkpoint."""

    step: int = 0
    best_step: int | None = None
    best: tuple[float, float] | None = None
    """The kept checkpoint's metric (higher is better) and, to settle ties, its negative log-loss."""
    since_best: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    """Time spent in training steps."""
    rows: int = 0
    """Rows trained on, each epoch counted."""
    tokens: int = 0
    """Real tokens read in training steps."""
    stopped_early: bool = False


def prepared(
    optimizer: torch.optim.Optimizer, settings: AnyTrainSettings, total: int, accelerator: Accelerator
) -> tuple[Any, Any]:
    """Return an optimiser and the schedule of its learning rate over all steps, as accelerate runs them.

    The model stays as it is: autocast around it would make training compute otherwise than prediction.
    """
    from transformers import get_scheduler

    warmup = math.ceil(settings.warmup * total) if settings.warmup < 1 else int(settings.warmup)
    name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    return accelerator.prepare(optimizer), accelerator.prepare(schedule)


def evaluation_steps(per_epoch: int, total: int, every: float) -> set[int]:
    """Return the steps after which the model is evaluated: every so many epochs, and at the end."""
    every = max(every, 1 / per_epoch)
    count = math.floor(total / (per_epoch * every) + 1e-9)
    return {max(1, round(per_epoch * every * number)) for number in range(1, count + 1)} | {total}


def require_finite(loss: float, norm: Any, step: int, settings: AnyTrainSettings, *, scaled: bool) -> None:
    """Refuse to go on from a step whose loss or gradient is not a number.

    Raises:
        TrainingError: It is not.
    """
    # With loss scaling an overflowing gradient is no fault: the step is skipped and the scale halved.
    if math.isfinite(loss) and (scaled or norm is None or math.isfinite(float(norm))):
        return
    what = "loss" if not math.isfinite(loss) else "gradient"
    raise TrainingError(
        f"Step {step + 1}: the {what} is not a number. Nothing was changed by this step. Lower train.learning_rate "
        f"(now {settings.learning_rate:g}), raise train.warmup, or compute in another model.dtype (bf16 or fp32)."
    )


def evaluate_step(
    model: Any,
    evaluate: Evaluate,
    state: Progress,
    settings: AnyTrainSettings,
    per_epoch: int,
    keep_best: Callable[[], None],
    accelerator: Accelerator,
) -> None:
    """Measure the model on the validation rows, and keep its weights where it is the best so far.

    Args:
        model: Is put into training mode again.
        evaluate: Returns the metrics.
        state: Is brought up to date.
        settings: Tell the metric and the patience.
        per_epoch: Steps.
        keep_best: Keeps the weights as those of `state.best_step`.
        accelerator: Logs the metrics.

    Raises:
        TrainingError: The model's scores are not numbers.
    """
    model.eval()
    try:
        metrics = evaluate()
    except ArtifactError as error:
        raise TrainingError(
            f"Step {state.step}: {error} If it was sound until here, lower train.learning_rate "
            f"(now {settings.learning_rate:g})."
        ) from error
    model.train()
    state.evaluations.append({"step": state.step, "epoch": round(state.step / per_epoch, 4), **metrics})
    accelerator.log({f"valid/{name}": value for name, value in metrics.items()}, step=state.step)
    sign = -1.0 if settings.metric in LOWER_IS_BETTER else 1.0
    value = (sign * metrics[settings.metric], -metrics["log_loss"])
    better = state.best is None or value > tuple(state.best)
    say(
        f"epoch {state.step / per_epoch:.2f}: "
        + ", ".join(f"{name} {metrics[name]:.4f}" for name in ("accuracy", "precision", "recall", "f1", "log_loss"))
        + (" (best)" if better else "")
    )
    if better:
        state.best, state.best_step, state.since_best = value, state.step, 0
        keep_best()
        return
    state.since_best += 1
    state.stopped_early = bool(settings.patience) and state.since_best >= settings.patience
    if state.stopped_early:
        say(f"Stopped early: {state.since_best} evaluations without a better {settings.metric}.")


def has_checkpoint(folder: Path) -> bool:
    """Whether a training that was interrupted can go on from here."""
    return bool(checkpoints_in(folder))


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the whole checkpoints in a folder, the newest first."""
    # A kill between the two renames of replace_folder leaves the former checkpoint under its other name.
    return [place for place in (folder / "last", folder / ".last.old") if (place / PROGRESS).is_file()]


@contextmanager
def writing_checkpoint(folder: Path) -> Iterator[None]:
    """Turn what torch and safetensors raise where the disk is full into one error."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise cannot_write(folder, error, "Then --resume goes on from the last checkpoint.") from error


@contextmanager
def reading_checkpoint(folder: Path) -> Iterator[None]:
    """Turn what torch and safetensors raise over damaged files into one error."""
    try:
        yield
    except (
        OSError,
        RuntimeError,
        LookupError,
        TypeError,
        ValueError,
        SafetensorError,
        pickle.PickleError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"{folder}: the checkpoint is damaged: {reason}. Give --overwrite to start the training anew."
        ) from error
