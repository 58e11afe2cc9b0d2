"""What is measured in the process of a tool; it needs torch and nothing else."""

import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "llamafactory", "datasets", "tokenizers", "llm-clf")
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Marks:
    """Moments, each when all that was asked of the card is done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def note(self) -> None:
        """Note this moment."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def span(self) -> dict[str, Any]:
        """Return the time from the first moment to the last, and how many stretches of work it has."""
        return {"seconds": self.times[-1] - self.times[0], "stretches": len(self.times) - 1}


def model_facts(model: Any) -> dict[str, Any]:
    """Return by what one sees that all tools train the same: adapter weights, and the type of the others."""
    weights = list(model.parameters())
    frozen = [weight for weight in weights if not weight.requires_grad]
    return {
        "trained_weights": sum(weight.numel() for weight in weights if weight.requires_grad),
        "base_dtype": str(max(frozen, key=lambda weight: weight.numel()).dtype) if frozen else None,
        "device": weights[0].device.type,
    }


def process_facts() -> dict[str, Any]:
    """Return the peak memory of this process in bytes, and its packages."""
    unit = 1 if sys.platform == "darwin" else 1024
    facts: dict[str, Any] = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        facts["cuda_peak_bytes"] = torch.cuda.max_memory_allocated()
    return {**facts, "versions": _versions(), "threads": torch.get_num_threads()}


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
