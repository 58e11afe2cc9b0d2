"""LoRA adapters that were trained on ChatGLM's own code, as adapters of the native network: the same update, exactly.

The original computes queries, keys and values by one matrix, the native network by three. The rows of an update B·A are
the rows of B times A, so q_proj, k_proj and v_proj take the same A and each its rows of B. All other layers have their
like, and only the names change.
"""

import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llm_clf.errors import ArtifactError
from llm_clf.files import cannot_write, read_json, replace_folder, write_json, writing
from llm_clf.models.adapters import CONFIG, WEIGHTS, adapter_weights
from llm_clf.models.chatglm.weights import LAYER, QKV, qkv_sizes, read_shard, require_no_pointer
from llm_clf.models.heads import SEQ_CLS

DENSE, UP, DOWN = "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
NATIVE = {
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    DENSE: ("self_attn.o_proj",),
    UP: ("mlp.gate_up_proj",),
    DOWN: ("mlp.down_proj",),
}
HEAD, NATIVE_HEAD = "transformer.output_layer", "lm_head"
LEGACY = re.compile(r"(?:^|\.)transformer\.(?:encoder\.layers\.\d+\.(?:self_attention|mlp)|output_layer|embedding)\.")
TARGET = re.compile(
    r"(?:(?:transformer\.)?(?:encoder\.)?layers\.(?P<layer>\d+)\.)?"
    r"(?:(?P<part>self_attention|mlp)\.)?(?P<name>query_key_value|dense|dense_h_to_4h|dense_4h_to_h)"
)

A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
# Whoever saves the trainable parameters by hand keeps the adapter's name, `default`, inside the keys.
KEY = re.compile(rf"(?:base_model\.model\.)?(?P<module>.+?)\.(?P<part>{A}|{B}|{MAGNITUDE})(?:\.default)?(?:\.weight)?")

# The other starts of training, such as PiSSA, take their part out of the base's weights.
STARTS_BESIDE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
# What makes of A and B something other than an update B·A of one layer.
OTHER_UPDATES = (
    "enable_lora",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
MERGE_INSTEAD = (
    "Merge it into the base with the versions of PEFT and transformers that it was trained with (merge_and_unload, "
    "save_pretrained), and use the merged model as the base; or fine-tune anew."
)


@dataclass(frozen=True, slots=True)
class _Update:
    """The update of one linear layer of the original."""

    module: str
    """The layer's name in the original: transformer.encoder.layers.0.self_attention.query_key_value."""
    native: tuple[str, ...]
    """The native layers that it is made of, in the order of its rows."""
    rows: list[int]
    """How many rows each of them has."""
    columns: int
    parts: dict[str, torch.Tensor]
    """A (rank, columns), B (rows, rank), and with DoRA the magnitudes (rows)."""

    @property
    def rank(self) -> int:
        return self.parts[A].shape[0]


def is_legacy(names: Iterable[str]) -> bool:
    """Whether an adapter was trained on ChatGLM's own code, going by the names of its weights."""
    return any(LEGACY.search(name) for name in names)


def native_names(names: Sequence[str]) -> list[str]:
    """Return target modules with the native names in place of the original's: query_key_value is q, k and v_proj.

    A name that is none of the original's stays as it is.
    """
    return list(dict.fromkeys(native for name in names for native in _native_target(name)))


def _native_target(name: str) -> tuple[str, ...]:
    if name in (HEAD, HEAD.rpartition(".")[2]):
        return (NATIVE_HEAD,)
    found = TARGET.fullmatch(name)
    if found is None:
        return (name,)
    kind = next(kind for kind in NATIVE if kind.endswith(f".{found['name']}"))
    if found["part"] not in (None, kind.partition(".")[0]):
        return (name,)
    if found["layer"] is None:
        return tuple(native.rpartition(".")[2] for native in NATIVE[kind])
    return tuple(f"layers.{found['layer']}.{native}" for native in NATIVE[kind])


def convert_adapter(source: Path, target: Path, base_config: Any) -> None:
    """Write an adapter that was trained on ChatGLM's own code as a PEFT adapter of the native network.

    What is written is read again and compared with the source before it takes its name.

    Args:
        source: The adapter: `adapter_config.json` of PEFT, of any year, with its weights.
        target: The folder to write; one that is there is replaced.
        base_config: The base's GlmConfig.

    Raises:
        ArtifactError: The source is no such adapter, is damaged, is one of another base, or does what the native
            network has no counterpart for.
        DataError: The folder cannot be written.
    """
    config = _read_config(source)
    file = adapter_weights(source)
    updates = _read_updates(file, base_config)
    native = _native_config(source / CONFIG, config, updates, base_config.num_hidden_layers)
    unfinished = target.with_name(f".{target.name}.writing")
    try:
        with writing(target):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            _save(unfinished / WEIGHTS[0], updates, target)
            write_json(unfinished / CONFIG, native)
            _require_same(unfinished / WEIGHTS[0], updates, source)
            replace_folder(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _read_config(source: Path) -> dict[str, Any]:
    """Return the source's config, which may have fields that PEFT knows no more, and lack those that it has now."""
    file = source / CONFIG
    if not file.is_file():
        found = "; this looks like a P-Tuning checkpoint, which is none" if _is_ptuning(source) else ""
        raise ArtifactError(
            f"{source}: has no {CONFIG}, so it is no PEFT adapter{found}. Give a LoRA adapter's folder."
        )
    require_no_pointer(file)
    config = read_json(file)
    if not isinstance(config, dict):
        raise ArtifactError(f"{file}: found {type(config).__name__}, expected what PEFT writes. Copy it again.")
    faults = list(_faults(config))
    if faults:
        raise ArtifactError(f"{file}: this adapter cannot be used. {' '.join(faults)}")
    return config


def _is_ptuning(source: Path) -> bool:
    config = read_json(source / "config.json") if (source / "config.json").is_file() else None
    return isinstance(config, dict) and bool(config.get("pre_seq_len"))


def _faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what has no native counterpart or is no setting of LoRA: what was found, and what to do."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        yield f"peft_type {kind!r}: only LoRA has a counterpart in the native network. Fine-tune anew with LoRA."
        return
    for key in OTHER_UPDATES:
        if config.get(key):
            yield f"{key} {config[key]!r}: its weights are not those of one update a layer. {MERGE_INSTEAD}"
    start = config.get("init_lora_weights")
    if start not in STARTS_BESIDE_THE_BASE:
        yield f"init_lora_weights {start!r}: it was trained beside a changed base. {MERGE_INSTEAD}"
    if config.get("task_type") == SEQ_CLS:
        yield f"task_type {SEQ_CLS!r}: its head is that of ChatGLM's own code. Fine-tune anew, with model.head linear."
    elif config.get("task_type") not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        yield f"task_type {config['task_type']!r}: expected CAUSAL_LM. {MERGE_INSTEAD}"
    for key in ("lora_alpha", "r", "lora_dropout"):
        # The weights say the rank too; without dropout there was none.
        if not _is_number(config.get(key)) and (config.get(key) is not None or key == "lora_alpha"):
            yield f"{key} is {config.get(key)!r}, and must be a number. Copy the file again."
    for key in ("alpha_pattern", "rank_pattern"):
        pattern = config.get(key) or {}
        if not (isinstance(pattern, dict) and all(map(_is_number, pattern.values()))):
            yield f"{key} is {pattern!r}, and must give numbers to names of layers. Copy the file again."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_updates(file: Path, base_config: Any) -> list[_Update]:
    """Return the updates that a file of adapter weights holds; each of its tensors is part of one."""
    require_no_pointer(file)
    updates: dict[tuple[str, ...], _Update] = {}
    for key, tensor in read_shard(file).items():
        found = KEY.fullmatch(key)
        layout = _layout(found["module"], base_config) if found else None
        if found is None or layout is None:
            raise ArtifactError(f"{file}: {_unknown(key)}")
        native, rows, columns = layout
        update = updates.setdefault(native, _Update(found["module"], native, rows, columns, {}))
        if found["part"] in update.parts:
            raise ArtifactError(
                f"{file}: {key} stands there twice, under two names. Keep the one that was trained last."
            )
        update.parts[found["part"]] = tensor
    if not updates:
        raise ArtifactError(f"{file}: holds no weights. Copy it again.")
    for update in updates.values():
        _require_in_base(file, update, base_config.num_hidden_layers)
        _require_whole(file, update)
    return list(updates.values())


def _layout(module: str, base_config: Any) -> tuple[tuple[str, ...], list[int], int] | None:
    """Return a layer's native layers, the rows of each, and the columns; None where the original has no such layer."""
    hidden, inner = base_config.hidden_size, base_config.intermediate_size
    if module == HEAD:
        return (NATIVE_HEAD,), [base_config.vocab_size], hidden
    found = LAYER.fullmatch(module)
    if found is None or found[2] not in NATIVE:
        return None
    rows, columns = {
        QKV: (qkv_sizes(base_config), hidden),
        DENSE: ([hidden], base_config.num_attention_heads * base_config.head_dim),
        UP: ([2 * inner], hidden),
        DOWN: ([hidden], inner),
    }[found[2]]
    return tuple(f"model.layers.{int(found[1])}.{name}" for name in NATIVE[found[2]]), rows, columns


def _unknown(key: str) -> str:
    """Return what a weight is that is no part of an update, and what to do."""
    if "prefix_encoder" in key or "prompt_embeddings" in key:
        return f"{key} is a P-Tuning or prefix weight; only LoRA has a counterpart here. Fine-tune anew with LoRA."
    if "lora_embedding" in key or ".word_embeddings." in key:
        return f"{key} changes the embedding of tokens, for which there is no import. {MERGE_INSTEAD}"
    if key.endswith(".bias"):
        return f"{key} is a trained bias (bias other than none), for which there is no import. {MERGE_INSTEAD}"
    if "transformer.layers." in key:
        return f"{key} belongs to an adapter of ChatGLM-6B version 1, another network. Fine-tune a ChatGLM2 or 3 anew."
    if not is_legacy([key]):
        return (
            f"{key} is no weight of an adapter that was trained on ChatGLM's own code. An adapter of the native "
            "network (names such as model.layers.0.self_attn.q_proj) is used as it is."
        )
    if "modules_to_save" in key or "lora_" not in key:
        return f"{key} is a whole trained layer (modules_to_save), for which there is no import. {MERGE_INSTEAD}"
    return f"{key} is no part of a LoRA update of one of ChatGLM's linear layers. {MERGE_INSTEAD}"


def _require_in_base(file: Path, update: _Update, layers: int) -> None:
    if (_layer(update.native[0]) or 0) >= layers:
        raise ArtifactError(
            f"{file}: changes {update.module}, and the base has {layers} layers (0 to {layers - 1}): this is an "
            "adapter of another base. Give the base that it was trained on."
        )


def _require_whole(file: Path, update: _Update) -> None:
    """Refuse an update that lacks a part, or whose parts do not fit together or the base."""
    for part, other in ((A, B), (B, A)):
        if part not in update.parts:
            raise ArtifactError(
                f"{file}: {update.module} has {other if other in update.parts else MAGNITUDE} but no {part}; the file "
                "is not whole. Copy it again."
            )
    first, rows = update.parts[A], sum(update.rows)
    rank = first.shape[0] if first.ndim == 2 and first.shape[0] > 0 else "r"
    needed = {A: (rank, update.columns), B: (rows, rank), MAGNITUDE: (rows,)}
    for part, tensor in update.parts.items():
        name = f"{update.module}.{part}"
        if tuple(tensor.shape) != needed[part]:
            raise ArtifactError(
                f"{file}: {name} has the shape {_shape(tensor.shape)}, and the base needs {_shape(needed[part])}: this "
                "is an adapter of another base, or damaged. Give the base that it was trained on."
            )
        if not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
            raise ArtifactError(
                f"{file}: {name} ({tensor.dtype}) holds something other than finite numbers, so its training failed or "
                "the file is damaged. Copy it again, or give an earlier checkpoint."
            )


def _shape(sizes: Iterable[object]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _native_config(file: Path, config: Mapping[str, Any], updates: Sequence[_Update], layers: int) -> dict[str, Any]:
    """Return the native adapter's config; the weights say which layers it has and their ranks."""
    ranks = {name: update.rank for update in updates for name in update.native}
    alphas = {name: alpha for update in updates for alpha in [_alpha(file, config, update)] for name in update.native}
    rank = int(config.get("r") or Counter(ranks.values()).most_common(1)[0][0])
    targets, numbers = _targets(list(ranks), layers)
    return {
        "alpha_pattern": {name: value for name, value in alphas.items() if value != config["lora_alpha"]},
        "auto_mapping": None,
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "bias": "none",
        # PEFT's word for weights that are stored transposed, which those of nn.Linear never are.
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": numbers,
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": config.get("lora_dropout") or 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "revision": None,
        "target_modules": targets,
        # The original also passed for a sequence-to-sequence model; the native network is a causal one.
        "task_type": config.get("task_type") and "CAUSAL_LM",
        "use_dora": _uses_dora(file, config, updates),
        "use_rslora": bool(config.get("use_rslora")),
    }


def _layer(native: str) -> int | None:
    return None if native == NATIVE_HEAD else int(native.split(".")[2])


def _alpha(file: Path, config: Mapping[str, Any], update: _Update) -> float:
    """Return the alpha of an update, by PEFT's way to look it up under the name that the layer then had."""
    ranks, alphas = _readings(file, config, "rank", update.module), _readings(file, config, "alpha", update.module)
    if config.get("r") is not None and update.rank not in ranks:
        raise ArtifactError(
            f"{file}: says rank {ranks[-1]} for {update.module}, and its weights have {update.rank}: config and "
            "weights are not of one adapter, so that lora_alpha may be wrong too. Copy both again, from one place."
        )
    if len(set(alphas)) > 1:
        raise ArtifactError(
            f"{file}: for {update.module}, PEFT before 0.14 takes alpha {alphas[0]} from rank_pattern and "
            f'alpha_pattern, later ones {alphas[1]}. Add "peft_version": "0.14.0" to take the latter; for the former '
            "write alpha_pattern so that it gives that too."
        )
    return alphas[0]


def _readings(file: Path, config: Mapping[str, Any], kind: str, module: str) -> list[float]:
    """Return the rank or alpha that PEFT takes for a layer: before 0.14, and since.

    Then, the first key of the two patterns that fitted the layer decided both. Configs that name their PEFT are newer.
    Source: https://github.com/huggingface/peft/pull/2195
    """
    default: Any = config["lora_alpha"] if kind == "alpha" else config.get("r")
    own = config.get(f"{kind}_pattern") or {}
    both = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    try:
        then = next((key for key in both if re.match(rf".*\.{key}$", module)), module)
        now = next((key for key in own if re.match(rf"(.*\.)?({key})$", module)), module)
    except re.error as error:
        raise ArtifactError(
            f"{file}: rank_pattern or alpha_pattern has a key that is no regular expression: {error}. Mend it."
        ) from error
    readings: list[float] = [own.get(then, default), own.get(now, default)]
    return readings[1:] if config.get("peft_version") else readings


def _targets(names: Sequence[str], layers: int) -> tuple[list[str], list[int] | None]:
    """Return `target_modules`, and `layers_to_transform` where only some layers have an update.

    Where the layers differ in what is updated, the targets are full names.
    """
    kinds = sorted({name.rpartition(".")[2] for name in names})
    numbers = sorted({number for name in names if (number := _layer(name)) is not None})
    if len(names) - (NATIVE_HEAD in kinds) != (len(kinds) - (NATIVE_HEAD in kinds)) * len(numbers):
        return sorted(names), None
    return kinds, numbers if 0 < len(numbers) < layers else None


def _uses_dora(file: Path, config: Mapping[str, Any], updates: Sequence[_Update]) -> bool:
    without = [update.module for update in updates if MAGNITUDE not in update.parts]
    if without and (config.get("use_dora") or len(without) < len(updates)):
        raise ArtifactError(f"{file.parent}: is a DoRA adapter, but {without[0]} has no {MAGNITUDE}. Copy it again.")
    return not without


def _native_keys(update: _Update, part: str) -> list[str]:
    return [f"base_model.model.{name}.{part}{'' if part == MAGNITUDE else '.weight'}" for name in update.native]


def _save(file: Path, updates: Sequence[_Update], target: Path) -> None:
    """Write the updates under native names."""
    weights: dict[str, torch.Tensor] = {}
    for update in updates:
        for part, tensor in update.parts.items():
            shares = [tensor] * len(update.native) if part == A else torch.split(tensor, update.rows)
            # safetensors takes no two tensors that lie at one place.
            weights |= {
                key: share.clone().contiguous() for key, share in zip(_native_keys(update, part), shares, strict=True)
            }
    try:
        save_file(weights, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise cannot_write(target, error) from error


def _require_same(written: Path, updates: Sequence[_Update], source: Path) -> None:
    """Check that the written weights, put together again, are the source's to the last bit, and no others."""
    made = read_shard(written)
    for update in updates:
        for part, tensor in update.parts.items():
            shares = [made.pop(key) for key in _native_keys(update, part)]
            same = [*shares, tensor] if part == A else [torch.cat(shares), tensor]
            if not all(share.dtype == tensor.dtype and torch.equal(share, tensor) for share in same):
                raise ArtifactError(
                    f"{source}: {update.module}.{part} came out other than it is there. Check the disk, and try again."
                )
    if made:
        raise ArtifactError(f"{source}: came out with weights that it does not have, first {min(made)}.")
