"""Which texts are the same after normalisation, and which of them contradict each other."""

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field


def normal_text(text: str) -> str:
    """Return a text in the Unicode form NFKC, with one space wherever it has white space and none at its ends."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def text_key(text: str) -> bytes:
    """Return 16 bytes that are equal for texts that differ only in Unicode form or white space."""
    return hashlib.blake2b(normal_text(text).encode(), digest_size=16).digest()


@dataclass(slots=True)
class _Group:
    first: str
    label: str | None
    more: list[str] = field(default_factory=list)
    contradicts: bool = False


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What to keep of rows with equal text."""

    kept: dict[bytes, tuple[str, str | None]]
    """Text key to the id and the label of the row that stays."""
    duplicates: int
    """Rows dropped because an equal one stays."""
    contradictions: list[list[str]]
    """Ids of rows that differ only in their label; all of them are dropped."""


def find_duplicates(rows: Iterable[tuple[bytes, str, str | None]]) -> Duplicates:
    """Return which rows stay, given `(text key, id, label)` of each.

    Of equal rows the one with the smallest id stays (shorter first, so `9` before `10`), whatever their order; a
    labelled row wins over unlabelled ones.
    """
    groups: dict[bytes, _Group] = {}
    for key, row_id, label in rows:
        group = groups.get(key)
        if group is None:
            groups[key] = _Group(row_id, label)
            continue
        if label is not None and group.label is not None and label != group.label:
            group.contradicts = True
        better = (label is None, len(row_id), row_id) < (group.label is None, len(group.first), group.first)
        group.more.append(group.first if better else row_id)
        if better:
            group.first, group.label = row_id, label
    agreeing = {key: group for key, group in groups.items() if not group.contradicts}
    return Duplicates(
        kept={key: (group.first, group.label) for key, group in agreeing.items()},
        duplicates=sum(len(group.more) for group in agreeing.values()),
        contradictions=[[group.first, *group.more] for group in groups.values() if group.contradicts],
    )
