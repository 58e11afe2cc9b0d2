"""What a training leaves so that its validation can be repeated, and whether the saved model repeats it at once."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llm_clf.commands.validation import TOLERANCE
from llm_clf.config import Tree, settings_to_dict
from llm_clf.console import say
from llm_clf.decisions.decide import probabilities
from llm_clf.evaluation.parity import compare_probabilities
from llm_clf.files import file_hash, replacing
from llm_clf.prompting.prompts import Prompt
from llm_clf.runs import VALID_PREDICTIONS, VALID_SCORES

if TYPE_CHECKING:
    from llm_clf.baselines.encoder_tokens import RowTokenizer
    from llm_clf.engine.tokens import PromptTokenizer

# Validation rows whose tokens are hashed: enough to tell one tokenizer from another.
SAMPLE = 32
# Sections that scores depend on, and keys in them that change no score or are told by a hash.
SECTIONS = ("model", "data", "head", "predict", "speed")
LEFT_OUT = ("model.name", "data.token_cache", "predict.max_new_tokens")


def scored_with(folder: Path, settings: Tree | None, tokens: str | None) -> dict[str, Any]:
    """Return what run.json tells of how the validation rows were scored, so that a difference has a name later.

    Args:
        folder: The unfinished run, with its validation predictions where it has any.
        settings: Those of the run, None where scores depend on none.
        tokens: Hash of the tokens of the first validation rows, None where the model has no tokenizer.
    """
    predictions = folder / VALID_PREDICTIONS
    return {
        "settings": scoring_settings(settings) if settings is not None else {},
        "tokens": tokens,
        "predictions": file_hash(predictions) if predictions.is_file() else None,
    }


def scoring_settings(settings: Tree) -> dict[str, Any]:
    """Return the settings that scores depend on, by `section.key`."""
    sections = settings_to_dict(settings)
    values = {f"{name}.{key}": value for name in SECTIONS for key, value in sections.get(name, {}).items()}
    return {key: value for key, value in values.items() if key not in LEFT_OUT}


def prompt_digest(tokens: "PromptTokenizer", prompts: Sequence[Prompt]) -> str | None:
    """Return a hash of the tokens of the first rows and of the labels' words; None where there are no rows."""
    return _digest([example.ids for example in tokens.encode(prompts[:SAMPLE])], tokens.answers)


def text_digest(tokens: "RowTokenizer", prompts: Sequence[Prompt]) -> str | None:
    """Return a hash of an encoder's tokens of the first rows; None where there are no rows."""
    return _digest([example.ids for example in tokens.encode([prompt.input for prompt in prompts[:SAMPLE]])], [])


def _digest(rows: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]) -> str | None:
    if not rows:
        return None
    return hashlib.sha256(json.dumps([[list(row) for row in rows], answers]).encode()).hexdigest()


class MeasuredRows:
    """The probabilities that each evaluation of a training gave the validation rows.

    They stand among the checkpoints, so that a training that was killed and goes on still has them.

    Args:
        folder: Of the checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, metrics: dict[str, float], probs: NDArray[np.float32]) -> None:
        """Keep those of an evaluation, which its metrics name."""
        with replacing(self._file(metrics)) as temporary, open(temporary, "wb") as opened:
            np.save(opened, probs, allow_pickle=False)

    def of(self, step: int | None, evaluations: Sequence[dict[str, Any]]) -> NDArray[np.float32] | None:
        """Return those of the evaluation after a step; None where there was none.

        Args:
            step: Of the checkpoint that was kept.
            evaluations: Metrics with `step` and `epoch`.
        """
        for found in evaluations:
            file = self._file({name: value for name, value in found.items() if name not in ("step", "epoch")})
            if found["step"] == step and file.is_file():
                probs: NDArray[np.float32] = np.load(file, allow_pickle=False)
                return probs
        return None

    def _file(self, metrics: dict[str, float]) -> Path:
        name = hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest()[:16]
        return self._folder / f"measured-{name}.npy"


def check_against_training(
    folder: Path, measured: NDArray[np.float32] | None, *, rounding: str | None = None
) -> dict[str, Any] | None:
    """Say whether the stored bare scores are what training measured, and return what run.json tells of it.

    Args:
        folder: The unfinished run.
        measured: Probabilities of the validation rows, or of the first of them, by the model in memory; None where
            training measured nothing.
        rounding: Why the saved model may round otherwise, if it may.
    """
    if measured is None:
        return None
    stored = probabilities(np.load(folder / VALID_SCORES, allow_pickle=False))
    found = compare_probabilities(measured, stored[: len(measured)])
    outcome = "equal" if found.equal else "rounding" if found.within(TOLERANCE) else "differs"
    rows, why = f"{found.rows:,} validation rows", f" ({rounding})" if rounding else ""
    say(
        {
            "equal": f"Verified: the saved model gives {rows} the probabilities that training measured, bit for bit.",
            "rounding": f"Verified but for rounding{why}: {found.text()}.",
            "differs": f"Warning: the saved model does not predict what training measured{why}: {found.text()}.",
        }[outcome]
    )
    return {"outcome": outcome, **found.facts()}
