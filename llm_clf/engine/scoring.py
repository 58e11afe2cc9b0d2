"""Label scores: the log-probability of every label's words, end token included, after each prompt.

Two ways lead to the same numbers. Packed, each prompt is read once and all answers behind it in the same forward: the
answers' tokens hang on the prompt as a tree, and each sees the prompt and its own beginnings only; prompts stand one
behind another, and what all begin with is read once for all. The plain way pads, and reads the whole prompt again for
every answer; it serves bases whose attention cannot be steered, and it is what the packed one is tested against.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llm_clf.engine.batches import Batch, pad_left, plan_batches, plan_packed
from llm_clf.engine.packing import NOTHING, AnswerShape, Beginning, Row, packed_logits, read_beginning
from llm_clf.engine.transfer import to_device
from llm_clf.errors import ArtifactError

# Most fp32 log-probabilities held at once: rows x positions x vocabulary.
LOGITS_LIMIT = 2**26


@dataclass(frozen=True, slots=True)
class AnswerTree:
    """All answers as one tree of tokens; answers that begin alike share their beginning.

    The last token of an answer is predicted and never read, so it is no node.
    """

    tokens: list[int]
    """Token of each node."""
    ancestors: list[list[int]]
    """Nodes from the root to each node, the node itself included."""
    paths: list[list[list[tuple[int, int]]]]
    """By label, by word: steps `(place, token)`; place 0 is the prompt's end, place i + 1 is node i."""

    @classmethod
    def build(cls, answers: Sequence[Sequence[Sequence[int]]]) -> "AnswerTree":
        """Return the tree of token sequences given by label and word."""
        tokens: list[int] = []
        ancestors: list[list[int]] = []
        node_of: dict[tuple[int, ...], int] = {}

        def walk(word: Sequence[int]) -> list[tuple[int, int]]:
            place, steps = 0, []
            above: list[int] = []
            for depth, token in enumerate(word):
                steps.append((place, token))
                if depth + 1 < len(word):
                    beginning = tuple(word[: depth + 1])
                    node = node_of.setdefault(beginning, len(tokens))
                    if node == len(tokens):
                        tokens.append(token)
                        ancestors.append([*above, node])
                    above = ancestors[node]
                    place = node + 1
            return steps

        paths = [[walk(word) for word in words] for words in answers]
        return cls(tokens, ancestors, paths)

    def shape(self) -> AnswerShape:
        """Return how the nodes see each other: each its ancestors."""
        seen = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        for node, above in enumerate(self.ancestors):
            seen[node, above] = True
        return AnswerShape([len(above) - 1 for above in self.ancestors], seen)


class LabelScorer:
    """Scores labels with a model.

    Args:
        model: A causal language model of transformers, with or without a PEFT adapter.
        answers: Token sequences by label and word, each with the end token.
        pad_id: Token on padded places; never seen by a real one.
        packed: Read packed rows; the model must have been told with `enable_packing`.
        shared: Tokens that prompts begin with, read once for all prompts that do.
    """

    def __init__(
        self,
        model: Any,
        answers: Sequence[Sequence[Sequence[int]]],
        *,
        pad_id: int,
        packed: bool,
        shared: Sequence[int] = (),
    ) -> None:
        self._model = model
        self._answers = [[list(word) for word in words] for words in answers]
        self._tree = AnswerTree.build(answers)
        self._shape = self._tree.shape()
        self._pad_id = pad_id
        self._packed = packed
        self._shared = list(shared) if packed else []
        self._beginning: Beginning | None = None
        self._extra = forward_arguments(model)

    def start(self) -> None:
        """Forget what was read of the shared tokens: the model may have changed since."""
        self._beginning = None

    def plan(self, lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
        """Group prompts of the given lengths into batches of at most about `batch_tokens` tokens, padding included."""
        max_rows = max(1, LOGITS_LIMIT // ((self._tail() + 1) * self._model.config.get_text_config().vocab_size))
        plan = plan_packed if self._packed else plan_batches
        return plan(self._sizes(lengths), batch_tokens, max_rows)

    def tokens(self, lengths: Sequence[int]) -> int:
        """Return the tokens of one batch of prompts of the given lengths, as `plan` counts them."""
        sizes = self._sizes(lengths)
        return sum(sizes) if self._packed else len(sizes) * max(sizes)

    def _tail(self) -> int:
        """Return the tokens that are read behind a prompt."""
        return len(self._tree.tokens) if self._packed else max(len(word) for words in self._answers for word in words)

    def _sizes(self, lengths: Sequence[int]) -> list[int]:
        tail = self._tail()
        return [max(1, length - len(self._shared) + tail) for length in lengths]

    @torch.inference_mode()
    def score(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return log-probabilities in nats, fp32 on the CPU, shape `(prompts, labels)`.

        A label's score is the log of the summed probabilities of its words.

        Raises:
            ArtifactError: A score is not a number.
        """
        words = self._score_packed(prompts) if self._packed else self._score_plain(prompts)
        first, labels = 0, []
        for label in self._answers:
            labels.append(words[:, first : first + len(label)].logsumexp(dim=1))
            first += len(label)
        scores = torch.stack(labels, dim=1).float().cpu()
        if scores.isnan().any():
            raise ArtifactError(
                "The model's label scores are not numbers (NaN). In fp16 that is an overflow: "
                "use --set model.dtype=bf16 or fp32; otherwise the weights are damaged."
            )
        return scores

    def _score_packed(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return word scores, shape `(prompts, words)`, from one forward over prompts and answer trees."""
        size = len(self._shared)
        shares = [len(ids) > size and list(ids[:size]) == self._shared for ids in prompts]
        scores: dict[int, torch.Tensor] = {}
        for shared in (True, False):
            numbers = [number for number, shares_it in enumerate(shares) if shares_it == shared]
            if numbers:
                rows = [prompts[number][size if shared else 0 :] for number in numbers]
                found = self._word_scores(rows, self._read_shared() if shared else NOTHING)
                scores |= dict(zip(numbers, found, strict=True))
        return torch.stack([scores[number] for number in range(len(prompts))])

    def _read_shared(self) -> Beginning:
        if self._beginning is None:
            self._beginning = read_beginning(self._model, self._shared)
        return self._beginning

    def _word_scores(self, rows: Sequence[Sequence[int]], beginning: Beginning) -> torch.Tensor:
        kept = len(self._tree.tokens) + 1
        logits = packed_logits(
            self._model,
            [Row(ids, self._tree.tokens) for ids in rows],
            beginning,
            [range(len(ids) - 1, len(ids) - 1 + kept) for ids in rows],
            self._shape,
        )
        log_probs = logits.view(len(rows), kept, -1).float().log_softmax(dim=-1)
        paths = [word for words in self._tree.paths for word in words]
        places = to_device([place for path in paths for place, _ in path], log_probs.device)
        tokens = to_device([token for path in paths for _, token in path], log_probs.device)
        steps = torch.split(log_probs[:, places, tokens], [len(path) for path in paths], dim=1)
        return torch.stack([found.sum(dim=1) for found in steps], dim=1)

    def _score_plain(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return word scores, shape `(prompts, words)`, from one forward for each word."""
        columns = []
        for word in (word for words in self._answers for word in words):
            batch = pad_left([[*prompt, *word[:-1]] for prompt in prompts], self._pad_id, self._model.device)
            log_probs = self._log_probs(batch, len(word))
            tokens = to_device(word, log_probs.device)
            places = torch.arange(len(word), device=log_probs.device)
            columns.append(log_probs[:, places, tokens].sum(dim=1))
        return torch.stack(columns, dim=1)

    def _log_probs(self, batch: Batch, kept: int) -> torch.Tensor:
        """Return fp32 log-probabilities over the vocabulary at the last places, shape `(rows, kept, vocabulary)`."""
        return last_logits(self._model, batch, kept, self._extra).float().log_softmax(dim=-1)


def forward_arguments(model: Any) -> frozenset[str]:
    """Return which optional arguments the base's forward takes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    taken = inspect.signature(base.forward).parameters
    return frozenset(name for name in ("position_ids", "logits_to_keep", "use_cache") if name in taken)


def last_logits(model: Any, batch: Batch, kept: int, takes: frozenset[str]) -> torch.Tensor:
    """Return the logits at the last `kept` places of every row, shape `(rows, kept, vocabulary)`."""
    extra: dict[str, Any] = {"position_ids": batch.position_ids, "logits_to_keep": kept, "use_cache": False}
    logits: torch.Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        **{name: value for name, value in extra.items() if name in takes},
    ).logits
    return logits[:, -kept:]
