"""A predictions file to metrics: a table, and metrics.json."""

from pathlib import Path
from typing import Any

from llm_clf.decisions.predictions import read_predictions
from llm_clf.evaluation.metrics import compute_metrics
from llm_clf.files import write_json


def evaluate(predictions: str | Path, *, out: str | Path | None = None) -> dict[str, Any]:
    """Return the metrics of a predictions file; with `out`, write them to `metrics.json` in that folder.

    Raises:
        DataError: It is no predictions file.
    """
    table = read_predictions(Path(predictions))
    metrics = compute_metrics(table.gold, table.predicted, table.probs, table.labels, table.status)
    if out is not None:
        write_json(Path(out) / "metrics.json", metrics)
    return metrics
