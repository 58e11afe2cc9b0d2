"""LoRA adapters through PEFT: make one, attach a saved one, take its weights out and put them back."""

import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llm_clf.config import LoraSettings, ModelSettings
from llm_clf.errors import ArtifactError, ConfigError
from llm_clf.files import cannot_write, read_json
from llm_clf.models.heads import SCORE, SEQ_CLS, WEIGHT, has_linear_head, heads_of

ALL_LINEAR = "all-linear"
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def new_adapter(model: Any, settings: LoraSettings, *, seed: int) -> Any:
    """Return the model with a fresh adapter, which changes nothing yet: PEFT starts B at zero.

    Adapter weights are fp32, whatever the base is.

    Raises:
        ConfigError: No layer of the base fits `lora.target_modules`.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        # PEFT trains and saves the head of a sequence classification beside the adapter.
        task_type=TaskType.SEQ_CLS if has_linear_head(model) else TaskType.CAUSAL_LM,
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=_targets(model, settings.target_modules),
        exclude_modules=_targets(model, settings.exclude_modules or []) or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    torch.manual_seed(seed)
    try:
        with _without_peft_notices():
            return get_peft_model(model, config)
    except (ValueError, re.error) as error:
        layers = _linear_names(model)
        raise ConfigError(
            f"lora.target_modules {settings.target_modules!r}: {str(error).splitlines()[0]} "
            f"The base's linear layers are {', '.join(layers)}."
        ) from error


def _targets(model: Any, names: str | list[str]) -> str | list[str]:
    """Return names of layers as this base has them; ChatGLM's own names mean the native layers made of them."""
    from llm_clf.models.chatglm.adapters import native_names

    if names == ALL_LINEAR:
        return _linear_names(model)
    if isinstance(names, list) and model.config.model_type == "glm":
        return native_names(names)
    return names


def _linear_names(model: Any) -> list[str]:
    """Return the names of the base's linear layers, without its head.

    PEFT's own `all-linear` writes the full name of every layer into the adapter's config; a base with more layers
    would then take the adapter without a word.
    """
    from transformers.pytorch_utils import Conv1D

    heads = heads_of(model)
    layers = (
        name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear | Conv1D) and part not in heads
    )
    return sorted({name.rpartition(".")[2] for name in layers})


def save_adapter(model: Any, folder: Path, *, base: str, tokenizer: Any) -> None:
    """Write the adapter as PEFT does, with the tokenizer beside it: by that another base is recognised."""
    model.peft_config["default"].base_model_name_or_path = base
    # Without the flag PEFT asks a hub whether the base's vocabulary was changed; it never is here.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    save_tokenizer(tokenizer, folder)
    # PEFT's model card is an empty form; the run folder says what there is to say.
    (folder / "README.md").unlink(missing_ok=True)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer as transformers does.

    Raises:
        DataError: The folder cannot be written, or the disk is full.
    """
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        # tokenizers is not written in Python, and gives the system's words in an error of no kind.
        raise cannot_write(folder, error) from error


def attach_adapter(model: Any, folder: Path, *, merge: bool, tokenizer: Any) -> Any:
    """Return the base with a saved adapter, in evaluation mode; `merge` adds it into the base's weights.

    Args:
        model: The base.
        folder: A folder that PEFT saved; for a Glm also one that was trained on ChatGLM's own code.
        merge: Whether to merge.
        tokenizer: The base's; compared with the one that was saved beside the adapter, if one was.

    Raises:
        ArtifactError: The folder holds no adapter, or one of another base.
    """
    from peft import PeftModel, get_peft_model_state_dict

    from llm_clf.models.chatglm.adapters import convert_adapter, is_legacy

    if not (folder / CONFIG).is_file():
        raise ArtifactError(f"{folder}: has no {CONFIG}, so it is no adapter.")
    shapes = _weight_shapes(adapter_weights(folder))
    if is_legacy(shapes):
        with TemporaryDirectory() as place:
            convert_adapter(folder, Path(place) / folder.name, model.config)
            return attach_adapter(model, Path(place) / folder.name, merge=merge, tokenizer=tokenizer)
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise ArtifactError(
            f"{folder / CONFIG}: found {type(config).__name__}, expected what PEFT writes. Copy it again."
        )
    _require_same_head(folder, config, shapes, model)
    trained_on = config.get("base_model_name_or_path")
    this = f"{model.config.name_or_path} (the adapter was trained on {trained_on})"
    _require_same_tokenizer(folder, tokenizer, this)
    try:
        with _without_peft_notices():
            adapted = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, OSError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{folder}: the adapter does not fit the base {this}: {reason}") from error
    # PEFT only warns of weights that find no place, and leaves those that are absent as they were drawn.
    wrong = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) ^ shapes.keys()
    if wrong:
        raise ArtifactError(
            f"{folder}: the adapter does not fit the base {this}: {len(wrong)} weights have no counterpart, first "
            f"{min(wrong)}. Give the base that it was trained on."
        )
    return (merge_adapter(adapted) if merge else adapted).eval()


def require_mergeable(base: ModelSettings) -> None:
    """Refuse to add an adapter into weights of 8 or 4 bits; the base's config is read, no weight.

    Raises:
        ConfigError: The base is quantised.
    """
    from llm_clf.models.bases import is_quantized

    if is_quantized(base):
        found = f"model.quantization {base.quantization}" if base.quantization != "none" else "as it lies on disk"
        raise ConfigError(
            f"predict.merge true: {base.name} is quantised ({found}), and rounding the merged weights to so few bits "
            "would blur what was learned. Set predict.merge to false, and the adapter is used beside the base."
        )


def merge_adapter(adapted: Any) -> Any:
    """Return the base with the adapter added into its weights, the sum made in fp32 and rounded once to their type.

    A head that shares its weights with the input embeddings, and has an adapter that they have not, gets its own.

    Args:
        adapted: A base that is not quantised, with its adapter beside it as PEFT attached it. It must not be used
            afterwards: its weights are changed in place, and one layer at a time is held twice.

    Raises:
        ArtifactError: A merged weight is no finite number in the base's type.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, layer) for name, layer in adapted.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in layers:
        # Experts that lie in one tensor have a layer for each of their parameters, one around the other.
        key = getattr(layer, "parameter_name", "weight")
        base = layer.get_base_layer()
        weight = getattr(base, key)
        assert weight.is_floating_point(), "weights in 8 or 4 bits are refused by require_mergeable"
        # PEFT 0.21 with a half-precision weight: safe_merge, and experts in any case, round the product of B and A to
        # the weight's type before it is added, so a sum is rounded twice; the plain merge of other layers adds in fp32
        # because PyTorch promotes it. With the weight in fp32 they all do, and only one layer is held so at a time. A
        # parameter of its own, since the old one may be a view of a file, or the embeddings' too.
        setattr(base, key, torch.nn.Parameter(weight.detach().to(torch.float32, copy=True), requires_grad=False))
        layer.merge()
        merged = getattr(base, key).detach().to(weight.dtype)
        if not merged.isfinite().all():
            raise ArtifactError(
                f"{name}: merged with the adapter, its weights hold infinite numbers or none in {weight.dtype}. "
                "Train again in a type of larger range (model.dtype bf16 or fp32)."
            )
        setattr(base, key, torch.nn.Parameter(merged, requires_grad=False))
    model = adapted.unload()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if (
        getattr(model.config, "tie_word_embeddings", False)
        and head is not None
        and head.weight is not embeddings.weight
    ):
        model.config.tie_word_embeddings = False
    return model


def adapter_weights(folder: Path) -> Path:
    """Return the file of an adapter's weights.

    Raises:
        ArtifactError: There is none.
    """
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise ArtifactError(f"{folder}: holds no adapter weights ({' or '.join(WEIGHTS)}).")
    return found


def _weight_shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's weights by their names."""
    try:
        if weights.suffix == ".safetensors":
            with safe_open(weights, framework="pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        tensors = torch.load(weights, map_location="meta", weights_only=True)
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except (OSError, RuntimeError, ValueError, AttributeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{weights}: is damaged: {reason}. Copy it again.") from error


def _require_same_head(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], model: Any) -> None:
    """Refuse an adapter that was trained to be read by another head than the model has."""
    linear = has_linear_head(model)
    if (config.get("task_type") == SEQ_CLS) != linear:
        kinds = {True: "a linear head", False: "label words"}
        raise ArtifactError(
            f"{folder / CONFIG}: task_type {config.get('task_type')}, so the adapter was not trained for "
            f"{kinds[linear]}. Set model.head to {'label-words' if linear else 'linear'}."
        )
    if not linear:
        return
    found = next((shape[0] for name, shape in shapes.items() if name.endswith(f".{WEIGHT}")), None)
    if found is None:
        raise ArtifactError(
            f"{folder}: was trained for sequence classification, and holds no head ({WEIGHT}). Save it again with "
            f"modules_to_save {SCORE}, or train again."
        )
    if found != model.config.num_labels:
        raise ArtifactError(
            f"{folder}: its head tells {found} labels apart, and the task has {model.config.num_labels}. Give the task "
            "that it was trained on."
        )


def _require_same_tokenizer(folder: Path, tokenizer: Any, base: str) -> None:
    if not (folder / "tokenizer.json").is_file():
        return
    from transformers import AutoTokenizer

    try:
        own = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder}: the tokenizer saved with the adapter cannot be read: {error}.") from error
    if own.get_vocab() != tokenizer.get_vocab():
        raise ArtifactError(
            f"{folder}: the adapter was trained with another tokenizer than that of the base {base}. "
            "Give the base that it was trained on."
        )


@contextmanager
def _without_peft_notices() -> Iterator[None]:
    """Keep quiet what PEFT says of itself (a property's old name, GPT-2's transposed layers) or what we see to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
        # Of an adapter at a head that shares its weights with the embeddings: merge_adapter heeds it.
        warnings.filterwarnings("ignore", message=".*a tied layer is part of the adapter", category=UserWarning)
        yield


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters that training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the adapter's weights on the CPU, by PEFT's names."""
    from peft import get_peft_model_state_dict

    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def load_adapter_state(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Put saved adapter weights back into the model."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, state)
