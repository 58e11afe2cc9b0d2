"""Which device and which number type to compute in, and how much memory was used."""

import platform
from typing import Any

import torch

from llm_clf.errors import ConfigError
from llm_clf.runs import processor, resident_peak

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device() -> torch.device:
    """Return the CUDA card where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(wanted: str, device: torch.device) -> str:
    """Return the name of the number type: the wanted one, or for `auto` the one that suits the device.

    Raises:
        ConfigError: The device cannot compute in the wanted type.
    """
    cuda = device.type == "cuda"
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else _cpu_has_bf16()
    if wanted == "auto":
        return "bf16" if bf16 else "fp16" if cuda else "fp32"
    if wanted == "bf16" and cuda and not bf16:
        raise ConfigError(
            f"model.dtype bf16: {torch.cuda.get_device_name(device)} has no bf16; use fp16, fp32 or auto."
        )
    return wanted


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX-512 BF16, AMX or Arm's BF16), not by emulation."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))


def describe(device: torch.device) -> str:
    """Return the device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def hardware(device: torch.device) -> dict[str, Any]:
    """Return what a run folder records of the machine."""
    facts: dict[str, Any] = {
        "device": describe(device),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "processor": processor(),
    }
    if device.type == "cuda":
        facts["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the process's peak resident memory and, on CUDA, the peak allocated there, in bytes."""
    peaks = {"resident_bytes": resident_peak()}
    if device.type == "cuda":
        peaks["cuda_bytes"] = torch.cuda.max_memory_allocated(device)
    return peaks
