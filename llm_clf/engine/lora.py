"""Linear layers that share their input, with their LoRA updates, in few products.

PEFT copies the input to the adapter's fp32 for each layer, multiplies there, scales, adds and converts back. Here the
adapter's small matrices are rounded to the base's type instead, the scale is put into the second one, those that share
their input multiply it once, and updates and gradients are added by the product that makes them. The adapter itself
stays fp32: what the optimiser changes is not rounded.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch


def enable_fast_lora(model: Any) -> None:
    """Give every plain LoRA layer of a PEFT model the short forward; others (DoRA, quantised bases, …) keep theirs."""
    for module in model.modules():
        if _is_plain(module):
            module.forward = MethodType(_forward, module)
            module.is_fast = True


def adapted_linears(modules: Sequence[Any], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what linear layers make of one input, each with its adapter.

    Where dropout is on, the adapters share its mask, as they share the input.

    Args:
        modules: Linear layers, some or all of them with LoRA. Those that are not plain are called as they are.
        x: Shape `(tokens, inputs)`.

    Returns:
        By layer, shape `(tokens, outputs)`.
    """
    if not all(_is_fast(module) for module in modules):
        return tuple(module(x) for module in modules)
    firsts, seconds, dropout = [], [], 0.0
    for module in modules:
        if hasattr(module, "is_fast"):
            name = module.active_adapters[0]
            firsts.append(module.lora_A[name].weight)
            seconds.append((module.lora_B[name].weight * module.scaling[name]).to(x.dtype))
            chance = module.lora_dropout[name]
            dropout = chance.p if isinstance(chance, torch.nn.Dropout) and chance.training else dropout
        else:
            seconds.append(None)
    layers = [module.get_base_layer() if hasattr(module, "get_base_layer") else module for module in modules]
    first = torch.cat(firsts).to(x.dtype) if firsts else None
    dropped = torch.nn.functional.dropout(x, dropout) if dropout else None
    weights = tuple((layer.weight, layer.bias) for layer in layers)
    result: tuple[torch.Tensor, ...] = _Linears.apply(x, dropped, weights, first, *seconds)  # type: ignore[no-untyped-call]
    return result


def _is_fast(module: Any) -> bool:
    if type(module) is torch.nn.Linear:
        return not module.weight.requires_grad
    # PEFT's own forward knows what to do when an adapter is switched off or merged.
    return hasattr(module, "is_fast") and not (module.disable_adapters or module.merged)


def _is_plain(module: Any) -> bool:
    """Whether a module is a LoRA layer with one adapter, without more than LoRA, on a frozen linear layer."""
    from peft.tuners.lora import Linear

    if type(module) is not Linear or len(module.active_adapters) != 1:
        return False
    name, base = module.active_adapters[0], module.get_base_layer()
    return (
        name in module.lora_A
        and type(base) is torch.nn.Linear
        and not base.weight.requires_grad
        and not module.lora_variant.get(name)
        and module.lora_B[name].bias is None
        and module.lora_A[name].bias is None
    )


def _forward(module: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    from peft.tuners.lora import Linear

    if not _is_fast(module):
        whole: torch.Tensor = Linear.forward(module, x, *arguments, **options)
        return whole
    return adapted_linears([module], x.flatten(0, -2))[0].view(*x.shape[:-1], -1)


class _Linears(torch.autograd.Function):
    """y_i = x W_iᵀ + b_i + (x Aᵀ)_i B_iᵀ for layers that share x; A holds the first matrices of all, B_i is scaled."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        weights: tuple[tuple[torch.Tensor, torch.Tensor | None], ...],
        first: torch.Tensor | None,
        *seconds: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        source = x if dropped is None else dropped
        inner = source.mm(first.t()) if first is not None else None
        results = []
        for (weight, bias), second, ranks in zip(weights, seconds, _ranks(seconds), strict=True):
            result = x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
            if second is not None and inner is not None:
                result.addmm_(inner[:, ranks], second.t())
            results.append(result)
        ctx.save_for_backward(source, first, inner, *seconds)
        ctx.weights, ctx.drops = weights, dropped is not None
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        source, first, inner, *seconds = ctx.saved_tensors
        for_inner = torch.zeros_like(inner) if inner is not None else None
        for_seconds: list[torch.Tensor | None] = []
        for_x: torch.Tensor | None = None
        for (weight, _), second, ranks, gradient in zip(ctx.weights, seconds, _ranks(seconds), gradients, strict=True):
            if gradient is not None and second is not None and for_inner is not None:
                for_inner[:, ranks] = gradient.mm(second)
                for_seconds.append(gradient.t().mm(inner[:, ranks]))
            else:
                for_seconds.append(None)
            if gradient is not None and ctx.needs_input_grad[0]:
                for_x = gradient.mm(weight) if for_x is None else for_x.addmm_(gradient, weight)
        for_first = for_dropped = None
        if for_inner is not None:
            for_first = for_inner.t().mm(source)
            if ctx.drops and ctx.needs_input_grad[1]:
                for_dropped = for_inner.mm(first)
            elif for_x is not None and not ctx.drops:
                for_x.addmm_(for_inner, first)
        return for_x, for_dropped, None, for_first, *for_seconds


def _ranks(seconds: Sequence[torch.Tensor | None]) -> list[slice]:
    """Return which columns of the product with the first matrices belong to each layer."""
    first, found = 0, []
    for second in seconds:
        size = 0 if second is None else second.shape[1]
        found.append(slice(first, first + size))
        first += size
    return found
