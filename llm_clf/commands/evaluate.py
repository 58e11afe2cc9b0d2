"""A predictions file to metrics: a table, and metrics.json."""

from pathlib import Path
from typing import Any

from llm_clf.decisions.predictions import read_predictions
from llm_clf.errors import ConfigError
from llm_clf.evaluation.metrics import compute_metrics
from llm_clf.files import path_of, write_json
from llm_clf.runs import METRICS, is_run


def evaluate(predictions: str | Path, *, out: str | Path | None = None) -> dict[str, Any]:
    """Return the metrics of a predictions file; with `out`, write them to `metrics.json` in that folder.

    Raises:
        ConfigError: `out` is a file, or a run, whose metrics.json is its own.
        DataError: It is no predictions file.
    """
    folder = path_of(out) if out is not None else None
    if folder is not None and folder.exists() and (is_run(folder) or not folder.is_dir()):
        found = "is a run, and its metrics are those of its own validation" if is_run(folder) else "is a file"
        raise ConfigError(f"--out {folder}: {found}. Give another folder for metrics.json.")
    table = read_predictions(Path(predictions))
    metrics = compute_metrics(table.gold, table.predicted, table.probs, table.labels, table.status)
    if folder is not None:
        write_json(folder / METRICS, metrics)
    return metrics
