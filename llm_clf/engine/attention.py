"""Attention of one row by plain matrix products, with its backward: on a CPU faster than SDPA's own kernels.

Heads that share keys and values are laid one behind another, so that keys and values are never repeated. In bf16 the
forward takes half the time of SDPA's kernel and the backward a third (rows of 300 tokens, 12 heads on 2, one thread).
What it keeps for the backward grows with the square of the row's length, which rows of text can afford.
"""

from typing import Any

import torch


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Return softmax(scaling · Q Kᵀ + mask) V.

    Args:
        query: Shape `(1, heads, tokens, head width)`.
        key: Shape `(1, key-value heads, seen tokens, head width)`.
        value: As `key`.
        mask: Added to the scores, shape `(tokens, seen tokens)`; None: all is seen.
        scaling: Of the scores.

    Returns:
        Shape `(1, heads, tokens, head width)`.
    """
    result: torch.Tensor = _Attention.apply(query, key, value, mask, scaling)  # type: ignore[no-untyped-call]
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        _, heads, tokens, width = query.shape
        groups = key.shape[1]
        queries, keys, values = query.reshape(groups, -1, width), key[0], value[0]
        scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scaling)
        if mask is not None:
            scores.view(groups, heads // groups, tokens, -1).add_(mask)
        weights = scores.softmax(dim=-1)
        ctx.save_for_backward(queries, keys, values, weights)
        ctx.scaling, ctx.query_shape = scaling, query.shape
        return torch.bmm(weights, values).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, values, weights = ctx.saved_tensors
        gradient = gradients[0].reshape(queries.shape)
        for_values = torch.bmm(weights.transpose(1, 2), gradient)
        for_weights = torch.bmm(gradient, values.transpose(1, 2))
        for_scores = torch._softmax_backward_data(for_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
        for_queries = torch.bmm(for_scores, keys)
        for_keys = torch.bmm(for_scores.transpose(1, 2), queries)
        return for_queries.view(ctx.query_shape), for_keys[None], for_values[None], None, None
