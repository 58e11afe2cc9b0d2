"""An encoder's training on disk: all that it needs to go on after a kill, and the weights of its best evaluation."""

import pickle
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from llm_clf.console import say
from llm_clf.engine.training import CHECKPOINT_SECONDS, Progress
from llm_clf.errors import ArtifactError
from llm_clf.files import cannot_write, read_json, replace_folder, write_json

WEIGHTS, PROGRESS = "weights.safetensors", "progress.json"
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
        # A kill between the two renames of replace_folder leaves the former checkpoint under its other name.
        places = [self._folder / "last", self._folder / ".last.old"]
        place = next((place for place in places if (place / PROGRESS).is_file()), None)
        if place is None:
            return Progress()
        with self._reading():
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
        with self._writing():
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
        with self._writing():
            save_model(self._model, str(self._best(state)))

    def load_best(self, state: Progress) -> None:
        """Put the weights of the best evaluation into the model, where there was any evaluation.

        Raises:
            ArtifactError: They are damaged.
        """
        if state.best_step is not None:
            with self._reading():
                load_model(self._model, self._best(state))

    def _best(self, state: Progress) -> Path:
        return self._folder / f"best-{state.best_step}.safetensors"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what torch and safetensors raise where the disk is full into one error."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            raise cannot_write(self._folder, error, "Then --resume goes on from the last checkpoint.") from error

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what torch and safetensors raise over damaged files into one error."""
        try:
            yield
        except (
            OSError,
            RuntimeError,
            LookupError,
            TypeError,
            ValueError,
            SafetensorError,
            pickle.PickleError,
        ) as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(
                f"{self._folder}: the checkpoint is damaged: {reason}. Give --overwrite to start the training anew."
            ) from error
