"""Places on disk: a result takes its name only when it is complete."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from llm_clf.errors import ArtifactError, ConfigError, DataError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def path_of(name: str | Path) -> Path:
    """Return a path as it was given, with `~` for the home folder.

    Raises:
        ConfigError: No file can have this name.
    """
    try:
        place = Path(name).expanduser()
        place.exists()
    except (OSError, RuntimeError) as error:
        found = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{str(name)[:80]!r}: cannot be a file or folder: {found}. Give another name.") from error
    return place


def partial_name(place: Path) -> Path:
    """Return the name under which the unfinished result of `place` stands beside it."""
    return place.with_name(place.name + ".partial")


def require_free(place: Path, *, overwrite: bool, what: str) -> None:
    """Refuse a place that is taken, or that no result can take.

    Raises:
        ConfigError: `place` exists and `overwrite` is false, or it has no name of its own (`.`, `..`, `/`).
    """
    if place.name in ("", ".."):
        raise ConfigError(f"--out {str(place)!r}: has no name of its own. Give one, such as output/NAME.")
    if place.exists() and not overwrite:
        raise ConfigError(f"{place}: {what} is already there. Give another --out, or --overwrite to replace it.")


def require_apart(place: Path, inputs: Iterable[Path]) -> None:
    """Refuse a result that would replace what it is made from, or be put among it.

    Raises:
        ConfigError: `place` is one of the inputs, holds one, or lies in one.
    """
    out = Path(os.path.realpath(place))
    for given in inputs:
        source = Path(os.path.realpath(given))
        found = "is" if out == source else "holds" if out in source.parents else "lies in"
        if found != "lies in" or source in out.parents:
            raise ConfigError(
                f"--out {place}: {found} the input {given}, and a result stands apart from what it is made from. "
                "Give another --out."
            )


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Keep `place` for this command alone; folders made for it go again where nothing was put into them.

    The lock is the operating system's: one that a killed process left holds nobody up.

    Raises:
        ConfigError: Another command is making the same result.
        DataError: The folder cannot be written.
    """
    missing = [folder for folder in place.parents if not folder.exists()]
    file = place.with_name(f".{place.name}.lock")
    lock = FileLock(file)
    try:
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise ConfigError(
                    f"{place}: another command is writing it now. Wait until that one has ended, or give another --out."
                ) from error
        try:
            yield
        finally:
            # Removed while it is held: whoever opened it meanwhile sees that it is gone, and makes a new one.
            with suppress(OSError):
                file.unlink()
            lock.release()
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def writing(place: Path, then: str = "") -> Iterator[None]:
    """Turn what the system refuses while `place` is written into a message; `then` is what else can be done.

    Raises:
        DataError: The folder cannot be written, or the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(place, error, then) from error


def cannot_write(place: Path, error: Exception, then: str = "") -> DataError:
    """Return the message for a result that could not be written."""
    found = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
    # Libraries that are not written in Python give the system's words alone.
    full = any(getattr(error, "errno", None) == n or os.strerror(n) in str(error) for n in FULL)
    advice = "Make room on the disk" if full else "See to room and rights there"
    return DataError(f"{place}: cannot be written: {found}. {advice}, or give another --out.{then and ' ' + then}")


@contextmanager
def replacing(place: Path) -> Iterator[Path]:
    """Yield a name beside `place` to write to; it takes the place when the block ends without an error.

    Raises:
        DataError: The folder cannot be written, or the disk is full.
    """
    temporary = place.with_name(f".{place.name}.writing")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, place)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(place, error) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove(place: Path) -> None:
    """Remove a file or a folder with all that is in it, where there is one."""
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def replace_folder(finished: Path, place: Path) -> None:
    """Move the folder `finished` to `place`; what stood there is removed only after the move."""
    old = place.with_name(f".{place.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if place.exists():
        os.replace(place, old)
    os.replace(finished, place)
    if old.exists():
        shutil.rmtree(old)


def write_json(place: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with replacing(place) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_yaml(place: Path, value: Any) -> None:
    """Write `value` as YAML in the order of its keys, whole or not at all."""
    with replacing(place) as temporary:
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
        temporary.write_text(text, encoding="utf-8")


def read_json(file: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ArtifactError: It is missing or broken.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: cannot be read: {error}.") from error


def file_hash(file: Path) -> str:
    """Return the sha256 of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
