"""Attention of packed rows by plain matrix products, with its backward: on a CPU faster than SDPA's own kernels.

A row's queries are taken a chunk at a time, each against the keys that it may see and no others, so that most
of what lies above the diagonal is never computed. Heads that share keys and values are laid one behind another, so that
these are never repeated. What is kept for the backward grows with the square of a row's length, which rows of text can
afford.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Queries of a chunk: products of fewer are slower, of more compute more that is masked.
CHUNK = 128


@dataclass(frozen=True, slots=True)
class Chunk:
    """Queries that are attended together."""

    queries: slice
    """Which of the given queries."""
    seen: int
    """How many of the row's own places they see at most."""
    mask: torch.Tensor
    """Added to the scores of the last of these places, shape `(queries, places)`."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One row in a packed sequence."""

    places: slice
    """Its keys and values."""
    chunks: list[Chunk]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    before: tuple[torch.Tensor, torch.Tensor] | None,
    plan: Sequence[RowPlan],
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return softmax(scaling · Q Kᵀ + mask) V, row by row; each row also sees what stands before all of them.

    Args:
        query: Shape `(queries, heads, head width)`.
        key: Shape `(tokens, key-value heads, head width)`.
        value: As `key`.
        before: Keys and values of the shared beginning, each of shape `(its tokens, key-value heads, head width)`.
        plan: Every query is in one chunk.
        scaling: Of the scores.
        dropout: Chance by which a base in training drops a weight.

    Returns:
        Shape `(queries, heads · head width)`.
    """
    keys, values = before if before is not None else (None, None)
    result: torch.Tensor = _Attention.apply(query, key, value, keys, values, plan, scaling, dropout)  # type: ignore[no-untyped-call]
    return result


def _by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Return `(tokens, heads, width)` as `(groups, tokens · heads of a group, width)`."""
    return x.reshape(x.shape[0], groups, -1, x.shape[2]).transpose(0, 1).flatten(1, 2).contiguous()


def _by_token(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return `(groups, tokens · heads of a group, width)` as `(tokens, heads, width)`."""
    return x.view(x.shape[0], tokens, -1, x.shape[2]).transpose(0, 1).flatten(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys_before: torch.Tensor | None,
        values_before: torch.Tensor | None,
        plan: Sequence[RowPlan],
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        groups = key.shape[1]
        queries, keys, values = (_by_group(x, groups) for x in (query, key, value))
        earlier = [None if x is None else _by_group(x, groups) for x in (keys_before, values_before)]
        result, kept = torch.empty_like(queries), []
        heads = query.shape[1] // groups
        for row in plan:
            row_keys, row_values = _joined(earlier[0], keys[:, row.places]), _joined(earlier[1], values[:, row.places])
            own = row_keys.shape[1] - (row.places.stop - row.places.start)
            for chunk in row.chunks:
                some, seen = _rows_of(chunk.queries, heads), own + chunk.seen
                scores = torch.bmm(queries[:, some], row_keys[:, :seen].transpose(1, 2)).mul_(scaling)
                _masked_part(scores, heads, chunk).add_(chunk.mask[:, None])
                weights = scores.softmax(dim=-1)
                kept.append(weights)
                if dropout:
                    kept.append(torch.nn.functional.dropout(torch.ones_like(weights), dropout))
                    weights = weights * kept[-1]
                result[:, some] = torch.bmm(weights, row_values[:, :seen])
        ctx.save_for_backward(queries, keys, values, *earlier, *kept)
        ctx.plan, ctx.scaling, ctx.dropout, ctx.heads, ctx.tokens = plan, scaling, dropout, heads, query.shape[0]
        return _by_token(result, query.shape[0]).flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, values, keys_before, values_before, *kept = ctx.saved_tensors
        groups, heads = keys.shape[0], ctx.heads
        gradient = _by_group(gradients[0].reshape(ctx.tokens, groups * heads, -1), groups)
        for_queries, for_keys, for_values = (torch.empty_like(x) for x in (queries, keys, values))
        earlier = [
            None if x is None else torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            for x in (keys_before, values_before)
        ]
        weights_left = iter(kept)
        for row in ctx.plan:
            row_keys, row_values = (
                _joined(keys_before, keys[:, row.places]),
                _joined(values_before, values[:, row.places]),
            )
            own = row_keys.shape[1] - (row.places.stop - row.places.start)
            # Of all chunks and rows they are added up in fp32.
            sums = [torch.zeros(row_keys.shape, dtype=torch.float32, device=keys.device) for _ in range(2)]
            for chunk in row.chunks:
                some, seen, weights = _rows_of(chunk.queries, heads), own + chunk.seen, next(weights_left)
                drop = next(weights_left) if ctx.dropout else None
                used = weights if drop is None else weights * drop
                sums[1][:, :seen] += torch.bmm(used.transpose(1, 2), gradient[:, some])
                for_weights = torch.bmm(gradient[:, some], row_values[:, :seen].transpose(1, 2))
                if drop is not None:
                    for_weights.mul_(drop)
                for_scores = torch._softmax_backward_data(for_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
                for_queries[:, some] = torch.bmm(for_scores, row_keys[:, :seen])
                sums[0][:, :seen] += torch.bmm(for_scores.transpose(1, 2), queries[:, some])
            for result, before, total in zip((for_keys, for_values), earlier, sums, strict=True):
                result[:, row.places] = total[:, own:]
                if before is not None:
                    before += total[:, :own]
        before_all = [None if x is None else _by_token(x, x.shape[1]).to(keys.dtype) for x in earlier]
        tokens = keys.shape[1]
        mine = (_by_token(for_queries, ctx.tokens), _by_token(for_keys, tokens), _by_token(for_values, tokens))
        return *mine, *before_all, None, None, None


def _rows_of(queries: slice, heads: int) -> slice:
    """Return where queries stand among `(tokens · heads of a group)`."""
    return slice(queries.start * heads, queries.stop * heads)


def _masked_part(scores: torch.Tensor, heads: int, chunk: Chunk) -> torch.Tensor:
    """Return the scores that the mask is added to, shape `(groups, queries, heads of a group, places)`."""
    groups, _, seen = scores.shape
    return scores.view(groups, -1, heads, seen)[..., seen - chunk.mask.shape[1] :]


def _joined(before: torch.Tensor | None, own: torch.Tensor) -> torch.Tensor:
    return own if before is None else torch.cat([before, own], dim=1)
