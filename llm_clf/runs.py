"""The run folder: what training leaves, and all that prediction needs."""

import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llm_clf.config import Settings, load_settings, settings_to_dict
from llm_clf.errors import ArtifactError, LlmClfError
from llm_clf.files import partial_name, read_json, write_json, write_yaml
from llm_clf.prompting.tasks import Task, load_task

FORMAT = 1
ADAPTER, TASK, CONFIG, RUN, METRICS = "adapter", "task.yaml", "config.yaml", "run.json", "metrics.json"
VALID_PREDICTIONS, LOG, CHECKPOINTS = "predictions-valid.parquet", "log", "checkpoints"
PACKAGES = ("llm-clf", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run folder."""

    folder: Path
    task: Task
    settings: Settings
    facts: dict[str, Any]
    """The content of run.json."""

    @property
    def adapter(self) -> Path:
        """Return the folder of the PEFT adapter."""
        return self.folder / ADAPTER


def is_run(folder: Path) -> bool:
    """Whether a folder is a finished run."""
    return (folder / RUN).is_file()


def save_inputs(folder: Path, task: Task, settings: Settings) -> None:
    """Write the task and the resolved settings of a run."""
    task.save(folder / TASK)
    write_yaml(folder / CONFIG, settings_to_dict(settings))


def save_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write run.json; with it a run is whole."""
    write_json(folder / RUN, {"format": FORMAT, **facts})


def load_run(folder: Path) -> Run:
    """Return a run folder.

    Raises:
        ArtifactError: It is no run, unfinished, damaged, or of a newer version.
    """
    if not is_run(folder):
        raise ArtifactError(f"{folder}: {_why_no_run(folder)}")
    facts = read_json(folder / RUN)
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise ArtifactError(f"{folder / RUN}: is not what finetune writes. Train again.")
    if facts["format"] > FORMAT:
        raise ArtifactError(
            f"{folder}: was written by a newer llm-clf (format {facts['format']}, this one reads {FORMAT}). Upgrade."
        )
    for name in (TASK, CONFIG, ADAPTER):
        if not (folder / name).exists():
            raise ArtifactError(f"{folder}: {name} is missing from the run. Copy the whole folder, or train again.")
    try:
        return Run(folder, load_task(folder / TASK), load_settings([folder / CONFIG]), facts)
    except LlmClfError as error:
        raise ArtifactError(f"{folder}: the run is damaged. {error}") from error


def _why_no_run(folder: Path) -> str:
    if not folder.exists():
        if partial_name(folder).is_dir():
            return "the run is not finished. `llm-clf finetune … --resume` goes on with it."
        return "there is no such folder."
    return "has no run.json, so it is no run. Give a folder that `llm-clf finetune` finished."


def package_versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def commit() -> str | None:
    """Return the commit of the checkout that runs, None where it is no checkout."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
