"""The shards of an original ChatGLM folder, memory-mapped, under the names of the native network."""

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llm_clf.errors import ArtifactError
from llm_clf.files import read_json

FORMATS = ("model.safetensors", "pytorch_model.bin")
POINTER = b"version https://git-lfs"
ENDS = {
    "transformer.embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "transformer.encoder.final_layernorm.weight": "model.norm.weight",
    "transformer.output_layer.weight": "lm_head.weight",
}
IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.dense.weight": "self_attn.o_proj.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up_proj.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down_proj.weight",
}
QKV = "self_attention.query_key_value"
LAYER = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(.+)")
# The rotary table, which is computed.
IGNORED = "transformer.rotary_pos_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class Shards:
    """The files of weights of one folder."""

    folder: Path
    files: dict[str, tuple[str, ...]]
    """Names of the files in order, each with the keys that the index places there; none where there is no index."""


def find_shards(folder: Path) -> Shards:
    """Return the files of weights that an index names, or the single one; safetensors where both kinds are whole.

    Raises:
        ArtifactError: There are none, one is missing or stands for a file that was never fetched, or the index is
            wrong.
    """
    fault: ArtifactError | None = None
    for single in FORMATS:
        index, whole = folder / f"{single}.index.json", folder / single
        if not (index.is_file() or whole.is_file()):
            continue
        shards = Shards(folder, _read_index(index) if index.is_file() else {single: ()})
        try:
            _require_files(shards)
        except ArtifactError as error:
            fault = fault or error
        else:
            return shards
    raise fault or ArtifactError(
        f"{folder}: holds no weights; expected {' or '.join(FORMATS)}, or several files and their index "
        f"({FORMATS[1]}.index.json). Copy the whole folder again."
    )


def _read_index(index: Path) -> dict[str, tuple[str, ...]]:
    require_no_pointer(index)
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise ArtifactError(f"{index}: has no weight_map, so it is no index of weights. Copy it again.")
    files: dict[str, list[str]] = {}
    for key, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith((".bin", ".safetensors")):
            raise ArtifactError(
                f"{index}: places {key} in {name!r}; expected a .bin or .safetensors file of the same folder."
            )
        files.setdefault(name, []).append(key)
    return {name: tuple(files[name]) for name in sorted(files)}


def _require_files(shards: Shards) -> None:
    missing = [name for name in shards.files if not (shards.folder / name).is_file()]
    if missing:
        raise ArtifactError(
            f"{shards.folder}: {len(missing)} of {len(shards.files)} files of weights are missing: "
            f"{', '.join(missing)}. Copy them from where the others came."
        )
    for name in shards.files:
        require_no_pointer(shards.folder / name)


def require_no_pointer(file: Path) -> None:
    """Refuse a file that only stands for one that Git LFS has not fetched.

    Raises:
        ArtifactError: It is such a file, or cannot be read.
    """
    try:
        with open(file, "rb") as opened:
            start = opened.read(len(POINTER))
    except OSError as error:
        raise ArtifactError(
            f"{file}: cannot be read: {error.strerror}. See to its rights, or copy it again."
        ) from error
    if start == POINTER:
        raise ArtifactError(
            f"{file}: is a Git LFS pointer, not the file itself. Run `git lfs pull` in that folder, or download the "
            "file."
        )


def read_shard(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by their original keys, memory-mapped; nothing in it is executed.

    Raises:
        ArtifactError: The file is cut short, damaged, or holds more than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        # torch before 1.6 wrote another layout, which cannot be mapped.
        tensors = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{file}: holds something other than tensors, or is damaged, and is not opened: what it holds could be "
            "code. Give the file that the model's authors published."
        ) from error
    except Exception as error:
        # A damaged file comes as whatever the reader stumbles over: KeyError, IndexError, struct.error, BadZipFile, …
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{file}: is cut short or damaged: {reason}. Copy it again.") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in tensors.items()
    ):
        raise ArtifactError(f"{file}: holds something other than tensors by name. Give the published file.")
    return tensors


def native_shards(folder: Path, config: Any) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield for each file its name and its tensors under native names, as views of the mapped file.

    Args:
        folder: The original folder.
        config: Its GlmConfig.

    Raises:
        ArtifactError: A key is unknown, missing, there twice, or its tensor has another shape than the config says.
    """
    shards = find_shards(folder)
    expected = native_shapes(config)
    found: dict[str, str] = {}
    for name, keys in shards.files.items():
        tensors = read_shard(folder / name)
        _require_indexed(shards, name, keys, tensors)
        renamed: dict[str, torch.Tensor] = {}
        for key, tensor in tensors.items():
            for native, part in _native(key, tensor, config, folder / name):
                if native in found:
                    raise ArtifactError(f"{folder}: {key} stands in {found[native]} and again in {name}. Remove one.")
                _require_shape(folder / name, key, part, expected.get(native), native)
                found[native] = name
                renamed[native] = part
        yield name, renamed
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ArtifactError(
            f"{folder}: {len(missing)} of {len(expected)} weights are missing, first {_original(missing[0])}. "
            "Copy the whole folder again."
        )


def _require_indexed(shards: Shards, name: str, keys: tuple[str, ...], tensors: Mapping[str, torch.Tensor]) -> None:
    absent = [key for key in keys if key not in tensors]
    if absent:
        raise ArtifactError(
            f"{shards.folder / name}: lacks {len(absent)} weights that the index places there, first {absent[0]}. "
            "Copy the index and all files of weights from one place."
        )


def _native(key: str, tensor: torch.Tensor, config: Any, file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the native names and parts of one original tensor."""
    if key == IGNORED:
        return
    if key in ENDS:
        yield ENDS[key], tensor
        return
    in_layer = LAYER.fullmatch(key)
    number, part = in_layer.groups() if in_layer else ("", "")
    if part in IN_LAYER:
        yield f"model.layers.{number}.{IN_LAYER[part]}", tensor
    elif part in (f"{QKV}.weight", f"{QKV}.bias") and (part.endswith("weight") or config.attention_bias):
        sizes = qkv_sizes(config)
        if tensor.shape[:1] != (sum(sizes),):
            raise ArtifactError(
                f"{file}: {key} has the shape {tuple(tensor.shape)}; config.json makes it {sum(sizes)} "
                "rows (queries, keys and values). Config and weights must come from one model."
            )
        for letter, rows in zip("qkv", torch.split(tensor, sizes), strict=True):
            yield f"model.layers.{number}.self_attn.{letter}_proj.{part.rpartition('.')[2]}", rows
    else:
        raise ArtifactError(f"{file}: {_unknown(key)}")


def _unknown(key: str) -> str:
    if key.endswith("_scale"):
        return (
            f"{key} is a scale of weights that were quantised beforehand. Give the half-precision checkpoint, and set "
            "model.quantization to 8bit or 4bit."
        )
    if "prefix_encoder" in key:
        return f"{key} is a P-tuning prefix, which is no LoRA adapter. Give the base alone, and fine-tune it anew."
    if key.startswith("transformer.layers.") or key == "transformer.word_embeddings.weight":
        return f"{key} is a weight of ChatGLM-6B version 1, another network. Give ChatGLM2-6B or ChatGLM3-6B."
    return (
        f"{key} is no weight of a ChatGLM2 or ChatGLM3 with this config. Copy the whole folder again, from one place."
    )


def qkv_sizes(config: Any) -> list[int]:
    """Return how many rows of the joint weight are queries, keys and values."""
    groups = config.num_key_value_heads * config.head_dim
    return [config.num_attention_heads * config.head_dim, groups, groups]


def native_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of the native network."""
    from transformers import GlmForCausalLM

    with torch.device("meta"):
        model = GlmForCausalLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _require_shape(file: Path, key: str, part: torch.Tensor, shape: tuple[int, ...] | None, native: str) -> None:
    if shape is None:
        raise ArtifactError(f"{file}: {key} is one layer more than config.json (num_layers) says. Copy both again.")
    # Before the shape: two weights of 4 bits share a byte, which halves a row.
    if not part.is_floating_point():
        raise ArtifactError(
            f"{file}: {key} holds {str(part.dtype).removeprefix('torch.')}, so it was quantised beforehand. Give the "
            "half-precision checkpoint, and set model.quantization to 8bit or 4bit."
        )
    if tuple(part.shape) != shape:
        raise ArtifactError(
            f"{file}: {key} gives {native} the shape {tuple(part.shape)}; config.json makes it {shape}. Config and "
            "weights must come from one model."
        )


def _original(native: str) -> str:
    """Return the original key of a native weight, for messages."""
    for key, name in ENDS.items():
        if name == native:
            return key
    _, _, number, part = native.split(".", 3)
    joint = re.sub(r"self_attn\.[qkv]_proj", QKV, part)
    back = {name: key for key, name in IN_LAYER.items()}
    return f"transformer.encoder.layers.{number}.{back.get(joint, joint)}"


def native_weights(folder: Path, config: Any) -> dict[str, torch.Tensor]:
    """Return all weights of an original folder under native names: views of the mapped files, which cost no memory."""
    weights: dict[str, torch.Tensor] = {}
    for _, tensors in native_shards(folder, config):
        weights |= tensors
    return weights
