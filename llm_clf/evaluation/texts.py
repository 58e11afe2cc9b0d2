"""The rows behind predictions: their texts and columns, from the predictions file or from the rows themselves."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_clf.decisions.predictions import PROB, prediction_columns
from llm_clf.errors import ConfigError, DataError
from llm_clf.prompting.rows import read_rows, shorten
from llm_clf.prompting.tasks import Task

Cells = Mapping[str, str]

OWN = frozenset({*prediction_columns([], text=True), "label_set"})
"""Columns of a predictions file that say what was predicted."""
NO_TEXT = frozenset({"instruction", "output", "label", "gold"})
"""Columns of rows that are no text of theirs."""
# What XML does not take: control characters but tab and line feed, and halves of surrogate pairs.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def visible(text: str) -> str:
    """Return a text with a sign for each character that cannot be shown."""
    return UNSEEN.sub("\ufffd", text)


def shorten_text(text: str, most: int) -> str:
    """Return the beginning of a text, with an ellipsis where something is left out."""
    return text if len(text) <= most else text[: most - 1] + "…"


@dataclass(frozen=True, slots=True)
class PredictedRows:
    """What is known of predicted rows besides what was predicted, in the order of the predictions."""

    predictions: Sequence[Cells]
    """What was predicted, without the probabilities."""
    cells: Sequence[Cells]
    """The rows' own columns, without their ids; none where only predictions are known."""
    texts: list[str] | None
    """None where no column holds a text."""

    def column(self, name: str) -> list[str]:
        """Return a column of the rows, or of the predictions (`cut`, `status`).

        Raises:
            ConfigError: There is no such column.
        """
        for table in (self.cells, self.predictions):
            if any(name in cells for cells in table):
                return [cells.get(name, "") for cells in table]
        names = dict.fromkeys(key for table in (self.cells, self.predictions) for cells in table for key in cells)
        raise ConfigError(
            f"--slice {name}: there is no such column; there are {shorten(names)}. --rows FILE adds those of the rows."
        )


def read_predicted_rows(
    predictions: Path, rows: Path | None = None, *, task: Task | None = None, encoding: str = "utf-8"
) -> PredictedRows:
    """Return the rows behind a predictions file.

    Args:
        predictions: May hold columns of the rows, as `predict --columns` writes them.
        rows: The rows that were predicted, and maybe others; they are found by their ids.
        task: Tells the id column, and how a row's text is put together.
        encoding: Of `rows`.

    Raises:
        DataError: Rows are missing from `rows`.
    """
    records = [row.cells for row in read_rows([predictions])]
    own = [{name: cell for name, cell in one.items() if name in OWN} for one in records]
    cells: list[Cells] = [
        {name: cell for name, cell in one.items() if name not in OWN and not name.startswith(PROB)} for one in records
    ]
    if rows is not None:
        ids = [one.get("id", str(number)) for number, one in enumerate(own)]
        added = _find_rows(rows, ids, task.id_column if task is not None else None, encoding)
        cells = [{**one, **more} for one, more in zip(cells, added, strict=True)]
    texts = [_text(one, task) for one in cells]
    return PredictedRows(own, cells, texts if any(texts) else None)


def _find_rows(file: Path, ids: Sequence[str], id_column: str | None, encoding: str) -> list[Cells]:
    """Return the rows with these ids, without the id column.

    Raises:
        DataError: No column has all ids, each once.
    """
    table = [row.cells for row in read_rows([file], encoding=encoding)]
    names = list(table[0]) if table else []
    wanted = set(ids)
    for name in [id_column] if id_column in names else sorted(names, key=lambda name: name != "id"):
        places = {cells.get(name or "") or str(number): number for number, cells in enumerate(table)}
        if len(places) == len(table) and wanted <= places.keys():
            return [{key: cell for key, cell in table[places[i]].items() if key != name} for i in ids]
    # Rows without an id are numbered from 0.
    if len(table) == len(ids) and wanted == {str(number) for number in range(len(table))}:
        return [table[int(i)] for i in ids]
    raise DataError(
        f"--rows {file}: no column has the ids of all predictions, each once, such as {ids[0]!r}; there are "
        f"{shorten(names)}. Give the rows that were predicted."
    )


def _text(cells: Cells, task: Task | None) -> str:
    """Return a row's text: as the prompt has it, else all its columns; empty where it has none."""
    if "input" in cells and "instruction" in cells:
        return cells["input"]
    if task is not None and set(task.columns) <= cells.keys():
        return task.render(cells)
    shown = [(name, cell) for name, cell in cells.items() if name not in NO_TEXT and cell]
    return shown[0][1] if len(shown) == 1 else "\n".join(f"{name}: {cell}" for name, cell in shown)
