"""Learning curves: what a run recorded while it was trained."""

from dataclasses import dataclass
from typing import Any

from llm_clf.runs import LOG, Run

TRAINING_LOSS = "train/loss"


@dataclass(frozen=True, slots=True)
class LearningCurves:
    """The course of a training; steps are optimiser steps."""

    evaluations: list[dict[str, Any]]
    """Validation metrics by name, with `step` and `epoch`."""
    losses: list[tuple[int, float]]
    """Step and loss of the training rows, empty where the log is gone."""
    best_step: int | None


def learning_curves(run: Run) -> LearningCurves | None:
    """Return a run's learning curves, None where it was not measured while it was trained."""
    evaluations = run.facts.get("evaluations")
    if not (isinstance(evaluations, list) and evaluations):
        return None
    return LearningCurves(evaluations, _training_losses(run), run.facts.get("training", {}).get("best_step"))


def _training_losses(run: Run) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(run.folder / LOG), size_guidance={"scalars": 0})
    if not (run.folder / LOG).is_dir():
        return []
    log.Reload()
    if TRAINING_LOSS not in log.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in log.Scalars(TRAINING_LOSS)]
