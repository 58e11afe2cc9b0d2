"""Any file or folder of text to papers, one after another, without holding more than one."""

import gzip
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ENDINGS = (".jsonl", ".txt")
PACKED: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}


@dataclass(frozen=True, slots=True)
class Paper:
    """A text with what is known about it."""

    text: str
    title: str = ""
    source: str = ""
    """Where it comes from; questions about its field are asked where this is known."""


def read_papers(corpus: Path) -> Iterator[Paper]:
    """Yield the papers of a file, or of all files of a folder in the order of their names.

    Args:
        corpus: `.jsonl` holds objects with "text" or "abstract", and "title" and "source" where they are known; in
            `.txt` an empty line ends a text. Either may be packed (`.xz`, `.gz`).

    Raises:
        ValueError: There is no such file, or a line is no object with a text.
    """
    files = sorted(file for file in corpus.rglob("*") if _ending(file) in ENDINGS) if corpus.is_dir() else [corpus]
    if not files or not all(file.is_file() and _ending(file) in ENDINGS for file in files):
        raise ValueError(f"{corpus}: expected .jsonl or .txt files, plain or packed (.xz, .gz), or a folder of them.")
    for file in files:
        with PACKED.get(file.suffix, open)(file, "rt", encoding="utf-8") as lines:
            yield from _objects(lines, file) if _ending(file) == ".jsonl" else _texts(lines)


def _ending(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in PACKED else file.suffix


def _objects(lines: IO[str], file: Path) -> Iterator[Paper]:
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            text = found["text"] if "text" in found else found["abstract"]
            yield Paper(text.strip(), found.get("title", "").strip(), found.get("source", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{file}:{number}: expected an object with "text" or "abstract": {error!r}') from error


def _texts(lines: IO[str]) -> Iterator[Paper]:
    text: list[str] = []
    for line in lines:
        if line.strip():
            text.append(line.strip())
        elif text:
            yield Paper("\n".join(text))
            text = []
    if text:
        yield Paper("\n".join(text))
