"""Does it matter that dropout is off on the beginning that rows share? Trainings with it shared, and with it read anew.

Every run stays in its folder, so that the comparison goes on where it was interrupted.
"""

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llm_clf
from comparison.inputs import TASK
from comparison.learning import mean_and_spread
from comparison.processes import command
from comparison.report import Report
from llm_clf.console import table
from llm_clf.files import read_json

PART = "dropout"
WAYS = {"shared, without dropout": "true", "read for each row, with dropout": "false"}
SPLITS = ("valid", "test")
METRICS = ("accuracy", "f1", "log_loss")


@dataclass(frozen=True, slots=True)
class Study:
    """What is trained."""

    rows: Path
    place: Path
    """Where runs are kept."""
    seeds: int
    epochs: int
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Return a folder for these rows and settings alone."""
        said = [self.rows.read_bytes().hex(), str(self.epochs), *self.overrides]
        return self.place / f"dropout-{hashlib.sha256(' '.join(said).encode()).hexdigest()[:10]}"

    def settings(self, way: str, seed: int) -> list[str]:
        """Return what finetune is told; what is compared cannot be overridden."""
        fixed = ["lora.dropout=0.1", f"speed.shared_prefix={WAYS[way]}", f"train.seed={seed}"]
        sets = [*self.overrides, f"train.epochs={self.epochs}", *fixed]
        return [word for one in sets for word in ("--set", one)]


def compare_dropout(study: Study, report: Report) -> list[dict[str, Any]]:
    """Train, predict and evaluate both ways with every seed; print what they come to after each pair of runs."""
    prompts = study.folder / "prompts"
    if not prompts.is_dir():
        made = command(["build-prompts", str(study.rows), "--task", TASK, "--out", str(prompts)])
        if made:
            report.add(PART, {"task": "build-prompts", **made})
            return []
    found: list[dict[str, Any]] = []
    for seed in range(1, study.seeds + 1):
        for way in WAYS:
            found.append(report.add(PART, {"way": way, "seed": seed, **_run(study, way, seed, prompts)}))
        report.show(PART, dropout_text(found))
    return found


def _run(study: Study, way: str, seed: int, prompts: Path) -> dict[str, Any]:
    """Return the metrics of one training on rows that it did not learn from, or `error`."""
    run = study.folder / f"{'shared' if WAYS[way] == 'true' else 'anew'}-{seed}"
    failed = command(["finetune", str(prompts), "--out", str(run), "--resume", *study.settings(way, seed)])
    test = run.with_name(f"{run.name}-test.csv")
    failed = failed or command(["predict", str(run), str(prompts / "test.jsonl"), "--out", str(test), "--resume"])
    if failed:
        return failed
    measured = {"valid": read_json(run / "metrics.json"), "test": llm_clf.evaluate(test)}
    figures = {f"{split}_{name}": measured[split][name] for split in SPLITS for name in METRICS}
    return {**figures, "rows_per_second": read_json(run / "run.json")["training"]["rows_per_second"]}


def dropout_text(found: Sequence[dict[str, Any]]) -> str:
    """Return both ways' figures over the seeds, and their difference seed by seed."""
    pairs = _pairs(found)
    if not pairs:
        return "no seed was trained both ways yet"
    rows = []
    for split in SPLITS:
        for name in METRICS:
            key = f"{split}_{name}"
            sides = [[pair[way][key] for pair in pairs] for way in WAYS]
            apart = [one - other for one, other in zip(*sides, strict=True)]
            cells = [" ± ".join(mean_and_spread(side, ".4f")) for side in sides]
            error = f"{statistics.stdev(apart) / math.sqrt(len(apart)):.4f}" if len(apart) > 1 else "-"
            rows.append([f"{split} {name}", *cells, f"{statistics.mean(apart):+.4f} ± {error}"])
    head = (
        f"The beginning that rows share, {len(pairs)} seeds, dropout 0.1 elsewhere: mean ± standard deviation; of the"
    )
    head += "\ndifference, seed by seed, mean ± standard error.\n\n"
    return head + table(["metric", *WAYS, "difference"], rows)


def _pairs(found: Sequence[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Return the runs of each seed by way, where both went well."""
    seeds: dict[int, dict[str, dict[str, Any]]] = {}
    for one in found:
        if "error" not in one:
            seeds.setdefault(one["seed"], {})[one["way"]] = one
    return [ways for ways in seeds.values() if len(ways) == len(WAYS)]
