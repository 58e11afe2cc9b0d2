"""An original ChatGLM folder as a standard transformers folder, shard by shard."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from llm_clf.config import ModelSettings
from llm_clf.config_loading import load_settings
from llm_clf.console import progress, say
from llm_clf.errors import ArtifactError, ConfigError
from llm_clf.files import (
    cannot_write,
    locked,
    partial_name,
    path_of,
    replace_folder,
    replacing,
    require_apart,
    require_free,
    write_json,
    writing,
)

Only = Literal["all", "weights", "tokenizer"]
HEEDED = ("model.family", "model.rope_ratio")
INDEX = "model.safetensors.index.json"
# What stands in a folder that is finished.
MADE: dict[Only, tuple[str, ...]] = {
    "all": ("config.json", "tokenizer_config.json"),
    "weights": ("config.json",),
    "tokenizer": ("tokenizer_config.json",),
}


def import_chatglm(
    source: str | Path,
    out: str | Path,
    *,
    only: Only = "all",
    set: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Write an original ChatGLM2 or ChatGLM3 folder as one that transformers loads anywhere, without this package.

    The weights keep their type. One file of them is held in memory at a time; in the end every tensor is read back and
    compared with the original's.

    Args:
        source: The original folder.
        out: The new folder; until it is complete it stands beside its place as `out.partial`.
        only: `weights` (with config and generation config), `tokenizer` (with chat template), or all.
        set: `model.family=…`, `model.rope_ratio=…` where the folder leaves them open.
        resume: Go on with what an interrupted import left.
        overwrite: Replace `out`.

    Raises:
        LlmClfError: The source is no original ChatGLM folder, cannot be used or is damaged, or the place is taken.
    """
    if only not in get_args(Only):
        raise ConfigError(f"--only {only!r}: allowed are {', '.join(get_args(Only))}.")
    place, folder = path_of(out), path_of(source)
    if resume and all((place / name).is_file() for name in MADE[only]):
        say(f"{place} is finished; nothing to do.")
        return
    require_free(place, overwrite=overwrite, what="something")
    if place.exists() and not _may_be_replaced(place):
        raise ConfigError(f"{place}: is no model folder, so --overwrite leaves it alone. Give another DIR.")
    require_apart(place, [folder])
    base = _base(folder, set)
    with locked(place):
        unfinished = partial_name(place)
        if unfinished.exists():
            if not (resume or overwrite):
                raise ConfigError(
                    f"{unfinished}: an interrupted import left this. --resume goes on with it, --overwrite starts anew."
                )
            if not resume:
                shutil.rmtree(unfinished)
        with writing(unfinished, "Then --resume goes on from the last whole file."):
            _import(base, folder, unfinished, only)
            replace_folder(unfinished, place)
    say(f"The model is in {place}.")


def _may_be_replaced(place: Path) -> bool:
    """Whether a folder holds a model or a tokenizer, or nothing."""
    return place.is_dir() and (any((place / name).is_file() for name in MADE["all"]) or not any(place.iterdir()))


def _base(folder: Path, overrides: Sequence[str]) -> ModelSettings:
    from llm_clf.models.chatglm.config import is_chatglm

    if not is_chatglm(folder):
        found = "none" if not (folder / "config.json").is_file() else "one of another model, or damaged"
        raise ArtifactError(
            f"{folder}: is no original ChatGLM folder: expected a config.json whose model_type is chatglm, found "
            f"{found}. Give the folder that was downloaded."
        )
    for override in overrides:
        if override.partition("=")[0].strip() not in HEEDED:
            raise ConfigError(
                f"--set {override!r}: an import heeds {' and '.join(HEEDED)} only; weights keep their type."
            )
    return load_settings(overrides=[*overrides, f"model.name={json.dumps(str(folder))}"]).model


def _import(base: ModelSettings, folder: Path, target: Path, only: Only) -> None:
    from llm_clf.models.adapters import save_tokenizer
    from llm_clf.models.bases import load_tokenizer, prepare_libraries, resolve_base
    from llm_clf.models.chatglm.tokenizer import end_ids

    prepare_libraries()
    base, _ = resolve_base(base)
    # What is wrong with the source shows before anything is written.
    tokenizer = load_tokenizer(base) if only != "weights" else None
    ends = end_ids(folder, family=base.family)
    config, names = _check_weights(base, folder) if only != "tokenizer" else (None, [])
    target.mkdir(parents=True, exist_ok=True)
    _clear(target, keep=names)
    if tokenizer is not None:
        save_tokenizer(tokenizer, target)
    if config is not None:
        from transformers import GenerationConfig

        _import_weights(folder, config, target, names)
        config.save_pretrained(str(target))
        GenerationConfig(
            eos_token_id=ends if len(ends) > 1 else ends[0], pad_token_id=config.pad_token_id
        ).save_pretrained(str(target))


def _check_weights(base: ModelSettings, folder: Path) -> tuple[Any, list[str]]:
    """Return the native config of a folder whose weights are all there and fit it, and the names of the new files."""
    from llm_clf.models.chatglm.config import native_config
    from llm_clf.models.chatglm.weights import find_shards, native_weights

    config = native_config(folder, rope_ratio=base.rope_ratio)
    native_weights(folder, config)
    return config, _target_names(len(find_shards(folder).files))


def _clear(target: Path, keep: Sequence[str]) -> None:
    """Remove what an interrupted import of something else may have left."""
    for file in target.iterdir():
        if file.name not in keep:
            file.unlink()


def _import_weights(folder: Path, config: Any, target: Path, names: Sequence[str]) -> None:
    """Write the shards that are not there yet, then compare all of them with the original."""
    from llm_clf.models.chatglm.weights import native_shards

    places: dict[str, str] = {}
    size = 0
    with progress("writing", len(names), "files") as advance:
        for name, (_, tensors) in zip(names, native_shards(folder, config), strict=True):
            if not _is_equal(target / name, tensors):
                _write_shard(target / name, tensors)
            places |= dict.fromkeys(tensors, name)
            size += sum(tensor.nbytes for tensor in tensors.values())
            advance(1)
    if len(names) > 1:
        write_json(target / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})
    with progress("comparing", len(names), "files") as advance:
        for name, (original, tensors) in zip(names, native_shards(folder, config), strict=True):
            if not _is_equal(target / name, tensors):
                (target / name).unlink()
                raise ArtifactError(
                    f"{target / name}: is not what {folder / original} holds after it was written. See to the disk, "
                    "then --resume writes this file again."
                )
            advance(1)
    say(f"{len(places):,} weights, {size / 1e9:.2f} GB, each equal to the original's.")


def _target_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_shard(file: Path, tensors: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(file) as temporary:
        try:
            # Queries, keys and values are views of one tensor, and a file of safetensors shares nothing.
            save_file({key: tensor.clone() for key, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise cannot_write(file, error) from error


def _is_equal(file: Path, tensors: Mapping[str, Any]) -> bool:
    """Whether a file is whole and holds exactly these tensors."""
    import torch
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            if set(opened.keys()) != tensors.keys():
                return False
            return all(
                held.dtype == tensor.dtype and torch.equal(held, tensor)
                for key, tensor in tensors.items()
                for held in (opened.get_tensor(key),)
            )
    except (OSError, SafetensorError):
        return False
