"""The run folder: what training leaves, and all that prediction needs."""

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_clf.config import EncoderSettings, Settings, Tree
from llm_clf.config_loading import load_tree
from llm_clf.errors import ArtifactError, ConfigError, LlmClfError
from llm_clf.files import file_hash, partial_name, read_json, replacing, require_free, write_json, write_yaml
from llm_clf.prompting.duplicates import text_key
from llm_clf.prompting.prompts import Prompt
from llm_clf.prompting.tasks import Task, load_task

FORMAT = 1
ADAPTER, TASK, CONFIG, RUN, METRICS = "adapter", "task.yaml", "config.yaml", "run.json", "metrics.json"
VALID_PREDICTIONS, LOG, CHECKPOINTS = "predictions-valid.parquet", "log", "checkpoints"
SWEEP = "sweep"
INPUTS = "inputs.json"
"""What an unfinished run began with."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ENCODER_WEIGHTS = "model.safetensors"
TRAINED_ROWS = "trained-rows.npy"
DECISIONS, VALID_SCORES = "decisions.json", "scores-valid.npy"
"""How scores become probabilities and labels, and the scores by which that was fitted."""
FOLDS, FOLD_PREDICTIONS = "folds", "predictions-folds.parquet"
"""Of a cross-validation: the runs of its folds, and what each predicts of the rows that it was not trained on."""
LORA, TFIDF, ENCODER, ENSEMBLE = "lora", "tfidf", "encoder", "ensemble"
PACKAGES = ("llm-clf", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of run: how its folder differs from that of another kind."""

    command: str
    """What makes it."""
    learned: str
    """The file in the run folder that holds what was learned."""
    entries: tuple[str, ...]
    """Entries that run.json must have; the last one tells the hash of that file."""
    settings: type[Tree] = Settings
    """What config.yaml holds."""
    reads_instruction: bool = False
    """Whether it was trained on the task's instruction, beside the input."""
    chooses_by_validation: bool = False
    """Whether training keeps what is best on the validation rows, so that it is flattered there."""


KINDS = {
    LORA: Kind(
        "finetune",
        f"{ADAPTER}/{ADAPTER_WEIGHTS}",
        ("base", "adapter"),
        reads_instruction=True,
        chooses_by_validation=True,
    ),
    TFIDF: Kind("baseline tfidf", "model.skops", ("model",)),
    ENCODER: Kind(
        "baseline encoder",
        f"encoder/{ENCODER_WEIGHTS}",
        ("base", "encoder"),
        settings=EncoderSettings,
        chooses_by_validation=True,
    ),
    ENSEMBLE: Kind("ensemble", "ensemble.json", ("ensemble",)),
}


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run folder."""

    folder: Path
    task: Task
    settings: Any
    """Of the type that its kind has."""
    facts: dict[str, Any]
    """The content of run.json."""

    @property
    def kind(self) -> str:
        """Return the kind of the run, a key of KINDS."""
        return str(self.facts.get("kind", LORA))

    @property
    def learned(self) -> Path:
        """Return the file that holds what was learned."""
        return self.folder / KINDS[self.kind].learned

    @property
    def adapter(self) -> Path:
        """Return the folder of the PEFT adapter."""
        return self.folder / ADAPTER


def is_run(folder: Path) -> bool:
    """Whether a folder is a finished run."""
    return (folder / RUN).is_file()


def require_run_place(place: Path, *, overwrite: bool) -> None:
    """Refuse a place that no run can take: one that is taken, or holds something else than a run.

    Raises:
        ConfigError: `place` exists and `overwrite` is false, or what is there is no run.
    """
    require_free(place, overwrite=overwrite, what="something")
    if place.exists() and not is_run(place) and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{place}: is no run, so --overwrite leaves it alone. Give another --out.")


def require_no_run(folder: Path, what: str) -> None:
    """Refuse a folder that figures cannot be put into; it need not be there yet.

    Args:
        folder: Where to.
        what: The file that is to be written, for the message.

    Raises:
        ConfigError: It is a file, or a run, whose figures are its own.
    """
    if folder.exists() and (is_run(folder) or not folder.is_dir()):
        found = "is a run, and its figures are those of its own validation" if is_run(folder) else "is a file"
        raise ConfigError(f"--out {folder}: {found}. Give another folder for {what}.")


def is_finished(place: Path, kind: str) -> bool:
    """Whether a run of this kind is there already, so that `--resume` has nothing to do.

    Raises:
        ConfigError: There is a run of another kind.
    """
    if not is_run(place):
        return False
    facts = read_json(place / RUN)
    found = facts.get("kind", LORA) if isinstance(facts, dict) else None
    if found != kind:
        raise ConfigError(
            f"{place}: is a run of kind {found}, and this command makes one of kind {kind}. Give another --out, or "
            "--overwrite without --resume."
        )
    return True


def run_metrics(folder: Path) -> dict[str, Any]:
    """Return the validation metrics of a run, nothing where it was not measured."""
    return dict(read_json(folder / METRICS)) if (folder / METRICS).is_file() else {}


def require_same_inputs(folder: Path, inputs: dict[str, Any]) -> None:
    """Refuse to go on with a training that began with other inputs.

    Args:
        folder: The unfinished run.
        inputs: As they are now: `settings` by section, `prompts` and `base`.

    Raises:
        ArtifactError: What it began with cannot be read.
        ConfigError: Something has changed.
    """
    former = read_json(folder / INPUTS)
    if not (isinstance(former, dict) and isinstance(former.get("settings"), dict)):
        raise ArtifactError(f"{folder / INPUTS}: is not what finetune writes. Give --overwrite to start anew.")
    changed = [name for name in ("prompts", "base") if former.get(name) != inputs[name]]
    then, now = (_by_key(one["settings"]) for one in (former, inputs))
    changed += [
        f"{key} (then {then.get(key)!r}, now {now.get(key)!r})"
        for key in {**now, **then}
        if then.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{folder}: cannot go on, these have changed since: {', '.join(changed)}. "
            "Give the former ones, or --overwrite to start anew."
        )


def _by_key(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in settings.items() for key, value in values.items()}


def save_inputs(folder: Path, task: Task, settings: dict[str, Any]) -> None:
    """Write the task and the resolved settings of a run."""
    task.save(folder / TASK)
    write_yaml(folder / CONFIG, settings)


def save_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write run.json; with it a run is whole."""
    write_json(folder / RUN, {"format": FORMAT, **facts})


def save_trained_rows(folder: Path, prompts: Iterable[Prompt]) -> None:
    """Write which rows a run learned from, so that it can be told later whether it saw others: 8 bytes a row."""
    with replacing(folder / TRAINED_ROWS) as temporary, open(temporary, "wb") as opened:
        np.save(opened, np.unique(_row_hashes(prompts)), allow_pickle=False)


def count_trained_rows(folder: Path, prompts: Iterable[Prompt]) -> int | None:
    """Return how many of some rows a run learned from, by their texts; None where it does not tell.

    Raises:
        ArtifactError: The run's record is damaged.
    """
    file = folder / TRAINED_ROWS
    if not file.is_file():
        return None
    try:
        trained = np.load(file, allow_pickle=False)
        return int(np.isin(_row_hashes(prompts), trained.astype(np.uint64, casting="safe")).sum())
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ArtifactError(f"{file}: is damaged: {error}. Copy the whole run again, or train again.") from error


def prompts_place(data: Path, run: Path) -> dict[str, str]:
    """Return where the prompts folder of a run is, as run.json tells: seen from the run, and as it was given."""
    return {"path": os.path.relpath(os.path.realpath(data), os.path.realpath(run)), "given": str(data.absolute())}


def _row_hashes(prompts: Iterable[Prompt]) -> NDArray[np.uint64]:
    """Return 64 bits of each text; texts that differ only in Unicode form or white space are one, as in a split."""
    return np.array([int.from_bytes(text_key(prompt.input)[:8], "little") for prompt in prompts], dtype=np.uint64)


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
    name = facts.get("kind", LORA)
    if not isinstance(name, str) or name not in KINDS:
        raise ArtifactError(f"{folder}: is a run of kind {name!r}; this llm-clf knows {', '.join(KINDS)}. Upgrade.")
    kind = KINDS[name]
    if not all(isinstance(facts.get(entry), dict) for entry in kind.entries):
        raise ArtifactError(
            f"{folder / RUN}: does not tell {' and '.join(kind.entries)}, so {kind.command} did not write it. Train "
            "again."
        )
    for file in (TASK, CONFIG, kind.learned):
        if not (folder / file).exists():
            raise ArtifactError(f"{folder}: {file} is missing from the run. Copy the whole folder, or train again.")
    try:
        run = Run(folder, load_task(folder / TASK), load_tree(kind.settings, [folder / CONFIG]), facts)
    except LlmClfError as error:
        raise ArtifactError(f"{folder}: the run is damaged. {error}") from error
    _require_unchanged(run)
    return run


def task_facts(task: Task) -> dict[str, Any]:
    """Return what run.json records of a task: its labels, and a hash of all that it says."""
    text = json.dumps(task.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    return {"labels": list(task.names), "hash": hashlib.sha256(text.encode()).hexdigest()}


def _require_unchanged(run: Run) -> None:
    """Refuse a run whose task, or what was learned, is not the one of the training."""
    trained, now = run.facts.get("task"), task_facts(run.task)
    # Runs made before it was recorded say nothing of their task.
    if isinstance(trained, dict) and trained != now:
        found = "its instruction, template or words differ"
        if trained.get("labels") != now["labels"]:
            found = (
                f"its labels are {', '.join(now['labels'])}, then {', '.join(map(str, trained.get('labels') or ()))}"
            )
        raise ArtifactError(
            f"{run.folder / TASK}: is not the task that the run was trained on: {found}. Put the former file back, or "
            "train again."
        )
    if file_hash(run.learned) != run.facts[KINDS[run.kind].entries[-1]].get("hash"):
        own = "; an adapter of your own is used with --task and --model, as a folder without run.json"
        raise ArtifactError(
            f"{run.learned}: has changed since the training that run.json tells of. Copy the whole run again, or train "
            f"again{own if run.kind == LORA else ''}."
        )


def _why_no_run(folder: Path) -> str:
    if not folder.exists():
        if partial_name(folder).is_dir():
            return "the run is not finished. The command that makes it goes on with --resume."
        return "there is no such folder."
    return "has no run.json, so it is no run. Give a folder that `llm-clf finetune` or `llm-clf baseline` finished."


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of packages, by default of those that a result depends on."""
    versions = {}
    for name in names:
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


def cpu_hardware() -> dict[str, Any]:
    """Return what a run folder records of the machine where only the CPU was used."""
    return {
        "device": f"{platform.machine()} CPU",
        "system": f"{platform.system()} {platform.machine()}",
        "threads": os.cpu_count(),
        "processor": processor(),
    }


def processor() -> str:
    """Return the processor's name: another one may round otherwise."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def resident_peak() -> int:
    """Return the peak resident memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
