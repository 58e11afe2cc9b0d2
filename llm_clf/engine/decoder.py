"""Decoder layers of known families with the package's own kernels, the last one only where an answer is read.

Glm, Llama, Mistral, Qwen2 and Qwen3 are built alike: norm, attention with rotary embeddings, norm, gated MLP, each
added to what came in. Their layers get a forward that does the same in fewer passes over packed rows; whatever else
they are given they read with their own.
"""

from functools import cache
from typing import Any

import torch

from llm_clf.engine.kernels import rms_norm, rotate, silu_gate, silu_gate_joined
from llm_clf.engine.lora import adapted_linears
from llm_clf.engine.parts import unwrapped

# Whether the two numbers that are turned together stand side by side.
INTERLEAVED = {"glm": True, "llama": False, "mistral": False, "qwen2": False, "qwen3": False}


def enable_fused_layers(model: Any, *, short: bool) -> bool:
    """Give the layers of a known family the forward of this module; return whether the family is known.

    Args:
        model: A causal language model of transformers, with or without an adapter.
        short: Whether the last layer computes queries, output and MLP at the wanted places only.
    """
    config = model.config.get_text_config()
    if config.model_type not in INTERLEAVED or config.hidden_act != "silu" or config.attention_dropout:
        return False
    layers = _layers(model)
    for layer in layers:
        layer.__class__ = _fused(layer.__class__, INTERLEAVED[config.model_type])
        layer.ends_short = short and layer is layers[-1]
    return True


@cache
def _fused(kind: type, interleaved: bool) -> type:
    """Return a kind of layer with the forward of this module.

    A class and not a function in the layer's place: transformers computes activations again around the forward of a
    layer's class, and would leave a layer's own one alone.
    """

    def forward(
        layer: Any, hidden_states: torch.Tensor, *arguments: Any, layout: Any = None, **options: Any
    ) -> torch.Tensor:
        if layout is None:
            whole: torch.Tensor = kind.forward(layer, hidden_states, *arguments, **options)  # type: ignore[attr-defined]
            return whole
        return _forward(layer, hidden_states, interleaved, layout, options["position_embeddings"])

    return type(kind.__name__, (kind,), {"forward": forward})


def ends_short(model: Any) -> bool:
    """Whether a model's last layer leaves the wanted places only."""
    return bool(hasattr(unwrapped(model), "model") and getattr(_layers(model)[-1], "ends_short", False))


def _layers(model: Any) -> Any:
    return unwrapped(model).model.layers


def _forward(
    layer: Any,
    hidden_states: torch.Tensor,
    interleaved: bool,
    layout: Any,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Return what the layer makes of a packed sequence, shape `(1, tokens, width)`.

    Where the layer ends short, `tokens` of the result are the wanted places.
    """
    cos, sin = (part[0].float() for part in position_embeddings)
    turn = torch.complex(*(part[:, : part.shape[1] // 2] for part in (cos, sin)))
    attention = layer.self_attn
    x = hidden_states[0]
    normed = _norm(layer.input_layernorm, x)
    if layer.ends_short:
        key, value = adapted_linears([attention.k_proj, attention.v_proj], normed)
        x, normed, queries_turn = x[layout.places], normed[layout.places], turn[layout.places]
        (query,) = adapted_linears([attention.q_proj], normed)
    else:
        query, key, value = adapted_linears([attention.q_proj, attention.k_proj, attention.v_proj], normed)
        queries_turn = turn
    query, key, value = (part.view(len(part), -1, attention.head_dim) for part in (query, key, value))
    if hasattr(attention, "q_norm"):
        query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
    query = rotate(query, queries_turn, interleaved=interleaved)
    key = rotate(key, turn, interleaved=interleaved)
    attended = layout.attend(attention.layer_idx, query, key, value, attention.scaling)
    x = x + adapted_linears([attention.o_proj], attended)[0]
    x = x + _gated_mlp(layer.mlp, _norm(layer.post_attention_layernorm, x))
    return x[None]


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the root-mean-square norm over the last dimension."""
    if module.weight.requires_grad:
        trained: torch.Tensor = module(x)
        return trained
    return rms_norm(x.flatten(0, -2), module.weight, module.variance_epsilon).view(x.shape)


def _gated_mlp(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    if hasattr(mlp, "gate_up_proj"):
        inner = silu_gate_joined(adapted_linears([mlp.gate_up_proj], x)[0])
    else:
        inner = silu_gate(*adapted_linears([mlp.gate_proj, mlp.up_proj], x))
    return adapted_linears([mlp.down_proj], inner)[0]
