"""Settings from what is given: defaults < the base's recipe < --config FILE < --set KEY=VALUE; all faults at once."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from llm_clf.config import Settings, Tree, known_keys, settings_to_dict
from llm_clf.errors import ConfigError

SomeTree = TypeVar("SomeTree", bound=Tree)


def load_settings(files: Sequence[Path] = (), overrides: Sequence[str] = ()) -> Settings:
    """Return the settings of a language model's run, as `load_tree` does.

    Raises:
        ConfigError: As there.
    """
    return load_tree(Settings, files, overrides)


def load_tree(kind: type[SomeTree], files: Sequence[Path] = (), overrides: Sequence[str] = ()) -> SomeTree:
    """Return settings: defaults, then each file, then each `section.key=value`.

    Raises:
        ConfigError: A file or an override cannot be read, or a key or value is wrong; all faults at once.
    """
    tree: dict[str, Any] = {}
    for file in files:
        _merge(tree, read_settings_file(file, "--config", "sections such as `train:` with keys under them"))
    for override in overrides:
        _merge(tree, _parse_override(override))
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        source = ", ".join([str(file) for file in files] + (["--set"] if overrides else []))
        faults = "\n".join(f"  {line}" for line in _faults(error, kind))
        raise ConfigError(f"Settings ({source}) are wrong:\n{faults}") from error


def with_changes(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Return the settings with other values for known keys, given as `section.key`.

    Raises:
        ConfigError: A value is wrong; a line for each.
    """
    tree = settings_to_dict(settings)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(error, Settings))) from error


def setting(settings: Settings, key: str) -> Any:
    """Return one setting as a plain value."""
    section, _, name = key.partition(".")
    return settings_to_dict(settings)[section][name]


def require_sections(overrides: Sequence[str], allowed: Sequence[str], what: str) -> None:
    """Refuse overrides of settings that a command does not heed.

    Raises:
        ConfigError: One is of another section.
    """
    for override in overrides:
        section = override.partition(".")[0].strip()
        if section in Settings.model_fields and section not in allowed:
            raise ConfigError(
                f"--set {override!r}: {what} heeds the sections {' and '.join(allowed)} only; the others belong to the "
                "training."
            )


def require_keys(overrides: Sequence[str], allowed: Sequence[str], what: str) -> None:
    """Refuse overrides of other settings than those that a command heeds.

    Raises:
        ConfigError: One is another setting.
    """
    for override in overrides:
        if override.partition("=")[0].strip() not in allowed:
            raise ConfigError(f"--set {override!r}: {what} heeds {' and '.join(allowed)} only.")


def read_settings_file(file: Path, option: str, expected: str) -> dict[str, Any]:
    """Return the mapping in a YAML file that was given with an option; an empty file is an empty mapping.

    Raises:
        ConfigError: It cannot be read, or holds something else.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: settings cannot be read: {error}. Give {option} a YAML file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: is not YAML: {error}") from error
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{file}: found {type(tree).__name__}, expected {expected}.")
    return tree or {}


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        raise ConfigError(f"--set {override!r}: expected SECTION.KEY=VALUE, such as lora.r=16.")
    try:
        return {section: {name: yaml.safe_load(text)}}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error


def _merge(tree: dict[str, Any], newer: Mapping[str, Any]) -> None:
    """Lay `newer` over `tree`, section by section; sections that are no mappings are left for validation to refuse."""
    for section, values in newer.items():
        if values is None and isinstance(tree.get(section), dict):
            continue
        if isinstance(values, Mapping) and isinstance(tree.get(section), dict):
            tree[section].update(values)
        else:
            tree[section] = dict(values) if isinstance(values, Mapping) else values


def _faults(error: ValidationError, kind: type[Tree]) -> Iterator[str]:
    """Yield one line a fault: where, what was found, what is allowed."""
    keys = known_keys(kind)
    # A value that fits none of several allowed types gives one error for each; one line a key is enough.
    seen: dict[str, str] = {}
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"][:2])
        if fault["type"] == "extra_forbidden":
            line = unknown_key(key, [*keys, *kind.model_fields])
        else:
            line = f"{key}: found {fault['input']!r}; {fault['msg'][0].lower()}{fault['msg'][1:]}."
        if key in seen:
            line = f"{seen[key].removesuffix('.')}, or {fault['msg'][0].lower()}{fault['msg'][1:]}."
        seen[key] = line
    yield from seen.values()


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Return the fault of a key that there is not, with the nearest one or all that there are."""
    near = difflib.get_close_matches(key, known, n=1)
    advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
    return f"{key}: there is no such setting; {advice}"
