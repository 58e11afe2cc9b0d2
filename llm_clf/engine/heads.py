"""How what a model reads becomes scores of labels, and a loss: by label words, or by a linear head."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from llm_clf.config import ModelSettings
from llm_clf.engine.label_words import LabelWords
from llm_clf.engine.linear_head import LinearHead
from llm_clf.engine.packing import Beginning
from llm_clf.engine.tokens import PromptTokenizer, TrainingExample


class Head(Protocol):
    """One way to read labels from a model; packed and padded rows give the same numbers.

    Scores are log-probabilities in nats, fp32, shape `(rows, labels)`. Losses are scalars in fp32, in nats.
    """

    reads_every_state: bool
    """Whether the last layer must compute all of a row, not only where the prompt ends and behind it."""

    def answer(self, label: int) -> list[int]:
        """Return what training teaches for a label, by its number in the task; the last item is never read."""

    def tail(self, *, packed: bool) -> int:
        """Return the tokens that are read behind a prompt to score it."""

    def most_rows(self, model: Any, *, packed: bool) -> int | None:
        """Return how many rows may be scored at once, whatever their length; None: any number."""

    def read_beginning(self, model: Any, ids: Sequence[int]) -> Beginning:
        """Read tokens that all rows begin with."""

    def packed_scores(self, model: Any, rows: Sequence[Sequence[int]], beginning: Beginning) -> torch.Tensor:
        """Score prompts that stand one behind another, each given behind the beginning."""

    def padded_scores(self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
        """Score prompts the plain way."""

    def packed_loss(self, model: Any, batch: Sequence[TrainingExample], beginning: Beginning) -> torch.Tensor:
        """Return the sum of the rows' losses, each by its weight; the beginning is part of every example."""

    def padded_loss(self, model: Any, batch: Sequence[TrainingExample], pad_id: int) -> torch.Tensor:
        """Return the same the plain way."""


def make_head(settings: ModelSettings, tokens: PromptTokenizer) -> Head:
    """Return the head that the settings name."""
    return LinearHead(settings.pooling) if settings.head == "linear" else LabelWords(tokens.answers)
