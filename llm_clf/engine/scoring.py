"""Label scores of prompts, by the head that reads them.

Two ways lead to the same numbers. Packed, prompts stand one behind another, and what all begin with is read once for
all. The plain way pads; it serves bases whose attention cannot be steered, and it is what the packed one is tested
against.
"""

from collections.abc import Sequence
from typing import Any

import torch

from llm_clf.engine.batches import plan_batches, plan_packed
from llm_clf.engine.heads import Head
from llm_clf.engine.packing import NOTHING, Beginning
from llm_clf.errors import ArtifactError


class LabelScorer:
    """Scores labels with a model.

    Args:
        model: A model of transformers, with or without a PEFT adapter, that the head can read.
        head: How it is read.
        pad_id: Token on padded places; never seen by a real one.
        packed: Read packed rows; the model must have been told with `enable_packing`.
        shared: Tokens that prompts begin with, read once for all prompts that do.
    """

    def __init__(self, model: Any, head: Head, *, pad_id: int, packed: bool, shared: Sequence[int] = ()) -> None:
        self._model = model
        self._head = head
        self._pad_id = pad_id
        self._packed = packed
        self._shared = list(shared) if packed else []
        self._beginning: Beginning | None = None

    def start(self) -> None:
        """Forget what was read of the shared tokens: the model may have changed since."""
        self._beginning = None

    def plan(self, lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
        """Group prompts of the given lengths into batches of at most about `batch_tokens` tokens, padding included."""
        plan = plan_packed if self._packed else plan_batches
        return plan(self._sizes(lengths), batch_tokens, self._head.most_rows(self._model, packed=self._packed))

    def tokens(self, lengths: Sequence[int]) -> int:
        """Return the tokens of one batch of prompts of the given lengths, as `plan` counts them."""
        sizes = self._sizes(lengths)
        return sum(sizes) if self._packed else len(sizes) * max(sizes)

    def _sizes(self, lengths: Sequence[int]) -> list[int]:
        tail = self._head.tail(packed=self._packed)
        return [max(1, length - len(self._shared) + tail) for length in lengths]

    @torch.inference_mode()
    def score(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return log-probabilities in nats, fp32 on the CPU, shape `(prompts, labels)`.

        Raises:
            ArtifactError: A score is not a number.
        """
        if self._packed:
            scores = self._score_packed(prompts)
        else:
            scores = self._head.padded_scores(self._model, prompts, self._pad_id)
        scores = scores.float().cpu()
        if scores.isnan().any():
            raise ArtifactError(
                "The model's label scores are not numbers (NaN). In fp16 that is an overflow: "
                "use --set model.dtype=bf16 or fp32; otherwise the weights are damaged."
            )
        return scores

    def _score_packed(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return scores of prompts that begin with the shared tokens, and of those that do not."""
        size = len(self._shared)
        shares = [len(ids) > size and list(ids[:size]) == self._shared for ids in prompts]
        scores: dict[int, torch.Tensor] = {}
        for shared in (True, False):
            numbers = [number for number, shares_it in enumerate(shares) if shares_it == shared]
            if numbers:
                rows = [prompts[number][size if shared else 0 :] for number in numbers]
                found = self._head.packed_scores(self._model, rows, self._read_shared() if shared else NOTHING)
                scores |= dict(zip(numbers, found, strict=True))
        return torch.stack([scores[number] for number in range(len(prompts))])

    def _read_shared(self) -> Beginning:
        if self._beginning is None:
            self._beginning = self._head.read_beginning(self._model, self._shared)
        return self._beginning
