"""Find and load a base model with its tokenizer, and tell whether it is still the same."""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_clf.config import DEFAULT_BASE, ModelSettings
from llm_clf.errors import ArtifactError, ConfigError, LlmClfError
from llm_clf.files import path_of, read_json
from llm_clf.models.chatglm.config import ROPE, family_of, is_chatglm, is_chatglm_config, native_config, read_config
from llm_clf.models.chatglm.tokenizer import MODEL, build_tokenizer, end_ids
from llm_clf.models.chatglm.weights import native_weights
from llm_clf.models.devices import DTYPES
from llm_clf.models.heads import SCORE, WEIGHT, classes_of, prepare_head, require_head_known
from llm_clf.models.quantization import quantization_config, require_loaded, require_usable

SHIPPED = Path(__file__).resolve().parent / DEFAULT_BASE
WEIGHT_SUFFIXES = (".safetensors", ".bin")
SAMPLE = 2**20


def find_base(name: str) -> str:
    """Return what transformers loads for a base's name: a folder, or a Hugging Face id.

    Raises:
        ArtifactError: The name is a path, and nothing fit is there.
    """
    if name == DEFAULT_BASE and not Path(name).is_dir():
        return str(SHIPPED)
    place = path_of(name)
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise ArtifactError(
                f"{name}: has no config.json, so it is no model folder. Give one that transformers saved."
            )
        return str(place)
    if place.exists() or place.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ArtifactError(
            f"{name}: there is no such model folder. Give a folder, a Hugging Face id, or {DEFAULT_BASE}."
        )
    return name


def resolve_base(base: ModelSettings) -> tuple[ModelSettings, Path | None]:
    """Return the settings with what `auto` means for this base, and its folder where it is an original ChatGLM.

    Raises:
        ArtifactError: The base cannot be found, or is a ChatGLM that cannot be used.
        ConfigError: A setting for ChatGLM is given for another base, or is needed and missing.
    """
    folder = _chatglm_folder(base.name)
    if folder is None:
        for key in ("family", "rope_ratio"):
            if getattr(base, key) != "auto":
                raise ConfigError(
                    f"model.{key} {getattr(base, key)}: {base.name} is no original ChatGLM folder, and only such a one "
                    "leaves it open. Set it to auto."
                )
        return base, None
    read_config(folder)
    family = family_of(folder, base.family)
    rope = ROPE[family] if base.rope_ratio == "auto" else base.rope_ratio
    return base.model_copy(update={"family": family, "rope_ratio": rope}), folder


def _chatglm_folder(name: str) -> Path | None:
    """Return the folder of an original ChatGLM; None for other bases.

    Of one on the hub config and tokenizer are fetched; the weights only by `_fetch_weights`.
    """
    found = find_base(name)
    if Path(found).is_dir():
        return Path(found) if is_chatglm(Path(found)) else None
    from huggingface_hub import hf_hub_download, snapshot_download

    with loading_of(name, "config"):
        if not is_chatglm_config(read_json(Path(hf_hub_download(name, "config.json")))):
            return None
        return Path(snapshot_download(name, allow_patterns=["*.json", MODEL]))


def _fetch_weights(name: str, folder: Path) -> None:
    """Put the weights of a ChatGLM on the hub beside its config; in one format, where there are both."""
    if Path(find_base(name)).is_dir():
        return
    from huggingface_hub import snapshot_download

    formats = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if any(folder.glob(f"*{suffix}.index.json"))]
    with loading_of(name, "model"):
        # A snapshot's folder has the name of its commit.
        snapshot_download(name, revision=folder.name, allow_patterns=formats[:1] or ["*.safetensors", "*.bin"])


def base_config(base: ModelSettings) -> Any:
    """Return the base's config as transformers knows it; no weight is read.

    Raises:
        ArtifactError: It cannot be found, or is of no causal language model.
    """
    base, folder = resolve_base(base)
    if folder is not None:
        return native_config(folder, rope_ratio=base.rope_ratio)
    from transformers import AutoConfig

    with loading_of(base.name, "config"):
        return AutoConfig.from_pretrained(find_base(base.name), trust_remote_code=False)


def is_quantized(base: ModelSettings) -> bool:
    """Whether the base's weights are held in few bits: because the settings say so, or as they lie on disk."""
    return base.quantization != "none" or getattr(base_config(base), "quantization_config", None) is not None


def load_tokenizer(base: ModelSettings) -> Any:
    """Return the base's tokenizer.

    Raises:
        ArtifactError: There is none, it has no end token, or more tokens than the base.
    """
    base, folder = resolve_base(base)
    if folder is not None:
        return _chatglm_tokenizer(base, folder)
    from transformers import AutoTokenizer

    with loading_of(base.name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(find_base(base.name), trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ArtifactError(f"{base.name}: its tokenizer has no end token (eos_token), and an answer needs one.")
    return tokenizer


def _chatglm_tokenizer(base: ModelSettings, folder: Path) -> Any:
    tokenizer = build_tokenizer(folder, family=base.family)
    rows = read_config(folder)["padded_vocab_size"]
    if len(tokenizer) > rows:
        raise ArtifactError(
            f"{folder}: {MODEL} makes {len(tokenizer)} tokens; config.json (padded_vocab_size) has room for {rows}. "
            "Give the tokenizer that belongs to the weights."
        )
    return tokenizer


def load_model(
    base: ModelSettings, *, dtype: str, device: torch.device, labels: Sequence[str] = (), complete: bool = False
) -> Any:
    """Return the base in evaluation mode, frozen, on the device: a causal language model, or one with a linear head.

    Args:
        base: Name, head, quantisation and what an original ChatGLM leaves open.
        dtype: Type of the weights, and of the computation where they are quantised: a name of DTYPES.
        device: Where to.
        labels: What a linear head tells apart, in the task's order.
        complete: Refuse a base whose files lack the linear head, which otherwise begins at zero.

    Raises:
        ArtifactError: It cannot be loaded, or its files do not hold all of its weights.
    """
    base, folder = resolve_base(base)
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "device_map": {"": device}, "output_loading_info": True}
    if base.quantization != "none":
        options["quantization_config"] = quantization_config(
            base.quantization, DTYPES[dtype], [SCORE] if base.head == "linear" else None
        )
    load = _load_folder_or_id if folder is None else partial(_load_chatglm, folder=folder)
    model, report = load(base, labels, options)
    fresh = base.head == "linear" and WEIGHT in report["missing_keys"]
    if fresh and complete:
        raise ArtifactError(f"{base.name}: has no linear head ({WEIGHT}). Give a run, or an adapter with its head.")
    _require_whole(base.name, report, but={WEIGHT} if fresh else set())
    if base.head == "linear":
        prepare_head(model, base.name, fresh=fresh)
    require_usable(model, base.quantization, base.name)
    return model.eval().requires_grad_(False)


def _load_folder_or_id(base: ModelSettings, labels: Sequence[str], options: dict[str, Any]) -> tuple[Any, Any]:
    """Return a base of transformers, and what its files lacked."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForCausalLM
    if base.head == "linear":
        require_head_known(base_config(base), base.name)
        auto, options = AutoModelForSequenceClassification, options | classes_of(labels)
    with loading_of(base.name, "model"):
        loaded: tuple[Any, Any] = auto.from_pretrained(find_base(base.name), trust_remote_code=False, **options)
    return loaded


def _load_chatglm(
    base: ModelSettings, labels: Sequence[str], options: dict[str, Any], *, folder: Path
) -> tuple[Any, Any]:
    """Return an original ChatGLM as the native network, and what its files lacked."""
    from transformers import GlmForCausalLM, GlmForSequenceClassification

    _fetch_weights(base.name, folder)
    config = native_config(folder, rope_ratio=base.rope_ratio)
    weights = native_weights(folder, config)
    glm = GlmForCausalLM
    if base.head == "linear":
        glm = GlmForSequenceClassification
        config.update(classes_of(labels))
    with loading_of(base.name, "model"):
        model, report = glm.from_pretrained(None, config=config, state_dict=weights, **options)
    require_loaded(model, weights, base.name)
    if base.head == "label-words":
        model.generation_config.eos_token_id = end_ids(folder, family=base.family)
    return model, report


def _require_whole(name: str, report: Any, *, but: set[str]) -> None:
    absent = sorted(report["missing_keys"] - but) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise ArtifactError(
            f"{name}: its files lack or mis-shape {len(absent)} weights, first {absent[0]}. Copy it again."
        )


@contextmanager
def loading_of(name: str, what: str) -> Iterator[None]:
    """Turn the many errors of a failed load into one that says what to do."""
    quiet = logging.getLogger("transformers")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        yield
    except LlmClfError:
        raise
    except Exception as error:
        # Damaged files come as whatever the library that reads them raises: safetensors, pickle, tokenizers, …
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(
            f"{name}: the {what} cannot be loaded: {reason} "
            f"Give a folder that transformers saved, a Hugging Face id that can be reached, or {DEFAULT_BASE}."
        ) from error
    finally:
        quiet.setLevel(level)


def context_length(config: Any) -> int | None:
    """Return the most tokens that a base can read, None where its config does not say."""
    text = config.get_text_config()
    return next(
        (int(text.__dict__[key]) for key in ("max_position_embeddings", "n_positions") if text.__dict__.get(key)), None
    )


def base_identity(name: str) -> dict[str, Any]:
    """Return the base's name and a hash that changes with its config, tokenizer or weights.

    For a base on a hub it is the commit. In a folder, config and tokenizer files are hashed whole; of each file of
    weights its size and 1 MiB at the start, in the middle and at the end: a base of many gigabytes takes no time.
    """
    place = Path(find_base(name))
    if not place.is_dir():
        return {"name": name, "hash": _hub_commit(name)}
    digest = hashlib.sha256()
    for file in sorted(place.iterdir()):
        if file.suffix in WEIGHT_SUFFIXES:
            _hash_sample(file, digest)
        elif file.name.startswith(("config", "tokenizer", "vocab", "merges", "chat_template", "special_tokens")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return {"name": name, "hash": digest.hexdigest()}


def _hub_commit(name: str) -> str:
    """Return the commit of a base on a hub, which stands for all of its files; only its config is fetched.

    Without a network it is the commit of the copy in the local cache.
    """
    from huggingface_hub import hf_hub_download

    with loading_of(name, "config"):
        # The client puts a file at .../snapshots/COMMIT/FILE.
        return Path(hf_hub_download(name, "config.json")).parent.name


def _hash_sample(file: Path, digest: "hashlib._Hash") -> None:
    size = file.stat().st_size
    digest.update(f"{file.name}\0{size}\0".encode())
    with open(file, "rb") as opened:
        for start in (0, max(0, size // 2 - SAMPLE // 2), max(0, size - SAMPLE)):
            opened.seek(start)
            digest.update(opened.read(SAMPLE))


def prepare_libraries() -> None:
    """Set up torch and its like before they compute: less memory, and none of their own bars and notices.

    oneDNN keeps a kernel for each shape that it has met. Packed rows have ever new lengths: 1,024 kernels, its default,
    are half a gigabyte, and few are met again.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes.cextension").setLevel(logging.ERROR)
