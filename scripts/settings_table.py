"""Write docs/settings.md from the settings' own types, defaults and docstrings.

python scripts/settings_table.py
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llm_clf.config import EncoderSettings, Settings, Tree

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
HEAD = """# Settings

Made by `python scripts/settings_table.py` from `llm_clf/config.py`. Give settings in a YAML file (`--config FILE`)
and one by one (`--set lora.r=16`); later ones win: defaults, `configs/glm-nano.yaml` where glm-nano is the base,
`--config`, `--set`, `--model`. All are checked together before any model is loaded; `config.yaml` in the run folder
holds what was used.
"""
ENCODER = """
# Settings of `baseline encoder`

They are given in the same way; with glm-nano as the encoder, `configs/encoder-glm-nano.yaml` lies under them.
"""


def render() -> str:
    """Return the page."""
    return HEAD + _sections(Settings) + ENCODER + _sections(EncoderSettings)


def _sections(kind: type[Tree]) -> str:
    parts = []
    for section, field in kind.model_fields.items():
        group: Any = field.annotation
        parts.append(f"\n## {section}\n\n{(group.__doc__ or '').strip()}\n\n")
        parts.append("| key | default | allowed | meaning |\n|---|---|---|---|\n")
        for key, setting in group.model_fields.items():
            meaning = " ".join((setting.description or "").split())
            parts.append(f"| `{key}` | `{_plain(setting.default)}` | {_allowed(setting)} | {meaning} |\n")
    return "".join(parts)


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _allowed(setting: Any) -> str:
    return _type(setting.annotation) + _bounds(setting.metadata)


def _bounds(marks: Iterable[Any]) -> str:
    signs = {annotated_types.Ge: "≥", annotated_types.Gt: ">", annotated_types.Lt: "<", annotated_types.Le: "≤"}
    found = [
        f"{sign} {getattr(mark, kind.__name__.lower()):,}"
        for mark in _marks(marks)
        for kind, sign in signs.items()
        if isinstance(mark, kind)
    ]
    return f" {' and '.join(found)}" if found else ""


def _marks(marks: Iterable[Any]) -> Iterator[Any]:
    """Yield single marks; pydantic's Field holds several."""
    for mark in marks:
        yield from mark.metadata if isinstance(mark, FieldInfo) else (mark,)


def _type(annotation: Any) -> str:
    names = {int: "whole number", float: "number", bool: "true, false", str: "text", type(None): "none"}
    if annotation in names:
        return names[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.items()
        return "{" + ", ".join(f"{key}: {_allowed(field)}" for key, field in fields) + "}"
    arguments = get_args(annotation)
    if arguments and all(isinstance(argument, str) for argument in arguments):
        return ", ".join(arguments)
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0]) + _bounds(annotation.__metadata__)
    origin = getattr(annotation, "__origin__", None)
    if origin is list:
        return "list of text"
    if origin is dict:
        return f"{_type(get_args(annotation)[1])} by label"
    return " or ".join(map(_type, arguments))


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
