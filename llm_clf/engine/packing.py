"""Rows one behind another in one sequence, behind a beginning that they all share: nothing is padded or read twice.

No row sees another: attention is computed row by row, each over the shared beginning and itself, or on CUDA over all of
them in one kernel with a mask. The beginning is read once, and what rows need of it, its keys and values in every
layer, is kept. It plugs into transformers' attention interface, so that all else is the model's own code.

Sharing a beginning in training with exact gradients is described in https://arxiv.org/abs/2506.05433 (Prefix Grouper)
and https://arxiv.org/abs/2410.20305 (preference pairs).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from llm_clf.engine import flex
from llm_clf.engine.attention import attend

# Families whose attention goes through the interface with the forward's own arguments; each is tested.
FAMILIES = frozenset({"glm", "llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "gpt2"})
NAME = "llm_clf_packed"

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Beginning:
    """Tokens that all rows begin with, as the layers hold them."""

    tokens: int
    layers: list[KeysAndValues]
    """Keys and values by layer, each of shape `(1, key-value heads, tokens, head width)`."""

    def leaves(self) -> "Beginning":
        """Return the same values cut off from what made them: gradients gather on them."""
        cut = [(key.detach().requires_grad_(), value.detach().requires_grad_()) for key, value in self.layers]
        return Beginning(self.tokens, cut)

    def backward(self, leaves: "Beginning") -> None:
        """Send the gradients that gathered on the leaves on to what made the values."""
        pairs = zip(self.layers, leaves.layers, strict=True)
        both = [(tensor, leaf.grad) for made, cut in pairs for tensor, leaf in zip(made, cut, strict=True)]
        # Without an adapter on keys or values the first layer's do not depend on any.
        reached = [(tensor, grad) for tensor, grad in both if tensor.requires_grad and grad is not None]
        if reached:
            torch.autograd.backward([tensor for tensor, _ in reached], [grad for _, grad in reached])


NOTHING = Beginning(0, [])


def common_beginning(sequences: Iterable[Sequence[int]]) -> list[int]:
    """Return the tokens that all sequences begin with; each has at least one more."""
    common: list[int] | None = None
    for ids in sequences:
        if common is None:
            common = list(ids[:-1])
        size = min(len(common), len(ids) - 1)
        same = next((place for place in range(size) if common[place] != ids[place]), size)
        del common[same:]
    return common or []


@dataclass(frozen=True, slots=True)
class Row:
    """One row's tokens behind the shared beginning."""

    ids: Sequence[int]
    """Tokens of which each sees those before it."""
    nodes: Sequence[int] = ()
    """Tokens of the answer tree behind them."""


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """How the nodes of an answer tree see each other."""

    depths: list[int]
    """Places behind the row's end, from 0."""
    seen: torch.Tensor
    """Which node sees which, shape `(nodes, nodes)`."""


NO_ANSWERS = AnswerShape([], torch.zeros(0, 0, dtype=torch.bool))


@dataclass(frozen=True, slots=True)
class _Layout:
    """What attention must know of a sequence; handed through the model's forward."""

    beginning: Beginning
    spans: list[tuple[int, int, int]]
    """Of each row: its first place, that of its first node, and the one behind its last."""
    causal: torch.Tensor | None
    """Additive mask for the longest row behind the beginning; None where the kernel masks by itself."""
    nodes: torch.Tensor | None
    """Additive mask among nodes, shape `(nodes, nodes)`."""
    blocks: Any = None
    """The mask of all rows at once, of `flex.packed_blocks`; None: attention goes row by row."""
    kept: dict[int, KeysAndValues] = field(default_factory=dict)
    """By layer, what the sequence itself has for keys and values."""


def allows_packing(config: Any) -> bool:
    """Whether rows may be packed: a known family in which every layer sees everything."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return text.model_type in FAMILIES and kinds == {"full_attention"} and window is None


def enable_packing(model: Any) -> None:
    """Let a model's attention read packed rows; whatever else it is given it reads as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(NAME)


def read_beginning(model: Any, ids: Sequence[int]) -> Beginning:
    """Return the keys and values of tokens that all rows begin with.

    Dropout is off, also in training: the rows that share the tokens would share one mask.
    """
    if not ids:
        return NOTHING
    causal = _causal(len(ids), 0, model) if model.device.type == "cpu" else None
    layout = _Layout(NOTHING, [(0, len(ids), len(ids))], causal, None)
    _forward(model, list(ids), list(range(len(ids))), layout, torch.tensor([len(ids) - 1]))
    return Beginning(len(ids), [layout.kept[layer] for layer in sorted(layout.kept)])


def packed_logits(
    model: Any,
    rows: Sequence[Row],
    beginning: Beginning,
    wanted: Sequence[Sequence[int]],
    answers: AnswerShape = NO_ANSWERS,
) -> torch.Tensor:
    """Return logits at some places of each row, shape `(places of all rows, vocabulary)`, rows in their order.

    Args:
        model: A model with `enable_packing`.
        rows: What follows the beginning.
        beginning: Of `read_beginning`, or NOTHING.
        wanted: Places by row, counted from 0 behind the beginning, nodes included.
        answers: How nodes see each other; the same tree for every row.
    """
    ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    spans = []
    for row, some in zip(rows, wanted, strict=True):
        first, middle = len(ids), len(ids) + len(row.ids)
        places += [first + place for place in some]
        ids += [*row.ids, *row.nodes]
        end = beginning.tokens + len(row.ids)
        positions += [*range(beginning.tokens, end), *(end + depth for depth in answers.depths[: len(row.nodes)])]
        spans.append((first, middle, len(ids)))
    if len(rows) > 1 and flex.suits(model):
        blocks = flex.packed_blocks(spans, beginning.tokens, answers.seen, model.device)
        return _forward(model, ids, positions, _Layout(beginning, spans, None, None, blocks), torch.tensor(places))
    longest = max(len(row.ids) for row in rows)
    needs_mask = beginning.tokens or model.device.type == "cpu"
    causal = _causal(longest, beginning.tokens, model) if needs_mask else None
    layout = _Layout(beginning, spans, causal, _additive(answers.seen, model) if answers.depths else None)
    return _forward(model, ids, positions, layout, torch.tensor(places))


def _forward(model: Any, ids: list[int], positions: list[int], layout: _Layout, places: torch.Tensor) -> torch.Tensor:
    device = model.device
    logits: torch.Tensor = model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        # Four dimensions: transformers takes it as made, and makes none of its own; attention looks at the layout.
        attention_mask=torch.empty(1, 1, 0, 0, device=device),
        logits_to_keep=places.to(device),
        use_cache=False,
        layout=layout,
    ).logits
    return logits[0]


def _causal(longest: int, before: int, model: Any) -> torch.Tensor:
    """Return the mask by which a row's place sees the beginning and its row up to itself."""
    return _additive(torch.ones(longest, before + longest, dtype=torch.bool).tril(before), model)


def _additive(seen: torch.Tensor, model: Any) -> torch.Tensor:
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
    return mask.masked_fill_(~seen.to(model.device), torch.finfo(model.dtype).min)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: _Layout | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by rows where there is a layout; tensors are `(1, heads, tokens, head width)`.

    Returns:
        The result, shape `(1, tokens, heads, head width)`.
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return whole
    number = module.layer_idx
    # Where activations are computed again this runs twice; the first are the ones that others already read.
    layout.kept.setdefault(number, (key, value))
    before = layout.beginning.tokens
    if layout.blocks is not None:
        parts = ([layout.beginning.layers[number]] if before else []) + [(key, value)]
        all_keys, all_values = zip(*parts, strict=True)
        found = flex.attend(query, all_keys, all_values, layout.blocks, options.get("scaling"))
        return found.transpose(1, 2), None
    done = []
    for first, middle, end in layout.spans:
        keys, values = key[:, :, first:end], value[:, :, first:end]
        if before:
            shared = layout.beginning.layers[number]
            keys, values = torch.cat([shared[0], keys], dim=2), torch.cat([shared[1], values], dim=2)
        size = middle - first
        seen = before + size
        mask = None if layout.causal is None else layout.causal[:size, :seen]
        done.append(_attend(module, query[:, :, first:middle], keys[:, :, :seen], values[:, :, :seen], mask, options))
        if end > middle and layout.nodes is not None:
            tree = torch.nn.functional.pad(layout.nodes, (seen, 0))
            done.append(_attend(module, query[:, :, middle:end], keys, values, tree, options))
    return torch.cat(done, dim=1), None


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Return one row's attention, shape `(1, tokens, heads, head width)`; the mask is `(tokens, seen tokens)`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.device.type == "cpu" and not options.get("dropout"):
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        return attend(query, key, value, mask, scaling).transpose(1, 2)
    four = None if mask is None else mask[None, None]
    result: torch.Tensor = sdpa_attention_forward(module, query, key, value, four, **options)[0]
    return result


@contextmanager
def without_adapter_dropout(model: Any) -> Iterator[None]:
    """Switch the adapter's dropout off for a while."""
    dropouts = [part for part in model.modules() if isinstance(part, torch.nn.Dropout) and part.training]
    for part in dropouts:
        part.eval()
    try:
        yield
    finally:
        for part in dropouts:
            part.train()
