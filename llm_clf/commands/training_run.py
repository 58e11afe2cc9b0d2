"""The run folder of a training until it has its name: claimed, measured, completed, or dropped with nothing learned."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llm_clf.commands.parity import MeasuredRows
from llm_clf.config import Tree, settings_to_dict
from llm_clf.config_loading import load_tree
from llm_clf.decisions.decide import decide, probabilities
from llm_clf.errors import ConfigError, LlmClfError
from llm_clf.evaluation.metrics import NO_LABEL, compute_metrics
from llm_clf.files import locked, partial_name, replace_folder, write_json, writing
from llm_clf.prompting.prompts import Prompt
from llm_clf.prompting.training_data import TrainingData
from llm_clf.runs import CHECKPOINTS, CONFIG, INPUTS, is_run, require_same_inputs, save_inputs

if TYPE_CHECKING:
    from llm_clf.engine.course import Progress


class Measured(Protocol):
    """A model in training that scores rows as predict will."""

    batch_tokens: int
    """Most tokens in one forward; less after memory ran out."""

    def score_all(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return the scores of prompts in their order, fp32, shape `(prompts, labels)`."""


@contextmanager
def unfinished_run(place: Path, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Keep the place of a run for this command alone; yield where the run stands until it is complete.

    Raises:
        ConfigError: An interrupted training stands there, and is neither to be gone on with nor replaced; or another
            command is at work.
        DataError: The folder cannot be written.
    """
    with locked(place):
        unfinished = partial_name(place)
        if unfinished.exists() and not (resume or overwrite):
            raise ConfigError(
                f"{unfinished}: an interrupted training left this. --resume goes on with it, --overwrite starts anew."
            )
        yield unfinished


@contextmanager
def completing(
    unfinished: Path, place: Path, parts: Callable[[Path], Iterable[Path]] = lambda unfinished: ()
) -> Iterator[None]:
    """Give the unfinished run its name at the end of the block; where that ends with an error, see what is of use.

    Args:
        unfinished: Is whole when the block ends.
        place: Of the finished run.
        parts: Finds the folders of other trainings in it.

    Raises:
        DataError: The folder cannot be written, or the disk is full.
    """
    try:
        with writing(unfinished, "Then --resume goes on from the last checkpoint."):
            yield
            shutil.rmtree(unfinished / CHECKPOINTS, ignore_errors=True)
            (unfinished / INPUTS).unlink(missing_ok=True)
            replace_folder(unfinished, place)
    except LlmClfError:
        _drop_fruitless(unfinished, parts)
        raise


def _drop_fruitless(unfinished: Path, parts: Callable[[Path], Iterable[Path]]) -> None:
    """Remove an unfinished run in which nothing was learned yet: there is nothing to go on with."""
    from llm_clf.engine.course import has_checkpoint

    places = [unfinished, *parts(unfinished)]
    if not any(is_run(place) or has_checkpoint(place / CHECKPOINTS) for place in places):
        shutil.rmtree(unfinished, ignore_errors=True)


def claim(folder: Path, inputs: dict[str, Any], *, resume: bool) -> bool:
    """Make the folder, or check that the one there belongs to the same training; return whether its settings are there.

    Args:
        folder: The unfinished run.
        inputs: What is trained with: `settings` by section, `prompts` and `base`.
        resume: Go on with what is there.

    Raises:
        ConfigError: These are not what the interrupted training had.
    """
    if resume and (folder / INPUTS).is_file():
        require_same_inputs(folder, inputs)
        return (folder / CONFIG).is_file()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / CHECKPOINTS).mkdir(parents=True)
    write_json(folder / INPUTS, inputs)
    return False


def record(folder: Path, data: TrainingData, kind: type[Tree], section: str, **found: int) -> None:
    """Put into the run's settings what was found while it runs: --resume goes on with it, and predict takes it."""
    settings = load_tree(kind, [folder / CONFIG]).having(section, **found)
    save_inputs(folder, data.task, settings_to_dict(settings))


def measure(model: Measured, data: TrainingData, folder: Path, kind: type[Tree]) -> dict[str, float]:
    """Return the validation metrics of the model as it is now, by the path that predict takes.

    Args:
        model: Where memory runs out, what fits is put into the run's settings.
        data: Has the validation rows.
        folder: The unfinished run; the probabilities are kept in it.
        kind: Of its settings.
    """
    before = model.batch_tokens
    probs = probabilities(model.score_all(data.valid))
    if model.batch_tokens != before:
        record(folder, data, kind, "predict", batch_tokens=model.batch_tokens)
    predicted = [data.task.names[choice] for choice in decide(probs)]
    gold = [prompt.label or NO_LABEL for prompt in data.valid]
    found = compute_metrics(gold, predicted, probs, data.task.names)
    metrics = {name: value for name, value in found.items() if isinstance(value, float)}
    MeasuredRows(folder / CHECKPOINTS).keep(metrics, probs)
    return metrics


def training_facts(data: TrainingData, state: "Progress", cut: int) -> dict[str, Any]:
    """Return what run.json says of a training.

    Args:
        data: What was trained and validated on.
        state: Where training ended.
        cut: Training rows that were cut to fit.
    """
    return {
        "rows": {
            "train": len(data.train),
            "train_cut": cut,
            "train_unlabelled": data.unlabelled,
            "valid": len(data.valid),
            "labels": data.counts,
        },
        "training": {
            "steps": state.step,
            "best_step": state.best_step,
            "stopped_early": state.stopped_early,
            "seconds": round(state.seconds, 2),
            "rows_per_second": round(state.rows / max(state.seconds, 1e-9), 2),
            "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1),
        },
        "evaluations": state.evaluations,
    }
