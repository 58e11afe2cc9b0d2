"""accelerate as trainings use it: one process, losses scaled where numbers are fp16, figures logged for TensorBoard."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from llm_clf.errors import ConfigError
from llm_clf.runs import LOG


@contextmanager
def accelerated(folder: Path, device: torch.device, dtype: str, command: str) -> Iterator[Accelerator]:
    """Yield what a training runs by; its log is closed at the end.

    Args:
        folder: The unfinished run; its log goes there.
        device: What is trained on.
        dtype: Type of the numbers that are computed in.
        command: That trains, for the message.

    Raises:
        ConfigError: Several processes were started.
    """
    on_cpu = device.type == "cpu"
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="fp16" if dtype == "fp16" and not on_cpu else "no",
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder)),
    )
    if accelerator.num_processes > 1:
        raise ConfigError(f"{command} trains in one process; start it without `accelerate launch` or torchrun.")
    accelerator.init_trackers(LOG)
    try:
        yield accelerator
    finally:
        accelerator.end_training()
