"""An encoder's training on disk: all that it needs to go on after a kill, and the weights of its best evaluation."""

import shutil
import time
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from torch import nn

from llm_clf.console import say
from llm_clf.engine.course import (
    CHECKPOINT_SECONDS,
    PROGRESS,
    Progress,
    checkpoints_in,
    reading_checkpoint,
    writing_checkpoint,
)
from llm_clf.files import read_json, replace_folder, write_json

WEIGHTS = "weights.safetensors"
# A large encoder's checkpoint is gigabytes with the optimiser's state: writing takes no more than this share of time.
SHARE = 0.05


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: Where they stand.
        model: Its weights are written, and put back.
        accelerator: Saves and loads the state of optimiser, schedule and random draws.
    """

    def __init__(self, folder: Path, model: nn.Module, accelerator: Accelerator) -> None:
        self._folder, self._model, self._accelerator = folder, model, accelerator
        self._due = time.monotonic() + CHECKPOINT_SECONDS

    def restore(self) -> Progress:
        """Return where training stood at the last checkpoint, and put all back as it was then.

        Raises:
            ArtifactError: It is damaged.
        """
        places = checkpoints_in(self._folder)
        if not places:
            return Progress()
        place = places[0]
        with reading_checkpoint(self._folder):
            state = Progress(**read_json(place / PROGRESS))
            load_model(self._model, place / WEIGHTS)
            self._accelerator.load_state(str(place))
        say(f"Going on from step {state.step}.")
        return state

    @property
    def due(self) -> bool:
        """Whether so much was done since the last checkpoint that it is time for another."""
        return time.monotonic() >= self._due

    def write(self, state: Progress) -> None:
        """Write all that training needs to go on; the former checkpoint stays until the new one is whole.

        Raises:
            DataError: The folder cannot be written, or the disk is full.
        """
        started = time.monotonic()
        unfinished = self._folder / "last.writing"
        shutil.rmtree(unfinished, ignore_errors=True)
        with writing_checkpoint(self._folder):
            self._accelerator.save_state(str(unfinished))
            save_model(self._model, str(unfinished / WEIGHTS))
        write_json(unfinished / PROGRESS, asdict(state))
        replace_folder(unfinished, self._folder / "last")
        for stale in self._folder.glob("best-*.safetensors"):
            if stale != self._best(state):
                stale.unlink()
        ended = time.monotonic()
        self._due = ended + max(CHECKPOINT_SECONDS, (ended - started) / SHARE)

    def keep_best(self, state: Progress) -> None:
        """Write the weights as those of the best evaluation.

        Raises:
            DataError: The folder cannot be written, or the disk is full.
        """
        with writing_checkpoint(self._folder):
            save_model(self._model, str(self._best(state)))

    def load_best(self, state: Progress) -> None:
        """Put the weights of the best evaluation into the model, where there was any evaluation.

        Raises:
            ArtifactError: They are damaged.
        """
        if state.best_step is not None:
            with reading_checkpoint(self._folder):
                load_model(self._model, self._best(state))

    def _best(self, state: Progress) -> Path:
        return self._folder / f"best-{state.best_step}.safetensors"
