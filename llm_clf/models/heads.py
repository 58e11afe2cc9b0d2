"""The linear head of a model for sequence classification, as transformers and PEFT name and keep it.

It is held in fp32, whatever the base is: PEFT trains and saves a copy of it in its own type.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from llm_clf.errors import ArtifactError

SCORE = "score"
WEIGHT = f"{SCORE}.weight"
# As PEFT names what is no causal language model.
SEQ_CLS = "SEQ_CLS"


def classes_of(labels: Sequence[str]) -> dict[str, Any]:
    """Return the entries of a model's config that name its labels, in the task's order."""
    return {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}


def require_head_known(config: Any, name: str) -> None:
    """Refuse a base for which transformers has no sequence classification.

    Raises:
        ArtifactError: It has none.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ArtifactError(
            f"{name}: transformers has no sequence classification for a {config.model_type}, so it can have no linear "
            "head. Use label words (model.head label-words), or another base."
        )


def prepare_head(model: Any, name: str, *, fresh: bool) -> None:
    """Put the head into fp32; one that the base's files do not have begins at zero, so that all labels are as probable.

    Args:
        model: Of a class for sequence classification.
        name: The base's, for messages.
        fresh: Whether the files lack it.

    Raises:
        ArtifactError: The head is not the one linear layer without a bias that decoders have.
    """
    head = getattr(model, SCORE, None)
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise ArtifactError(
            f"{name}: a {model.config.model_type} has another head in transformers than decoders have ({SCORE}), so it "
            "is no base for model.head linear. Give a decoder."
        )
    if fresh:
        # A new layer: where the base is quantised, the old one may be too.
        head = torch.nn.Linear(head.in_features, head.out_features, bias=False, device=model.device)
        torch.nn.init.zeros_(head.weight)
        setattr(model, SCORE, head)
    head.float()


def has_linear_head(model: Any) -> bool:
    """Whether a model, without an adapter around it, is one for sequence classification."""
    return hasattr(model, SCORE)


def heads_of(model: Any) -> list[Any]:
    """Return the layers of a model, without an adapter around it, that read states: these get no adapter."""
    found = (model.get_output_embeddings(), getattr(model, SCORE, None))
    return [head for head in found if head is not None]


@contextmanager
def as_stored(model: Any, tokenizer: Any) -> Iterator[None]:
    """Hold a linear head in the base's type for a while, rounded, as transformers would when it loads the model.

    The config is told what such a model needs to be used by itself: which token is padding.
    """
    if not has_linear_head(model):
        yield
        return
    if model.config.pad_token_id is None:
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    model.config.problem_type = "single_label_classification"
    head = getattr(model, SCORE)
    head.to(model.dtype)
    yield
    head.float()
