"""Label words as a head: a label is as probable as its words, end token included, are as the prompt's answer.

Packed, each prompt is read once and all answers behind it in the same forward: the answers' tokens hang on the prompt
as a tree, and each sees the prompt and its own beginnings only. Padded, the whole prompt is read again for every
answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from llm_clf.engine.batches import pad_left
from llm_clf.engine.packing import AnswerShape, Beginning, Row, packed_logits, read_beginning
from llm_clf.engine.padded import last_logits
from llm_clf.engine.tokens import TrainingExample
from llm_clf.engine.transfer import to_device

# Most fp32 log-probabilities held at once: rows x positions x vocabulary.
LOGITS_LIMIT = 2**26
IGNORED = -100


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


class LabelWords:
    """Scores labels by the log-probability of their words; words of a label add up.

    Args:
        answers: Token sequences by label and word, each with the end token.
    """

    reads_every_state = False

    def __init__(self, answers: Sequence[Sequence[Sequence[int]]]) -> None:
        self._answers = [[list(word) for word in words] for words in answers]
        self._tree = AnswerTree.build(answers)
        self._shape = self._tree.shape()

    def answer(self, label: int) -> list[int]:
        """Return the tokens of the label's first word: what training teaches."""
        return self._answers[label][0]

    def tail(self, *, packed: bool) -> int:
        """Return the nodes of the answer tree, or the tokens of the longest word."""
        return len(self._tree.tokens) if packed else max(len(word) for words in self._answers for word in words)

    def most_rows(self, model: Any, *, packed: bool) -> int:
        """Return how many rows' log-probabilities over the vocabulary may be held at once."""
        vocabulary: int = model.config.get_text_config().vocab_size
        return max(1, LOGITS_LIMIT // ((self.tail(packed=packed) + 1) * vocabulary))

    def read_beginning(self, model: Any, ids: Sequence[int]) -> Beginning:
        """Read tokens that all rows begin with."""
        return read_beginning(model, ids)

    def packed_scores(self, model: Any, rows: Sequence[Sequence[int]], beginning: Beginning) -> torch.Tensor:
        """Return label scores from one forward over prompts and answer trees."""
        kept = len(self._tree.tokens) + 1
        logits = packed_logits(
            model,
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
        return self._of_labels(torch.stack([found.sum(dim=1) for found in steps], dim=1))

    def padded_scores(self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
        """Return label scores from one forward for each word."""
        columns = []
        for word in (word for words in self._answers for word in words):
            batch = pad_left([[*prompt, *word[:-1]] for prompt in prompts], pad_id, model.device)
            log_probs = last_logits(model, batch, len(word)).float().log_softmax(dim=-1)
            tokens = to_device(word, log_probs.device)
            places = torch.arange(len(word), device=log_probs.device)
            columns.append(log_probs[:, places, tokens].sum(dim=1))
        return self._of_labels(torch.stack(columns, dim=1))

    def packed_loss(self, model: Any, batch: Sequence[TrainingExample], beginning: Beginning) -> torch.Tensor:
        """Return the weighted sum over rows of the answer's negative log-likelihood, the sum over its tokens."""
        # The last token is predicted and never read.
        rows = [Row([*example.ids, *example.answer[:-1]][beginning.tokens :]) for example in batch]
        wanted = [
            range(len(row.ids) - len(example.answer), len(row.ids)) for row, example in zip(rows, batch, strict=True)
        ]
        logits = packed_logits(model, rows, beginning, wanted).float()
        targets = to_device([token for example in batch for token in example.answer], logits.device)
        weights = to_device([example.weight for example in batch for _ in example.answer], logits.device)
        return (cross_entropy(logits, targets, reduction="none") * weights).sum()

    def padded_loss(self, model: Any, batch: Sequence[TrainingExample], pad_id: int) -> torch.Tensor:
        """Return the same from padded rows; only the answers' logits are computed."""
        sequences = pad_left([[*example.ids, *example.answer] for example in batch], pad_id, model.device)
        longest = max(len(example.answer) for example in batch)
        targets = torch.full((len(batch), longest), IGNORED, dtype=torch.long)
        for row, example in enumerate(batch):
            targets[row, longest - len(example.answer) :] = torch.tensor(example.answer)
        targets = to_device(targets, model.device)
        # The last token is predicted and never predicts: one more place is kept, and the last one dropped.
        logits = last_logits(model, sequences, longest + 1)[:, :-1].float()
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        weights = to_device([example.weight for example in batch], model.device)
        return (losses.view(len(batch), longest).sum(dim=1) * weights).sum()

    def _of_labels(self, words: torch.Tensor) -> torch.Tensor:
        """Return the log of the summed probabilities of each label's words, from scores of shape `(rows, words)`."""
        of_labels = torch.split(words, [len(label) for label in self._answers], dim=1)
        return torch.stack([scores.logsumexp(dim=1) for scores in of_labels], dim=1)
