"""Rows to a predictions file: a label and a probability for each label, resumable."""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_clf.config import Settings, load_settings, settings_to_dict
from llm_clf.console import progress, say
from llm_clf.decisions.decide import decide, probabilities
from llm_clf.decisions.predictions import OK, STDOUT, Prediction, check_format, choose_columns, write_predictions
from llm_clf.errors import ArtifactError, ConfigError, DataError
from llm_clf.files import file_hash, partial_name, require_free
from llm_clf.prompting.prompts import Prompt, read_prompts
from llm_clf.prompting.rows import rewindable
from llm_clf.prompting.tasks import Task, load_task
from llm_clf.runs import is_run, load_run

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class Source:
    """Where labels come from: an adapter, the task it answers and the settings it is read with."""

    adapter: Path
    task: Task
    settings: Settings
    run: Path | None
    """The run folder, None for a bare adapter."""


@dataclass(frozen=True, slots=True)
class _Survey:
    """What one pass over the rows tells before any model is loaded."""

    rows: int
    digest: str
    columns: list[str]


def predict(
    run: str | Path,
    rows: Sequence[str | Path],
    *,
    out: str | Path,
    columns: Sequence[str] | None = None,
    task: str | Path | None = None,
    model: str | None = None,
    encoding: str = "utf-8",
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Predict every row and write the file `out`; return counts and speed.

    Rows are read three times and never held all at once: memory grows by about 150 bytes a row, and 4 bytes for
    each label.

    Args:
        run: A run folder, or a bare adapter folder with `task` and `model`.
        rows: Tables or instruction/input/output files; `-` is standard input.
        out: .csv, .jsonl or .parquet; `-` is JSONL on standard output.
        columns: What to write, of the predictions' and the rows' columns; None: all of the predictions'.
        task: For a bare adapter: the task.
        model: For a bare adapter: the base.
        encoding: Of text files.
        resume: Go on with what an interrupted job left beside `out`.
        overwrite: Replace `out`.

    Raises:
        LlmClfError: Run, rows or arguments are wrong; no file is written then.
    """
    place = Path(out)
    check_format(place)
    unfinished = None if str(out) == STDOUT else partial_name(place)
    if unfinished is None and resume:
        raise ConfigError("--resume: standard output cannot be resumed; give --out a file.")
    if resume and place.exists():
        say(f"{place} is finished; nothing to do.")
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)
        return {}
    if unfinished is not None:
        require_free(place, overwrite=overwrite, what="a file")
        if unfinished.exists() and not (resume or overwrite):
            raise ConfigError(
                f"{unfinished}: an interrupted job left this. --resume goes on with it, --overwrite starts anew."
            )
    source = find_source(Path(run), task, model)
    with rewindable(rows) as files:
        prompts = _FilePrompts(files, source.task, encoding)
        return predict_prompts(source, prompts, place, columns=columns, journal=unfinished, resume=resume)


def find_source(folder: Path, task: str | Path | None, model: str | None) -> Source:
    """Return what to predict with: a run, or a bare adapter with the task and the base given.

    Raises:
        ArtifactError: The folder is neither.
        ConfigError: A bare adapter lacks a task or a base, or a run is given another one.
    """
    if is_run(folder) or not (folder / "adapter_config.json").is_file():
        run = load_run(folder)
        if task is not None or model is not None:
            raise ConfigError(f"{folder}: is a run and has its own task and base; leave out --task and --model.")
        return Source(run.adapter, run.task, run.settings, folder)
    if task is None or model is None:
        raise ConfigError(f"{folder}: is a bare adapter; tell what it answers and its base: --task TASK --model BASE.")
    return Source(folder, load_task(task), load_settings(overrides=[f"model.name={json.dumps(model)}"]), None)


def predict_prompts(
    source: Source,
    prompts: Iterable[Prompt],
    out: Path,
    *,
    columns: Sequence[str] | None = None,
    journal: Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Score prompts into `journal`, and write `out` from it when all are there.

    Args:
        source: What to predict with.
        prompts: In input order; iterated three times.
        out: The predictions file.
        columns: What to write; None: all columns of predictions.
        journal: Where scores stand until all are there; None: in memory only.
        resume: Go on with the journal that is there.
    """
    survey = _survey(prompts)
    if survey.rows == 0:
        raise DataError("There are no rows to predict.")
    names = source.task.names
    chosen = choose_columns(columns, names, survey.columns)

    from llm_clf.engine.journal import Journal
    from llm_clf.models.bases import quiet_libraries

    quiet_libraries()
    key = _job_key(source, survey.digest)
    with Journal(journal, key=key, rows=survey.rows, labels=len(names), resume=resume) as scored:
        before, started = len(scored.finished), time.monotonic()
        if before:
            say(f"Going on: {before:,} of {survey.rows:,} rows are there.")
        if before < survey.rows:
            classifier = _load(source)
            started = time.monotonic()
            with progress("predicting", survey.rows, "rows", done=before) as advance:

                def done(rows: Sequence[int], scores: Any, cut: Sequence[bool]) -> None:
                    scored.record(rows, scores, cut)
                    advance(len(rows))

                classifier.score(prompts, done, frozenset(scored.finished))
        seconds = time.monotonic() - started
        write_predictions(out, _predictions(prompts, scored, names), labels=names, columns=chosen)
        cut = int(scored.cut.sum())
    if journal is not None:
        journal.unlink(missing_ok=True)
    speed = (survey.rows - before) / max(seconds, 1e-9)
    say(f"{survey.rows:,} rows predicted, {cut:,} of them cut to fit; {speed:.1f} rows/s.")
    return {"rows": survey.rows, "cut": cut, "seconds": round(seconds, 3), "rows_per_second": round(speed, 2)}


@dataclass(frozen=True, slots=True)
class _FilePrompts:
    """The prompts of files, read anew each time they are iterated."""

    files: Sequence[Path]
    task: Task
    encoding: str

    def __iter__(self) -> Iterator[Prompt]:
        return read_prompts(self.files, self.task, encoding=self.encoding)


def _survey(prompts: Iterable[Prompt]) -> _Survey:
    """Read all rows once: every fault in them shows before a model is loaded."""
    digest = hashlib.sha256()
    rows, columns = 0, []
    for prompt in prompts:
        if rows == 0:
            columns = list(prompt.cells)
        digest.update(json.dumps([prompt.id, prompt.input, prompt.label]).encode())
        rows += 1
    return _Survey(rows, digest.hexdigest(), columns)


def _job_key(source: Source, rows_digest: str) -> str:
    """Return a hash of all that the scores depend on."""
    from llm_clf.models.bases import base_identity

    weights = next((source.adapter / name for name in ADAPTER_FILES if (source.adapter / name).is_file()), None)
    if weights is None:
        raise ArtifactError(f"{source.adapter}: holds no adapter weights ({' or '.join(ADAPTER_FILES)}).")
    parts = [
        rows_digest,
        file_hash(weights),
        base_identity(source.settings.model.name)["hash"],
        source.task.model_dump(mode="json"),
        settings_to_dict(source.settings),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _load(source: Source) -> Any:
    from llm_clf.engine.classifier import Classifier

    if source.run is not None:
        return Classifier.from_run(load_run(source.run))
    return Classifier.from_adapter(source.adapter, source.task, source.settings)


def _predictions(prompts: Iterable[Prompt], scored: Any, names: Sequence[str]) -> Iterator[Prediction]:
    probs = probabilities(scored.scores)
    choices = decide(probs)
    for number, prompt in enumerate(prompts):
        yield Prediction(
            id=prompt.id,
            label=names[choices[number]],
            probs=list(probs[number]),
            status=OK,
            cut=bool(scored.cut[number]),
            gold=prompt.label,
            cells=prompt.cells,
        )
