"""A prompts folder to a run: by a single training, the best one of a sweep, or one for each fold."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llm_clf.commands.folds import fold_folders, require_folds, run_folds
from llm_clf.commands.lora_training import train_run
from llm_clf.commands.sweep import run_sweep, trial_folders
from llm_clf.commands.training_run import completing, unfinished_run
from llm_clf.commands.training_settings import require_fitting, resolve_settings
from llm_clf.config import Settings
from llm_clf.console import say
from llm_clf.decisions.fitting import require_decidable
from llm_clf.errors import ConfigError
from llm_clf.files import path_of, require_apart
from llm_clf.prompting.training_data import TrainingData, read_training_data
from llm_clf.runs import (
    ENSEMBLE,
    FOLDS,
    INPUTS,
    LORA,
    SWEEP,
    is_finished,
    is_run,
    require_run_place,
    run_metrics,
)
from llm_clf.sweeping.space import Sweep, ends, load_sweep


def finetune(
    data: str | Path,
    *,
    out: str | Path,
    model: str | None = None,
    config: str | Path | None = None,
    set: Sequence[str] = (),
    sweep: str | Path | None = None,
    folds: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a LoRA adapter on a prompts folder and write the run folder `out`; return its metrics.

    Args:
        data: A folder that `build_prompts` made.
        out: The run folder; until it is complete it stands beside its place as `out.partial`.
        model: The base, in place of the setting `model.name`.
        config: A YAML file of settings.
        set: Settings as `section.key=value`, stronger than the file.
        sweep: A YAML file of settings to try; the best of these trainings becomes the run.
        folds: Cut the training rows into so many folds and train on the rest of each; the run is the mean of all.
        resume: Go on with what an interrupted training left.
        overwrite: Replace `out`.

    Raises:
        LlmClfError: Settings, prompts or base are wrong, or the loss is not a number.
    """
    if folds is not None and sweep is not None:
        raise ConfigError("--folds: a sweep compares its trials by the validation rows. Sweep first, then --folds.")
    place = path_of(out)
    if resume and is_finished(place, LORA if folds is None else ENSEMBLE):
        say(f"{place} is finished; nothing to do.")
        return run_metrics(place)
    require_run_place(place, overwrite=overwrite)
    settings = resolve_settings(Settings, model, config, set)
    base, folder = path_of(settings.model.name), path_of(data)
    require_apart(place, [folder, *([base] if base.is_dir() else [])])
    prompts = read_training_data(folder)
    _check_settings(settings, prompts)
    plan = _read_sweep(sweep, settings, prompts) if sweep is not None else None
    if folds is not None:
        require_folds(folds, settings, prompts)
    with unfinished_run(place, resume=resume, overwrite=overwrite) as unfinished:
        if not overwrite:
            _require_same_kind(unfinished, SWEEP if plan is not None else FOLDS if folds is not None else None)
        with completing(unfinished, place, _parts):
            if not (resume and is_run(unfinished)):
                if plan is not None:
                    train = partial(train_run, data=prompts, resume=True)
                    run_sweep(plan, settings, prompts.hashes, unfinished, train, resume=resume)
                elif folds is not None:
                    train_fold = partial(train_run, resume=True)
                    run_folds(folds, settings, prompts, unfinished, train_fold, resume=resume)
                else:
                    train_run(settings, prompts, unfinished, resume=resume)
    say(f"The run is in {place}.")
    return run_metrics(place)


def _parts(unfinished: Path) -> list[Path]:
    """Return the folders of the trials of a sweep, or of the folds, that an unfinished run has."""
    return [*trial_folders(unfinished), *fold_folders(unfinished)]


def _check_settings(settings: Settings, data: TrainingData) -> None:
    """Refuse settings that do not fit the task, before any model is loaded."""
    require_decidable(settings.decide, data.task.names, [prompt.label for prompt in data.valid])
    if settings.data.cut is not None and settings.data.cut not in data.task.columns:
        raise ConfigError(
            f"data.cut: {settings.data.cut!r} is no column of the task; these are {', '.join(data.task.columns)}."
        )
    require_fitting(settings.train, data)


def _read_sweep(file: str | Path, settings: Settings, data: TrainingData) -> Sweep:
    """Return what a sweep tries; each of it must fit the task, and there must be rows to compare trials by."""
    sweep = load_sweep(path_of(file), settings)
    if not data.validates:
        raise ConfigError(
            "A sweep compares its trials by the validation rows, and none of these has a label. Build the prompts with "
            "a larger share for validation."
        )
    for changed in ends(sweep, settings):
        _check_settings(changed, data)
    return sweep


def _require_same_kind(unfinished: Path, wanted: str | None) -> None:
    """Refuse to go on with a sweep, or with folds, as with another training.

    Args:
        unfinished: What was interrupted, if anything.
        wanted: The folder that a sweep or folds have in it, None for a single training.

    Raises:
        ConfigError: What was interrupted is another one.
    """
    found = next((name for name in (SWEEP, FOLDS) if (unfinished / name).is_dir()), None)
    if (unfinished / INPUTS).is_file() and found != wanted:
        words = {
            SWEEP: ("an interrupted sweep", "Give its --sweep"),
            FOLDS: ("an interrupted cross-validation", "Give its --folds"),
            None: ("an interrupted single training", f"Leave out --{wanted}"),
        }
        left, advice = words[found]
        raise ConfigError(f"{unfinished}: {left} left this. {advice}, or --overwrite to start anew.")
