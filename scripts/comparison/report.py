"""What was found, written as it comes: a comparison that is interrupted keeps what it has."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison.processes import last_line
from llm_clf.console import say

# What is said of a record when it comes.
SHOWN = (
    *("guideline", "varied", "value", "dtype", "seed", "way", "repeat", "task"),
    *("flops_per_second", "rows_per_second", "log_loss", "valid_accuracy", "test_accuracy", "error"),
)


@dataclass(slots=True)
class Report:
    """Machine, settings, versions, and every run."""

    file: Path | None
    machine: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    """Packages by the name of a tool."""
    parts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Records in the order in which they came, by the part of the comparison."""

    def add(self, part: str, record: dict[str, Any]) -> dict[str, Any]:
        """Keep a record, and say in a line what it holds; return it without the versions, which are kept once."""
        record = dict(record)
        versions = record.pop("versions", None)
        if versions:
            self.versions[str(record.get("task", part)).partition(":")[0]] = versions
        self.parts.setdefault(part, []).append(record)
        self._save()
        say(f"{part}: {_line(record)}")
        return record

    def show(self, part: str, text: str) -> None:
        """Print a finished table and keep it."""
        print(f"\n{text}\n", flush=True)
        self.parts.setdefault(f"{part} tables", []).append({"text": text})
        self._save()

    def _save(self) -> None:
        if self.file is None:
            return
        content = {"machine": self.machine, "settings": self.settings, "versions": self.versions, **self.parts}
        unfinished = self.file.with_name(self.file.name + ".partial")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(unfinished, self.file)


def _line(record: dict[str, Any]) -> str:
    """Return a record's short values in one line."""
    if "error" in record:
        record = {**record, "error": last_line(record["error"])}
    values = {name: record[name] for name in SHOWN if name in record}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
