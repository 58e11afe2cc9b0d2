"""A base with its adapter, ready to score prompts: the one path of validation, prediction and the rest."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llm_clf.config import Settings
from llm_clf.engine.scoring import LabelScorer
from llm_clf.engine.tokens import PromptTokenizer
from llm_clf.errors import ArtifactError
from llm_clf.models.adapters import attach_adapter
from llm_clf.models.bases import base_identity, context_length, load_model, load_tokenizer
from llm_clf.models.devices import choose_device, choose_dtype
from llm_clf.prompting.prompts import Prompt
from llm_clf.prompting.tasks import Task
from llm_clf.runs import Run

# Rows that are sorted by length together. Part of the plan of batches: another number, other rounding.
WINDOW = 16_384

Done = Callable[[Sequence[int], np.ndarray, Sequence[bool]], None]


class Classifier:
    """Scores prompts of one task.

    Args:
        model: The base with its adapter.
        tokens: Turns prompts into tokens.
        batch_tokens: Most padded tokens in one forward.
    """

    def __init__(self, model: Any, tokens: PromptTokenizer, *, batch_tokens: int) -> None:
        self.tokens = tokens
        self._scorer = LabelScorer(model, tokens.answers, pad_id=tokens.pad_id)
        self._batch_tokens = batch_tokens

    @classmethod
    def from_run(cls, run: Run) -> "Classifier":
        """Load the classifier of a finished run.

        Raises:
            ArtifactError: The base is missing, or is not the one that the run was trained on.
        """
        trained_on = run.facts.get("base", {})
        if base_identity(run.settings.model.name)["hash"] != trained_on.get("hash"):
            raise ArtifactError(
                f"{run.folder}: the base {run.settings.model.name} is not the one that the run was trained on "
                "(its config, tokenizer or weights changed). Put the former files back, or train again."
            )
        return cls.from_adapter(run.adapter, run.task, run.settings)

    @classmethod
    def from_adapter(cls, folder: Path, task: Task, settings: Settings) -> "Classifier":
        """Load an adapter folder onto the base that the settings name."""
        device = choose_device()
        dtype = choose_dtype(settings.model.dtype, device)
        tokenizer = load_tokenizer(settings.model.name)
        base = load_model(settings.model.name, dtype=dtype, device=device)
        tokens = prompt_tokenizer(tokenizer, base, task, settings)
        model = attach_adapter(base, folder, merge=settings.predict.merge)
        return cls(model, tokens, batch_tokens=settings.predict.batch_tokens)

    def score(self, prompts: Iterable[Prompt], done: Done, finished: Collection[int] = ()) -> None:
        """Score prompts window by window, reading them as it goes.

        The plan of batches depends on the prompts and the settings alone; batches that are finished are left out.

        Args:
            prompts: Rows in input order.
            done: Takes each batch as row numbers, scores of shape `(rows, labels)`, and which rows were cut.
            finished: Numbers of rows that need no scores; whole batches, as `done` got them.
        """
        first = 0
        for window in windows(prompts):
            if not all(number in finished for number in range(first, first + len(window))):
                self._score_window(window, first, done, finished)
            first += len(window)

    def _score_window(self, window: Sequence[Prompt], first: int, done: Done, finished: Collection[int]) -> None:
        examples = self.tokens.encode(window)
        for batch in self._scorer.plan([len(example.ids) for example in examples], self._batch_tokens):
            numbers = [first + index for index in batch]
            if not all(number in finished for number in numbers):
                scores = self._scorer.score([examples[index].ids for index in batch])
                done(numbers, scores.numpy(), [examples[index].cut for index in batch])

    def score_all(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return the scores of prompts in their order, fp32, shape `(prompts, labels)`."""
        scores = np.empty((len(prompts), len(self.tokens.answers)), dtype=np.float32)

        def keep(rows: Sequence[int], found: np.ndarray, _: Sequence[bool]) -> None:
            scores[list(rows)] = found

        self.score(prompts, keep)
        return scores


def prompt_tokenizer(tokenizer: Any, base: Any, task: Task, settings: Settings) -> PromptTokenizer:
    """Return what tokenises prompts for a base: the settings' length, or the base's own where that is less."""
    limit = context_length(base.config)
    max_length = min(settings.data.max_length, limit) if limit else settings.data.max_length
    return PromptTokenizer(tokenizer, task, max_length=max_length, cut=settings.data.cut)


def windows(prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
    """Yield lists of WINDOW prompts; the last one may be shorter."""
    source = iter(prompts)
    while window := list(islice(source, WINDOW)):
        yield window
