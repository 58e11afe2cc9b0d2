"""Scores on disk while a prediction runs: what a kill leaves is what a resumed job goes on from."""

import json
from pathlib import Path
from types import TracebackType

import numpy as np

from llm_clf.engine.classifier import Scored
from llm_clf.errors import ArtifactError


class Journal:
    """The scores of a job, in memory as arrays and on disk as one JSON line a batch.

    Args:
        file: Where the lines go; None keeps them in memory only.
        key: Tells the job (rows, run, settings); a journal of another job is refused.
        rows: Number of input rows.
        labels: Number of labels.
        resume: Go on with the lines that are there; else they are dropped.

    Raises:
        ArtifactError: The journal belongs to another job.
    """

    def __init__(self, file: Path | None, *, key: str, rows: int, labels: int, resume: bool) -> None:
        self.scores = np.zeros((rows, labels), dtype=np.float32)
        self.cut = np.zeros(rows, dtype=bool)
        self.texts: dict[int, str] = {}
        self.finished: set[int] = set()
        self._file = file
        self._lines = None
        if file is None:
            return
        kept = self._read(file, key) if resume and file.is_file() else 0
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lines = open(file, "r+b" if kept else "wb")
        self._lines.truncate(kept)
        self._lines.seek(kept)
        if not kept:
            self._append({"key": key})

    def record(self, batch: Scored) -> None:
        """Keep one batch; it is on disk when this returns."""
        self._keep(batch)
        line = {"rows": batch.rows, "scores": batch.scores.tolist(), "cut": [int(value) for value in batch.cut]}
        self._append(line | ({"texts": batch.texts} if batch.texts is not None else {}))

    def close(self) -> None:
        """Close the file and leave it."""
        if self._lines is not None:
            self._lines.close()

    def __enter__(self) -> "Journal":
        """Return the journal."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def _keep(self, batch: Scored) -> None:
        self.scores[batch.rows] = batch.scores
        self.cut[batch.rows] = batch.cut
        self.texts.update(zip(batch.rows, batch.texts or (), strict=False))
        self.finished.update(batch.rows)

    def _append(self, record: dict[str, object]) -> None:
        if self._lines is not None:
            self._lines.write(json.dumps(record).encode() + b"\n")
            self._lines.flush()

    def _read(self, file: Path, key: str) -> int:
        """Take over the whole lines of a journal; return how many bytes they are. A line cut by a kill is dropped."""
        kept = 0
        with open(file, "rb") as lines:
            for number, line in enumerate(lines):
                try:
                    record = json.loads(line) if line.endswith(b"\n") else None
                except json.JSONDecodeError:
                    record = None
                if record is None:
                    break
                if number == 0 and record.get("key") != key:
                    raise ArtifactError(
                        f"{file}: is what another job left: the rows, the run or the settings are not the same now. "
                        "Give the former ones to go on, or --overwrite to start anew."
                    )
                if number:
                    scores = np.array(record["scores"], dtype=np.float32)
                    self._keep(Scored(record["rows"], scores, record["cut"], record.get("texts")))
                kept += len(line)
        return kept
