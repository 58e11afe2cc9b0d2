"""The validation rows of a run, scored with the saved model as predict will, and whether predict merges an adapter."""

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_clf.commands.predict import predict_prompts
from llm_clf.config import Settings
from llm_clf.console import say
from llm_clf.decisions.predictions import read_predictions
from llm_clf.errors import ArtifactError
from llm_clf.evaluation.intervals import measure
from llm_clf.evaluation.tables import metrics_text
from llm_clf.files import write_json
from llm_clf.prompting.prompts import Prompt
from llm_clf.prompting.tasks import Task
from llm_clf.runs import ADAPTER, CHECKPOINTS, METRICS, VALID_PREDICTIONS
from llm_clf.sources import LoraSource

# A merged weight is rounded to the base's type. Where that moves no validation probability by more than this, it is
# taken to change no decision that anybody relies on.
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class MergeChoice:
    """Whether a run predicts with its adapter added into the base's weights, and why."""

    merged: bool
    largest_probability_change: float | None
    """Between both ways, over all validation rows and labels; None where only one way was tried."""
    reason: str


def score_validation(
    settings: Settings, task: Task, prompts: Sequence[Prompt], folder: Path
) -> tuple[MergeChoice, int]:
    """Score the validation rows with the saved adapter exactly as predict will; write predictions and metrics.

    Where memory runs out, all rows are scored anew in batches that fit: predict will make these, and rows that stand in
    other batches round otherwise.

    Args:
        settings: Of the training; where `predict.merge` is auto, it is decided here.
        task: The run's task.
        prompts: The validation rows.
        folder: The unfinished run.

    Returns:
        Whether predict merges, and the tokens of a batch that fits.
    """
    batch_tokens = settings.predict.batch_tokens
    if not prompts:
        say("No validation rows: the last step's adapter is kept, and nothing is measured.")
        return _without_comparison(settings, "there are no validation rows"), batch_tokens
    # The trained model is a knot of objects that point at each other; its memory is needed now.
    gc.collect()
    while True:
        choice, fits = _score(LoraSource(folder / ADAPTER, task, settings, None), prompts, folder)
        if fits == settings.predict.batch_tokens:
            break
        settings = settings.model_copy(update={"predict": settings.predict.model_copy(update={"batch_tokens": fits})})
    measure_validation(folder)
    return choice, fits


def measure_validation(folder: Path) -> None:
    """Write and print the metrics of the predictions that the unfinished run in this folder has."""
    metrics = measure(read_predictions(folder / VALID_PREDICTIONS))
    write_json(folder / METRICS, metrics)
    say("Validation rows, scored with the saved model:\n" + metrics_text(metrics))


def _score(source: LoraSource, prompts: Sequence[Prompt], folder: Path) -> tuple[MergeChoice, int]:
    """Write the predictions; where `predict.merge` is auto, of the way that predict will take.

    Returns:
        That way, and the tokens of a batch that fitted into memory.
    """
    from llm_clf.engine.classifier import Classifier
    from llm_clf.models.bases import is_quantized

    settings, kept = source.settings, folder / VALID_PREDICTIONS
    if settings.predict.merge != "auto" or is_quantized(settings.model):
        fits = predict_prompts(source, prompts, kept)["batch_tokens"]
        return _without_comparison(settings, "the base is quantised"), fits
    classifier = Classifier.from_adapter(source.adapter, source.task, settings)
    fits = predict_prompts(source, prompts, kept, scorer=classifier)["batch_tokens"]
    # What is not kept goes with the checkpoints.
    other = folder / CHECKPOINTS / VALID_PREDICTIONS
    try:
        fits = min(fits, predict_prompts(source, prompts, other, scorer=classifier.merged())["batch_tokens"])
        choice = _compare(kept, other)
    except ArtifactError as error:
        choice = MergeChoice(False, None, f"it cannot be merged: {str(error).removesuffix('.')}")
    say(f"The adapter is {'merged into' if choice.merged else 'used beside'} the base in predictions: {choice.reason}.")
    if choice.merged:
        os.replace(other, kept)
    return choice, fits


def _without_comparison(settings: Settings, reason: str) -> MergeChoice:
    """Return what was asked for; where nothing was, the adapter stays beside the base."""
    if settings.predict.merge == "auto":
        return MergeChoice(False, None, reason)
    return MergeChoice(settings.predict.merge, None, "predict.merge was set")


def _compare(beside: Path, merged: Path) -> MergeChoice:
    """Return whether two files of predictions are the same but for rounding."""
    one, other = read_predictions(beside).probs, read_predictions(merged).probs
    assert one is not None and other is not None
    change = float(abs(other - one).max())
    reason = f"merging moves no validation probability by more than {change:.2g}, and {TOLERANCE:g} is allowed"
    return MergeChoice(change <= TOLERANCE, change, reason)
