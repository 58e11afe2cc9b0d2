"""Find and load an encoder: a model that gives a state for every token, without a head, from safetensors alone."""

from pathlib import Path
from typing import Any

import torch

from llm_clf.config import DEFAULT_BASE, ModelSettings
from llm_clf.errors import ArtifactError
from llm_clf.models.bases import base_config, context_length, find_base, loading_of

# In transformers' list of causal language models, and yet every state of theirs sees all tokens.
BIDIRECTIONAL = frozenset({"xlnet", "bert-generation"})
POOLER = "pooler."


def is_causal(config: Any) -> bool:
    """Whether a state sees only the tokens before it, as in a decoder."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.model_type
    writes = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return bool(getattr(config, "is_decoder", False)) or (writes and kind not in BIDIRECTIONAL)


def require_encoder(name: str) -> None:
    """Refuse what is no encoder or has no safe weights; its config is read, no weight.

    Raises:
        ArtifactError: It cannot be found, is a decoder or an encoder-decoder, or its weights are pickled. The decoder
            that ships is allowed.
    """
    config = base_config(ModelSettings(name=name))
    if getattr(config, "is_encoder_decoder", False):
        raise ArtifactError(
            f"{name}: is an encoder-decoder ({config.model_type}), and an encoder is wanted. Give one, such as "
            "roberta-base."
        )
    if is_causal(config) and name != DEFAULT_BASE:
        raise ArtifactError(
            f"{name}: is a decoder ({config.model_type}): its tokens do not see those behind them. Train it with "
            f"`llm-clf finetune DIR --out RUN --model {name}` (--set model.head=linear puts a linear head on it), or "
            "give an encoder, such as roberta-base."
        )
    place = Path(find_base(name))
    if place.is_dir() and not any(place.glob("*.safetensors")):
        found = next((file.name for file in sorted(place.glob("*.bin"))), "no weights")
        raise ArtifactError(
            f"{name}: holds {found} and no model.safetensors. Files of pickle can run code when they are read, so they "
            'are not loaded. If you trust this one, write it anew: python -c "from transformers import AutoModel; '
            f"AutoModel.from_pretrained('{name}').save_pretrained('NEW')\", and copy the tokenizer's files to NEW."
        )


def load_trunk(name: str, *, attention: str | None = None, seed: int = 0) -> Any:
    """Return the model in fp32, in evaluation mode.

    Args:
        name: As `find_base` takes it.
        attention: How transformers is to compute it; None: as it likes.
        seed: Of the pooler's weights, where the files have none: RoBERTa's were saved without.

    Raises:
        ArtifactError: It cannot be loaded, or its files do not hold all other weights.
    """
    from transformers import AutoModel

    options = {"attn_implementation": attention} if attention is not None else {}
    torch.manual_seed(seed)
    with loading_of(name, "model"):
        trunk, report = AutoModel.from_pretrained(
            find_base(name),
            trust_remote_code=False,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    absent = sorted(key for key in report["missing_keys"] if not key.startswith(POOLER))
    absent += sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise ArtifactError(
            f"{name}: its files lack or mis-shape {len(absent)} weights, first {absent[0]}. Copy it again."
        )
    # Keys and values are never read again.
    trunk.config.use_cache = False
    return trunk.eval()


def load_encoder_tokenizer(name: str, trunk: Any) -> Any:
    """Return the tokenizer that belongs to a loaded model.

    Raises:
        ArtifactError: There is none, or it has more tokens than the model.
    """
    from transformers import AutoTokenizer

    with loading_of(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(find_base(name), trust_remote_code=False)
    # Without its files transformers makes one that knows the special tokens alone.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise ArtifactError(f"{name}: has no tokenizer (tokenizer.json). Copy the tokenizer's files into the folder.")
    rows = trunk.get_input_embeddings().num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ArtifactError(
            f"{name}: its tokenizer makes tokens up to {highest}, and the model knows {rows}. Give the tokenizer that "
            "belongs to the weights."
        )
    return tokenizer


def longest_input(trunk: Any, tokenizer: Any) -> int | None:
    """Return the most tokens that an encoder can read, None where nothing says so."""
    limits = [context_length(trunk.config), tokenizer.model_max_length]
    # RoBERTa counts positions from behind its padding token's id.
    limits += [
        part.num_embeddings - part.padding_idx - 1
        for name, part in trunk.named_modules()
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None
    ]
    # Where a tokenizer does not know, it says a number beyond all measure.
    return min((int(limit) for limit in limits if limit is not None and limit < 10**9), default=None)
