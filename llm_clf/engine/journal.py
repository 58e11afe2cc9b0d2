"""Scores on disk while a prediction runs: what a kill leaves is what a resumed job goes on from."""

import json
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llm_clf.engine.scores import Scored
from llm_clf.errors import ArtifactError, LlmClfError
from llm_clf.files import writing


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
        DataError: The file cannot be written, or the disk is full.
    """

    def __init__(self, file: Path | None, *, key: str, rows: int, labels: int, resume: bool) -> None:
        self.scores = np.zeros((rows, labels), dtype=np.float32)
        self.cut = np.zeros(rows, dtype=bool)
        self.texts: dict[int, str] = {}
        self.finished: set[int] = set()
        self.fits: int | None = None
        """Most tokens at once that were found to fit into memory; None: it did not run out."""
        self._file = file
        self._lines = None
        if file is None:
            return
        kept = self._read(file, key) if resume and file.is_file() else 0
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._lines = open(file, "r+b" if kept else "wb")
            self._lines.truncate(kept)
            self._lines.seek(kept)
        try:
            if not kept:
                self._append({"key": key})
        except LlmClfError:
            self.close()
            file.unlink()
            raise

    def record(self, batch: Scored) -> None:
        """Keep one batch; it is on disk when this returns."""
        line = {"rows": batch.rows, "scores": batch.scores.tolist(), "cut": [int(value) for value in batch.cut]}
        self._append(line | ({"texts": batch.texts} if batch.texts is not None else {}))
        self._keep(batch)

    def shrink(self, tokens: int) -> None:
        """Keep how many tokens at once are tried from here on; it is on disk when this returns."""
        self._append({"fits": tokens})
        self.fits = tokens

    def close(self) -> None:
        """Close the file and leave it."""
        if self._lines is not None:
            # What a full disk did not take is still in the buffer and is tried again; it was reported already.
            with suppress(OSError):
                self._lines.close()

    def __enter__(self) -> "Journal":
        """Return the journal."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; where the job failed before any row was scored, there is nothing to go on with."""
        self.close()
        if isinstance(error, LlmClfError) and not self.finished and self._file is not None:
            self._file.unlink(missing_ok=True)

    def _keep(self, batch: Scored) -> None:
        self.scores[batch.rows] = batch.scores
        self.cut[batch.rows] = batch.cut
        self.texts.update(zip(batch.rows, batch.texts or (), strict=False))
        self.finished.update(batch.rows)

    def _append(self, record: dict[str, object]) -> None:
        if self._lines is not None and self._file is not None:
            with writing(self._file, "Then --resume goes on with the rows that are there."):
                self._lines.write(json.dumps(record).encode() + b"\n")
                self._lines.flush()

    def _read(self, file: Path, key: str) -> int:
        """Take over the whole lines of a journal; return how many bytes they are. A line cut by a kill is dropped."""
        kept = 0
        with open(file, "rb") as lines:
            for number, line in enumerate(lines):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if number == 0 and (not isinstance(record, dict) or record.get("key") != key):
                    raise ArtifactError(
                        f"{file}: is what another job left: the rows, the run or the settings are not the same now. "
                        "Give the former ones to go on, or --overwrite to start anew."
                    )
                if number:
                    self._keep_line(file, number, record)
                kept += len(line)
        return kept

    def _keep_line(self, file: Path, number: int, record: dict[str, Any]) -> None:
        try:
            if "fits" in record:
                self.fits = int(record["fits"])
                return
            scores = np.array(record["scores"], dtype=np.float32)
            self._keep(Scored(record["rows"], scores, record["cut"], record.get("texts")))
        except (LookupError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{file}:{number + 1}: is not what an interrupted job left: {error!r}. Give --overwrite to start anew."
            ) from error
