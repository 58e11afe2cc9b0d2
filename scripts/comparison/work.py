"""The folder through which the script and the process of a tool speak.

Every tool's environment can read this module: it needs nothing but Python.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STEP_ROWS = 16


@dataclass(frozen=True, slots=True)
class Row:
    """A row as tokens, and as the texts that they were made from."""

    prompt: list[int]
    answer: list[int]
    """With the end token."""
    instruction: str = ""
    input: str = ""
    output: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """What a tool is to do with the rows, the same for each."""

    order: list[int]
    """Numbers of the rows in the order in which they are trained on, every epoch; STEP_ROWS of them are a step."""
    dtype: str = "bf16"
    """Of the base: bf16 or fp32."""
    seed: int = 1
    epochs: int = 1
    learning_rate: float = 2e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    overrides: tuple[str, ...] = ()
    """Settings of llm-clf, as `section.key=value`."""
    initial: str | None = None
    """Folder of the adapter that trainings begin with; llm-clf makes it where it is missing. None: each its own."""
    adapter: str | None = None
    """Folder of the adapter that a training leaves, or that a prediction uses. None: neither."""


@dataclass(frozen=True, slots=True)
class Work:
    """A folder with a base, rows and a job."""

    folder: Path

    @property
    def base(self) -> Path:
        """Return the base's folder, model and tokenizer."""
        return self.folder / "base"

    def give(self, rows: list[Row], job: Job) -> None:
        """Write rows and job, in place of the former ones."""
        (self.folder / "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
        (self.folder / "job.json").write_text(json.dumps(asdict(job)))

    def rows(self) -> list[Row]:
        """Return the rows."""
        return [Row(**row) for row in json.loads((self.folder / "rows.json").read_text())]

    def job(self) -> Job:
        """Return the job."""
        return Job(**json.loads((self.folder / "job.json").read_text()))

    def rows_in_order(self) -> list[Row]:
        """Return the rows as they are trained on, one epoch behind the other."""
        rows = self.rows()
        return [rows[number] for number in self.job().order]

    def answer(self, figures: dict[str, Any]) -> None:
        """Write what the tool's process found."""
        (self.folder / "result.json").write_text(json.dumps(figures))
