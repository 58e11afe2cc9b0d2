"""The ways to do less work, as the settings allow and the base knows them."""

from typing import Any

from llm_clf.config import SpeedSettings
from llm_clf.engine.decoder import enable_fused_layers
from llm_clf.engine.lora import enable_fast_lora
from llm_clf.engine.packing import allows_packing, enable_packing


def speed_up(model: Any, speed: SpeedSettings, *, every_state: bool = False) -> bool:
    """Let a model do less work for the same result; return whether it reads packed rows.

    Args:
        model: With or without an adapter.
        speed: What is allowed.
        every_state: Whether the states of all tokens are needed, not only where the prompt ends and behind it.
    """
    if speed.fast_lora:
        enable_fast_lora(model)
    packed = speed.packing and allows_packing(model.config)
    if packed:
        enable_packing(model)
        if speed.fused_layers:
            enable_fused_layers(model, short=speed.short_last_layer and not every_state)
    return packed
