"""The validation rows of a run, scored with the saved model as predict will, and whether predict merges an adapter."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm_clf.commands.predict import write_scored
from llm_clf.commands.scoring import Scoring, score_rows, survey_rows
from llm_clf.config import EncoderSettings, Settings
from llm_clf.console import say
from llm_clf.decisions.decide import probabilities
from llm_clf.decisions.fitting import fit_decisions
from llm_clf.decisions.stored import save_scores, trained_shares
from llm_clf.engine.scores import AllScored, Scorer
from llm_clf.errors import ArtifactError
from llm_clf.evaluation.decided import decisions_text, measure_decisions
from llm_clf.files import file_hash, write_json
from llm_clf.prompting.prompts import Prompt
from llm_clf.prompting.tasks import Task
from llm_clf.runs import ADAPTER, DECISIONS, METRICS, VALID_PREDICTIONS, VALID_SCORES
from llm_clf.sources import LoraSource, Source

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
) -> tuple[MergeChoice, int, AllScored | None]:
    """Score the validation rows with the saved adapter exactly as predict will.

    Where memory runs out, all rows are scored anew in batches that fit: predict will make these, and rows that stand in
    other batches round otherwise.

    Args:
        settings: Of the training; where `predict.merge` is auto, it is decided here.
        task: The run's task.
        prompts: The validation rows.
        folder: The unfinished run.

    Returns:
        Whether predict merges, the tokens of a batch that fits, and the scores; None where there are no rows.
    """
    batch_tokens = settings.predict.batch_tokens
    if not prompts:
        say("No validation rows: the last step's adapter is kept.")
        return _without_comparison(settings, "there are no validation rows"), batch_tokens, None
    # The trained model is a knot of objects that point at each other; its memory is needed now.
    gc.collect()
    while True:
        choice, fits, scored = _score(LoraSource(folder / ADAPTER, task, settings, None), prompts)
        if fits == settings.predict.batch_tokens:
            return choice, fits, scored
        settings = settings.having("predict", batch_tokens=fits)


def _score(source: LoraSource, prompts: Sequence[Prompt]) -> tuple[MergeChoice, int, AllScored]:
    """Score rows; where `predict.merge` is auto, both ways, of which the one is kept that predict will take.

    Returns:
        That way, the tokens of a batch that fitted into memory, and its scores.
    """
    from llm_clf.engine.classifier import Classifier
    from llm_clf.models.bases import is_quantized

    settings = source.settings
    if settings.predict.merge != "auto" or is_quantized(settings.model):
        found = score_all(source, prompts)
        return _without_comparison(settings, "the base is quantised"), _budget(found), found.scored
    classifier = Classifier.from_adapter(source.adapter, source.task, settings)
    found = score_all(source, prompts, classifier)
    fits, kept = _budget(found), found.scored
    try:
        found = score_all(source, prompts, classifier.merged())
        fits = min(fits, _budget(found))
        choice = _compare(kept, found.scored)
    except ArtifactError as error:
        choice = MergeChoice(False, None, f"it cannot be merged: {str(error).removesuffix('.')}")
    say(f"The adapter is {'merged into' if choice.merged else 'used beside'} the base in predictions: {choice.reason}.")
    return choice, fits, found.scored if choice.merged else kept


def score_all(source: Source, prompts: Sequence[Prompt], scorer: Scorer | None = None) -> Scoring:
    """Score rows that are in memory, and say how fast."""
    found = score_rows(source, prompts, survey_rows(prompts), scorer=scorer)
    speed, cut = found.rows / max(found.seconds, 1e-9), int(found.scored.cut.sum())
    say(f"{len(prompts):,} validation rows scored, {cut:,} of them cut to fit; {speed:.1f} rows/s.")
    return found


def _budget(found: Scoring) -> int:
    assert found.batch_tokens is not None
    return found.batch_tokens


def _without_comparison(settings: Settings, reason: str) -> MergeChoice:
    """Return what was asked for; where nothing was, the adapter stays beside the base."""
    if settings.predict.merge == "auto":
        return MergeChoice(False, None, reason)
    return MergeChoice(settings.predict.merge, None, "predict.merge was set")


def _compare(beside: AllScored, merged: AllScored) -> MergeChoice:
    """Return whether two ways to score the same rows give the same but for rounding."""
    change = float(abs(probabilities(merged.scores).astype(np.float64) - probabilities(beside.scores)).max())
    reason = f"merging moves no validation probability by more than {change:.2g}, and {TOLERANCE:g} is allowed"
    return MergeChoice(change <= TOLERANCE, change, reason)


def decide_validation(
    settings: Settings | EncoderSettings,
    task: Task,
    prompts: Sequence[Prompt],
    scored: AllScored | None,
    folder: Path,
    *,
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """Fit decisions on scored validation rows, and write decisions, scores, predictions and metrics into the run.

    Args:
        settings: Of the run.
        task: The run's task.
        prompts: The validation rows.
        scored: Their scores, None where there are none.
        folder: The unfinished run.
        counts: Training rows by label.

    Returns:
        What run.json says of the decisions.
    """
    scores = scored.scores if scored is not None else np.empty((0, len(task.names)), dtype=np.float32)
    gold = [prompt.label for prompt in prompts]
    seed, trained = settings.train.seed, trained_shares(counts, settings.train)
    decisions = fit_decisions(scores, gold, task.names, settings.decide, seed=seed, trained=trained)
    decisions.save(folder / DECISIONS)
    if scored is None:
        say("No validation rows: nothing is measured on them.")
        return {"hash": file_hash(folder / DECISIONS)}
    save_scores(folder / VALID_SCORES, scores)
    write_scored(folder / VALID_PREDICTIONS, prompts, scored, task, decisions)
    metrics = measure_decisions(decisions, scores, gold, settings.decide, seed=seed, trained=trained)
    write_json(folder / METRICS, metrics)
    say(decisions_text(decisions, metrics))
    return {"hash": file_hash(folder / DECISIONS)}
