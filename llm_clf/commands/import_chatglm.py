"""An original ChatGLM folder as a standard transformers folder, shard by shard."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from llm_clf.config import ModelSettings, load_settings
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
INDEX = "model.safetensors.index.json"


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
        set: Settings of the section model: `model.family=…`, `model.rope_ratio=…`.
        resume: Go on with what an interrupted import left.
        overwrite: Replace `out`.

    Raises:
        LlmClfError: The source is no original ChatGLM folder, cannot be used or is damaged, or the place is taken.
    """
    if only not in get_args(Only):
        raise ConfigError(f"--only {only!r}: allowed are {', '.join(get_args(Only))}.")
    place, folder = path_of(out), path_of(source)
    if resume and place.exists():
        say(f"{place} is finished; nothing to do.")
        return
    require_free(place, overwrite=overwrite, what="something")
    if place.exists() and not (place.is_dir() and ((place / "config.json").exists() or not any(place.iterdir()))):
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


def _base(folder: Path, overrides: Sequence[str]) -> ModelSettings:
    from llm_clf.models.chatglm.config import is_chatglm

    if not is_chatglm(folder):
        found = "none" if not (folder / "config.json").is_file() else "one of another model, or damaged"
        raise ArtifactError(
            f"{folder}: is no original ChatGLM folder: expected a config.json whose model_type is chatglm, found {found}. "
            "Give the folder that was downloaded."
        )
    return load_settings(overrides=[*overrides, f"model.name={folder}"]).model


def _import(base: ModelSettings, folder: Path, target: Path, only: Only) -> None:
    from llm_clf.models.bases import load_tokenizer, quiet_libraries, resolve_base
    from llm_clf.models.chatglm.config import native_config
    from llm_clf.models.chatglm.tokenizer import end_ids

    quiet_libraries()
    base, _ = resolve_base(base)
    target.mkdir(parents=True, exist_ok=True)
    if only != "weights":
        load_tokenizer(base).save_pretrained(str(target))
    if only != "tokenizer":
        from transformers import GenerationConfig

        config = native_config(folder, rope_ratio=base.rope_ratio)
        _import_weights(folder, config, target)
        config.save_pretrained(str(target))
        ends = end_ids(folder, family=base.family)
        GenerationConfig(
            eos_token_id=ends if len(ends) > 1 else ends[0], pad_token_id=config.pad_token_id
        ).save_pretrained(str(target))


def _import_weights(folder: Path, config: Any, target: Path) -> None:
    """Write the shards that are not there yet, then compare all of them with the original."""
    from llm_clf.models.chatglm.weights import find_shards, native_shards

    names = _target_names(len(find_shards(folder).files))
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
