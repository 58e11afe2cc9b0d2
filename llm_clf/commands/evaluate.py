"""A predictions file to metrics: a table, metrics.json and a report to look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_clf.console import say
from llm_clf.decisions.predictions import PredictionTable, read_predictions
from llm_clf.errors import ConfigError
from llm_clf.evaluation.intervals import Judged, measure
from llm_clf.evaluation.texts import PredictedRows, read_predicted_rows
from llm_clf.files import path_of, replacing, write_json, writing
from llm_clf.prompting.rows import read_rows
from llm_clf.runs import METRICS, VALID_PREDICTIONS, Run, load_run, require_no_run

REPORT = "report.html"


def evaluate(
    predictions: str | Path,
    *,
    out: str | Path | None = None,
    rows: str | Path | None = None,
    run: str | Path | None = None,
    slice: str | Sequence[str] = (),
    encoding: str = "utf-8",
) -> dict[str, Any]:
    """Return the metrics of a predictions file with their intervals.

    Args:
        predictions: A file that `predict` wrote from labelled rows.
        out: Folder for `metrics.json`, `report.html` and the report's plots as PNG.
        rows: The rows that were predicted: the report shows their texts, and slices by their columns.
        run: What made the predictions: the report shows its learning curves.
        slice: Columns of `rows` or of the predictions by whose values the report tells the metrics apart.
        encoding: Of `rows`.

    Raises:
        ArtifactError: `run` is missing or damaged.
        ConfigError: `out` is a file, or a run, whose metrics.json is its own; there is no column to slice by; or a
            report is described and `out` not given.
        DataError: It is no predictions file, or rows are missing from `rows`.
    """
    columns = [slice] if isinstance(slice, str) else list(slice)
    folder = path_of(out) if out is not None else None
    _require_use(folder, {"--rows": rows, "--run": run, "--slice": columns})
    if folder is not None:
        require_no_run(folder, METRICS)
    file = path_of(predictions)
    table = read_predictions(file)
    if folder is None:
        return measure(table)
    source = load_run(path_of(run)) if run is not None else None
    known = read_predicted_rows(
        file, path_of(rows) if rows is not None else None, task=source.task if source else None, encoding=encoding
    )
    sliced = {name: known.column(name) for name in columns}
    metrics = measure(table)
    write_json(folder / METRICS, metrics)
    _write_report(folder, file.name, table, metrics, known, sliced, source)
    return metrics


def _require_use(out: Path | None, given: dict[str, Any]) -> None:
    idle = [name for name, value in given.items() if value]
    if out is None and idle:
        raise ConfigError(f"{', '.join(idle)}: only the report shows it. Give --out DIR too, where it goes.")


def _write_report(
    folder: Path,
    source: str,
    table: PredictionTable,
    metrics: dict[str, Any],
    rows: PredictedRows,
    sliced: dict[str, list[str]],
    run: Run | None,
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
    notes = [_validation_note(table, run)] if run is not None else []
    report = Report(source, table, metrics, plots, slicings, rows, [note for note in notes if note])
    with writing(folder):
        write_pngs(plots, folder)
    with replacing(folder / REPORT) as temporary:
        temporary.write_text(report_html(report), encoding="utf-8", newline="\n")
    say(f"The report is {folder / REPORT}.")


def _validation_note(table: PredictionTable, run: Run) -> str:
    """Return what to say where the rows are those that the run was chosen by."""
    file = run.folder / VALID_PREDICTIONS
    if not file.is_file():
        return ""
    seen = {row.cells.get("id", "") for row in read_rows([file])}
    common = sum(row_id in seen for row_id in table.ids)
    if not common:
        return ""
    return (
        f"{common:,} of these rows have ids of validation rows of the run {run.facts.get('name', run.folder.name)}. "
        "What was chosen on those (the checkpoint, thresholds) makes figures on them a little too good."
    )
