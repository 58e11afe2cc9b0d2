"""The predictions file: one row an input row, in input order, as .csv, .jsonl or .parquet."""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm_clf.errors import ConfigError, DataError
from llm_clf.files import replacing
from llm_clf.prompting.rows import STDIN, read_rows, shorten

STDOUT = STDIN
FORMATS = (".csv", ".jsonl", ".parquet")
OK, UNPARSED, ABSTAINED = "ok", "unparsed", "abstained"
PROB, LABEL_SET = "prob_", "label_set"
ROW_GROUP = 16_384

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is known of one row after prediction."""

    id: str
    label: str | None
    """None where the status is not ok."""
    probs: Sequence[float]
    """By label in the task's order."""
    status: str
    cut: bool
    gold: str | None
    text: str | None
    """Generated answer, None where none was asked for."""
    cells: Mapping[str, str]
    """The input row's own columns."""
    label_set: Sequence[str] | None = None
    """Labels in the row's set in the task's order, None without label sets."""


def prediction_columns(labels: Sequence[str], *, text: bool = False, sets: bool = False) -> list[str]:
    """Return the columns of a predictions file: `text` where answers were generated, `label_set` with label sets."""
    own = ["id", "label", *(PROB + label for label in labels), "status", "cut", "gold"]
    return own + (["text"] if text else []) + ([LABEL_SET] if sets else [])


def check_format(file: Path) -> None:
    """Refuse a predictions file of another ending.

    Raises:
        ConfigError: The name is neither `-` nor ends in .csv, .jsonl or .parquet.
    """
    if str(file) != STDOUT and file.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"--out {file}: found the ending {file.suffix!r}; predictions are written as {', '.join(FORMATS)}."
        )


def choose_columns(
    wanted: Sequence[str] | None, own: Sequence[str], row_columns: Sequence[str], fill: Iterable[str] = ()
) -> list[str]:
    """Return the columns to write: those of a predictions file, or the wanted ones.

    Args:
        wanted: Names of columns of predictions, of the rows or of `fill`; None: those of a predictions file.
        own: Columns of a predictions file.
        row_columns: Columns of the rows.
        fill: Columns that are filled where a row has nothing in them.

    Raises:
        ConfigError: A wanted column is none of these, or one to be filled is not wanted or a prediction's.
    """
    _check_fill(wanted, own, fill)
    if wanted is None:
        return list(own)
    unknown = [name for name in wanted if name not in own and name not in row_columns and name not in fill]
    if unknown or not wanted:
        raise ConfigError(
            f"--columns: there is no column {', '.join(map(repr, unknown)) or repr('')}; predictions have "
            f"{', '.join(own)}, the rows have {shorten(row_columns)}. --fill NAME=VALUE adds one."
        )
    repeated = sorted({name for name in wanted if wanted.count(name) > 1})
    if repeated:
        raise ConfigError(f"--columns: names {', '.join(map(repr, repeated))} more than once; name each once.")
    return list(wanted)


def _check_fill(wanted: Sequence[str] | None, own: Sequence[str], fill: Iterable[str]) -> None:
    for name in fill:
        if name in own:
            raise ConfigError(
                f"--fill {name}: is a column of predictions, and what they say is left alone. Leave it out."
            )
        if name not in (wanted or ()):
            raise ConfigError(f"--fill {name}: is not among the columns to write. Name it in --columns too.")


def write_predictions(
    file: Path,
    predictions: Iterator[Prediction],
    *,
    labels: Sequence[str],
    columns: Sequence[str],
    fill: Mapping[str, str] | None = None,
) -> None:
    """Write predictions one after the other; the file takes its name when it is complete. `-` writes JSONL.

    Args:
        file: Its ending tells the format.
        predictions: In the order of the rows.
        labels: In the task's order.
        columns: What to write, of the predictions' and the rows' columns.
        fill: What a column of the rows holds where a row has nothing in it.
    """
    records = (_record(prediction, labels, columns, fill or {}) for prediction in predictions)
    if str(file) == STDOUT:
        _write_jsonl(sys.stdout, records)
        return
    with replacing(file) as temporary:
        if file.suffix.lower() == ".parquet":
            _write_parquet(temporary, records, columns, labels)
            return
        with open(temporary, "w", encoding="utf-8", newline="") as opened:
            if file.suffix.lower() == ".csv":
                _write_csv(opened, records, columns)
            else:
                _write_jsonl(opened, records)


def _record(prediction: Prediction, labels: Sequence[str], columns: Sequence[str], fill: Mapping[str, str]) -> Record:
    own: Record = {
        "id": prediction.id,
        "label": prediction.label,
        **{PROB + label: prob for label, prob in zip(labels, prediction.probs, strict=True)},
        "status": prediction.status,
        "cut": prediction.cut,
        "gold": prediction.gold,
        **({"text": prediction.text} if prediction.text is not None else {}),
    }
    if prediction.label_set is not None:
        # A JSON list as text, which all formats hold alike.
        own[LABEL_SET] = json.dumps(list(prediction.label_set), ensure_ascii=False)
    return {
        name: own[name] if name in own else prediction.cells.get(name, "") or fill.get(name, "") for name in columns
    }


def _write_csv(opened: TextIO, records: Iterator[Record], columns: Sequence[str]) -> None:
    # Only characters of the line end are quoted before Python 3.13, so a lone \r in a cell needs the longer one.
    line = io.StringIO(newline="")
    writer = csv.writer(line, lineterminator="\r\n")
    for cells in chain([list(columns)], ([_csv_cell(record[name]) for name in columns] for record in records)):
        writer.writerow(cells)
        opened.write(line.getvalue().removesuffix("\r\n") + "\n")
        line.seek(0)
        line.truncate()


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    # The shortest text that reads back as the same fp32 number.
    return str(value)


def _write_jsonl(opened: TextIO, records: Iterator[Record]) -> None:
    for record in records:
        plain = {name: float(str(v)) if isinstance(v, np.floating) else v for name, v in record.items()}
        opened.write(json.dumps(plain, ensure_ascii=False) + "\n")


def _write_parquet(file: Path, records: Iterator[Record], columns: Sequence[str], labels: Sequence[str]) -> None:
    kinds = {"cut": pa.bool_(), **{PROB + label: pa.float32() for label in labels}}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
    with pq.ParquetWriter(file, schema) as writer:
        group: list[Record] = []
        for record in records:
            group.append(record)
            if len(group) == ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema))


@dataclass(frozen=True, slots=True)
class PredictionTable:
    """A predictions file as columns."""

    labels: list[str]
    """In the task's order where there are probabilities, else sorted."""
    ids: list[str]
    predicted: list[str]
    """Empty text where there is no label."""
    status: list[str]
    gold: list[str]
    """Empty text where the row had none."""
    probs: np.ndarray | None
    """Shape `(rows, labels)`, None where the file has none."""
    sets: list[list[str]] | None = None
    """Labels in each row's set, None where the file has none."""


def read_predictions(file: Path) -> PredictionTable:
    """Return a predictions file.

    Raises:
        DataError: It is no predictions file: the columns `label` and `gold` are missing, or a probability is no number.
    """
    rows = list(read_rows([file]))
    if not rows:
        raise DataError(f"{file}: holds no predictions.")
    names = rows[0].cells.keys()
    missing = [name for name in ("label", "gold") if name not in names]
    if missing:
        raise DataError(
            f"{file}: needs the column {shorten(missing)}; there are {shorten(names)}. "
            "Give a file that `llm-clf predict` wrote from labelled rows."
        )
    cells = [row.cells for row in rows]
    predicted = [cell.get("label", "") for cell in cells]
    gold = [cell.get("gold", "") for cell in cells]
    labels = [name.removeprefix(PROB) for name in names if name.startswith(PROB)]
    probs = (
        np.array([[_number(row.where, row.cells, PROB + label) for label in labels] for row in rows])
        if labels
        else None
    )
    known = set(labels) if labels else None
    strangers = [
        row.where for row, name in zip(rows, gold, strict=True) if known is not None and name and name not in known
    ]
    strangers += [
        row.where for row, name in zip(rows, predicted, strict=True) if known is not None and name and name not in known
    ]
    if strangers:
        raise DataError(
            f"{strangers[0]}: has a label without a column of probabilities; the columns are for {', '.join(labels)}."
        )
    return PredictionTable(
        labels=labels or sorted({*predicted, *gold} - {""}),
        ids=[cell.get("id", str(number)) for number, cell in enumerate(cells)],
        predicted=predicted,
        status=[cell.get("status") or (OK if name else UNPARSED) for cell, name in zip(cells, predicted, strict=True)],
        gold=gold,
        probs=probs,
        sets=[_label_set(row.where, row.cells[LABEL_SET]) for row in rows] if LABEL_SET in names else None,
    )


def _label_set(where: str, text: str) -> list[str]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not (isinstance(found, list) and all(isinstance(label, str) for label in found)):
        raise DataError(f'{where}: {LABEL_SET} is {text!r}; expected a JSON list of labels, such as ["0", "1"].')
    return found


def _number(where: str, cells: Mapping[str, str], column: str) -> float:
    text = cells.get(column, "")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise DataError(f"{where}: {column} is {text!r}; expected a number from 0 to 1.")
    return value


__all__ = [
    "ABSTAINED",
    "OK",
    "STDOUT",
    "UNPARSED",
    "Prediction",
    "PredictionTable",
    "check_format",
    "choose_columns",
    "prediction_columns",
    "read_predictions",
    "write_predictions",
]
