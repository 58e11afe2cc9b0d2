"""A sweep: one training after another with other settings, and the best of them as the run."""

import csv
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llm_clf.commands.training_run import claim
from llm_clf.config import Settings, settings_to_dict
from llm_clf.config_loading import with_changes
from llm_clf.console import say
from llm_clf.errors import MemoryLimitError, TrainingError
from llm_clf.files import read_json, replacing, write_yaml
from llm_clf.runs import (
    CHECKPOINTS,
    INPUTS,
    RUN,
    SWEEP,
    is_run,
    package_versions,
    prompts_place,
    run_metrics,
    save_facts,
)
from llm_clf.sweeping.space import Sweep

if TYPE_CHECKING:
    from llm_clf.engine.training import Watch
    from llm_clf.sweeping.trials import Trial, Trials

STUDY, TABLE, PLAN = "study.db", "trials.csv", "sweep.yaml"
TRIAL = "trial-"


class Train(Protocol):
    """Trains in a folder, going on with what is there, and leaves a whole run."""

    def __call__(self, settings: Settings, *, folder: Path, watch: "Watch") -> None:
        """Train; `watch` may break it off."""


class Pruned(Exception):
    """A trial is not worth to be trained to its end."""


def run_sweep(
    sweep: Sweep, settings: Settings, prompts: Mapping[str, str], folder: Path, train: Train, *, resume: bool
) -> None:
    """Try settings one after another in the unfinished run folder, and make the best trial the run.

    Args:
        sweep: What is tried.
        settings: All other settings, the same in all trials.
        prompts: Hashes of what is trained and validated on.
        folder: The unfinished run.
        train: Trains one trial.
        resume: Go on with the trials that are there.

    Raises:
        TrainingError: All trials failed.
        LlmClfError: Something is wrong that another trial would not mend.
    """
    from llm_clf.engine.course import LOWER_IS_BETTER
    from llm_clf.sweeping.trials import open_trials

    metric = settings.train.metric
    _claim(folder, sweep, settings, prompts, resume=resume)
    with open_trials(folder / SWEEP / STUDY, sweep, maximize=metric not in LOWER_IS_BETTER) as trials:
        while (trial := trials.next()) is not None:
            _clear(folder, trials.best(), trial)
            say(f"\nTrial {trial.number} ({trial.number + 1}/{sweep.trials}): {_words(trial.settings)}")
            _try(trial, trials, settings, folder, train)
            say(_outcome(trials, trial.number, metric))
            _write_table(folder / SWEEP / TABLE, trials.all(), metric)
        best, made = trials.best(), trials.all()
    if best is None:
        errors = "\n".join(f"  {error}" for error in dict.fromkeys(trial.error for trial in made))
        raise TrainingError(f"All {len(made)} trials of the sweep failed:\n{errors}\nChange what it tries.")
    write_yaml(folder / SWEEP / PLAN, sweep.model_dump(mode="json", exclude_none=True))
    _promote(_place(folder, best), folder, _facts(sweep, made, best, metric))
    say(f"\nTrial {best.number} becomes the run: {metric} {best.value:.4f} with {_words(best.settings)}.")


def trial_folders(folder: Path) -> Iterator[Path]:
    """Yield the folders of the trials that an unfinished run still has."""
    # Among the checkpoints: what is of use only while training goes on.
    yield from (folder / CHECKPOINTS).glob(f"{TRIAL}*")


def _place(folder: Path, trial: "Trial") -> Path:
    return folder / CHECKPOINTS / f"{TRIAL}{trial.number:04d}"


def _claim(folder: Path, sweep: Sweep, settings: Settings, prompts: Mapping[str, str], *, resume: bool) -> None:
    """Make the unfinished run folder, or check that the one there belongs to the same sweep.

    The number of trials may be another one: it changes nothing in those that are made.
    """
    from llm_clf.models.bases import base_identity, prepare_libraries

    prepare_libraries()
    plan = sweep.model_dump(mode="json", exclude={"trials", "settings"})
    spaces = sweep.model_dump(mode="json", exclude_none=True)["settings"]
    inputs = {
        "settings": {**settings_to_dict(settings), "sweep": plan, "sweep.settings": spaces},
        "prompts": dict(prompts),
        "base": base_identity(settings.model.name),
    }
    claim(folder, inputs, resume=resume)
    (folder / SWEEP).mkdir(exist_ok=True)


def _clear(folder: Path, *kept: "Trial | None") -> None:
    """Remove the folders of trials that are not needed any more, and what the last trial holds of memory."""
    from accelerate.utils.memory import clear_device_cache

    places = {_place(folder, trial) for trial in kept if trial is not None}
    for place in trial_folders(folder):
        if place not in places:
            shutil.rmtree(place)
        elif is_run(place):
            shutil.rmtree(place / CHECKPOINTS, ignore_errors=True)
    clear_device_cache(garbage_collection=True)


def _try(trial: "Trial", trials: "Trials", settings: Settings, folder: Path, train: Train) -> None:
    """Train one trial, or go on with it, and note how it ended."""
    place, metric, started = _place(folder, trial), settings.train.metric, time.monotonic()

    def watch(number: int, metrics: dict[str, float]) -> None:
        if trials.report(trial, number, metrics[metric]):
            raise Pruned

    def seconds() -> float:
        return round(time.monotonic() - started, 2)

    try:
        if not is_run(place):
            train(with_changes(settings, trial.settings), folder=place, watch=watch)
    except Pruned:
        trials.prune(trial, seconds())
    except (TrainingError, MemoryLimitError) as error:
        # Other settings may do better. What is wrong in all trials alike ends the sweep.
        trials.fail(trial, str(error), seconds())
    else:
        metrics = run_metrics(place)
        trials.complete(trial, metrics[metric], metrics["log_loss"], seconds())


def _promote(trial: Path, folder: Path, facts: dict[str, Any]) -> None:
    """Make the best trial the run; run.json comes last, and what a kill leaves is promoted again."""
    for entry in trial.iterdir():
        if entry.name not in (RUN, INPUTS, CHECKPOINTS):
            os.replace(entry, folder / entry.name)
    name, trained = folder.name.removesuffix(".partial"), read_json(trial / RUN)
    data = prompts_place(Path(trained["data"]["given"]), folder)
    save_facts(folder, {**trained, "name": name, "data": data, "sweep": facts})


def _facts(sweep: Sweep, made: Sequence["Trial"], best: "Trial", metric: str) -> dict[str, Any]:
    """Return what run.json says of the sweep."""
    states = Counter(trial.state for trial in made)
    return {
        "trials": len(made),
        **{state: states[state] for state in ("complete", "pruned", "failed")},
        "best": best.number,
        "metric": metric,
        "value": best.value,
        "settings": best.settings,
        "seed": sweep.seed,
        "seconds": round(sum(trial.seconds or 0.0 for trial in made), 2),
        "versions": package_versions(("optuna",)),
    }


def _outcome(trials: "Trials", number: int, metric: str) -> str:
    """Return the line that ends a trial."""
    trial, best = trials.all()[number], trials.best()
    ended = {
        "complete": f"{metric} {trial.value or 0.0:.4f}",
        "pruned": f"pruned at evaluation {trial.evaluations}, {metric} {trial.value or 0.0:.4f}",
        "failed": f"failed: {trial.error}",
    }[trial.state]
    so_far = f"trial {best.number} with {metric} {best.value:.4f}" if best is not None else "none"
    return f"Trial {number}: {ended}. Best so far: {so_far}."


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in settings.items())


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _write_table(file: Path, made: Sequence["Trial"], metric: str) -> None:
    """Write the trials as CSV, with every digit."""
    rows = [
        {
            "number": trial.number,
            "state": trial.state,
            # Where it is the metric, that stands here.
            "log_loss": trial.log_loss,
            metric: trial.value,
            "evaluations": trial.evaluations,
            "seconds": trial.seconds,
            **{key: value if isinstance(value, float) else _text(value) for key, value in trial.settings.items()},
            "error": trial.error,
        }
        for trial in made
    ]
    with replacing(file) as temporary, open(temporary, "w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
