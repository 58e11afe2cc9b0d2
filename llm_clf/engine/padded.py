"""One forward over padded rows: the plain way, which every model of transformers takes."""

import inspect
from typing import Any

import torch

from llm_clf.engine.batches import Batch
from llm_clf.engine.parts import backbone, unwrapped


def last_logits(model: Any, batch: Batch, kept: int) -> torch.Tensor:
    """Return the logits at the last `kept` places of every row, shape `(rows, kept, vocabulary)`."""
    taken = _taken(unwrapped(model), batch, logits_to_keep=kept)
    logits: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **taken).logits
    return logits[:, -kept:]


def padded_states(model: Any, batch: Batch) -> torch.Tensor:
    """Return the last layer's states, normed as for the head, shape `(rows, tokens, width)`."""
    body = backbone(model)
    taken = _taken(body, batch)
    states: torch.Tensor = body(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, **taken
    ).last_hidden_state
    return states


def _taken(module: Any, batch: Batch, **extra: Any) -> dict[str, Any]:
    """Return those of the optional arguments that the module's forward takes."""
    optional = {"position_ids": batch.position_ids, "use_cache": False, **extra}
    taken = inspect.signature(module.forward).parameters
    return {name: value for name, value in optional.items() if name in taken}
