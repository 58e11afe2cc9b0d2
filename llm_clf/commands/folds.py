"""A cross-validation: a training for each fold of the training rows, and all of them together as the run."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm_clf.baselines.ensemble import equal_weights
from llm_clf.commands.parity import scored_with
from llm_clf.commands.predict import write_scored
from llm_clf.commands.scoring import score_members, score_rows, survey_rows
from llm_clf.commands.training_run import claim
from llm_clf.commands.validation import decide_validation
from llm_clf.config import Settings, settings_to_dict
from llm_clf.console import say, table
from llm_clf.decisions.decide import decide, probabilities
from llm_clf.decisions.predictions import read_predictions
from llm_clf.engine.scores import AllScored
from llm_clf.errors import ConfigError
from llm_clf.evaluation.intervals import measure
from llm_clf.evaluation.metrics import HEADLINES, compute_metrics
from llm_clf.evaluation.tables import interval_text
from llm_clf.files import file_hash, write_json
from llm_clf.prompting.folds import fold_rows
from llm_clf.prompting.training_data import TrainingData
from llm_clf.runs import (
    CHECKPOINTS,
    ENSEMBLE,
    FOLD_PREDICTIONS,
    FOLDS,
    INPUTS,
    KINDS,
    METRICS,
    Run,
    commit,
    is_run,
    load_run,
    package_versions,
    prompts_place,
    run_metrics,
    save_facts,
    save_inputs,
    save_trained_rows,
    task_facts,
)
from llm_clf.sources import ensemble_members, member_source


class Train(Protocol):
    """Trains in a folder, going on with what is there, and leaves a whole run."""

    def __call__(self, settings: Settings, data: TrainingData, folder: Path) -> None:
        """Train on some of the rows."""


def require_folds(count: int, settings: Settings, data: TrainingData) -> None:
    """Refuse a number of folds that the training rows cannot be cut into.

    Raises:
        ConfigError: They are too few for it.
    """
    if count < 2:
        raise ConfigError(f"--folds {count}: a row is predicted by a model that was trained on other folds; give 2 up.")
    fold_rows(data.train, count, settings.train.seed)


def run_folds(count: int, settings: Settings, data: TrainingData, folder: Path, train: Train, *, resume: bool) -> None:
    """Train a run for each fold on the rows of the others, and make one run of all in the unfinished folder.

    Every row of the training split is predicted by the one model that did not see it: the validation split chooses the
    checkpoints, in each fold as in any training.

    Args:
        count: Of folds.
        settings: Of each training.
        data: Its training rows are cut into folds.
        folder: The unfinished run; the runs of the folds stand in it.
        train: Trains one of them.
        resume: Go on with what is there.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    base = _claim(folder, count, settings, data, resume=resume)
    folds = fold_rows(data.train, count, settings.train.seed)
    scores = np.empty((len(data.train), len(data.task.names)), dtype=np.float32)
    cut = np.zeros(len(data.train), dtype=bool)
    for number, held_out in enumerate(folds, 1):
        place = folder / FOLDS / str(number)
        say(f"\nFold {number} of {count}: {len(held_out):,} rows held out.")
        if not is_run(place):
            _free_memory()
            train(settings, _without(data, held_out), place)
        _clear(place)
        found = _score_held_out(load_run(place), data, held_out, folder / CHECKPOINTS / f"fold-{number}")
        scores[held_out], cut[held_out] = found.scores, found.cut
    members = [load_run(folder / FOLDS / str(number)) for number in range(1, count + 1)]
    write_scored(folder / FOLD_PREDICTIONS, data.train, AllScored(scores, cut, {}), data.task)
    learned, scored = _write_ensemble(members, settings, data, folder)
    decided = decide_validation(settings, data.task, data.valid, scored, folder, counts=data.counts)
    _measure(folds, scores, data, folder)
    save_facts(
        folder,
        {
            "kind": ENSEMBLE,
            "name": folder.name.removesuffix(".partial"),
            "ensemble": learned,
            "decisions": decided,
            "base": base,
            "task": task_facts(data.task),
            "folds": {"count": count, "rows": [len(fold) for fold in folds]},
            "rows": {
                "train": len(data.train),
                "train_unlabelled": data.unlabelled,
                "valid": len(data.valid),
                "labels": data.counts,
            },
            "training": _training_facts(members),
            "prompts": data.hashes,
            "data": prompts_place(data.folder, folder),
            "scored_with": scored_with(folder, None, None),
            "seed": settings.train.seed,
            "versions": package_versions(),
            "commit": commit(),
            "hardware": members[0].facts["hardware"],
            "peak_memory": _highest([run.facts["peak_memory"] for run in members]),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 2),
        },
    )


def _training_facts(members: Sequence[Run]) -> dict[str, float]:
    each = [run.facts["training"] for run in members]
    seconds = sum(one["seconds"] for one in each)
    rows = sum(one["seconds"] * one["rows_per_second"] for one in each)
    return {"seconds": round(seconds, 2), "rows_per_second": round(rows / max(seconds, 1e-9), 2)}


def _highest(peaks: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: max(peak[name] for peak in peaks) for name in peaks[0]}


def fold_folders(folder: Path) -> list[Path]:
    """Return the folders of the folds that an unfinished run has."""
    return sorted((folder / FOLDS).glob("*"))


def _claim(folder: Path, count: int, settings: Settings, data: TrainingData, *, resume: bool) -> dict[str, Any]:
    """Make the unfinished run folder, or check that the one there belongs to the same folds; return the base."""
    from llm_clf.models.bases import base_identity, prepare_libraries

    prepare_libraries()
    base = base_identity(settings.model.name)
    asked = {**settings_to_dict(settings), "cross-validation": {"folds": count}}
    claim(folder, {"settings": asked, "prompts": data.hashes, "base": base}, resume=resume)
    (folder / FOLDS).mkdir(exist_ok=True)
    return base


def _without(data: TrainingData, held_out: Sequence[int]) -> TrainingData:
    left_out = set(held_out)
    return replace(data, train=[prompt for row, prompt in enumerate(data.train) if row not in left_out])


def _free_memory() -> None:
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


def _clear(fold: Path) -> None:
    """Remove what was of use only while a fold was trained."""
    shutil.rmtree(fold / CHECKPOINTS, ignore_errors=True)
    (fold / INPUTS).unlink(missing_ok=True)


def _score_held_out(run: Run, data: TrainingData, held_out: Sequence[int], journal: Path) -> AllScored:
    """Return the scores of the rows of a fold; they stay in the journal until the whole run is finished."""
    journal.parent.mkdir(exist_ok=True)
    rows = [data.train[row] for row in held_out]
    return score_rows(member_source(run), rows, survey_rows(rows), journal=journal, resume=True).scored


def _write_ensemble(
    members: Sequence[Run], settings: Settings, data: TrainingData, folder: Path
) -> tuple[dict[str, Any], AllScored | None]:
    """Write what predict averages; return what run.json says of it, and the validation rows as it scores them.

    All members weigh the same: nothing is chosen, so no row is used up by it.
    """
    combination = equal_weights("log-odds", len(members))
    stored, learned = ensemble_members(folder, members), folder / KINDS[ENSEMBLE].learned
    save_inputs(folder, data.task, settings_to_dict(settings))
    write_json(learned, {"members": stored, **combination.facts()})
    save_trained_rows(folder, data.train)
    scored = None
    if data.valid:
        say("\nThe mean of all folds, on the validation rows:")
        named = [(run.folder, member_source(run)) for run in members]
        journal = folder / CHECKPOINTS / "valid"
        parts = score_members(named, data.valid, survey_rows(data.valid), journal=journal, resume=True)
        scores = combination.combine(np.stack([part.scored.scores for part in parts]))
        cut = np.any([part.scored.cut for part in parts], axis=0)
        scored = AllScored(scores.astype(np.float32), cut, {})
    return {"method": combination.method, "members": stored, "hash": file_hash(learned)}, scored


def _measure(folds: Sequence[Sequence[int]], scores: np.ndarray, data: TrainingData, folder: Path) -> None:
    """Add to metrics.json, under `folds`, what was measured on rows that a model did not see, and show it."""
    gold = [prompt.label or "" for prompt in data.train]
    each = []
    for fold in folds:
        probs = probabilities(scores[fold])
        predicted = [data.task.names[choice] for choice in decide(probs)]
        each.append(compute_metrics([gold[row] for row in fold], predicted, probs, data.task.names))
    spread = {name: _spread([found[name] for found in each]) for name in HEADLINES}
    pooled = measure(read_predictions(folder / FOLD_PREDICTIONS))
    write_json(folder / METRICS, run_metrics(folder) | {"folds": {"spread": spread, "pooled": pooled, "each": each}})
    say(
        f"\nTraining rows, each by the model of the {len(folds)} that did not see it, as scored, without decisions:\n"
        + _text(spread, pooled)
    )


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return mean and standard deviation over the folds in which a metric has a value."""
    known = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(known)) if known else None,
        "deviation": float(np.std(known, ddof=1)) if len(known) > 1 else None,
    }


def _text(spread: dict[str, dict[str, float | None]], pooled: dict[str, Any]) -> str:
    level = pooled["intervals"]["level"]
    rows = [
        [
            name,
            *map(_number, found.values()),
            _number(pooled[name]),
            interval_text(pooled["intervals"]["metrics"][name]),
        ]
        for name, found in spread.items()
    ]
    return table(["metric", "mean of folds", "deviation", "all rows", f"{level:.0%} interval"], rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
