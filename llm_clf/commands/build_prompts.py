"""Rows to a prompts folder: train, valid and test, without duplicates and with a report."""

import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal, get_args

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
from llm_clf.prompting.near_duplicates import THRESHOLD, TRAIN, NearDuplicate, find_near_duplicates
from llm_clf.prompting.prompts import SPLITS, Prompt, prompt_line, read_prompts
from llm_clf.prompting.rows import STDIN, rewindable
from llm_clf.prompting.splits import parse_shares, split_keys
from llm_clf.prompting.tasks import Task, load_task

UNLABELLED = "(none)"
SHOWN_PAIRS = 5
LISTED_PAIRS = 100

Near = Literal["warn", "drop", "ignore"]


def build_prompts(
    rows: str | Path | Sequence[str | Path],
    *,
    task: str | Path,
    out: str | Path,
    split: str = "0.8,0.1,0.1",
    seed: int = 42,
    encoding: str = "utf-8",
    near_duplicates: Near = "warn",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `{train,valid,test}.jsonl`, `task.yaml` and `report.json` into the folder `out`; return the report.

    Rows are read three times and never held all at once: memory grows by about 3 kB a row, and by 500 bytes where
    near-duplicates are ignored.

    Args:
        rows: Tables or prompts files.
        task: A task file, or the name of one that ships.
        out: The folder.
        split: Shares of train, valid and test.
        seed: Of the split.
        encoding: Of text files.
        near_duplicates: What to do about rows that are nearly the same as one of another split: `warn` of them,
            `drop` those of the training split, or `ignore` them. It never changes which split another row is in.
        overwrite: Replace what stands at `out`.

    Raises:
        LlmClfError: Rows, task or arguments are wrong; nothing is written then.
    """
    folder, shares, used = path_of(out), parse_shares(split), load_task(task)
    if near_duplicates not in get_args(Near):
        raise ConfigError(f"--near-duplicates {near_duplicates!r}: allowed are {', '.join(get_args(Near))}.")
    if seed < 0:
        raise ConfigError(f"--seed {seed}: is negative; allowed are whole numbers from 0, such as 42.")
    require_free(folder, overwrite=overwrite, what="something")
    if folder.exists() and not _is_prompts(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is no prompts folder, so --overwrite leaves it alone. Give another --out.")
    require_apart(folder, [Path(file) for file in _listed(rows) if str(file) != STDIN])

    with rewindable(rows) as files, locked(folder):
        return _build(files, used, folder, shares, seed, encoding, near_duplicates)


def _listed(rows: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [rows] if isinstance(rows, str | Path) else rows


def _is_prompts(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("task.yaml", "report.json", *(f"{s}.jsonl" for s in SPLITS)))


def _build(
    files: Sequence[Path], used: Task, folder: Path, shares: Sequence[float], seed: int, encoding: str, near: Near
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
    across = None
    if near != "ignore":
        across = find_near_duplicates(_texts(files, used, encoding, same, assigned))
    dropped = {one.id for one in across or () if one.split == TRAIN} if near == "drop" else set()

    unfinished = partial_name(folder)
    try:
        with writing(folder):
            unfinished.mkdir(exist_ok=True)
            counts, lengths = _write_splits(unfinished, files, used, encoding, same, assigned, dropped)
            used.save(unfinished / "task.yaml")
            report = _report(files, same, counts, lengths, used, shares, seed)
            report["rows_dropped"]["near_duplicate"] = len(dropped)
            report["near_duplicates"] = _near_facts(across) if across is not None else None
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


def _texts(
    files: Sequence[Path], task: Task, encoding: str, same: Duplicates, assigned: dict[bytes, int]
) -> Iterator[tuple[int, str, str]]:
    """Yield split, id and text of the kept rows, without what the template adds; none where one split has all."""
    if len(set(assigned.values())) < 2:
        return
    for prompt in read_prompts(files, task, encoding=encoding):
        split = _split_of(prompt, _key(prompt, task), same, assigned)
        if split is not None:
            own = (prompt.input[slice(*span)] for span in task.column_spans(prompt.input))
            yield split, prompt.id, "\n".join(own)


def _near_facts(across: Sequence[NearDuplicate]) -> dict[str, Any]:
    """Return what report.json says of rows near another split: how many, and the first pairs."""
    return {
        "threshold": THRESHOLD,
        "rows": {split: sum(one.split == number for one in across) for number, split in enumerate(SPLITS[:2])},
        "pairs": [
            {
                SPLITS[one.split]: one.id,
                SPLITS[one.other_split]: one.other_id,
                "similarity": round(one.similarity, 3),
            }
            for one in across[:LISTED_PAIRS]
        ],
    }


def _write_splits(
    folder: Path,
    files: Sequence[Path],
    task: Task,
    encoding: str,
    same: Duplicates,
    assigned: dict[bytes, int],
    dropped: set[str],
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
            if split is not None and prompt.id not in dropped:
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
    kept = sum(count.total() for count in counts)
    return {
        "rows_read": len(same.kept) + same.duplicates + contradicting,
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


def _show_near(report: dict[str, Any]) -> None:
    near, dropped = report["near_duplicates"], report["rows_dropped"]["near_duplicate"]
    if not near or not sum(near["rows"].values()):
        return
    train, valid = near["rows"]["train"], near["rows"]["valid"]
    if dropped:
        say(f"Dropped from the training rows: {dropped:,} that are nearly the same as a validation or test row.")
    elif train:
        say(
            f"Warning: {train:,} training rows are nearly the same as a validation or test row; figures on those are "
            "too good. --near-duplicates drop leaves them out of training."
        )
    if valid:
        say(f"Warning: {valid:,} validation rows are nearly the same as a test row.")
    for pair in near["pairs"][:SHOWN_PAIRS]:
        rows = " and ".join(f"{split} {row_id}" for split, row_id in pair.items() if split != "similarity")
        say(f"  {rows}: {pair['similarity']:.0%} alike")
    more = train + valid - SHOWN_PAIRS
    if more > 0:
        say(f"  … and {more:,} more rows")


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
    _show_near(report)
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
