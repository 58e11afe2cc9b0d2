"""LoRA layers computed in the base's number type, the update added by one product.

PEFT copies the input to the adapter's fp32, multiplies there, scales, adds and converts back. Here the adapter's two
small matrices are rounded to the base's type instead and the scale is put into the smaller one. The adapter itself
stays fp32: what the optimiser changes is not rounded.
"""

from types import MethodType
from typing import Any

import torch
from torch.nn.functional import linear


def enable_fast_lora(model: Any) -> None:
    """Give every plain LoRA layer of a PEFT model the short forward; others (DoRA, quantised bases, …) keep theirs."""
    from peft.tuners.lora import Linear

    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            module.forward = MethodType(_forward, module)


def _is_plain(module: Any) -> bool:
    names = module.active_adapters
    return (
        len(names) == 1
        and names[0] in module.lora_A
        and type(module.get_base_layer()) is torch.nn.Linear
        and not module.lora_variant.get(names[0])
        and module.lora_B[names[0]].bias is None
        and module.lora_A[names[0]].bias is None
    )


def _forward(module: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    from peft.tuners.lora import Linear

    if module.disable_adapters or module.merged:
        # PEFT's own forward knows what to do when an adapter is switched off or merged.
        whole: torch.Tensor = Linear.forward(module, x, *arguments, **options)
        return whole
    base = module.base_layer(x)
    name = module.active_adapters[0]
    first = module.lora_A[name].weight.to(x.dtype)
    second = (module.lora_B[name].weight * module.scaling[name]).to(x.dtype)
    inner = linear(module.lora_dropout[name](x), first)
    return torch.addmm(base.flatten(0, -2), inner.flatten(0, -2), second.t()).view(base.shape)
