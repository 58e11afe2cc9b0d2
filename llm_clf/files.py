"""Places on disk: a result takes its name only when it is complete."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from llm_clf.errors import ArtifactError, ConfigError, DataError


def partial_name(place: Path) -> Path:
    """Return the name under which the unfinished result of `place` stands beside it."""
    return place.with_name(place.name + ".partial")


def require_free(place: Path, *, overwrite: bool, what: str) -> None:
    """Refuse a place that is taken.

    Raises:
        ConfigError: `place` exists and `overwrite` is false.
    """
    if place.exists() and not overwrite:
        raise ConfigError(f"{place}: {what} is already there. Give another --out, or --overwrite to replace it.")


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
        raise DataError(f"{place}: cannot be written: {error.strerror or error}.") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{file}: cannot be read: {error}.") from error


def file_hash(file: Path) -> str:
    """Return the sha256 of a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
