"""Write docs/settings.md from the settings' own types, defaults and docstrings.

python scripts/settings_table.py
"""

from pathlib import Path
from typing import Any, get_args

import annotated_types
from pydantic import BaseModel

from llm_clf.config import EncoderSettings, Settings, Tree

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
HEAD = """# Settings

Made by `python scripts/settings_table.py` from `llm_clf/config.py`. Give settings in a YAML file (`--config FILE`)
and one by one (`--set lora.r=16`); later ones win: defaults, `configs/glm-nano.yaml` where glm-nano is the base,
`--config`, `--set`. All are checked together before any model is loaded; `config.yaml` in the run folder holds
what was used.
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
    bounds = [
        f"{sign} {getattr(mark, name):g}"
        for mark in setting.metadata
        for kind, name, sign in (
            (annotated_types.Ge, "ge", "≥"),
            (annotated_types.Gt, "gt", ">"),
            (annotated_types.Lt, "lt", "<"),
        )
        if isinstance(mark, kind)
    ]
    return _type(setting.annotation) + (", " + ", ".join(bounds) if bounds else "")


def _type(annotation: Any) -> str:
    names = {int: "whole number", float: "number", bool: "true, false", str: "text", type(None): "none"}
    if annotation in names:
        return names[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.items()
        return "{" + ", ".join(f"{key}: {_type(field.annotation)}" for key, field in fields) + "}"
    arguments = get_args(annotation)
    if arguments and all(isinstance(argument, str) for argument in arguments):
        return ", ".join(arguments)
    origin = getattr(annotation, "__origin__", None)
    if origin is list:
        return "list of text"
    if origin is dict:
        return f"{_type(get_args(annotation)[1])} by label"
    # The marks of an Annotated have no name.
    return " or ".join(filter(None, map(_type, arguments)))


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
