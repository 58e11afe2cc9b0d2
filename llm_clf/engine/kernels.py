"""Norm, rotary embedding and gated activation in few passes over memory, each with its backward.

Written as plain PyTorch, these take a dozen passes over the whole batch, in fp32 for the most part, and keep several of
its values for the backward. Here each keeps its input only, and on a CPU goes through the batch in blocks that stay in
the cache. The arithmetic is that of transformers' own code, rounded less often in between.
"""

from collections.abc import Iterator
from typing import Any

import torch

# Numbers in a block: in fp32 half a megabyte, which two or three of them leave in a core's cache.
BLOCK = 2**18


def blocks(x: torch.Tensor) -> Iterator[slice]:
    """Yield slices of the rows of a matrix; on a card, where each would be a launch, all of them at once."""
    rows, width = x.shape[0], x[:1].numel()
    step = max(1, BLOCK // max(1, width)) if x.device.type == "cpu" else max(1, rows)
    for first in range(0, rows, step):
        yield slice(first, first + step)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x²) + eps) · weight, computed in fp32 (https://arxiv.org/abs/1910.07467).

    Args:
        x: Shape `(tokens, width)`.
        weight: Shape `(width,)`; gets no gradient.
        eps: Keeps the root from 0.
    """
    result: torch.Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed, scales = torch.empty_like(x), x.new_empty(x.shape[0], 1, dtype=torch.float32)
        for some in blocks(x):
            wide = x[some].to(torch.float32, copy=True)
            scale = wide.square().mean(dim=1, keepdim=True).add_(eps).rsqrt_()
            scales[some] = scale
            # Rounded before it is multiplied, as transformers does.
            torch.mul(wide.mul_(scale).to(x.dtype), weight, out=normed[some])
        ctx.save_for_backward(x, weight, scales)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        result = torch.empty_like(x)
        for some in blocks(x):
            scale = scales[some]
            unit = x[some].to(torch.float32, copy=True).mul_(scale)
            gradient = (gradients[0][some] * weight).to(torch.float32)
            along = torch.linalg.vecdot(gradient, unit).div_(-x.shape[1]).unsqueeze(1)
            result[some] = gradient.addcmul_(unit, along).mul_(scale)
        return result, None, None


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) · up, all of shape `(tokens, width)` (https://arxiv.org/abs/2002.05202)."""
    result: torch.Tensor = _SiluGate.apply(gate, up)  # type: ignore[no-untyped-call]
    return result


def silu_gate_joined(both: torch.Tensor) -> torch.Tensor:
    """Return the same from gate and up side by side, shape `(tokens, 2 · width)`."""
    result: torch.Tensor = _SiluGateJoined.apply(both)  # type: ignore[no-untyped-call]
    return result


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    result = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    for some in blocks(result):
        torch.mul(torch.nn.functional.silu(gate[some]), up[some], out=result[some])
    return result


def _gated_backward(
    gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, for_gate: torch.Tensor, for_up: torch.Tensor
) -> None:
    for some in blocks(gradient):
        torch.mul(torch.nn.functional.silu(gate[some]), gradient[some], out=for_up[some])
        for_gate[some] = torch.ops.aten.silu_backward(gradient[some] * up[some], gate[some])


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gate, up = ctx.saved_tensors
        for_gate, for_up = torch.empty_like(gate), torch.empty_like(up)
        _gated_backward(gradients[0], gate, up, for_gate, for_up)
        return for_gate, for_up


class _SiluGateJoined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        return _gated(*both.chunk(2, dim=1))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (both,) = ctx.saved_tensors
        result = torch.empty_like(both)
        _gated_backward(gradients[0], *both.chunk(2, dim=1), *result.chunk(2, dim=1))
        return result


def rotate(x: torch.Tensor, turn: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Return x with its rotary position embedding (https://arxiv.org/abs/2104.09864).

    Args:
        x: Shape `(tokens, heads, head width)`.
        turn: Complex cos + i sin, shape `(tokens, turned pairs)`; the numbers behind the turned pairs stay.
        interleaved: Whether the two of a pair stand side by side (Glm), not half of the turned width apart (Llama).
    """
    result: torch.Tensor = _Rotate.apply(x, turn, interleaved)  # type: ignore[no-untyped-call]
    return result


def _turn(x: torch.Tensor, turn: torch.Tensor, interleaved: bool) -> torch.Tensor:
    width = 2 * turn.shape[1]
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for some in blocks(result):
        turned = x[some, :, :width].to(torch.float32, copy=True)
        pairs = turned.view(*turned.shape[:2], -1, 2)
        if not interleaved:
            pairs = turned.view(*turned.shape[:2], 2, -1).transpose(2, 3).contiguous()
        torch.view_as_complex(pairs).mul_(turn[some, None])
        result[some, :, :width] = (pairs if interleaved else pairs.transpose(2, 3)).flatten(2)
        result[some, :, width:] = x[some, :, width:]
    return result


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, turn: torch.Tensor, interleaved: bool) -> torch.Tensor:
        ctx.turn, ctx.interleaved = turn, interleaved
        return _turn(x, turn, interleaved)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _turn(gradients[0], ctx.turn.conj(), ctx.interleaved), None, None
