"""From seconds to rates, shares and ratios; nothing here measures."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flops import useful_flops

from comparison.ours import answers_of
from comparison.tasks import MATMUL, OURS, TRAIN, kind_of
from comparison.work import STEP_ROWS, Job, Row
from llm_clf.engine.label_words import AnswerTree
from llm_clf.engine.packing import common_beginning
from llm_clf.models.memory import BaseShape


@dataclass(frozen=True, slots=True)
class Amount:
    """The work of a timed span, the same for every tool that does it."""

    rows: int
    tokens: int
    """Of prompts and answers; what rows share counts for each."""
    flops: int
    """That are useful; what rows share counts once a step in training, and once in prediction."""
    given: int
    """Tokens of all that a tool is given, also of what is not timed."""


def training_amount(base: BaseShape, rows: Sequence[Row], job: Job) -> Amount:
    """Return the work of all steps but the first, which warms up and is not timed."""
    shared = len(common_beginning(row.prompt for row in rows))
    timed = [rows[number] for number in job.order][STEP_ROWS:]
    steps = [timed[first : first + STEP_ROWS] for first in range(0, len(timed), STEP_ROWS)]
    flops = 0
    for step in steps:
        # The last token of an answer is predicted and never read.
        flops += useful_flops(
            base,
            [len(row.prompt) + len(row.answer) - 1 for row in step],
            places=len(rows[0].answer),
            backward=True,
            shared=shared,
        )
    return Amount(len(timed), _tokens(timed), flops, _tokens([rows[number] for number in job.order]))


def prediction_amount(base: BaseShape, rows: Sequence[Row]) -> Amount:
    """Return the work of scoring all answers behind every prompt."""
    shared = len(common_beginning(row.prompt for row in rows))
    nodes = len(AnswerTree.build([[answer] for answer in answers_of(list(rows))]).tokens)
    lengths = [len(row.prompt) + nodes for row in rows]
    flops = useful_flops(base, lengths, places=nodes + 1, backward=False, shared=shared)
    return Amount(len(rows), _tokens(rows), flops, _tokens(rows))


def amount_of(task: str, base: BaseShape, rows: Sequence[Row], job: Job) -> Amount:
    """Return the work that a task's time is for."""
    return training_amount(base, rows, job) if kind_of(task) == TRAIN else prediction_amount(base, rows)


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.prompt) + len(row.answer) for row in rows)


def with_rates(found: dict[str, Any], amount: Amount) -> dict[str, Any]:
    """Return a run's figures with its work and its rates; an error stays what it is."""
    if "error" in found:
        return found
    seconds = found["seconds"]
    return {
        "rows_per_second": amount.rows / seconds,
        "tokens_per_second": amount.tokens / seconds,
        "rows": amount.rows,
        "tokens": amount.tokens,
        "flops": amount.flops,
        "tokens_given": amount.given,
        **found,
    }


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """Return the spread of some values, None where there is none."""
        return cls(statistics.median(values), min(values), max(values)) if values else None

    def text(self, form: str) -> str:
        """Return median and range, each in a format."""
        if self.low == self.high:
            return format(self.median, form)
        return f"{self.median:{form}} ({self.low:{form}}–{self.high:{form}})"


def differences(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return in what tools did not do what ours did: another device, type, adapter, or other tokens."""
    found = []
    for run in runs:
        if "error" in run or run["task"] == MATMUL:
            continue
        ours = next((other for other in runs if other["task"] == f"{OURS}: {kind_of(run['task'])}"), run)
        for name in ("device", "base_dtype", "trained_weights"):
            if name in ours and run.get(name) != ours[name]:
                found.append(f"{run['task']}: {name} {run.get(name)}, ours {ours[name]}")
        if run.get("tokens_seen", run["tokens_given"]) != run["tokens_given"]:
            found.append(f"{run['task']}: read {run['tokens_seen']:,} tokens where {run['tokens_given']:,} were given")
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Line:
    """What the runs of a task come to."""

    task: str
    rows: int | None
    rate: Spread | None
    """Rows a second."""
    tokens: Spread | None
    """Tokens a second."""
    share: Spread | None
    """Of the machine's rate of matrix products."""
    peak: float | None
    """Bytes."""
    cuda_peak: float | None
    """Bytes."""
    ratio: Spread | None
    """How many times as fast ours is at the same, by tokens a second, repeat by repeat."""
    error: str | None
    """Of the last run that failed."""


def summarise(runs: Sequence[dict[str, Any]]) -> list[Line]:
    """Return a line for each task, in the order in which they came.

    Args:
        runs: With `task`, `repeat`, and either what `with_rates` gives or `error`; a run of `matmul` in each repeat.
    """
    ok = {(run["task"], run["repeat"]): run for run in runs if "error" not in run}
    tasks = [task for task in dict.fromkeys(run["task"] for run in runs) if task != MATMUL]
    return [_line(task, ok, [run["error"] for run in runs if run["task"] == task and "error" in run]) for task in tasks]


def _line(task: str, ok: dict[tuple[str, int], dict[str, Any]], errors: list[str]) -> Line:
    mine = {repeat: run for (name, repeat), run in ok.items() if name == task}
    shares, ratios = [], []
    for repeat, run in mine.items():
        machine, ours = ok.get((MATMUL, repeat)), ok.get((f"{OURS}: {kind_of(task)}", repeat))
        if machine is not None:
            shares.append(run["flops"] / run["seconds"] / machine["flops_per_second"])
        if ours is not None and ours is not run:
            ratios.append(ours["tokens_per_second"] / run["tokens_per_second"])
    found = list(mine.values())
    cards = [run["cuda_peak_bytes"] for run in found if "cuda_peak_bytes" in run]
    return Line(
        task=task,
        rows=found[0]["rows"] if found else None,
        rate=Spread.of([run["rows_per_second"] for run in found]),
        tokens=Spread.of([run["tokens_per_second"] for run in found]),
        share=Spread.of(shares),
        peak=statistics.median(run["peak_bytes"] for run in found) if found else None,
        cuda_peak=statistics.median(cards) if cards else None,
        ratio=Spread.of(ratios),
        error=errors[-1] if errors else None,
    )
