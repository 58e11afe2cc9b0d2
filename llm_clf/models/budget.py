"""How a training is cut so that it fits into the memory there is: tokens of a micro-batch, gradient checkpointing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llm_clf.config import ModelSettings, Settings, TrainSettings
from llm_clf.errors import MemoryLimitError
from llm_clf.models.memory import (
    DTYPE_BYTES,
    MODES,
    QUANTIZED,
    AdapterShape,
    BaseShape,
    Estimate,
    MicroBatch,
    adapter_shape,
    base_shape,
    estimate,
    largest_micro_batch,
)

AUTO = "auto"
# Padded tokens of a micro-batch, tried from the first. On CPU more tokens than the first are no faster.
BUDGETS = {"cpu": (2048, 1024, 512), "cuda": (16384, 8192, 4096, 2048, 1024, 512)}
# Share of the free memory that an estimate may take before a leaner plan is tried.
SHARE = 0.9


@dataclass(frozen=True, slots=True)
class RowLengths:
    """Lengths of the training rows with their answers, in tokens."""

    longest: int
    mean: float
    answer: int
    """The longest answer, end token included."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a training is cut, and what it is estimated to take."""

    micro_batch_tokens: int
    gradient_checkpointing: bool
    batch: MicroBatch
    """The largest micro-batch."""
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the memory of a training follows from."""

    base: BaseShape
    adapter: AdapterShape
    can_checkpoint: bool
    """Whether the base's code can compute activations again."""

    @classmethod
    def of(cls, empty: Any, settings: Settings) -> "Shapes":
        """Return the shapes of a base on the meta device and of the adapter that the settings give it."""
        from llm_clf.models.adapters import new_adapter

        base, can_checkpoint = base_shape(empty), bool(empty.supports_gradient_checkpointing)
        adapter = adapter_shape(new_adapter(empty, settings.lora, seed=settings.train.seed))
        return cls(base, adapter, can_checkpoint)


def mode_of(model: ModelSettings) -> str:
    """Return the mode of MODES in which resolved settings hold the base."""
    return model.dtype if model.quantization == "none" else model.quantization


def plan_training(
    mode: str, size: int, shapes: Shapes, rows: RowLengths, settings: Settings, *, device: str, free: int
) -> Plan:
    """Return the fastest plan whose estimate fits; the leanest one where none does.

    Args:
        mode: How the base is held, of MODES.
        size: Bytes of a number that is computed.
        shapes: Base and adapter.
        rows: Lengths of the training rows.
        settings: What they fix is kept; `auto` is decided here.
        device: `cuda` or `cpu`.
        free: Bytes.
    """
    plan = None
    for budget, checkpointing in _choices(settings.train, device, shapes.can_checkpoint):
        batch = largest_micro_batch(
            rows.longest, rows.mean, answer=rows.answer, batch_size=settings.train.batch_size, budget=budget
        )
        dropout = settings.lora.dropout > 0
        found = estimate(
            mode,
            size,
            shapes.base,
            shapes.adapter,
            batch,
            device=device,
            dropout=dropout,
            checkpointing=checkpointing,
            packed=settings.speed.packing,
            fast_lora=settings.speed.fast_lora,
            fused=settings.speed.fused_layers,
            short=settings.speed.short_last_layer and settings.model.pooling == "last",
        )
        plan = Plan(budget, checkpointing, batch, found)
        if found.peak <= SHARE * free:
            break
    assert plan is not None
    return plan


def _choices(train: TrainSettings, device: str, can_checkpoint: bool) -> Iterator[tuple[int, bool]]:
    """Yield what may be tried, the fastest first: checkpointing costs a forward more, small micro-batches less."""
    budgets = BUDGETS[device] if train.micro_batch_tokens == AUTO else (int(train.micro_batch_tokens),)
    wanted = train.gradient_checkpointing
    for checkpointing in (False, *([True] if can_checkpoint else [])) if wanted == AUTO else (bool(wanted),):
        for budget in budgets:
            yield budget, checkpointing


def require_fit(
    mode: str, size: int, plan: Plan, shapes: Shapes, rows: RowLengths, settings: Settings, *, device: str, free: int
) -> None:
    """Refuse a training that does not fit, and name the modes that would.

    Raises:
        MemoryLimitError: The estimate is more than the free memory.
    """
    if plan.estimate.peak <= free:
        return
    leaner = []
    for other in MODES:
        other_size = size if other in QUANTIZED else DTYPE_BYTES[other]
        found = plan_training(other, other_size, shapes, rows, settings, device=device, free=free).estimate
        if found.peak <= free:
            setting = f"model.quantization={other}" if other in QUANTIZED else f"model.dtype={other}"
            leaner.append(f"{setting} (about {gigabytes(found.peak)})")
    advice = f"It would with {' or '.join(leaner)}" if leaner else "No other mode would either; take a smaller base"
    raise MemoryLimitError(
        f"This training would not fit: about {gigabytes(plan.estimate.peak)} in {mode}, and {gigabytes(free)} are free "
        f"{'on the card' if device == 'cuda' else 'in RAM'}. {advice}, a smaller data.max_length (the longest row has "
        f"{rows.longest:,} tokens), or less at work beside it. `llm-clf doctor` shows the estimate."
    )


def gigabytes(count: int) -> str:
    """Return a number of bytes for reading."""
    return f"{count / 1e9:.1f} GB"


def free_memory(device: torch.device) -> int:
    """Return the bytes that a process can still take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)
