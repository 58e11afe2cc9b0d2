"""Rows one behind another in one sequence, behind a beginning that they all share: nothing is padded or read twice.

No row sees another: attention is computed row by row, each over the shared beginning and itself, or on CUDA over all of
them in one kernel with a mask. The beginning is read once, and what rows need of it, its keys and values in every
layer, is kept. It plugs into transformers' attention interface, so that all else can be the model's own code.

Sharing a beginning in training with exact gradients is described in https://arxiv.org/abs/2506.05433 (Prefix Grouper)
and https://arxiv.org/abs/2410.20305 (preference pairs).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from llm_clf.engine import flex
from llm_clf.engine.attention import CHUNK, Chunk, RowPlan, attend
from llm_clf.engine.decoder import ends_short
from llm_clf.engine.parts import backbone, unwrapped
from llm_clf.engine.transfer import to_device

# Families whose attention goes through the interface with the forward's own arguments; each is tested.
FAMILIES = frozenset({"glm", "llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "gpt2"})
NAME = "llm_clf_packed"

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Beginning:
    """Tokens that all rows begin with, as the layers hold them."""

    tokens: int
    layers: list[KeysAndValues]
    """Keys and values by layer, each of shape `(tokens, key-value heads, head width)`."""
    total: torch.Tensor | None = None
    """Sum of the last layer's states over the tokens, fp32, shape `(width,)`; None where nobody asked for it."""

    def leaves(self) -> "Beginning":
        """Return the same values cut off from what made them: gradients gather on them."""
        cut = [(key.detach().requires_grad_(), value.detach().requires_grad_()) for key, value in self.layers]
        total = self.total.detach().requires_grad_() if self.total is not None else None
        return Beginning(self.tokens, cut, total)

    def backward(self, leaves: "Beginning") -> None:
        """Send the gradients that gathered on the leaves on to what made the values."""
        pairs = zip(self.layers, leaves.layers, strict=True)
        both = [(tensor, leaf.grad) for made, cut in pairs for tensor, leaf in zip(made, cut, strict=True)]
        if self.total is not None and leaves.total is not None:
            both.append((self.total, leaves.total.grad))
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
class Layout:
    """What a model's layers must know of a packed sequence; handed through the model's forward."""

    beginning: Beginning
    rows: list[RowPlan]
    """Attention of all places."""
    wanted: list[RowPlan]
    """Attention of the wanted places, one behind another, alone."""
    places: torch.Tensor
    """The wanted places in the sequence."""
    blocks: Any = None
    """The mask of all places at once, of `flex.packed_blocks`; None: attention goes row by row."""
    kept: dict[int, KeysAndValues] = field(default_factory=dict)
    """By layer, what the sequence itself has for keys and values."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """Return one layer's attention, of all places or of the wanted ones alone, shape `(queries, heads · width)`.

        Args:
            layer: Its number.
            query: Shape `(queries, heads, head width)`.
            key: Shape `(tokens, key-value heads, head width)`, rotated.
            value: As `key`.
            scaling: Of the scores.
            dropout: Of the base's own attention, in training.
        """
        # Where activations are computed again this runs twice; the first are the ones that others already read.
        self.kept.setdefault(layer, (key, value))
        before = self.beginning.layers[layer] if self.beginning.tokens else None
        everywhere = len(query) == len(key)
        if everywhere and self.blocks is not None:
            parts = [(key, value)] if before is None else [before, (key, value)]
            keys, values = zip(*((_heads_first(k), _heads_first(v)) for k, v in parts), strict=True)
            found = flex.attend(_heads_first(query), keys, values, self.blocks, scaling)
            return found[0].transpose(0, 1).flatten(1)
        plan = self.rows if everywhere else self.wanted
        return attend(query, key, value, before, plan, scaling, dropout)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """Return `(tokens, heads, width)` as `(1, heads, tokens, width)`."""
    return x.transpose(0, 1)[None]


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
    unwrapped(model).set_attn_implementation(NAME)


def read_beginning(model: Any, ids: Sequence[int], *, summed: bool = False) -> Beginning:
    """Return the keys and values of tokens that all rows begin with, and where `summed` the sum of their states.

    Dropout is off, also in training: the rows that share the tokens would share one mask.
    """
    if not ids:
        return NOTHING
    inputs, layout = _lay_out(model, [Row(ids)], NOTHING, [[len(ids) - 1]], NO_ANSWERS)
    states = _states(model, inputs)
    layers = [layout.kept[layer] for layer in sorted(layout.kept)]
    assert not (summed and ends_short(model))
    return Beginning(len(ids), layers, states.sum(dim=0, dtype=torch.float32) if summed else None)


def packed_logits(
    model: Any,
    rows: Sequence[Row],
    beginning: Beginning,
    wanted: Sequence[Sequence[int]],
    answers: AnswerShape = NO_ANSWERS,
) -> torch.Tensor:
    """Return logits at some places of each row, shape `(places of all rows, vocabulary)`, rows in their order.

    Args:
        model: A causal language model with `enable_packing`.
        rows: What follows the beginning.
        beginning: Of `read_beginning`, or NOTHING.
        wanted: Places by row, counted from 0 behind the beginning, nodes included.
        answers: How nodes see each other; the same tree for every row.
    """
    inputs, layout = _lay_out(model, rows, beginning, wanted, answers)
    # A short last layer leaves the wanted places only; 0 keeps all that there are.
    logits: torch.Tensor = model(**inputs, logits_to_keep=0 if ends_short(model) else layout.places).logits
    return logits[0]


def packed_states(
    model: Any, rows: Sequence[Row], beginning: Beginning, wanted: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Return the states that a head would read at some places of each row, shape `(places of all rows, width)`.

    The arguments are those of `packed_logits`; the model may have any head.
    """
    inputs, layout = _lay_out(model, rows, beginning, wanted, NO_ANSWERS)
    states = _states(model, inputs)
    return states if ends_short(model) else states[layout.places]


def every_state(model: Any, rows: Sequence[Row], beginning: Beginning) -> torch.Tensor:
    """Return the states of all tokens of all rows, shape `(tokens, width)`; no last layer may be short."""
    assert not ends_short(model)
    return _states(model, _lay_out(model, rows, beginning, [() for _ in rows], NO_ANSWERS)[0])


def _lay_out(
    model: Any, rows: Sequence[Row], beginning: Beginning, wanted: Sequence[Sequence[int]], answers: AnswerShape
) -> tuple[dict[str, Any], Layout]:
    """Return what a forward over packed rows is given, and the layout that is part of it."""
    masks = _Masks(model, answers)
    ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    all_places, wanted_places, spans = [], [], []
    for row, some in zip(rows, wanted, strict=True):
        span = slice(len(ids), len(ids) + len(row.ids) + len(row.nodes))
        all_places.append(RowPlan(span, masks.chunks(span.start, len(row.ids), len(row.nodes))))
        wanted_places.append(RowPlan(span, [masks.some(len(places), len(row.ids), len(row.nodes), some)]))
        spans.append((span.start, span.start + len(row.ids), span.stop))
        ids += [*row.ids, *row.nodes]
        end = beginning.tokens + len(row.ids)
        positions += [*range(beginning.tokens, end), *(end + depth for depth in answers.depths[: len(row.nodes)])]
        places += [span.start + place for place in some]
    device = model.device
    blocks = None
    if len(rows) > 1 and flex.suits(model):
        blocks = flex.packed_blocks(spans, beginning.tokens, answers.seen, device)
    layout = Layout(beginning, all_places, wanted_places, to_device(places, device, torch.long), blocks)
    inputs = {
        "input_ids": to_device([ids], device),
        "position_ids": to_device([positions], device),
        # Four dimensions: transformers takes it as made, and makes none of its own; attention looks at the layout.
        "attention_mask": torch.empty(1, 1, 0, 0, device=device),
        "use_cache": False,
        "layout": layout,
    }
    return inputs, layout


def _states(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the states that the last layer leaves, shape `(places, width)`: all, or where it is short the wanted."""
    states: torch.Tensor = backbone(model)(**inputs).last_hidden_state
    return states[0]


class _Masks:
    """What is added to the scores of queries, by which places they may see."""

    def __init__(self, model: Any, answers: AnswerShape) -> None:
        self._dtype, self._device = model.dtype, model.device
        self._answers = answers
        self._causal = self._additive(torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril())
        self._nodes = self._additive(answers.seen)

    def chunks(self, start: int, tokens: int, nodes: int) -> list[Chunk]:
        """Return the attention of all places of a row that starts at `start`."""
        found = []
        for first in range(0, tokens, CHUNK):
            size = min(CHUNK, tokens - first)
            queries = slice(start + first, start + first + size)
            found.append(Chunk(queries, first + size, self._causal[:size, :size]))
        if nodes:
            found.append(Chunk(slice(start + tokens, start + tokens + nodes), tokens + nodes, self._nodes))
        return found

    def some(self, start: int, tokens: int, nodes: int, places: Sequence[int]) -> Chunk:
        """Return the attention of some places of a row, whose queries stand from `start` on."""
        seen = torch.zeros(len(places), tokens + nodes, dtype=torch.bool)
        for query, place in enumerate(places):
            seen[query, : min(place + 1, tokens)] = True
            if place >= tokens:
                seen[query, tokens:] = self._answers.seen[place - tokens]
        return Chunk(slice(start, start + len(places)), tokens + nodes, self._additive(seen))

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(seen.shape, dtype=self._dtype)
        return to_device(mask.masked_fill_(~seen, torch.finfo(self._dtype).min), self._device)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend row by row where there is a layout; tensors are `(1, heads, tokens, head width)`.

    Returns:
        The result, shape `(1, tokens, heads, head width)`.
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return whole
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    queries, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
    found = layout.attend(module.layer_idx, queries, keys, values, scaling, options.get("dropout") or 0.0)
    return found.view(1, *queries.shape), None


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
