"""Speed and memory of training and prediction, each tool in turn, over and over."""

from dataclasses import dataclass
from statistics import mean
from typing import Any

from comparison.figures import Line, Spread, amount_of, differences, summarise, with_rates
from comparison.inputs import ordered
from comparison.processes import Tools, last_line
from comparison.report import Report
from comparison.tasks import MATMUL, OURS
from comparison.work import Job, Row, Work
from llm_clf.console import table
from llm_clf.models.memory import BaseShape

PART = "speed"


@dataclass(frozen=True, slots=True)
class Bench:
    """A base in a folder, and what is done with it."""

    work: Work
    shape: BaseShape
    tools: Tools
    job: Job
    """Without an order."""
    repeats: int
    report: Report

    def measure(self, part: str, task: str, rows: list[Row], **about: Any) -> dict[str, Any]:
        """Run a task once on some rows, and record what it measured, with rates."""
        job = ordered(self.work.base, rows, self.job)
        self.work.give(rows, job)
        found = self.tools.run(task, self.work)
        if task != MATMUL:
            found = with_rates(found, amount_of(task, self.shape, rows, job))
        return self.report.add(part, {**about, "task": task, **found})


def compare_speed(bench: Bench, rows: list[Row], tasks: list[str], *, peer_count: int, guideline: int) -> list[Line]:
    """Run every task `repeats` times, in turn; print and return what they come to, also where that is interrupted.

    Args:
        bench: Base and tools.
        rows: Behind one prompt.
        tasks: Names of TASKS.
        peer_count: The first so many rows are for all but ours.
        guideline: About how long the prompt is; what the records say of it.
    """
    about = {"guideline": guideline, **_lengths("mean_tokens", rows, peer_count)}
    runs: list[dict[str, Any]] = []
    try:
        for repeat in range(1, bench.repeats + 1):
            for task in [MATMUL, *tasks]:
                some = rows if task.startswith(OURS) else rows[:peer_count]
                runs.append(bench.measure(PART, task, some, repeat=repeat, **about))
    finally:
        lines = summarise(runs)
        bench.report.show(PART, speed_text(lines, rows, peer_count, runs))
    return lines


def _lengths(name: str, rows: list[Row], peer_count: int) -> dict[str, float]:
    found = {name: mean(len(row.prompt) for row in rows)}
    if peer_count < len(rows):
        found[f"peer_{name}"] = mean(len(row.prompt) for row in rows[:peer_count])
    return found


def speed_text(lines: list[Line], rows: list[Row], peer_count: int, runs: list[dict[str, Any]]) -> str:
    """Return the table, with what it is about above it."""
    lengths = _lengths("mean", rows, peer_count)
    text = f"{len(rows)} rows, {lengths['mean']:.0f} tokens on average, longest {max(len(r.prompt) for r in rows)}"
    if peer_count < len(rows):
        text += f"; other tools get the first {peer_count}, {lengths['peer_mean']:.0f} tokens on average"
    rates = [run["flops_per_second"] for run in runs if run["task"] == MATMUL and "error" not in run]
    machine = Spread.of([rate / 1e9 for rate in rates])
    text += f". A product of large matrices reaches {machine.text(',.0f') if machine else '-'} GFLOP/s.\n"
    text += (
        "Medians (smallest–largest). The first step of a training is not timed; the ratio is by tokens a second.\n\n"
    )
    cards = any(line.cuda_peak is not None for line in lines)
    header = ["tool", "timed rows", "rows/s", "tokens/s", "of matmul", "memory"]
    header += [*(["on the card"] if cards else []), "ours is … times as fast"]
    text += table(header, [_cells(line, cards) for line in lines])
    notes = [f"{line.task} failed: {last_line(line.error)}" for line in lines if line.error]
    return "\n".join([text, *notes, *differences(runs)])


def _cells(line: Line, cards: bool) -> list[str]:
    def spread(value: Spread | None, form: str) -> str:
        return value.text(form) if value else "-"

    def size(value: float | None) -> str:
        return f"{value / 1e9:.2f} GB" if value is not None else "-"

    return [
        line.task,
        f"{line.rows:,}" if line.rows is not None else "failed",
        spread(line.rate, ".2f"),
        spread(line.tokens, ",.0f"),
        spread(line.share, ".0%"),
        size(line.peak),
        *([size(line.cuda_peak)] if cards else []),
        spread(line.ratio, ".2f"),
    ]
