"""A predictions file to metrics: a table, metrics.json and a report to look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_clf.console import say
from llm_clf.decisions.predictions import PredictionTable, read_predictions
from llm_clf.errors import ConfigError
from llm_clf.evaluation.intervals import Judged, measure
from llm_clf.evaluation.metrics import NO_LABEL
from llm_clf.evaluation.suspects import FEW, Suspect, find_suspects, rare_labels, write_suspects
from llm_clf.evaluation.texts import PredictedRows, read_predicted_rows
from llm_clf.files import path_of, replacing, write_json, writing
from llm_clf.prompting.prompts import Prompt
from llm_clf.prompting.rows import read_rows, shorten
from llm_clf.runs import METRICS, VALID_PREDICTIONS, Run, count_trained_rows, is_run, load_run, require_no_run

REPORT = "report.html"


def evaluate(
    predictions: str | Path,
    *,
    out: str | Path | None = None,
    rows: str | Path | None = None,
    run: str | Path | None = None,
    slice: str | Sequence[str] = (),
    suspects: str | Path | None = None,
    encoding: str = "utf-8",
) -> dict[str, Any]:
    """Return the metrics of a predictions file with their intervals.

    Args:
        predictions: A file that `predict` wrote from labelled rows.
        out: Folder for `metrics.json`, `report.html` and the report's plots as PNG.
        rows: The rows that were predicted: the report and `suspects` show their texts, and the report slices by their
            columns.
        run: What made the predictions: the report shows its learning curves.
        slice: Columns of `rows` or of the predictions by whose values the report tells the metrics apart.
        suspects: CSV file for the rows whose gold label looks wrong, the worst first. The predictions must come from
            a model that did not learn from these rows.
        encoding: Of `rows`.

    Raises:
        ArtifactError: `run` is missing or damaged.
        ConfigError: `out` is a file, or a run, whose metrics.json is its own; there is no column to slice by; or an
            argument has no use without another one.
        DataError: It is no predictions file, rows are missing from `rows`, or too few have labels for `suspects`.
    """
    columns = [slice] if isinstance(slice, str) else list(slice)
    folder, suspected = (path_of(place) if place is not None else None for place in (out, suspects))
    _require_use(folder, suspected, rows=rows, run=run, columns=columns)
    if folder is not None:
        require_no_run(folder, METRICS)
    file = path_of(predictions)
    if suspected is not None:
        _check_suspects(suspected, [file, *([path_of(rows)] if rows is not None else [])])
    table = read_predictions(file)
    if file.name == VALID_PREDICTIONS and is_run(file.parent):
        say(
            "Note: a run chooses by these rows how it decides, so these figures are in-sample; what was fitted is "
            f"cross-fitted in {file.parent / METRICS}."
        )
    if folder is None and suspected is None:
        return measure(table)
    source = load_run(path_of(run)) if run is not None else None
    known = read_predicted_rows(
        file, path_of(rows) if rows is not None else None, task=source.task if source else None, encoding=encoding
    )
    sliced = {name: known.column(name) for name in columns}
    found = find_suspects(table, str(predictions)) if suspected is not None else []
    metrics = measure(table)
    notes = _notes(table, known, source) if source is not None else []
    if folder is not None:
        _write_results(folder, file.name, table, metrics, known, sliced, source, notes)
    if suspected is not None:
        write_suspects(suspected, found, known.texts)
        _tell_suspects(suspected, found, table, notes)
    return metrics


def _require_use(out: Path | None, suspects: Path | None, *, rows: object, run: object, columns: Sequence[str]) -> None:
    """Refuse arguments that would change nothing."""
    idle = {"--slice": columns} if suspects is not None else {"--rows": rows, "--run": run, "--slice": columns}
    named = [name for name, value in idle.items() if value]
    if out is None and named:
        raise ConfigError(f"{', '.join(named)}: only the report shows it. Give --out DIR too, where it goes.")


def _check_suspects(file: Path, inputs: Sequence[Path]) -> None:
    if file.suffix.lower() != ".csv":
        raise ConfigError(f"--suspects {file}: found the ending {file.suffix!r}; suspects are written as .csv.")
    if file.resolve() in [one.resolve() for one in inputs]:
        raise ConfigError(f"--suspects {file}: is what they are found in. Give another file.")


def _tell_suspects(file: Path, found: Sequence[Suspect], table: PredictionTable, notes: Sequence[str]) -> None:
    labelled = sum(label != NO_LABEL for label in table.gold)
    say(f"{len(found):,} of {labelled:,} labels look wrong: {file}, the worst first.")
    rare = rare_labels(table)
    if rare:
        say(f"Of the labels {shorten(rare)} there are fewer than {FEW} rows: what is said about those is weak.")
    for note in notes:
        say(f"Note: {note}")


def _write_results(
    folder: Path,
    source: str,
    table: PredictionTable,
    metrics: dict[str, Any],
    rows: PredictedRows,
    sliced: dict[str, list[str]],
    run: Run | None,
    notes: Sequence[str],
) -> None:
    from llm_clf.evaluation.learning import learning_curves
    from llm_clf.evaluation.plots import draw_plots, write_pngs
    from llm_clf.evaluation.report import Report, report_html
    from llm_clf.evaluation.slices import slice_by_column, slice_by_length

    slicings = [slice_by_column(table, name, cells) for name, cells in sliced.items()]
    if rows.texts is not None:
        slicings.insert(0, slice_by_length(table, rows.texts))
    why = "Not drawn: --run RUN shows those of the run that made the predictions."
    if run is not None:
        why = "Not drawn: this run was not measured while it was trained."
    plots = draw_plots(Judged.of(table), learning_curves(run) if run is not None else None, why)
    page = report_html(Report(source, table, metrics, plots, slicings, rows, notes))
    # All is made before the first is written, so that files of two evaluations hardly ever stand side by side.
    write_json(folder / METRICS, metrics)
    with writing(folder):
        write_pngs(plots, folder)
    with replacing(folder / REPORT) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    say(f"The report is {folder / REPORT}.")


def _notes(table: PredictionTable, rows: PredictedRows, run: Run) -> list[str]:
    """Return what to say where the run has seen some of the rows: figures on those are too good."""
    name, notes = run.facts.get("name", run.folder.name), []
    prompts = (Prompt(row_id, text, None, {}) for row_id, text in zip(table.ids, rows.texts or [], strict=False))
    if trained := count_trained_rows(run.folder, prompts):
        notes.append(
            f"The run {name} was trained on {trained:,} of these rows: figures on them say nothing about others."
        )
    file = run.folder / VALID_PREDICTIONS
    validated = {row.cells.get("id", "") for row in read_rows([file])} if file.is_file() else set()
    if common := sum(row_id in validated for row_id in table.ids):
        notes.append(
            f"{common:,} of these rows have ids of validation rows of the run {name}. What was chosen on those (the "
            "checkpoint, thresholds) makes figures on them a little too good."
        )
    return notes
