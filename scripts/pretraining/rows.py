"""Documents to rows of tokens, and rows to batches of equal width, so that no document is read with another."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pretraining.documents import Document

END = "<|endoftext|>"
CONTEXT = 1024
# What a user turn and an answer look like: the shape of the documents with questions.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)
# Every width is a shape of its own for the processor's kernels.
WIDTHS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024)


@dataclass(frozen=True, slots=True)
class Rows:
    """Documents as one stream of tokens."""

    ids: np.ndarray
    """All tokens, shape `(tokens,)`."""
    answers: np.ndarray
    """Which of them are answers, shape `(tokens,)`."""
    starts: np.ndarray
    """Where each document begins, with the end of the last, shape `(documents + 1,)`."""

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one width; a row that is shorter is filled up, and what fills it weighs nothing."""

    ids: torch.Tensor
    """Shape `(rows, width)`."""
    weights: torch.Tensor
    """Of every token as a target, shape `(rows, width)`."""


def train_tokenizer(documents: Iterable[Document], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: any text is encodable, digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("".join(piece.text for piece in document) for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )


def encode(documents: Iterable[Document], tokenizer: Any, limit: int | None = None) -> Rows:
    """Return the documents as tokens, each closed by the end token, which is part of a last answer.

    Args:
        documents: What to encode; pieces are tokenised apart, as prompt and answer are in the task.
        tokenizer: Its vocabulary has at most 65,536 tokens.
        limit: Stop after so many tokens.
    """
    ids: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    starts = [0]
    left = iter(documents)
    while some := list(islice(left, 1000)):
        encoded = iter(tokenizer([piece.text for document in some for piece in document], verbose=False)["input_ids"])
        for document in some:
            pieces = [(next(encoded), piece.answer) for piece in document]
            pieces.append(([tokenizer.eos_token_id], document[-1].answer))
            ids.append(np.array([token for tokens, _ in pieces for token in tokens][:CONTEXT], dtype=np.uint16))
            flags = np.concatenate([np.full(len(tokens), answer) for tokens, answer in pieces])
            answers.append(flags[:CONTEXT])
            starts.append(starts[-1] + len(ids[-1]))
        if limit and starts[-1] >= limit:
            break
    return Rows(np.concatenate(ids), np.concatenate(answers), np.array(starts))


def plan_batches(rows: Rows, tokens: int, seed: int) -> list[tuple[int, np.ndarray]]:
    """Return the batches of one epoch, `(width, documents)` each, in an order of the seed.

    A plain document loses what the next smaller width has no place for, which costs nothing where there is more text
    than time; one with answers at its end is filled up to the next larger.
    """
    rng = np.random.default_rng(seed)
    lengths = np.diff(rows.starts)
    asks = np.add.reduceat(rows.answers, rows.starts[:-1]) > 0
    widths = np.array(WIDTHS)
    larger = np.searchsorted(widths, lengths)
    smaller = np.maximum(np.searchsorted(widths, lengths, side="right") - 1, 0)
    chosen = widths[np.where(asks, larger, smaller)]
    batches: list[tuple[int, np.ndarray]] = []
    for width in WIDTHS:
        mine = rng.permutation(np.flatnonzero(chosen == width))
        size = max(1, tokens // width)
        batches += [(width, mine[first : first + size]) for first in range(0, len(mine) - size + 1, size)]
    return [batches[place] for place in rng.permutation(len(batches))]


def load_batch(rows: Rows, width: int, documents: np.ndarray, answer_weight: float) -> Batch:
    """Return the tokens and weights of some documents."""
    ids = np.zeros((len(documents), width), dtype=np.int64)
    weights = np.zeros((len(documents), width), dtype=np.float32)
    for row, document in enumerate(documents):
        first = rows.starts[document]
        last = min(rows.starts[document + 1], first + width)
        ids[row, : last - first] = rows.ids[first:last]
        weights[row, : last - first] = np.where(rows.answers[first:last], answer_weight, 1.0)
    return Batch(torch.from_numpy(ids), torch.from_numpy(weights))


def batches_forever(rows: Rows, tokens: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield batches, epoch after epoch, each in another order."""
    epoch = 0
    while True:
        yield from plan_batches(rows, tokens, seed + epoch)
        epoch += 1
