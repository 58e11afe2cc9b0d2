"""Rows to a predictions file: a label and a probability for each label, resumable."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from llm_clf.commands.scoring import Decode, Unchanged, score_rows, survey_rows
from llm_clf.config_loading import load_settings
from llm_clf.console import say
from llm_clf.decisions.decide import decide, probabilities
from llm_clf.decisions.decisions import Decisions
from llm_clf.decisions.parsing import AnswerParser
from llm_clf.decisions.predictions import (
    ABSTAINED,
    OK,
    STDOUT,
    UNPARSED,
    Prediction,
    check_format,
    choose_columns,
    prediction_columns,
    write_predictions,
)
from llm_clf.decisions.stored import refit
from llm_clf.engine.scores import AllScored, Scorer
from llm_clf.errors import ConfigError, DataError
from llm_clf.evaluation.decided import decisions_text, measure_decisions
from llm_clf.files import locked, partial_name, path_of, remove, require_apart, require_free
from llm_clf.prompting.prompts import Prompt, read_prompts
from llm_clf.prompting.rows import STDIN, rewindable
from llm_clf.prompting.tasks import Task
from llm_clf.runs import CONFIG, Run, load_run
from llm_clf.sources import AnySource, LoraSource, find_source


def predict(
    run: str | Path,
    rows: str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    decode: Decode = "score",
    columns: str | Sequence[str] | None = None,
    fill: Mapping[str, str] | None = None,
    task: str | Path | None = None,
    model: str | None = None,
    set: Sequence[str] = (),
    raw: bool = False,
    prior: Mapping[str, float] | None = None,
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
        fill: Texts by the names of wanted columns, for rows that have nothing there: where the rows lack the column, or
            the cell is empty. What a row has of its own is kept.
        task: For a bare adapter: the task.
        model: For a bare adapter: the base. For a run: where its base is now, if it was moved.
        set: Settings of the sections model, predict, speed and decide, such as `model.quantization=4bit`. With one of
            decide, decisions are fitted anew on the run's validation rows.
        raw: Bare probabilities and the most probable label, whatever the run decides by.
        prior: Share of each label in these rows, in place of the setting `decide.priors`.
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
    changes = [*set, *([f"decide.priors={json.dumps(dict(prior))}"] if prior else [])]
    anew = any(change.strip().startswith("decide.") for change in changes)
    if raw and anew:
        raise ConfigError("--raw: gives what comes before all decisions; leave out --prior and --set decide.… with it.")
    place = path_of(out)
    check_format(place)
    given = [rows] if isinstance(rows, str | Path) else rows
    unfinished = _unfinished(place, [run, *given], resume=resume, overwrite=overwrite)
    if unfinished is not None and resume and place.exists():
        say(f"{place} is finished; nothing to do.")
        remove(unfinished)
        return {}
    with locked(place) if unfinished is not None else nullcontext():
        if unfinished is not None and unfinished.exists() and not (resume or overwrite):
            raise ConfigError(
                f"{unfinished}: an interrupted job left this. --resume goes on with it, --overwrite starts anew."
            )
        source = find_source(path_of(run), task, model, changes)
        if anew:
            _show_anew(path_of(run), changes)
        if decode == "generate" and not source.generates:
            raise ConfigError(f"--decode generate: {run} writes no answers: {_why_silent(source)}. Leave it out.")
        if isinstance(source, LoraSource) and source.run is not None:
            _say_merged_otherwise(source.run)
        with rewindable(rows) as files:
            prompts = _FilePrompts(files, source.task, encoding)
            return predict_prompts(
                source,
                prompts,
                place,
                decode=decode,
                columns=columns,
                fill=fill,
                raw=raw,
                journal=unfinished,
                resume=resume,
            )


def _show_anew(folder: Path, changes: Sequence[str]) -> None:
    """Say what decisions fitted anew on a run's validation rows are worth there."""
    fit = refit(load_run(folder), [change for change in changes if change.strip().startswith("decide.")])
    if fit.gold:
        metrics = measure_decisions(
            fit.decisions, fit.scores, fit.gold, fit.settings, seed=fit.seed, trained=fit.trained
        )
        say("Decisions fitted anew on the run's validation rows.\n" + decisions_text(fit.decisions, metrics))


def _why_silent(source: AnySource) -> str:
    return "it reads labels by a linear head" if isinstance(source, LoraSource) else "it is no language model"


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


def _say_merged_otherwise(run: Run) -> None:
    """Say so where the adapter is merged and was not for the run's validation, or the other way round."""
    then = load_settings([run.folder / CONFIG]).predict.merge is True
    now = run.settings.predict.merge is True
    if now != then and run.facts.get("rows", {}).get("valid"):
        ways = {True: "merged into the base", False: "beside the base"}
        say(f"The adapter is {ways[now]} here; the run's validation rows were scored with it {ways[then]}.")


def predict_prompts(
    source: AnySource,
    prompts: Iterable[Prompt],
    out: Path,
    *,
    decode: Decode = "score",
    columns: Sequence[str] | None = None,
    fill: Mapping[str, str] | None = None,
    raw: bool = False,
    journal: Path | None = None,
    resume: bool = False,
    scorer: Scorer | None = None,
) -> dict[str, Any]:
    """Score prompts into `journal`, and write `out` from it when all are there.

    Args:
        source: What to predict with.
        prompts: In input order; iterated three times, for an ensemble once more for each member.
        out: The predictions file.
        decode: Whether the label is what the source decides by scores, or what a generated answer means.
        columns: What to write; None: all columns of predictions.
        fill: What rows have in a wanted column in place of nothing.
        raw: Leave the source's decisions out.
        journal: Where scores stand until all are there; None: in memory only.
        resume: Go on with the journal that is there.
        scorer: The source loaded; None: it is when all rows have been read once.
    """
    survey = survey_rows(prompts)
    if survey.rows == 0:
        raise DataError("ROWS: there is no row below the names of the columns, so nothing to predict. Give some rows.")
    prompts = Unchanged(prompts, survey)
    names = source.task.names
    decisions = source.decisions if source.decisions is not None and not raw else Decisions.bare(names)
    own = prediction_columns(names, text=decode == "generate", sets=decisions.in_set is not None)
    chosen = choose_columns(columns, own, survey.columns, fill or ())

    found = score_rows(source, prompts, survey, decode=decode, journal=journal, resume=resume, scorer=scorer)
    scored = found.scored
    predictions = _predictions(prompts, scored, source.task, decode, decisions)
    write_predictions(out, predictions, labels=names, columns=chosen, fill=fill)
    agreement = {"agreement": _agreement(scored, source.task)} if decode == "generate" else {}
    if journal is not None:
        remove(journal)
    cut, speed = int(scored.cut.sum()), found.rows / max(found.seconds, 1e-9)
    say(f"{survey.rows:,} rows predicted, {cut:,} of them cut to fit; {speed:.1f} rows/s.")
    if agreement:
        _say_agreement(agreement["agreement"])
    figures = {"rows": survey.rows, "cut": cut, "seconds": round(found.seconds, 3), "rows_per_second": round(speed, 2)}
    return figures | {"batch_tokens": found.batch_tokens} | agreement


def write_scored(
    out: Path, prompts: Iterable[Prompt], scored: AllScored, task: Task, decisions: Decisions | None = None
) -> None:
    """Write the predictions of scored prompts, with the columns that predictions have."""
    decisions = decisions or Decisions.bare(task.names)
    predictions = _predictions(prompts, scored, task, "score", decisions)
    columns = prediction_columns(task.names, sets=decisions.in_set is not None)
    write_predictions(out, predictions, labels=task.names, columns=columns)


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


def _predictions(
    prompts: Iterable[Prompt], scored: AllScored, task: Task, decode: Decode, decisions: Decisions
) -> Iterator[Prediction]:
    """Yield predictions in input order: the label that was decided on, or the one that the generated text means."""
    decided = decisions.apply(scored.scores)
    parser = AnswerParser(task)
    for number, prompt in enumerate(prompts):
        text = scored.texts[number] if decode == "generate" else None
        label: str | None
        if text is None:
            answered = bool(decided.answered[number])
            label, status = (task.names[decided.choices[number]], OK) if answered else (None, ABSTAINED)
        else:
            label = parser.parse(text)
            status = OK if label is not None else UNPARSED
        in_set = decided.sets[number] if decided.sets is not None else None
        yield Prediction(
            id=prompt.id,
            label=label,
            probs=list(decided.probs[number]),
            status=status,
            cut=bool(scored.cut[number]),
            gold=prompt.label,
            text=text,
            cells=prompt.cells,
            label_set=[name for name, within in zip(task.names, in_set, strict=True) if within]
            if in_set is not None
            else None,
        )


def _agreement(scored: AllScored, task: Task) -> dict[str, Any]:
    """Return how often the generated answers mean the label that scores highest, and on which rows they do not."""
    choices = decide(probabilities(scored.scores))
    parser = AnswerParser(task)
    parsed = [parser.parse(scored.texts[number]) for number in range(len(choices))]
    differ = [number for number, label in enumerate(parsed) if label != task.names[choices[number]]]
    unparsed = sum(label is None for label in parsed)
    return {"rows": len(parsed), "agree": len(parsed) - len(differ), "unparsed": unparsed, "differ": differ}
