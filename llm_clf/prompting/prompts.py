"""Rows to prompts: `{"id", "instruction", "input", "output"}`, the one form that all later rooms know."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_clf.errors import DataError, LabelError
from llm_clf.prompting.rows import Row, read_rows, shorten
from llm_clf.prompting.tasks import Task

SPLITS = ("train", "valid", "test")
SHOWN = 10


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row, ready to be asked about. The instruction is the task's, the same for all rows."""

    id: str
    input: str
    label: str | None
    """Gold label, None where the row has none."""
    cells: dict[str, str]
    """The row's own columns."""


def read_prompts(files: Sequence[Path], task: Task, *, encoding: str = "utf-8") -> Iterator[Prompt]:
    """Yield a prompt for every row of tables or instruction/input/output files, in order.

    Raises:
        DataError: A column is missing, an id is repeated, or a prompts file carries another instruction.
        LabelError: Rows carry labels that are not the task's (the first ten are shown, after all rows were read).
    """
    seen: set[bytes] = set()
    unknown: list[str] = []
    strangers = 0
    for number, row in enumerate(read_rows(files, encoding=encoding)):
        try:
            prompt = _to_prompt(row, number, task)
        except LabelError as error:
            strangers += 1
            if len(unknown) < SHOWN:
                unknown.append(f"  {row.where}: {error}")
        else:
            key = hashlib.blake2b(prompt.id.encode(), digest_size=16).digest()
            if key in seen:
                raise DataError(
                    f"{row.where}: the id {prompt.id!r} stands twice. Ids tell rows apart; make them unique."
                )
            seen.add(key)
            if not strangers:
                yield prompt
    if strangers:
        shown = "\n".join(unknown) + ("" if strangers <= SHOWN else f"\n  … and {strangers - SHOWN} more")
        raise LabelError(
            f"{strangers} rows have a label that the task does not know:\n{shown}\n"
            "Mend the rows, or add the label (or a word for it) to the task."
        )


def _to_prompt(row: Row, number: int, task: Task) -> Prompt:
    cells = row.cells
    if "instruction" in cells and "input" in cells and not set(task.columns) <= cells.keys():
        if cells["instruction"] != task.instruction:
            raise DataError(
                f"{row.where}: the instruction is {cells['instruction']!r}, the task's is {task.instruction!r}. "
                "Training and prediction must ask the same; build the prompts again with this task."
            )
        text, label_column, id_column = cells["input"], "output", "id"
    else:
        missing = [column for column in task.columns if column not in cells]
        if missing:
            raise DataError(
                f"{row.where}: the task needs the columns {', '.join(map(repr, missing))}; there are {shorten(cells)}."
            )
        text, label_column, id_column = task.render(cells), task.label_column, task.id_column or ""
    row_id = cells.get(id_column, "") if id_column else ""
    return Prompt(row_id or str(number), text, task.label_of(cells.get(label_column, "")), cells)


def prompt_line(prompt: Prompt, task: Task) -> str:
    """Return a prompt as its line in a prompts file."""
    record = {"id": prompt.id, "instruction": task.instruction, "input": prompt.input}
    if prompt.label is not None:
        record["output"] = task.answer(prompt.label)
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_split(folder: Path, split: str, task: Task) -> list[Prompt]:
    """Return the prompts of one split of a prompts folder; an empty file is an empty split.

    Raises:
        DataError: The folder is none that `build-prompts` made, or a line is broken.
    """
    file = folder / f"{split}.jsonl"
    if not file.is_file():
        raise DataError(f"{folder}: has no {split}.jsonl. Give a folder that `llm-clf build-prompts` made.")
    if file.stat().st_size == 0:
        return []
    return list(read_prompts([file], task))
