"""Does llm-clf learn what TRL learns? Losses step by step, and validation log-loss, from the same initial adapter.

Rows, their order, number types, learning rate, optimiser, clipping and the measure of the loss are the same. How far
two right ways may be apart is measured too: ours against ours without packing and with PEFT's own LoRA layers.
"""

import math
import shutil
import statistics
from dataclasses import dataclass, replace
from typing import Any

from comparison.speed import Bench
from comparison.work import STEP_ROWS, Job, Row
from llm_clf.console import table

PART = "learning"
OURS, PLAIN, TRL = "ours", "ours, plain", "TRL"
PLAINLY = ("speed.packing=false", "speed.fast_lora=false")
DTYPES = ("fp32", "bf16")
WARMUP = 0.1
SHOWN_STEPS = 16


@dataclass(frozen=True, slots=True)
class Learned:
    """What one training came to."""

    dtype: str
    seed: int
    way: str
    losses: list[float]
    """Of each step, the mean over its answers in nats."""
    log_loss: float
    """Of the validation rows, by our scorer."""


def compare_learning(
    bench: Bench, rows: list[Row], valid: list[Row], seeds: int, epochs: int, rate: float
) -> list[Learned]:
    """Train in every way, type and seed, score the adapters on rows kept apart, and print what they come to.

    Args:
        bench: Base and tools; TRL is left out where it has no interpreter.
        rows: To train on.
        valid: To score.
        seeds: How many; a seed gives the initial adapter and the order of rows.
        epochs: Passes over the rows.
        rate: Highest learning rate.
    """
    ways = [OURS, PLAIN, *([TRL] if bench.tools.has("TRL: train") else [])]
    steps = math.ceil(len(rows) / STEP_ROWS) * epochs
    learned: list[Learned] = []
    for dtype in DTYPES:
        for seed in range(1, seeds + 1):
            job = Job([], dtype, seed, epochs, rate, "cosine", round(WARMUP * steps), bench.job.overrides)
            for way in ways:
                found = _learn(replace(bench, job=job), way, rows, valid)
                learned += [found] if found is not None else []
        text = learning_text([one for one in learned if one.dtype == dtype])
        bench.report.show(PART, f"{dtype}: {len(rows)} rows, {len(valid)} kept apart.\n{text}")
    return learned


def _learn(bench: Bench, way: str, rows: list[Row], valid: list[Row]) -> Learned | None:
    """Train in one way and score the adapter that it leaves; None where that failed."""
    job, folder = bench.job, bench.work.folder
    initial, adapter = folder / f"initial-{job.dtype}-{job.seed}", folder / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    # Ours comes first, and makes the initial adapter.
    overrides = (*job.overrides, *(PLAINLY if way == PLAIN else ()))
    train = replace(bench, job=replace(job, initial=str(initial), adapter=str(adapter), overrides=overrides))
    about: dict[str, Any] = {"way": way, "dtype": job.dtype, "seed": job.seed}
    trained = train.measure(PART, "TRL: train" if way == TRL else "ours: train", rows, **about)
    if "error" in trained:
        return None
    score = replace(bench, job=replace(job, adapter=str(adapter)))
    scored = score.measure(PART, "ours: predict", valid, **about)
    if "error" in scored:
        return None
    return Learned(job.dtype, job.seed, way, trained["losses"], scored["log_loss"])


def learning_text(learned: list[Learned]) -> str:
    """Return the losses of the first seed, the largest differences of all, and the log-loss; of one number type."""
    if not learned:
        return "nothing was trained to its end"
    first = {one.way: one.losses for one in learned if one.seed == learned[0].seed}
    others = [way for way in (PLAIN, TRL) if way in {one.way for one in learned}]
    every = math.ceil(len(learned[0].losses) / SHOWN_STEPS)
    steps = [
        [str(step + 1), *(f"{losses[step]:.6f}" for losses in first.values())]
        for step in range(0, len(learned[0].losses), every)
    ]
    apart = [_apart_cells(learned, other) for other in others]
    return "\n\n".join(
        [
            f"Loss by step, seed {learned[0].seed}:\n" + table(["step", *first], steps),
            table(["largest |difference| of a step's loss from ours", "first step", "all steps", "mean"], apart),
            table(["log-loss of validation rows", "mean", "spread", "by seed"], _log_loss_rows(learned)),
        ]
    )


def differences(learned: list[Learned], other: str) -> list[list[float]]:
    """Return by how much another way's losses are apart from ours, by seed and step."""
    ours = {one.seed: one.losses for one in learned if one.way == OURS}
    return [
        [abs(loss - mine) for loss, mine in zip(one.losses, ours[one.seed], strict=True)]
        for one in learned
        if one.way == other and one.seed in ours
    ]


def _apart_cells(learned: list[Learned], other: str) -> list[str]:
    found = differences(learned, other)
    everything = [value for steps in found for value in steps]
    if not everything:
        return [other, "-", "-", "-"]
    return [
        other,
        f"{max(steps[0] for steps in found):.1e}",
        f"{max(everything):.1e}",
        f"{statistics.mean(everything):.1e}",
    ]


def _log_loss_rows(learned: list[Learned]) -> list[list[str]]:
    rows = []
    for way in dict.fromkeys(one.way for one in learned):
        values = [one.log_loss for one in learned if one.way == way]
        rows.append([way, *mean_and_spread(values, ".4f"), " ".join(f"{value:.4f}" for value in values)])
    return rows


def mean_and_spread(values: list[float], form: str) -> list[str]:
    """Return mean and standard deviation as text; no deviation of a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return [format(statistics.mean(values), form), format(spread, form) if spread is not None else "-"]
