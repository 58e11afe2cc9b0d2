"""LoRA adapters through PEFT: make one, attach a saved one, take its weights out and put them back."""

from pathlib import Path
from typing import Any

import torch

from llm_clf.config import LoraSettings
from llm_clf.errors import ArtifactError, ConfigError


def new_adapter(model: Any, settings: LoraSettings, *, seed: int) -> Any:
    """Return the model with a fresh adapter, which changes nothing yet: PEFT starts B at zero.

    Adapter weights are fp32, whatever the base is.

    Raises:
        ConfigError: No layer of the base fits `lora.target_modules`.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        exclude_modules=settings.exclude_modules,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        layers = sorted(
            {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        )
        raise ConfigError(
            f"lora.target_modules {settings.target_modules!r}: {str(error).splitlines()[0]} "
            f"The base's linear layers are {', '.join(layers)}."
        ) from error


def attach_adapter(model: Any, folder: Path, *, merge: bool) -> Any:
    """Return the base with a saved adapter, in evaluation mode; `merge` adds it into the base's weights.

    Raises:
        ArtifactError: The folder holds no adapter, or one of another base.
    """
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise ArtifactError(f"{folder}: has no adapter_config.json, so it is no adapter.")
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtifactError(f"{folder}: the adapter does not fit the base: {reason}") from error
    return (adapted.merge_and_unload() if merge else adapted).eval()


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters that training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the adapter's weights on the CPU, by PEFT's names."""
    from peft import get_peft_model_state_dict

    return {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}


def load_adapter_state(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Put saved adapter weights back into the model."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, state)
