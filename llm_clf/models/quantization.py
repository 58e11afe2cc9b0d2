"""Bases whose linear layers are held in 8 or 4 bits by bitsandbytes, and the check that a base is what was read."""

from collections.abc import Mapping
from typing import Any

import torch

from llm_clf.errors import ArtifactError, ConfigError
from llm_clf.models.heads import WEIGHT

# Relative error of a whole weight, by Frobenius norm. NF4 of normally distributed weights has 0.09, int8 0.01; another
# weight in its place has 1 or more.
ERROR_LIMIT = 0.5
# Rows of a quantised weight that are compared: quantisation takes long enough.
SAMPLE = 64
# Weights that share a scale in NF4.
BLOCK = 64


def quantization_config(mode: str, compute: torch.dtype, whole: list[str] | None = None) -> Any:
    """Return what transformers needs to quantise while it loads.

    Args:
        mode: `8bit` (LLM.int8(), https://arxiv.org/abs/2208.07339) or `4bit` (NF4 with double quantisation,
            https://arxiv.org/abs/2305.14314).
        compute: What weights are unpacked to and multiplied in.
        whole: Layers that stay as they are; None: the head of a causal language model, which transformers finds.
    """
    from transformers import BitsAndBytesConfig

    if mode == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=whole,
    )


def require_usable(model: Any, mode: str, name: str) -> None:
    """Refuse a 4-bit base whose layers bitsandbytes cannot multiply on this device.

    Raises:
        ConfigError: On a CPU, a layer's inputs are no multiple of the 64 that share a scale.
    """
    if mode != "4bit" or model.device.type != "cpu":
        return
    for layer, part in model.named_modules():
        if hasattr(part, "quant_state") and part.in_features % BLOCK:
            raise ConfigError(
                f"model.quantization 4bit: {layer} of {name} has {part.in_features} inputs, and on a CPU bitsandbytes "
                f"needs a multiple of {BLOCK}. Use 8bit or none, or a CUDA card."
            )


def require_loaded(model: Any, weights: Mapping[str, torch.Tensor], name: str) -> None:
    """Compare every weight of a model with the one that it was loaded from.

    A weight must be equal in the model's type; of a quantised one a sample of rows is compared, which may differ by
    what quantisation does.

    Raises:
        ArtifactError: A weight differs.
    """
    for key, parameter in model.named_parameters():
        if key == WEIGHT:
            # A linear head is no part of the checkpoint.
            continue
        source = weights[key]
        if parameter.data_ptr() == source.data_ptr() and parameter.dtype == source.dtype:
            # A view of the mapped file, which need not be read.
            continue
        held = dequantized(parameter)
        if held.data_ptr() == parameter.data_ptr():
            same = torch.equal(held, source.to(held.device, held.dtype))
        else:
            step = max(1, held.shape[0] // SAMPLE)
            same = _is_close(held[::step].float(), source[::step].to(held.device).float())
        if not same:
            raise ArtifactError(
                f"{name}: {key} is not the checkpoint's after loading, so no answer of this model could be trusted. "
                "Report it with the output of `llm-clf doctor`."
            )


def _is_close(held: torch.Tensor, given: torch.Tensor) -> bool:
    return bool((held - given).norm() <= ERROR_LIMIT * given.norm())


def dequantized(parameter: Any) -> torch.Tensor:
    """Return a weight as numbers in its own shape, whichever way bitsandbytes holds it; others as they are."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        unpacked: torch.Tensor = dequantize_4bit(parameter.data, state)
        return unpacked
    scale = getattr(parameter, "SCB", None)
    if scale is not None:
        # LLM.int8(): each output has its own scale, its largest weight over 127.
        unpacked = parameter.data.float() * (scale / 127).unsqueeze(1)
        return unpacked
    plain: torch.Tensor = parameter
    return plain


def keep_differentiable(model: Any) -> None:
    """Keep a 4-bit base as it is, and fit for training, after it has scored rows.

    On a CPU with AVX-512 BF16, bitsandbytes 0.50 packs each 4-bit weight anew at the first forward in evaluation mode
    and multiplies the packed ones with a kernel that has no gradient; a state dict unpacks them again, with scales
    rounded once more. A training would go on from each validation with other weights, and without this package's
    checkpoint in between with wrong gradients. Elsewhere this changes nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
