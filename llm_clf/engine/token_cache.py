"""Tokens on disk, found again by content; a file that cannot be read or written is as if there were none."""

import hashlib
import os
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

from llm_clf.engine.tokens import Example

KEPT = 8
"""Files that stay, those used last: training and validation rows of four ways to make tokens of them."""
ENDING = ".tokens"
_DIGEST = hashlib.sha256().digest_size


class TokenCache:
    """A folder with a file of tokens for each key.

    A file holds whole numbers of 4 bytes: how many rows, the length of each, whether each was cut, and all tokens; then
    a digest of key and numbers, which is looked at before anything else is read.

    Args:
        folder: Where the files are; made when there is something to keep, in a folder that is there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, content: Iterable[str], make: Callable[[], list[Example]]) -> list[Example]:
        """Return what was kept for all that it depends on; without it, or where it is damaged, make it and keep it."""
        key = _key_of(content)
        file = self._folder / f"{key}{ENDING}"
        found = _read(file, key)
        with suppress(OSError):
            os.utime(file)
        if found is None:
            found = make()
            with suppress(OSError):
                self._folder.mkdir(exist_ok=True)
                _write(file, key, found)
                self._remove_oldest()
        return found

    def _remove_oldest(self) -> None:
        # With what a killed process left half written.
        files = sorted(self._folder.glob(f"*{ENDING}*"), key=lambda file: file.stat().st_mtime_ns)
        for file in files[:-KEPT]:
            file.unlink(missing_ok=True)


def _key_of(content: Iterable[str]) -> str:
    # With how files are written.
    digest = hashlib.sha256(Path(__file__).read_bytes() + sys.byteorder.encode())
    for text in content:
        # Text of the Python functions may hold halves of surrogate pairs.
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _read(file: Path, key: str) -> list[Example] | None:
    try:
        data = memoryview(file.read_bytes())
    except OSError:
        return None
    content, written = data[:-_DIGEST], data[-_DIGEST:]
    digest = hashlib.sha256(key.encode())
    digest.update(content)
    if digest.digest() != written:
        return None
    numbers = content.cast("i")
    rows = numbers[0]
    lengths, cut, ids = numbers[1 : 1 + rows], numbers[1 + rows : 1 + 2 * rows], numbers[1 + 2 * rows :]
    ends = accumulate(lengths)
    return [
        Example(array("i", ids[end - length : end].tobytes()), bool(was_cut))
        for end, length, was_cut in zip(ends, lengths, cut, strict=True)
    ]


def _write(file: Path, key: str, examples: Sequence[Example]) -> None:
    """Write a file, whole or not at all, also where another process writes the same one."""
    head = [len(examples), *(len(example.ids) for example in examples), *(example.cut for example in examples)]
    digest = hashlib.sha256(key.encode())
    number, name = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
    try:
        with open(number, "wb") as opened:
            for numbers in (head, *(example.ids for example in examples)):
                part = array("i", numbers).tobytes()
                digest.update(part)
                opened.write(part)
            opened.write(digest.digest())
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)
