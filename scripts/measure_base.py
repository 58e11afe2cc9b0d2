"""Measure bases by what they are for: accuracy after LoRA on a few rows, on rows that training did not see.

    python scripts/measure_base.py ROWS.csv BASE... --out bases.csv

ROWS needs the columns of the task. The same rows are kept apart for all bases and seeds; each seed draws other rows to
train on. A line is appended to the CSV as soon as it is known, and what has a line already is not measured again.
"""

import csv
import random
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import llm_clf

FIELDS = (
    "base",
    "rows",
    "seed",
    "settings",
    "accuracy",
    "f1",
    "roc_auc",
    "log_loss",
    "train_seconds",
    "rows_per_second",
)


def main(
    rows: Path,
    bases: list[Path],
    out: Annotated[Path, typer.Option(help="CSV file; lines are appended.")],
    task: str = "medical_paper",
    train_rows: int = 1000,
    test_rows: int = 600,
    seeds: int = 3,
    set: Annotated[list[str] | None, typer.Option(help="Settings of finetune, SECTION.KEY=VALUE.")] = None,
) -> None:
    """Fine-tune every base with every seed and score it on the same rows."""
    with open(rows, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    random.Random(0).shuffle(table)
    test, rest = table[:test_rows], table[test_rows:]
    settings = " ".join(set or [])
    known = _known(out)
    # Seeds outside: after half of the time each base has as many lines as any other.
    for seed in range(seeds):
        some = random.Random(seed + 1).sample(rest, train_rows)
        for base in bases:
            if (base.name, str(train_rows), str(seed), settings) in known:
                continue
            measured = _measure(some, test, base, task, seed, set or [])
            _append(out, {"base": base.name, "rows": train_rows, "seed": seed, "settings": settings, **measured})


def _measure(
    train: list[dict[str, str]], test: list[dict[str, str]], base: Path, task: str, seed: int, settings: list[str]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, some in (("train", train), ("test", test)):
            with open(folder / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, some[0])
                writer.writeheader()
                writer.writerows(some)
        llm_clf.build_prompts([folder / "train.csv"], task=task, out=folder / "prompts", split="1,0,0")
        started = time.monotonic()
        llm_clf.finetune(folder / "prompts", out=folder / "run", model=str(base), set=[f"train.seed={seed}", *settings])
        trained = time.monotonic()
        llm_clf.predict(folder / "run", folder / "test.csv", out=folder / "scored.csv")
        scored = time.monotonic()
        metrics = llm_clf.evaluate(folder / "scored.csv")
    return {
        **{name: round(metrics[name], 4) for name in ("accuracy", "f1", "roc_auc", "log_loss")},
        "train_seconds": round(trained - started),
        "rows_per_second": round(len(test) / (scored - trained), 1),
    }


def _known(out: Path) -> frozenset[tuple[str, ...]]:
    if not out.exists():
        return frozenset()
    with open(out, newline="", encoding="utf-8") as file:
        return frozenset(tuple(line[name] for name in FIELDS[:4]) for line in csv.DictReader(file))


def _append(out: Path, line: dict[str, Any]) -> None:
    new = not out.exists()
    with open(out, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)
    print("  ".join(f"{name} {value}" for name, value in line.items()), flush=True)


if __name__ == "__main__":
    typer.run(main)
