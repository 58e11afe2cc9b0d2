"""Rows to a predictions file: a label and a probability for each label, resumable."""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from llm_clf.config import Settings, load_settings, require_sections, settings_to_dict
from llm_clf.console import progress, say
from llm_clf.decisions.decide import decide, probabilities
from llm_clf.decisions.parsing import AnswerParser
from llm_clf.decisions.predictions import (
    OK,
    STDOUT,
    UNPARSED,
    Prediction,
    check_format,
    choose_columns,
    prediction_columns,
    write_predictions,
)
from llm_clf.errors import ConfigError, DataError
from llm_clf.files import file_hash, locked, partial_name, path_of, require_apart, require_free
from llm_clf.prompting.prompts import Prompt, read_prompts
from llm_clf.prompting.rows import STDIN, rewindable
from llm_clf.prompting.tasks import Task, load_task
from llm_clf.runs import CONFIG, Run, is_run, load_run

Decode = Literal["score", "generate"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where labels come from: an adapter, the task it answers and the settings it is read with."""

    adapter: Path | None
    """None: the base alone answers."""
    task: Task
    settings: Settings
    run: Run | None
    """None where there is only an adapter, or a base. Its settings are those above."""


@dataclass(frozen=True, slots=True)
class _Survey:
    """What one pass over the rows tells before any model is loaded."""

    rows: int
    digest: str
    columns: list[str]


def predict(
    run: str | Path,
    rows: str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    decode: Decode = "score",
    columns: str | Sequence[str] | None = None,
    task: str | Path | None = None,
    model: str | None = None,
    set: Sequence[str] = (),
    encoding: str = "utf-8",
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Predict every row and write the file `out`; return counts and speed.

    Rows are read three times and never held all at once: memory grows by about 450 bytes a row, and 4 bytes for
    each label.

    Args:
        run: A run folder, or a bare adapter folder with `task` and `model`.
        rows: Tables or instruction/input/output files; `-` is standard input.
        out: .csv, .jsonl or .parquet; `-` is JSONL on standard output.
        decode: `score` gives every row the most probable label; `generate` lets the model write its answer and reads
            the label from it, or finds none (`unparsed`).
        columns: What to write, of the predictions' and the rows' columns; None: all of the predictions'.
        task: For a bare adapter: the task.
        model: For a bare adapter: the base. For a run: where its base is now, if it was moved.
        set: Settings of the sections model, predict and speed, such as `model.quantization=4bit`.
        encoding: Of text files.
        resume: Go on with what an interrupted job left beside `out`.
        overwrite: Replace `out`.

    Raises:
        LlmClfError: Run, rows or arguments are wrong; no file is written then.
    """
    if decode not in get_args(Decode):
        raise ConfigError(f"--decode {decode!r}: allowed are {' and '.join(get_args(Decode))}.")
    if isinstance(columns, str):
        columns = [name.strip() for name in columns.split(",")]
    place = path_of(out)
    check_format(place)
    given = [rows] if isinstance(rows, str | Path) else rows
    unfinished = _unfinished(place, [run, *given], resume=resume, overwrite=overwrite)
    if unfinished is not None and resume and place.exists():
        say(f"{place} is finished; nothing to do.")
        unfinished.unlink(missing_ok=True)
        return {}
    with locked(place) if unfinished is not None else nullcontext():
        if unfinished is not None and unfinished.exists() and not (resume or overwrite):
            raise ConfigError(
                f"{unfinished}: an interrupted job left this. --resume goes on with it, --overwrite starts anew."
            )
        source = find_source(path_of(run), task, model, set)
        if source.run is not None:
            _say_merged_otherwise(source.run)
        with rewindable(rows) as files:
            prompts = _FilePrompts(files, source.task, encoding)
            return predict_prompts(
                source, prompts, place, decode=decode, columns=columns, journal=unfinished, resume=resume
            )


def _unfinished(place: Path, inputs: Sequence[str | Path], *, resume: bool, overwrite: bool) -> Path | None:
    """Return where the scores stand until all are there, None for standard output; refuse a place that cannot be.

    Raises:
        ConfigError: The place is taken, a folder, or one of the inputs; or standard output is to be resumed.
    """
    if str(place) == STDOUT:
        if resume:
            raise ConfigError("--resume: standard output cannot be resumed; give --out a file.")
        return None
    require_free(place, overwrite=overwrite or resume, what="a file")
    if place.is_dir():
        raise ConfigError(f"{place}: is a folder; give --out a file of its own.")
    require_apart(place, [Path(given) for given in inputs if str(given) != STDIN])
    return partial_name(place)


def find_source(folder: Path, task: str | Path | None, model: str | None, overrides: Sequence[str] = ()) -> Source:
    """Return what to predict with: a run, or a bare adapter with the task and the base given.

    Raises:
        ArtifactError: The folder is neither.
        ConfigError: A bare adapter lacks a task or a base, a run is given another one, or an override does not fit.
    """
    require_sections(overrides, ("model", "predict", "speed"), "a prediction")
    changes = [*overrides, *([f"model.name={json.dumps(model)}"] if model is not None else [])]
    if is_run(folder) or not (folder / "adapter_config.json").is_file():
        run = load_run(folder)
        if task is not None:
            raise ConfigError(f"{folder}: is a run and has its own task; leave out --task.")
        if changes:
            run = replace(run, settings=_changed(run, changes))
        return Source(run.adapter, run.task, run.settings, run)
    if task is None or model is None:
        raise ConfigError(f"{folder}: is a bare adapter; tell what it answers and its base: --task TASK --model BASE.")
    return Source(folder, load_task(task), load_settings(overrides=changes), None)


def _changed(run: Run, changes: Sequence[str]) -> Settings:
    """Return a run's settings with changes.

    Where they leave `predict.merge` to the run, its adapter is merged as for its validation; not where the base is held
    otherwise now, since what was found of one number type says nothing of another.
    """
    then = run.settings
    settings = load_settings([run.folder / CONFIG], ["predict.merge=auto", *changes])
    if settings.predict.merge != "auto":
        return settings
    held_so = settings.model == then.model.model_copy(update={"name": settings.model.name})
    return settings.merging(then.predict.merge is True and held_so)


def _say_merged_otherwise(run: Run) -> None:
    """Say so where the adapter is merged and was not for the run's validation, or the other way round."""
    then = load_settings([run.folder / CONFIG]).predict.merge is True
    now = run.settings.predict.merge is True
    if now != then and run.facts.get("rows", {}).get("valid"):
        ways = {True: "merged into the base", False: "beside the base"}
        say(f"The adapter is {ways[now]} here; the run's validation rows were scored with it {ways[then]}.")


def predict_prompts(
    source: Source,
    prompts: Iterable[Prompt],
    out: Path,
    *,
    decode: Decode = "score",
    columns: Sequence[str] | None = None,
    journal: Path | None = None,
    resume: bool = False,
    classifier: Any = None,
) -> dict[str, Any]:
    """Score prompts into `journal`, and write `out` from it when all are there.

    Args:
        source: What to predict with.
        prompts: In input order; iterated three times.
        out: The predictions file.
        decode: Whether the label is the most probable one, or what a generated answer means.
        columns: What to write; None: all columns of predictions.
        journal: Where scores stand until all are there; None: in memory only.
        resume: Go on with the journal that is there.
        classifier: A Classifier of the source; None: it is loaded when all rows have been read once.
    """
    survey = _survey(prompts)
    if survey.rows == 0:
        raise DataError("ROWS: there is no row below the names of the columns, so nothing to predict. Give some rows.")
    names = source.task.names
    chosen = choose_columns(columns, prediction_columns(names, text=decode == "generate"), survey.columns)

    from llm_clf.engine.classifier import Scored
    from llm_clf.engine.fitting import memory_explained
    from llm_clf.engine.journal import Journal
    from llm_clf.models.bases import quiet_libraries

    quiet_libraries()
    key = _job_key(source, survey.digest, decode)
    with Journal(journal, key=key, rows=survey.rows, labels=len(names), resume=resume) as scored:
        before, started = len(scored.finished), time.monotonic()
        fits = source.settings.predict.batch_tokens
        if before:
            say(f"Going on: {before:,} of {survey.rows:,} rows are there.")
        if before < survey.rows:
            with memory_explained():
                classifier = classifier or _load(source, decode)
            started = time.monotonic()
            with progress("predicting", survey.rows, "rows", done=before) as advance:

                def done(batch: Scored) -> None:
                    scored.record(batch)
                    advance(len(batch.rows))

                with memory_explained():
                    fits = classifier.score(prompts, done, scored.finished, fits=scored.fits, found=scored.shrink)
        seconds = time.monotonic() - started
        predictions = _predictions(prompts, scored, source.task, decode)
        write_predictions(out, predictions, labels=names, columns=chosen)
        cut = int(scored.cut.sum())
        agreement = {"agreement": _agreement(scored, source.task)} if decode == "generate" else {}
    if journal is not None:
        journal.unlink(missing_ok=True)
    speed = (survey.rows - before) / max(seconds, 1e-9)
    say(f"{survey.rows:,} rows predicted, {cut:,} of them cut to fit; {speed:.1f} rows/s.")
    if agreement:
        _say_agreement(agreement["agreement"])
    figures = {"rows": survey.rows, "cut": cut, "seconds": round(seconds, 3), "rows_per_second": round(speed, 2)}
    return figures | {"batch_tokens": fits} | agreement


def _say_agreement(found: dict[str, Any]) -> None:
    differ = found["differ"]
    where = (
        f"; they differ on rows {', '.join(map(str, differ[:10]))}{' …' if len(differ) > 10 else ''}" if differ else ""
    )
    say(
        f"Generated answers and scores agree on {found['agree']:,} of {found['rows']:,} rows "
        f"({found['unparsed']:,} answers are no label){where}."
    )


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


def _job_key(source: Source, rows_digest: str, decode: Decode) -> str:
    """Return a hash of all that the scores depend on."""
    from llm_clf.models.adapters import adapter_weights
    from llm_clf.models.bases import base_identity

    parts = [
        rows_digest,
        decode,
        file_hash(adapter_weights(source.adapter)) if source.adapter is not None else None,
        base_identity(source.settings.model.name)["hash"],
        source.task.model_dump(mode="json"),
        settings_to_dict(source.settings),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _load(source: Source, decode: Decode) -> Any:
    from llm_clf.engine.classifier import Classifier, require_same_base

    if source.run is not None:
        require_same_base(source.run)
    return Classifier.from_adapter(source.adapter, source.task, source.settings, generate=decode == "generate")


def _predictions(prompts: Iterable[Prompt], scored: Any, task: Task, decode: Decode) -> Iterator[Prediction]:
    """Yield decisions in input order: the most probable label, or the one that the generated text means."""
    probs = probabilities(scored.scores)
    choices = decide(probs)
    parser = AnswerParser(task)
    for number, prompt in enumerate(prompts):
        text = scored.texts[number] if decode == "generate" else None
        label = task.names[choices[number]] if text is None else parser.parse(text)
        yield Prediction(
            id=prompt.id,
            label=label,
            probs=list(probs[number]),
            status=OK if label is not None else UNPARSED,
            cut=bool(scored.cut[number]),
            gold=prompt.label,
            text=text,
            cells=prompt.cells,
        )


def _agreement(scored: Any, task: Task) -> dict[str, Any]:
    """Return how often the generated answers mean the label that scores highest, and on which rows they do not."""
    choices = decide(probabilities(scored.scores))
    parser = AnswerParser(task)
    parsed = [parser.parse(scored.texts[number]) for number in range(len(choices))]
    differ = [number for number, label in enumerate(parsed) if label != task.names[choices[number]]]
    unparsed = sum(label is None for label in parsed)
    return {"rows": len(parsed), "agree": len(parsed) - len(differ), "unparsed": unparsed, "differ": differ}
