"""Numbers from the host to the device without the host waiting for it."""

from typing import Any

import torch


def to_device(numbers: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a list of numbers, or a tensor on the host, as a tensor on the device.

    On CUDA a plain copy waits until all work in the queue is done. From pinned memory it joins the queue, and the
    memory is kept until the copy was made.
    """
    tensor = torch.as_tensor(numbers, dtype=dtype)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
