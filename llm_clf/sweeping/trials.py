"""The trials of a sweep: Optuna draws their settings, keeps them in its SQLite file, and says which to break off."""

import itertools
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from llm_clf.files import cannot_write
from llm_clf.sweeping.space import Range, Sweep, is_whole

NAME = "sweep"
# After so many draws that were tried before, blind ones find what is left.
GUIDED_DRAWS = 20
LOG_LOSS, SECONDS, ERROR = "log_loss", "seconds", "error"

State = Literal["running", "complete", "pruned", "failed"]
STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One training of a sweep."""

    number: int
    settings: dict[str, Any]
    """What was drawn, by `section.key`."""
    state: State
    value: float | None
    """The metric: of a complete trial that of its run, of a pruned one the last that was measured."""
    log_loss: float | None
    """Of a complete trial, to settle ties."""
    evaluations: int
    seconds: float | None
    """From its start, or from where it was gone on with, to its end."""
    error: str | None
    """Why it failed."""


@contextmanager
def open_trials(file: Path, sweep: Sweep, *, maximize: bool) -> Iterator["Trials"]:
    """Yield the trials in an SQLite file, which is made where there is none.

    Raises:
        DataError: The file cannot be read or written.
    """
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = None
    try:
        # Opened by its path: in a URL some names of folders would mean something else.
        storage = optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": lambda: sqlite3.connect(file)})
        yield Trials(storage, sweep, maximize=maximize)
    except (StorageInternalError, SQLAlchemyError) as error:
        raise cannot_write(file, error, "Then --resume goes on, or --overwrite starts anew.") from error
    finally:
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()
        optuna.logging.set_verbosity(verbosity)


class Trials:
    """The trials of one sweep, drawn one after another.

    Which settings a trial gets depends on the seed, its number and how the former ones ended, and on nothing that a
    kill could lose.

    Args:
        storage: Where they are kept.
        sweep: What is tried.
        maximize: Whether a higher metric is better.
    """

    def __init__(self, storage: Any, sweep: Sweep, *, maximize: bool) -> None:
        self._sweep = sweep
        self._direction: Literal["maximize", "minimize"] = "maximize" if maximize else "minimize"
        self._distributions = {key: _distribution(key, space) for key, space in sweep.settings.items()}
        self._study = optuna.create_study(
            study_name=NAME,
            storage=storage,
            direction=self._direction,
            # Evaluations count from 1.
            pruner=optuna.pruners.MedianPruner(sweep.startup_trials, n_warmup_steps=sweep.warmup_evaluations + 1),
            load_if_exists=True,
        )

    def all(self) -> list[Trial]:
        """Return the trials by their numbers."""
        return [self._trial(frozen) for frozen in self._frozen()]

    def best(self) -> Trial | None:
        """Return the best complete trial: by the metric, then by log-loss, then the earlier one."""
        sign = -1.0 if self._direction == "maximize" else 1.0

        def rank(trial: Trial) -> tuple[float, float]:
            assert trial.value is not None and trial.log_loss is not None
            return sign * trial.value, trial.log_loss

        return min((trial for trial in self.all() if trial.state == "complete"), key=rank, default=None)

    def next(self) -> Trial | None:
        """Return the trial that was interrupted, or else a new one; None where all are done."""
        made = self._frozen()
        interrupted = [frozen for frozen in made if frozen.state == TrialState.RUNNING]
        if not interrupted:
            if len(made) >= self._sweep.trials:
                return None
            params = self._draw(made)
            # With its settings in one transaction: a kill leaves the whole trial or none.
            self._study.add_trial(
                create_trial(state=TrialState.RUNNING, params=params, distributions=self._distributions)
            )
            interrupted = [self._frozen()[-1]]
        return self._trial(interrupted[0])

    def report(self, trial: Trial, evaluation: int, value: float) -> bool:
        """Note what an evaluation measured; return whether the trial is to be broken off.

        It is where its best so far is worse than the median of the complete trials at the same evaluation.
        """
        running = self._running(trial)
        # One that goes on from a checkpoint makes an evaluation again.
        if evaluation not in self._frozen()[trial.number].intermediate_values:
            running.report(value, evaluation)
        return running.should_prune()

    def complete(self, trial: Trial, value: float, log_loss: float, seconds: float) -> None:
        """End a trial with the metric of its run."""
        self._note(trial, {SECONDS: seconds, LOG_LOSS: log_loss})
        self._study.tell(trial.number, value)

    def prune(self, trial: Trial, seconds: float) -> None:
        """End a trial that was broken off."""
        self._note(trial, {SECONDS: seconds})
        self._study.tell(trial.number, state=TrialState.PRUNED)

    def fail(self, trial: Trial, error: str, seconds: float) -> None:
        """End a trial that could not be trained."""
        self._note(trial, {SECONDS: seconds, ERROR: error})
        self._study.tell(trial.number, state=TrialState.FAIL)

    def _note(self, trial: Trial, facts: dict[str, Any]) -> None:
        running = self._running(trial)
        for name, value in facts.items():
            running.set_user_attr(name, value)

    def _running(self, trial: Trial) -> optuna.Trial:
        return optuna.Trial(self._study, self._frozen()[trial.number]._trial_id)

    def _frozen(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _trial(self, frozen: FrozenTrial) -> Trial:
        return Trial(
            frozen.number,
            {key: _value(self._sweep, key, frozen.params[key]) for key in self._sweep.settings},
            STATES[frozen.state],
            frozen.value,
            frozen.user_attrs.get(LOG_LOSS),
            len(frozen.intermediate_values),
            frozen.user_attrs.get(SECONDS),
            frozen.user_attrs.get(ERROR),
        )

    def _draw(self, made: list[FrozenTrial]) -> dict[str, Any]:
        """Return settings that no trial had: guided by the former trials where there are enough of them."""
        tried = [frozen.params for frozen in made]
        for attempt in itertools.count():
            seed = int(np.random.SeedSequence(self._sweep.seed, spawn_key=(len(made), attempt)).generate_state(1)[0])
            blind = self._sweep.trials if attempt >= GUIDED_DRAWS else self._sweep.startup_trials
            # A sampler of its own for each draw, on a copy of the history: its state is never needed again.
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=blind)
            copy = optuna.create_study(direction=self._direction, sampler=sampler)
            copy.add_trials(made)
            params = copy.ask(self._distributions).params
            if params not in tried:
                return params
        raise AssertionError


def _distribution(key: str, space: Any) -> BaseDistribution:
    if not isinstance(space, Range):
        return CategoricalDistribution([_name(choice) for choice in space])
    if is_whole(key):
        return IntDistribution(int(space.low), int(space.top()), log=space.log, step=int(space.step or 1))
    return FloatDistribution(space.low, space.top(), log=space.log, step=space.step)


def _name(choice: Any) -> str:
    """Return a choice as text: Optuna knows none that are lists or mappings."""
    return json.dumps(choice, ensure_ascii=False)


def _value(sweep: Sweep, key: str, drawn: Any) -> Any:
    """Return a setting as it was drawn: a number, or the choice of that name."""
    return drawn if isinstance(sweep.settings[key], Range) else json.loads(drawn)
