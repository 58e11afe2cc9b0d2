"""Rows to the scores of their labels, resumable: by one model, or by the members of an ensemble one after the other."""

import gc
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from llm_clf.console import progress, say
from llm_clf.engine.journal import Journal
from llm_clf.engine.scores import AllScored, Scored, Scorer
from llm_clf.errors import ArtifactError, DataError
from llm_clf.files import remove
from llm_clf.prompting.prompts import Prompt
from llm_clf.sources import AnySource, EnsembleSource, Source

Decode = Literal["score", "generate"]


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over the rows tells before any model is loaded."""

    rows: int
    digest: str
    columns: list[str]


@dataclass(frozen=True, slots=True)
class Scoring:
    """The scores of all rows, and what they took."""

    scored: AllScored
    seconds: float
    """Without the time that loading took."""
    rows: float
    """How many rows were scored in it; the others were there already."""
    batch_tokens: int | None
    """Most tokens at once that fit into memory, None where the model has no such budget."""


def survey_rows(prompts: Iterable[Prompt]) -> Survey:
    """Read all rows once: every fault in them shows before a model is loaded."""
    digest = hashlib.sha256()
    rows, columns = 0, []
    for prompt in prompts:
        if rows == 0:
            columns = list(prompt.cells)
        digest.update(_row_bytes(prompt))
        rows += 1
    return Survey(rows, digest.hexdigest(), columns)


def _row_bytes(prompt: Prompt) -> bytes:
    return json.dumps([prompt.id, prompt.input, prompt.label]).encode()


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Prompts that are still those of the survey: scores would go to other rows where a file changes meanwhile.

    Raises:
        DataError: They are not.
    """

    prompts: Iterable[Prompt]
    survey: Survey

    def __iter__(self) -> Iterator[Prompt]:
        """Yield the prompts; what is wrong shows at the end at the latest."""
        digest = hashlib.sha256()
        number = 0
        for number, prompt in enumerate(self.prompts, 1):
            if number > self.survey.rows:
                break
            digest.update(_row_bytes(prompt))
            yield prompt
        if number != self.survey.rows or digest.hexdigest() != self.survey.digest:
            raise DataError(
                "ROWS: they changed while they were predicted, so scores would stand beside other rows; nothing is "
                "written. Predict once they stay as they are."
            )


def score_rows(
    source: AnySource,
    prompts: Iterable[Prompt],
    survey: Survey,
    *,
    decode: Decode = "score",
    journal: Path | None = None,
    resume: bool = False,
    scorer: Scorer | None = None,
) -> Scoring:
    """Score prompts into `journal`, and return all scores when they are there.

    Args:
        source: What scores.
        prompts: In input order; iterated once for each model.
        survey: What was found in them.
        decode: Whether answers are generated beside.
        journal: Where scores stand until the caller removes it: a file, for an ensemble a folder; None: in memory only.
        resume: Go on with the journal that is there.
        scorer: The source loaded; None: it is where there is something to score.

    Raises:
        ArtifactError: The journal belongs to another job.
    """
    several = isinstance(source, EnsembleSource)
    if journal is not None and journal.exists() and journal.is_dir() != several:
        if resume:
            raise ArtifactError(
                f"{journal}: is what another job left: the run is not the same now. Give the former one to go on, or "
                "--overwrite to start anew."
            )
        remove(journal)
    if isinstance(source, EnsembleSource):
        parts = score_members(source.members, prompts, survey, journal=journal, resume=resume)
        return _combined(source, parts)
    return _score_alone(source, prompts, survey, decode=decode, journal=journal, resume=resume, scorer=scorer)


def score_members(
    members: Iterable[tuple[Path, Source]],
    prompts: Iterable[Prompt],
    survey: Survey,
    *,
    journal: Path | None,
    resume: bool,
) -> list[Scoring]:
    """Score prompts by each of several models, of which one at a time is in memory.

    Args:
        members: Each with the name that is shown.
        prompts: In input order.
        survey: What was found in them.
        journal: A folder for the journal of each; None: in memory only.
        resume: Go on with what is there.
    """
    parts = []
    try:
        for number, (name, member) in enumerate(members):
            say(f"{name}:")
            own = journal / f"member-{number}" if journal is not None else None
            parts.append(_score_alone(member, prompts, survey, journal=own, resume=resume))
            # A model is a knot of objects that point at each other; the next one needs its memory.
            gc.collect()
    finally:
        if journal is not None:
            # Where nothing was scored there is nothing to go on with.
            with suppress(OSError):
                journal.rmdir()
    return parts


def _combined(source: EnsembleSource, parts: list[Scoring]) -> Scoring:
    scores = source.combination.combine(np.stack([part.scored.scores for part in parts]))
    cut = np.any([part.scored.cut for part in parts], axis=0)
    rows = sum(part.rows for part in parts) / len(parts)
    return Scoring(
        AllScored(scores.astype(np.float32), cut, {}), sum(part.seconds for part in parts), rows, batch_tokens=None
    )


def _score_alone(
    source: Source,
    prompts: Iterable[Prompt],
    survey: Survey,
    *,
    decode: Decode = "score",
    journal: Path | None = None,
    resume: bool = False,
    scorer: Scorer | None = None,
) -> Scoring:
    key, labels = job_key(source, survey, decode), len(source.task.names)
    with Journal(journal, key=key, rows=survey.rows, labels=labels, resume=resume) as scored:
        before, started = len(scored.finished), time.monotonic()
        fits = source.batch_tokens
        if before:
            say(f"Going on: {before:,} of {survey.rows:,} rows are there.")
        if before < survey.rows:
            scorer = scorer or source.load(generate=decode == "generate")
            started = time.monotonic()
            with progress("predicting", survey.rows, "rows", done=before) as advance:

                def done(batch: Scored) -> None:
                    scored.record(batch)
                    advance(len(batch.rows))

                fits = scorer.score(prompts, done, scored.finished, fits=scored.fits, found=scored.shrink)
        seconds = time.monotonic() - started
    return Scoring(AllScored(scored.scores, scored.cut, scored.texts), seconds, survey.rows - before, fits)


def job_key(source: AnySource, survey: Survey, decode: Decode = "score") -> str:
    """Return a hash of all that the scores depend on."""
    if isinstance(source, EnsembleSource):
        members = [job_key(member, survey, decode) for _, member in source.members]
        return hashlib.sha256(json.dumps([members, source.combination.facts()]).encode()).hexdigest()
    return hashlib.sha256(json.dumps([survey.digest, decode, *source.identity()]).encode()).hexdigest()
