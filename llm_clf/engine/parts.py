"""The parts of a transformers model, with or without PEFT around it."""

from typing import Any


def unwrapped(model: Any) -> Any:
    """Return the model of transformers itself; where there is an adapter, its layers have it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model: Any) -> Any:
    """Return what makes states of tokens: the model without its head."""
    return unwrapped(model).base_model
