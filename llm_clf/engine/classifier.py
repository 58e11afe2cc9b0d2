"""A base with its adapter, ready to score prompts: the one path of validation, prediction and the rest."""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_clf.config import Settings, SpeedSettings
from llm_clf.console import say
from llm_clf.engine.fitting import TokenBudget, Work, memory_explained
from llm_clf.engine.generation import TextGenerator
from llm_clf.engine.heads import Head, make_head
from llm_clf.engine.scores import Scored, windows
from llm_clf.engine.scoring import LabelScorer
from llm_clf.engine.speed import speed_up
from llm_clf.engine.token_cache import TokenCache
from llm_clf.engine.tokens import PromptTokenizer
from llm_clf.errors import ArtifactError
from llm_clf.models.adapters import attach_adapter, merge_adapter, require_mergeable
from llm_clf.models.bases import base_identity, context_length, load_model, load_tokenizer
from llm_clf.models.devices import choose_device, choose_dtype
from llm_clf.prompting.prompts import Prompt
from llm_clf.prompting.tasks import Task
from llm_clf.runs import Run

# Rows that are sorted by length together. Part of the plan of batches: another number, other rounding.
WINDOW = 16_384


class Classifier:
    """Scores prompts of one task.

    Args:
        model: The base with its adapter.
        tokens: Turns prompts into tokens.
        head: Reads labels from the model.
        batch_tokens: Most tokens in one forward, padding included; less where memory runs out.
        speed: Which work is spared.
        generator: Writes answers beside the scores; None: no answers.
    """

    def __init__(
        self,
        model: Any,
        tokens: PromptTokenizer,
        head: Head,
        *,
        batch_tokens: int,
        speed: SpeedSettings,
        generator: TextGenerator | None = None,
    ) -> None:
        self._model, self._tokens, self._head, self._speed = model, tokens, head, speed
        packed = speed_up(model, speed, every_state=head.reads_every_state)
        if speed.packing and not packed:
            kind = model.config.get_text_config().model_type
            say(f"Rows are padded, which is slower: packing is not known for {kind}.")
        shared = tokens.shared() if speed.shared_prefix else ()
        self._scorer = LabelScorer(model, head, pad_id=tokens.pad_id, packed=packed, shared=shared)
        self._device = model.device
        self._generator = generator
        self.batch_tokens = batch_tokens
        """Most tokens of a batch; `score_all` lowers it where memory runs out."""

    @classmethod
    def from_adapter(
        cls, folder: Path | None, task: Task, settings: Settings, *, generate: bool = False
    ) -> "Classifier":
        """Load an adapter folder onto the base that the settings name; without one the base alone answers.

        Raises:
            ArtifactError: Base or adapter cannot be loaded, or do not fit each other.
            ConfigError: The adapter is to be merged into a quantised base.
        """
        merge = settings.predict.merge is True and folder is not None
        if merge:
            require_mergeable(settings.model)
        device = choose_device()
        dtype = choose_dtype(settings.model.dtype, device)
        tokenizer = load_tokenizer(settings.model)
        complete = folder is None
        base = load_model(settings.model, dtype=dtype, device=device, labels=task.names, complete=complete)
        tokens = prompt_tokenizer(tokenizer, base, task, settings)
        model = base
        if folder is not None:
            model = attach_adapter(base, folder, merge=merge, tokenizer=tokenizer)
        limit = settings.predict.max_new_tokens
        generator = TextGenerator(model, tokenizer, pad_id=tokens.pad_id, max_new_tokens=limit) if generate else None
        return cls(
            model,
            tokens,
            make_head(settings.model, tokens),
            batch_tokens=settings.predict.batch_tokens,
            speed=settings.speed,
            generator=generator,
        )

    def merged(self) -> "Classifier":
        """Return what scores with the adapter added into the base's weights, in place: this one is used up.

        Raises:
            ArtifactError: A merged weight is no finite number in the base's type.
        """
        model = merge_adapter(self._model).eval()
        return Classifier(model, self._tokens, self._head, batch_tokens=self.batch_tokens, speed=self._speed)

    @memory_explained()
    def score(
        self,
        prompts: Iterable[Prompt],
        done: Callable[[Scored], None],
        finished: Collection[int] = (),
        *,
        fits: int | None = None,
        found: Callable[[int], None] = lambda tokens: None,
    ) -> int:
        """Score prompts window by window, as `Scorer` says.

        Where memory runs out, this batch and all that follow are scored in parts of fewer tokens.

        Raises:
            ConfigError: Memory runs out on a single row.
        """
        budget = TokenBudget(fits or self.batch_tokens, self._device, found)
        first = 0
        self._scorer.start()
        for window in windows(prompts, WINDOW):
            if not all(number in finished for number in range(first, first + len(window))):
                self._score_window(window, first, done, finished, budget)
            first += len(window)
        return budget.tokens

    def score_all(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return the scores of prompts in their order, fp32, shape `(prompts, labels)`.

        Where memory runs out, all are scored anew in batches that fit: the scores are those that such batches would
        have given from the beginning.
        """
        scores = np.empty((len(prompts), len(self._tokens.task.names)), dtype=np.float32)

        def keep(batch: Scored) -> None:
            scores[batch.rows] = batch.scores

        while (fits := self.score(prompts, keep)) != self.batch_tokens:
            self.batch_tokens = fits
        return scores

    def _score_window(
        self,
        window: Sequence[Prompt],
        first: int,
        done: Callable[[Scored], None],
        finished: Collection[int],
        budget: TokenBudget,
    ) -> None:
        examples = self._tokens.encode(window)
        work = Work(self._plan, self._size, self._score_parts, lambda: None)
        for batch in self._plan([example.ids for example in examples], self.batch_tokens):
            numbers = [first + index for index in batch]
            if all(number in finished for number in numbers):
                continue
            scores, texts = budget.fit(work, [examples[index].ids for index in batch])
            done(Scored(numbers, scores, [examples[index].cut for index in batch], texts))

    def _plan(self, ids: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
        return self._scorer.plan([len(row) for row in ids], budget)

    def _size(self, ids: Sequence[Sequence[int]]) -> int:
        return self._scorer.tokens([len(row) for row in ids])

    def _score_parts(self, ids: Sequence[Sequence[int]], budget: int) -> tuple[np.ndarray, list[str] | None]:
        """Return scores and generated answers of a batch's rows, in parts where the budget is less than theirs."""
        scores = np.empty((len(ids), len(self._tokens.task.names)), dtype=np.float32)
        texts = [""] * len(ids)
        for part in self._plan(ids, budget):
            rows = [ids[number] for number in part]
            scores[part] = self._scorer.score(rows).numpy()
            if self._generator is not None:
                for number, text in zip(part, self._generator.complete(rows), strict=True):
                    texts[number] = text
        return scores, texts if self._generator is not None else None


def require_same_base(run: Run) -> None:
    """Refuse to go on with a base that is not the one that the run was trained on.

    Raises:
        ArtifactError: The base is missing, or its config, tokenizer or weights changed.
    """
    name = run.settings.model.name
    if base_identity(name)["hash"] != run.facts.get("base", {}).get("hash"):
        raise ArtifactError(
            f"{run.folder}: the base {name} is not the one that the run was trained on (its config, tokenizer or "
            "weights differ). Put the former files back, tell where they are with --model, or train again."
        )


def prompt_tokenizer(
    tokenizer: Any, base: Any, task: Task, settings: Settings, cache: TokenCache | None = None
) -> PromptTokenizer:
    """Return what tokenises prompts for a base: the settings' length, or the base's own where that is less."""
    limit = context_length(base.config)
    max_length = min(settings.data.max_length, limit) if limit else settings.data.max_length
    words = settings.model.head == "label-words"
    return PromptTokenizer(tokenizer, task, max_length=max_length, cut=settings.data.cut, words=words, cache=cache)
