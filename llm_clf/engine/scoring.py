"""Label scores: the log-probability of every label's words, end token included, after each prompt.

Two ways lead to the same numbers. The tree reads a prompt once and all answers behind it in the same forward:
the answers' tokens hang on the prompt as a tree, and each sees the prompt and its own beginnings only. The
plain way reads the prompt again for every answer; it serves bases whose attention the tree cannot steer, and
it is what the tree is tested against.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llm_clf.engine.batches import Batch, pad_left, plan_batches
from llm_clf.errors import ArtifactError

# Families whose forward takes a mask of shape (rows, 1, tokens, tokens) and explicit positions; each is tested.
TREE_FAMILIES = frozenset({"glm", "llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "gpt2"})
# Most fp32 log-probabilities held at once: rows x positions x vocabulary.
LOGITS_LIMIT = 2**26

ScoredBatch = tuple[list[int], torch.Tensor]


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


class LabelScorer:
    """Scores labels with a model.

    Args:
        model: A causal language model of transformers, with or without a PEFT adapter.
        answers: Token sequences by label and word, each with the end token.
        pad_id: Token on padded places; never seen by a real one.
        tree: Read each prompt once; None: where the model's family is known to allow it.
    """

    def __init__(
        self, model: Any, answers: Sequence[Sequence[Sequence[int]]], *, pad_id: int, tree: bool | None = None
    ) -> None:
        self._model = model
        self._answers = [[list(word) for word in words] for words in answers]
        self._tree = AnswerTree.build(answers)
        self._pad_id = pad_id
        self._uses_tree = allows_tree(model.config) if tree is None else tree
        self._extra = forward_arguments(model)

    def plan(self, lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
        """Group prompts of the given lengths into batches of at most about `batch_tokens` padded tokens."""
        tail = len(self._tree.tokens) if self._uses_tree else max(len(w) for words in self._answers for w in words)
        positions = (len(self._tree.tokens) if self._uses_tree else tail) + 1
        max_rows = max(1, LOGITS_LIMIT // (positions * self._model.config.get_text_config().vocab_size))
        return plan_batches([length + tail for length in lengths], batch_tokens, max_rows)

    @torch.inference_mode()
    def score(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return log-probabilities in nats, fp32 on the CPU, shape `(prompts, labels)`.

        A label's score is the log of the summed probabilities of its words.

        Raises:
            ArtifactError: A score is not a number.
        """
        words = self._score_tree(prompts) if self._uses_tree else self._score_plain(prompts)
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

    def _score_tree(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return word scores, shape `(prompts, words)`, from one forward over prompts and answer tree."""
        device = self._model.device
        batch = tree_batch(prompts, self._tree, self._pad_id, self._model.dtype, device)
        kept = len(self._tree.tokens) + 1
        log_probs = self._log_probs(batch, kept)
        columns = []
        for path in (word for words in self._tree.paths for word in words):
            places = torch.tensor([place for place, _ in path], device=device)
            tokens = torch.tensor([token for _, token in path], device=device)
            columns.append(log_probs[:, places, tokens].sum(dim=1))
        return torch.stack(columns, dim=1)

    def _score_plain(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return word scores, shape `(prompts, words)`, from one forward for each word."""
        columns = []
        for word in (word for words in self._answers for word in words):
            batch = pad_left([[*prompt, *word[:-1]] for prompt in prompts], self._pad_id, self._model.device)
            log_probs = self._log_probs(batch, len(word))
            tokens = torch.tensor(word, device=log_probs.device)
            columns.append(log_probs[:, torch.arange(len(word)), tokens].sum(dim=1))
        return torch.stack(columns, dim=1)

    def _log_probs(self, batch: Batch, kept: int) -> torch.Tensor:
        """Return fp32 log-probabilities over the vocabulary at the last places, shape `(rows, kept, vocabulary)`."""
        return last_logits(self._model, batch, kept, self._extra).float().log_softmax(dim=-1)


def score_in_batches(
    scorer: LabelScorer,
    prompts: Sequence[Sequence[int]],
    batches: Sequence[Sequence[int]],
    done: Callable[[Sequence[int], torch.Tensor], None],
) -> None:
    """Score the prompts batch by batch and hand each batch's indices and scores to `done`."""
    for batch in batches:
        done(batch, scorer.score([prompts[index] for index in batch]))


def allows_tree(config: Any) -> bool:
    """Whether answers may hang on the prompt as a tree: a known family in which every layer sees everything."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return text.model_type in TREE_FAMILIES and kinds == {"full_attention"} and window is None


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


def tree_batch(
    prompts: Sequence[Sequence[int]], tree: AnswerTree, pad_id: int, dtype: torch.dtype, device: torch.device
) -> Batch:
    """Return prompts, padded on the left, with the answer tree behind each.

    The mask is additive, shape `(rows, 1, tokens, tokens)`: a prompt token sees the real ones up to itself, a node
    sees the prompt and its ancestors. Padding sees itself, because a row that sees nothing is NaN.
    """
    head = pad_left(prompts, pad_id, device)
    rows, width = head.input_ids.shape
    size = width + len(tree.tokens)
    nodes = torch.tensor(tree.tokens, dtype=torch.long, device=device).expand(rows, -1)
    depths = torch.tensor([len(above) for above in tree.ancestors], dtype=torch.long, device=device)

    seen = torch.zeros(rows, size, size, dtype=torch.bool, device=device)
    real = head.attention_mask.bool()
    seen[:, :width, :width] = real[:, None, :] & torch.ones(width, width, dtype=torch.bool, device=device).tril()
    seen[:, width:, :width] = real[:, None, :]
    for node, above in enumerate(tree.ancestors):
        seen[:, width + node, [width + ancestor for ancestor in above]] = True
    seen |= torch.eye(size, dtype=torch.bool, device=device)
    mask = torch.zeros(rows, 1, size, size, dtype=dtype, device=device)
    mask.masked_fill_(~seen[:, None], torch.finfo(dtype).min)

    positions = head.position_ids[:, -1:] + depths
    return Batch(torch.cat([head.input_ids, nodes], dim=1), mask, torch.cat([head.position_ids, positions], dim=1))
