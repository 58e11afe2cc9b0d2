"""Read rows from CSV, TSV, JSONL, JSON or Parquet, also gzipped, one at a time and with every cell as text."""

import csv
import gzip
import io
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from llm_clf.errors import DataError, LlmClfError

STDIN = "-"
STDIN_NAME = "standard input"
FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
PARQUET_BATCH = 1024
PEEKED = 64
SHOWN = 30


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a table."""

    where: str
    """File and line (or record) for messages."""
    cells: dict[str, str]
    """Column name to text; empty text where the cell was empty, null or NaN."""


def read_rows(files: Sequence[Path], *, encoding: str = "utf-8") -> Iterator[Row]:
    """Yield the rows of all files in order, reading as it goes.

    Args:
        files: Tables; their endings tell the format, `.gz` after it is allowed.
        encoding: Of text files; a byte-order mark is dropped.

    Raises:
        DataError: A file is missing, of an unknown format, damaged, or not in the encoding.
    """
    for file in files:
        yield from _read_file(file, encoding)


def _read_file(file: Path, encoding: str) -> Iterator[Row]:
    try:
        suffix = _format_of(file)
        if suffix == ".parquet":
            yield from _parquet_rows(file)
            return
        with _open_text(file, encoding) as text:
            if suffix == ".csv":
                yield from _csv_rows(file, text, ",")
            elif suffix == ".tsv":
                yield from _csv_rows(file, text, "\t")
            elif suffix == ".jsonl":
                yield from _jsonl_rows(file, text)
            else:
                yield from _json_rows(file, text)
    except UnicodeError as error:
        # utf-16 says in a plain UnicodeError that the byte-order mark is missing.
        found = str(error)
        if isinstance(error, UnicodeDecodeError):
            found = f"byte {error.object[error.start]:#04x} cannot be decoded"
        raise DataError(
            f"{file}: is not {encoding}: {found}. Give the file's own encoding, such as --encoding gb18030."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: the gzip data is damaged or cut off ({error}). Compress it again.") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}.") from error
    except LookupError as error:
        raise DataError(
            f"--encoding {encoding!r}: there is no such encoding; usual ones are utf-8, gb18030, latin-1."
        ) from error


def _format_of(file: Path) -> str:
    if not file.exists():
        raise DataError(f"{file}: there is no such file.")
    if file.is_dir():
        raise DataError(f"{file}: is a folder; give a file that ends in {', '.join(FORMATS)} (or these with .gz).")
    if not file.is_file():
        # Rows are read several times, and a pipe gives them once.
        raise DataError(f"{file}: is a pipe or a device and no file; pipe the rows into standard input (-).")
    suffixes = [suffix.lower() for suffix in file.suffixes]
    gzipped = suffixes[-1:] == [".gz"]
    suffix = (suffixes[-2:-1] if gzipped else suffixes[-1:]) or [""]
    if suffix[0] not in FORMATS:
        raise DataError(
            f"{file}: found the ending {file.suffix!r}; rows come as {', '.join(FORMATS)} (or these with .gz)."
        )
    return suffix[0]


def _open_binary(file: Path) -> BinaryIO:
    opened = gzip.open(file, "rb") if file.suffix.lower() == ".gz" else open(file, "rb")
    return opened  # type: ignore[return-value]


@contextmanager
def _open_text(file: Path, encoding: str) -> Iterator[TextIO]:
    if encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        encoding = "utf-8-sig"
    with _open_binary(file) as binary, io.TextIOWrapper(binary, encoding=encoding, newline="") as text:
        yield text


def _csv_rows(file: Path, text: TextIO, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    start = 1
    try:
        header = next(reader, None)
        if header is None:
            raise DataError(f"{file}: is empty; the first line must name the columns.")
        _check_header(file, header)
        start = reader.line_num + 1
        for values in reader:
            if values:
                if len(values) != len(header):
                    raise DataError(
                        f"{file}:{start}: found {len(values)} cells, the header has {len(header)}. "
                        "Quote cells that hold the delimiter."
                    )
                yield Row(f"{file}:{start}", dict(zip(header, map(_csv_text, values), strict=True)))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}:{start}: is not well-formed CSV: {error}.") from error


def _csv_text(cell: str) -> str:
    return "" if cell in ("NaN", "nan") else cell


def _check_header(file: Path, header: Sequence[str]) -> None:
    repeated = sorted(name for name, times in Counter(header).items() if times > 1)
    if repeated:
        raise DataError(f"{file}: the header names {shorten(repeated)} more than once. Rename the columns.")


def shorten(names: Iterable[str]) -> str:
    """Return the first thirty names, quoted, and how many more there are."""
    listed = [repr(name) for name in names]
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")


def _jsonl_rows(file: Path, text: TextIO) -> Iterator[Row]:
    empty = True
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        empty = False
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: is not JSON: {error}. Each line must hold one object.") from error
        yield _record_row(where, record)
    if empty:
        raise DataError(f"{file}: is empty; each line must hold one JSON object.")


def _json_rows(file: Path, text: TextIO) -> Iterator[Row]:
    content = text.read()
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not JSON: {error}. For one object a line, name it .jsonl.") from error
    if not isinstance(records, list):
        raise DataError(f"{file}: found {type(records).__name__}, expected an array of objects.")
    for number, record in enumerate(records):
        yield _record_row(f"{file}, record {number}", record)


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open_binary(file) as opened:
        try:
            source = io.BytesIO(opened.read()) if file.suffix.lower() == ".gz" else opened
            table = pq.ParquetFile(source)
            _check_header(file, table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(batch_size=PARQUET_BATCH):
                for record in batch.to_pylist():
                    yield _record_row(f"{file}, record {number}", record)
                    number += 1
        except (pa.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"{file}: is not a whole Parquet file: {reason}. Write it again.") from error


def _record_row(where: str, record: Any) -> Row:
    if not isinstance(record, dict):
        raise DataError(f"{where}: found {type(record).__name__}, expected an object of column names and values.")
    return Row(where, {str(name): _cell_text(value) for name, value in record.items()})


def _cell_text(value: Any) -> str:
    """Return a typed value as the text that a person would have written in a CSV cell."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, dict | list):
        value = json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, str):
        # Half of a surrogate pair is legal in JSON but in no file; it would break every later write.
        return value.encode("utf-8", "replace").decode("utf-8") if not value.isascii() else value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


@contextmanager
def rewindable(files: str | Path | Sequence[str | Path]) -> Iterator[list[Path]]:
    """Yield files that can be read several times: standard input (`-`) is copied into a temporary one.

    Raises:
        DataError: A file is given twice, or standard input cannot be copied. What is wrong in the copy is told of
            standard input.
    """
    files = [files] if isinstance(files, str | Path) else files
    _require_each_once(files)
    with tempfile.TemporaryDirectory() as scratch:
        spooled = _spool_stdin(Path(scratch)) if STDIN in map(str, files) else None
        try:
            yield [spooled if spooled is not None and str(file) == STDIN else Path(file) for file in files]
        except LlmClfError as error:
            if spooled is None:
                raise
            raise type(error)(str(error).replace(str(spooled), STDIN_NAME)) from error


def _require_each_once(files: Sequence[str | Path]) -> None:
    seen: set[str] = set()
    for file in files:
        place = STDIN if str(file) == STDIN else os.path.realpath(file)
        if place in seen:
            name = STDIN_NAME if place == STDIN else file
            raise DataError(f"{name}: is given twice, and its rows would count twice. Give each file of rows once.")
        seen.add(place)


def _spool_stdin(folder: Path) -> Path:
    """Copy standard input into the folder; its first bytes tell gzip, Parquet, JSONL, JSON and CSV apart."""
    if sys.stdin is None:
        raise DataError(f"{STDIN_NAME}: is closed. Pipe the rows into it, or give a file instead of -.")
    copy = folder / "stdin"
    try:
        with open(copy, "wb") as opened:
            shutil.copyfileobj(sys.stdin.buffer, opened)
    except OSError as error:
        raise DataError(f"{STDIN_NAME}: cannot be copied to {folder}: {error.strerror or error}.") from error
    with open(copy, "rb") as opened:
        head = opened.read(PEEKED)
    gzipped = head.startswith(b"\x1f\x8b")
    if gzipped:
        try:
            with gzip.open(copy) as unpacked:
                head = unpacked.read(PEEKED)
        except (OSError, EOFError, zlib.error):
            # Reading the rows tells what is wrong with it.
            head = b""
    first = head.lstrip(b"\xef\xbb\xbf\xff\xfe\x00 \t\r\n")[:1]
    suffix = ".parquet" if head.startswith(b"PAR1") else {b"{": ".jsonl", b"[": ".json"}.get(first, ".csv")
    return copy.rename(copy.with_suffix(suffix + (".gz" if gzipped else "")))
