"""A linear layer as a head: from the state of the prompt's last token, or the mean of all states, to a logit a label.

It is the head of transformers' sequence classification (`score`). Whatever the model computes in, head, logits and
loss are fp32.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch.nn.functional import cross_entropy

from llm_clf.engine.batches import Batch, pad_left
from llm_clf.engine.packing import Beginning, Row, every_state, packed_states, read_beginning
from llm_clf.engine.padded import padded_states
from llm_clf.engine.parts import unwrapped
from llm_clf.engine.tokens import TrainingExample
from llm_clf.engine.transfer import to_device


class Pooling(Protocol):
    """How the states of a row's tokens become one, fp32, shape `(rows, width)`."""

    reads_every_state: ClassVar[bool]
    """Whether it needs more than the last token's."""

    def packed(self, model: Any, rows: Sequence[Sequence[int]], beginning: Beginning) -> torch.Tensor:
        """Pool rows that stand one behind another, given behind the beginning."""

    def padded(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Pool the states of rows padded on the left, shape `(rows, tokens, width)`."""


class LastToken:
    """The last token's state, as transformers' sequence classification has it."""

    reads_every_state: ClassVar[bool] = False

    def packed(self, model: Any, rows: Sequence[Sequence[int]], beginning: Beginning) -> torch.Tensor:
        """Take the state at each row's end."""
        return packed_states(model, [Row(ids) for ids in rows], beginning, [[len(ids) - 1] for ids in rows]).float()

    def padded(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Take the state at each row's end."""
        return states[:, -1].float()


class MeanOfTokens:
    """The mean of the states of all tokens of the prompt; those of the shared beginning count in every row."""

    reads_every_state: ClassVar[bool] = True

    def packed(self, model: Any, rows: Sequence[Sequence[int]], beginning: Beginning) -> torch.Tensor:
        """Add the beginning's sum to the sum of each row."""
        states = every_state(model, [Row(ids) for ids in rows], beginning)
        sums = [part.sum(dim=0, dtype=torch.float32) for part in torch.split(states, [len(ids) for ids in rows])]
        tokens = to_device([beginning.tokens + len(ids) for ids in rows], states.device)
        whole = torch.stack(sums) if beginning.total is None else torch.stack(sums) + beginning.total
        return whole / tokens[:, None]

    def padded(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Leave out what is padded."""
        real = batch.attention_mask.bool()[..., None]
        return states.float().where(real, 0).sum(dim=1) / real.sum(dim=1)


POOLINGS: dict[str, Pooling] = {"last": LastToken(), "mean": MeanOfTokens()}


class LinearHead:
    """Scores labels by the log-softmax of the head's logits.

    Args:
        pooling: Of the states, a key of POOLINGS.
    """

    def __init__(self, pooling: str) -> None:
        self._pooling = POOLINGS[pooling]
        self.reads_every_state = self._pooling.reads_every_state

    def answer(self, label: int) -> list[int]:
        """Return the label's number: like the end of an answer it is predicted and never read."""
        return [label]

    def tail(self, *, packed: bool) -> int:
        """Return 0: nothing is read behind a prompt."""
        return 0

    def most_rows(self, model: Any, *, packed: bool) -> None:
        """Return None: a row's logits are few."""
        return

    def read_beginning(self, model: Any, ids: Sequence[int]) -> Beginning:
        """Read tokens that all rows begin with."""
        return read_beginning(model, ids, summed=self.reads_every_state)

    def packed_scores(self, model: Any, rows: Sequence[Sequence[int]], beginning: Beginning) -> torch.Tensor:
        """Return label scores from one forward over prompts."""
        return self._packed_logits(model, rows, beginning).log_softmax(dim=-1)

    def padded_scores(self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
        """Return the same from padded prompts."""
        return self._padded_logits(model, prompts, pad_id).log_softmax(dim=-1)

    def packed_loss(self, model: Any, batch: Sequence[TrainingExample], beginning: Beginning) -> torch.Tensor:
        """Return the weighted sum over rows of the label's negative log-likelihood."""
        rows = [example.ids[beginning.tokens :] for example in batch]
        return _loss(self._packed_logits(model, rows, beginning), batch)

    def padded_loss(self, model: Any, batch: Sequence[TrainingExample], pad_id: int) -> torch.Tensor:
        """Return the same from padded rows."""
        return _loss(self._padded_logits(model, [example.ids for example in batch], pad_id), batch)

    def _packed_logits(self, model: Any, rows: Sequence[Sequence[int]], beginning: Beginning) -> torch.Tensor:
        return _logits(model, self._pooling.packed(model, rows, beginning))

    def _padded_logits(self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
        batch = pad_left(prompts, pad_id, model.device)
        return _logits(model, self._pooling.padded(padded_states(model, batch), batch))


def _logits(model: Any, states: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = unwrapped(model).score(states)
    return logits


def _loss(logits: torch.Tensor, batch: Sequence[TrainingExample]) -> torch.Tensor:
    labels = to_device([example.answer[0] for example in batch], logits.device)
    weights = to_device([example.weight for example in batch], logits.device)
    return (cross_entropy(logits, labels, reduction="none") * weights).sum()
