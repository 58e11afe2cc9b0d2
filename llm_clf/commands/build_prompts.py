"""Rows to a prompts folder: train, valid and test, without duplicates and with a report."""

import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

from llm_clf.console import say, table
from llm_clf.errors import ConfigError, DataError, LlmClfError
from llm_clf.files import (
    locked,
    partial_name,
    path_of,
    replace_folder,
    require_apart,
    require_free,
    write_json,
    writing,
)
from llm_clf.prompting.duplicates import Duplicates, find_duplicates, normal_text, text_key
from llm_clf.prompting.prompts import SPLITS, Prompt, prompt_line, read_prompts
from llm_clf.prompting.rows import STDIN, rewindable
from llm_clf.prompting.splits import parse_shares, split_keys
from llm_clf.prompting.tasks import Task, load_task

UNLABELLED = "(none)"


def build_prompts(
    rows: str | Path | Sequence[str | Path],
    *,
    task: str | Path,
    out: str | Path,
    split: str = "0.8,0.1,0.1",
    seed: int = 42,
    encoding: str = "utf-8",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `{train,valid,test}.jsonl`, `task.yaml` and `report.json` into the folder `out`; return the report.

    Rows are read twice and never held all at once: memory grows by about 500 bytes a row.

    Raises:
        LlmClfError: Rows, task or arguments are wrong; nothing is written then.
    """
    folder, shares, used = path_of(out), parse_shares(split), load_task(task)
    if seed < 0:
        raise ConfigError(f"--seed {seed}: is negative; allowed are whole numbers from 0, such as 42.")
    require_free(folder, overwrite=overwrite, what="something")
    if folder.exists() and not _is_prompts(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is no prompts folder, so --overwrite leaves it alone. Give another --out.")
    require_apart(folder, [Path(file) for file in _listed(rows) if str(file) != STDIN])

    with rewindable(rows) as files, locked(folder):
        return _build(files, used, folder, shares, seed, encoding)


def _listed(rows: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [rows] if isinstance(rows, str | Path) else rows


def _is_prompts(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("task.yaml", "report.json", *(f"{s}.jsonl" for s in SPLITS)))


def _build(
    files: Sequence[Path], used: Task, folder: Path, shares: Sequence[float], seed: int, encoding: str
) -> dict[str, Any]:
    same = find_duplicates(_keys(files, used, encoding))
    if all(label is None for _, label in same.kept.values()):
        say(f"Note: no row has a label in the column {used.label_column!r}; these prompts are for prediction only.")
    strata: dict[str | None, list[bytes]] = {}
    for key, (_, label) in same.kept.items():
        strata.setdefault(label, []).append(key)
    if not same.kept:
        raise DataError(f"{', '.join(map(str, files))}: no row is left to build prompts from.")
    assigned = split_keys(strata, shares, seed)

    unfinished = partial_name(folder)
    try:
        with writing(folder):
            unfinished.mkdir(exist_ok=True)
            counts, lengths = _write_splits(unfinished, files, used, encoding, same, assigned)
            used.save(unfinished / "task.yaml")
            report = _report(files, same, counts, lengths, used, shares, seed)
            write_json(unfinished / "report.json", report)
            replace_folder(unfinished, folder)
    except LlmClfError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _show(report, folder)
    return report


def _keys(files: Sequence[Path], task: Task, encoding: str) -> Iterator[tuple[bytes, str, str | None]]:
    for prompt in read_prompts(files, task, encoding=encoding):
        yield _key(prompt, task), prompt.id, prompt.label and sys.intern(prompt.label)


def _key(prompt: Prompt, task: Task) -> bytes:
    """Return the key of a text: cells that differ only in white space, at their ends too, are one."""
    if not set(task.columns) <= prompt.cells.keys():
        return text_key(prompt.input)
    return text_key(task.render({name: normal_text(prompt.cells[name]) for name in task.columns}))


def _write_splits(
    folder: Path, files: Sequence[Path], task: Task, encoding: str, same: Duplicates, assigned: dict[bytes, int]
) -> tuple[list[Counter[str]], list[list[int]]]:
    """Write the kept rows in their order; return label counts and input lengths (characters) of each split."""
    counts: list[Counter[str]] = [Counter() for _ in SPLITS]
    lengths: list[list[int]] = [[] for _ in SPLITS]
    with ExitStack() as stack:
        outputs = [
            stack.enter_context(open(folder / f"{name}.jsonl", "w", encoding="utf-8", newline="\n")) for name in SPLITS
        ]
        for prompt in read_prompts(files, task, encoding=encoding):
            split = _split_of(prompt, _key(prompt, task), same, assigned)
            if split is not None:
                outputs[split].write(prompt_line(prompt, task))
                counts[split][prompt.label or UNLABELLED] += 1
                lengths[split].append(len(prompt.input))
    return counts, lengths


def _split_of(prompt: Prompt, key: bytes, same: Duplicates, assigned: dict[bytes, int]) -> int | None:
    kept = same.kept.get(key)
    return assigned[key] if kept is not None and kept[0] == prompt.id else None


def _report(
    files: Sequence[Path],
    same: Duplicates,
    counts: Sequence[Counter[str]],
    lengths: Sequence[Sequence[int]],
    task: Task,
    shares: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    contradicting = sum(len(group) for group in same.contradictions)
    kept = len(same.kept)
    return {
        "rows_read": kept + same.duplicates + contradicting,
        "rows_kept": kept,
        "rows_dropped": {"duplicate": same.duplicates, "contradicting": contradicting},
        "contradicting_ids": same.contradictions,
        "rows_unlabelled": sum(count[UNLABELLED] for count in counts),
        "splits": {
            name: {
                "rows": count.total(),
                "labels": {
                    label: count[label] for label in (*task.names, UNLABELLED) if label != UNLABELLED or count[label]
                },
                "input_characters": _summary(length),
            }
            for name, count, length in zip(SPLITS, counts, lengths, strict=True)
        },
        "split": list(shares),
        "seed": seed,
        "sources": [file.name for file in files],
    }


def _summary(lengths: Sequence[int]) -> dict[str, float]:
    if not lengths:
        return {}
    return {"mean": round(mean(lengths), 1), "median": median(lengths), "max": max(lengths)}


def _show(report: dict[str, Any], folder: Path) -> None:
    dropped = report["rows_dropped"]
    say(
        f"{report['rows_read']:,} rows read, {report['rows_kept']:,} kept; dropped: "
        f"{dropped['duplicate']:,} duplicates, {dropped['contradicting']:,} that differ only in their label."
    )
    for group in report["contradicting_ids"][:10]:
        say(f"  same text, different labels: ids {', '.join(group)}")
    if len(report["contradicting_ids"]) > 10:
        say(f"  … and {len(report['contradicting_ids']) - 10} more groups in {folder / 'report.json'}")
    splits = report["splits"]
    labels = list(dict.fromkeys(label for split in splits.values() for label in split["labels"]))
    rows = [
        [
            name,
            split["rows"],
            *(split["labels"].get(label, 0) for label in labels),
            split["input_characters"].get("mean", "-"),
        ]
        for name, split in splits.items()
    ]
    say(table(["split", "rows", *(f"label {label}" for label in labels), "characters"], rows))
    say(f"Prompts are in {folder}.")
