"""The decisions of a run: as they were stored, or fitted anew on its validation rows for other settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_clf.config import DecideSettings
from llm_clf.config_loading import load_tree
from llm_clf.decisions.decisions import Decisions, load_decisions
from llm_clf.decisions.fitting import fit_decisions
from llm_clf.decisions.predictions import read_predictions
from llm_clf.decisions.rules import logs_of
from llm_clf.errors import ArtifactError, ConfigError
from llm_clf.files import file_hash, replacing
from llm_clf.runs import CONFIG, DECISIONS, ENSEMBLE, KINDS, VALID_PREDICTIONS, VALID_SCORES, Run


def run_decisions(run: Run) -> Decisions | None:
    """Return the decisions that a run was made with, None where it has none, as runs of older versions.

    Raises:
        ArtifactError: They are missing, damaged, or not those that the run was made with.
    """
    file, stored = run.folder / DECISIONS, run.facts.get("decisions")
    if stored is None:
        return None
    if not file.is_file():
        raise ArtifactError(
            f"{run.folder}: {DECISIONS} is missing from the run. Copy the whole folder, or train again."
        )
    if not isinstance(stored, dict) or file_hash(file) != stored.get("hash"):
        raise ArtifactError(
            f"{file}: has changed since the training that run.json tells of. Copy the whole run again, or give "
            "`--set decide.…` to predict, which fits decisions anew."
        )
    return load_decisions(file, run.task.names)


@dataclass(frozen=True, slots=True)
class Refitted:
    """Decisions fitted on the validation rows of a run, and what they were fitted to, as `fit_decisions` takes it."""

    decisions: Decisions
    scores: NDArray[Any]
    gold: list[str | None]
    settings: DecideSettings
    seed: int
    trained: dict[str, float] | None


def refit(run: Run, changes: Sequence[str]) -> Refitted:
    """Fit decisions on the validation rows of a run, with some of its settings changed.

    Args:
        run: Of any kind.
        changes: As `decide.key=value`.

    Raises:
        ArtifactError: What the run stores of its validation rows is damaged.
        ConfigError: The settings do not fit, or the rows are too few.
    """
    settings: Any = load_tree(KINDS[run.kind].settings, [run.folder / CONFIG], changes)
    scores, gold = _validation_rows(run)
    counts = run.facts.get("rows", {}).get("labels")
    if run.kind == ENSEMBLE and counts is None and settings.decide.priors is not None:
        raise ConfigError(
            f"decide.priors: {run.folder} is an ensemble, and the shares of labels that its members were trained for "
            "may differ, so nothing says what to correct. Leave it out, or predict with one of the members."
        )
    seed, trained = settings.train.seed, trained_shares(counts, settings.train)
    decisions = fit_decisions(scores, gold, run.task.names, settings.decide, seed=seed, trained=trained)
    return Refitted(decisions, scores, gold, settings.decide, seed, trained)


def trained_shares(counts: Mapping[str, int] | None, train: Any) -> dict[str, float] | None:
    """Return the share of each label in training as the loss weighed it, None where it is not known.

    Args:
        counts: Training rows by label.
        train: The section `train` of the settings.
    """
    if not counts:
        return None
    weights, even = train.class_weights, getattr(train, "sampling", "shuffled") == "balanced"
    if weights == "balanced" or even:
        counts = {label: min(count, 1) for label, count in counts.items()}
        weights = None
    weighed = {label: count * (weights or {}).get(label, 1.0) for label, count in counts.items()}
    return {label: value / sum(weighed.values()) for label, value in weighed.items()}


def save_scores(file: Path, scores: NDArray[np.float32]) -> None:
    """Write the scores of validation rows, so that decisions can be fitted anew without the model."""
    with replacing(file) as temporary, open(temporary, "wb") as opened:
        np.save(opened, scores, allow_pickle=False)


def _validation_rows(run: Run) -> tuple[NDArray[Any], list[str | None]]:
    """Return scores and gold labels of the validation rows; there may be none."""
    predictions, file, labels = run.folder / VALID_PREDICTIONS, run.folder / VALID_SCORES, len(run.task.names)
    if not predictions.is_file():
        return np.empty((0, labels), dtype=np.float32), []
    table = read_predictions(predictions)
    gold = [label or None for label in table.gold]
    if not file.is_file():
        if run.kind == ENSEMBLE and "folds" not in run.facts:
            # What it stores of these rows is by weights that they chose.
            raise ArtifactError(
                f"{run.folder}: has no {VALID_SCORES}, by which decisions are fitted: it was made by an older version, "
                "or not copied whole. Make it again."
            )
        # Runs of older versions have bare probabilities there.
        if run.facts.get("decisions") is not None or table.probs is None:
            raise ArtifactError(f"{run.folder}: {VALID_SCORES} is missing from the run. Copy the whole folder.")
        return logs_of(table.probs), gold
    try:
        scores: NDArray[Any] = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{file}: is damaged: {error}. Copy the whole run again.") from error
    if scores.shape != (len(gold), labels) or scores.dtype != np.float32 or not np.isfinite(scores).all():
        raise ArtifactError(f"{file}: does not hold the scores of the run's validation rows. Copy the whole run again.")
    return scores, gold
