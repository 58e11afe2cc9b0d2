"""A LoRA adapter that was trained on ChatGLM's own code, made one of the native network."""

from pathlib import Path
from typing import Any

from llm_clf.config import ModelSettings
from llm_clf.console import say
from llm_clf.errors import ArtifactError, ConfigError
from llm_clf.files import locked, path_of, read_json, require_apart, require_free

GLM = "glm"


def import_adapter(source: str | Path, out: str | Path, *, base: str | Path, overwrite: bool = False) -> None:
    """Write a ChatGLM2 or ChatGLM3 adapter of former years as a PEFT adapter of the native network.

    The base's weights are not read; its config says how the layers are laid out.

    Args:
        source: The adapter's folder, as PEFT wrote it.
        out: Folder for the new adapter.
        base: The base that it was trained on: an original ChatGLM2 or ChatGLM3, or the native form of one.
        overwrite: Replace `out`.

    Raises:
        LlmClfError: The source is no such adapter, or does not fit the base; or `out` is taken.
    """
    from llm_clf.models.adapters import CONFIG
    from llm_clf.models.chatglm.adapters import convert_adapter

    folder, place = path_of(source), path_of(out)
    require_free(place, overwrite=overwrite, what="something")
    if place.exists() and not (place / CONFIG).is_file() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{place}: is no adapter, so --overwrite leaves it alone. Give another --out.")
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: there is no such folder. Give the folder of a LoRA adapter.")
    require_apart(place, [folder, *([path_of(base)] if path_of(base).is_dir() else [])])
    config = _base_config(base)
    with locked(place):
        convert_adapter(folder, place, config)
    _say_made(place, read_json(place / CONFIG), config.num_hidden_layers)


def _base_config(base: str | Path) -> Any:
    from llm_clf.models.bases import base_config
    from llm_clf.models.chatglm.config import CHATGLM2, is_chatglm

    place = path_of(base)
    # The families have the same layers; which one it is, the folder need not say here.
    family = {"family": CHATGLM2} if is_chatglm(place) else {}
    config = base_config(ModelSettings.model_validate({"name": str(base), **family}))
    if config.model_type != GLM:
        raise ArtifactError(
            f"--base {base}: is a {config.model_type}. Give the ChatGLM2 or ChatGLM3 that the adapter was trained on, "
            "or the native form of it."
        )
    return config


def _say_made(place: Path, made: dict[str, Any], layers: int) -> None:
    from safetensors import safe_open

    from llm_clf.models.adapters import adapter_weights

    with safe_open(adapter_weights(place), framework="pt") as opened:
        weights = len(opened.keys())
    rank, alpha = (
        f"{made[key]}{' (some layers differ)' if made[pattern] else ''}"
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
    )
    targets = sorted({name.rpartition(".")[2] for name in made["target_modules"]})
    numbers = made["layers_to_transform"]
    where = f" in layers {', '.join(map(str, numbers))} of {layers}" if numbers else ""
    say(f"{place}: {weights:,} weights, rank {rank}, alpha {alpha}, for {', '.join(targets)}{where}.")
