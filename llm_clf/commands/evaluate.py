"""A predictions file to metrics: a table, and metrics.json."""

from pathlib import Path
from typing import Any

from llm_clf.console import say
from llm_clf.decisions.predictions import read_predictions
from llm_clf.evaluation.intervals import measure
from llm_clf.files import path_of, write_json
from llm_clf.runs import METRICS, VALID_PREDICTIONS, is_run, require_no_run


def evaluate(predictions: str | Path, *, out: str | Path | None = None) -> dict[str, Any]:
    """Return the metrics of a predictions file with their intervals; with `out`, write them to `out/metrics.json`.

    Raises:
        ConfigError: `out` is a file, or a run, whose metrics.json is its own.
        DataError: It is no predictions file.
    """
    folder = path_of(out) if out is not None else None
    if folder is not None:
        require_no_run(folder, METRICS)
    file = Path(predictions)
    metrics = measure(read_predictions(file))
    if file.name == VALID_PREDICTIONS and is_run(file.parent):
        say(
            "Note: a run chooses by these rows how it decides, so these figures are in-sample; what was fitted is "
            f"cross-fitted in {file.parent / METRICS}."
        )
    if folder is not None:
        write_json(folder / METRICS, metrics)
    return metrics
