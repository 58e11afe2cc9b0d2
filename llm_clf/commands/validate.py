"""What every command that makes a run does at its end: measure the validation rows as predict will."""

from collections.abc import Sequence
from pathlib import Path

from llm_clf.commands.predict import predict_prompts
from llm_clf.console import say
from llm_clf.decisions.predictions import read_predictions
from llm_clf.evaluation.metrics import compute_metrics
from llm_clf.evaluation.tables import metrics_text
from llm_clf.files import write_json
from llm_clf.prompting.prompts import Prompt
from llm_clf.runs import METRICS, VALID_PREDICTIONS
from llm_clf.sources import Source


def score_validation(source: Source, valid: Sequence[Prompt], folder: Path) -> None:
    """Score the validation rows with the saved model exactly as predict will; write predictions and metrics."""
    predict_prompts(source, valid, folder / VALID_PREDICTIONS)
    table = read_predictions(folder / VALID_PREDICTIONS)
    metrics = compute_metrics(table.gold, table.predicted, table.probs, table.labels, table.status)
    write_json(folder / METRICS, metrics)
    say("Validation rows, scored with the saved model:\n" + metrics_text(metrics))
