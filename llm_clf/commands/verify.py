"""A run against itself: its validation rows predicted afresh, and compared with what is stored to the last bit."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llm_clf.commands.parity import prompt_digest, scoring_settings, text_digest
from llm_clf.commands.predict import predict_prompts
from llm_clf.console import say
from llm_clf.decisions.predictions import read_predictions
from llm_clf.errors import ArtifactError, ConfigError, DataError, LlmClfError
from llm_clf.evaluation.parity import ROUNDING, Parity, compare_predictions
from llm_clf.files import file_hash, path_of
from llm_clf.prompting.prompts import Prompt, read_split
from llm_clf.runs import (
    ENCODER,
    LORA,
    VALID_PREDICTIONS,
    Run,
    commit,
    cpu_hardware,
    load_run,
    package_versions,
)
from llm_clf.sources import AnySource, EnsembleSource, find_source, run_settings

VALID = "valid.jsonl"
HARDWARE = ("device", "system", "threads", "processor")


def verify(run: str | Path, *, data: str | Path | None = None, model: str | None = None) -> dict[str, Any]:
    """Predict a run's validation rows afresh and return how that compares with the predictions that it stores.

    On the machine and with the versions of the training every probability must be the same, bit for bit. On others it
    may round otherwise: all labels must be the same then, and no probability may move by more than `ROUNDING` allows.

    Args:
        run: A run folder of any kind.
        data: The prompts folder that it was trained on, where that was moved.
        model: Where the run's base is now, if it was moved.

    Raises:
        ArtifactError: The run is damaged, or predicts otherwise now; the message says what has changed since.
        ConfigError: It has no validation rows, or these are not found.
        DataError: They are other ones now.
    """
    folder = path_of(run)
    found = load_run(folder)
    prompts = validation_rows(found, path_of(data) if data is not None else None)
    stored = _stored_predictions(found)
    source = find_source(folder, None, model)
    parts = dict(_parts(found, source, model))
    for part in parts.values():
        _require_same_base(part, _rows_of(part, found, prompts))
    with tempfile.TemporaryDirectory() as place:
        fresh = Path(place) / VALID_PREDICTIONS
        predict_prompts(source, prompts, fresh)
        parity = compare_predictions(read_predictions(stored), read_predictions(fresh), stored)
    tolerance = max(_tolerance(part) for part in parts.values())
    elsewhere = [change for name, part in parts.items() for change in _elsewhere(name, part)]
    if not parity.equal:
        changes = [c for name, part in parts.items() for c in _changes(name, part, _rows_of(part, found, prompts))]
        if changes or not elsewhere or not parity.within(tolerance):
            raise ArtifactError(_differs(found, parity, changes + elsewhere, tolerance if elsewhere else None))
    say(_verified(found, parity, elsewhere, tolerance))
    return {
        "run": str(folder),
        "outcome": "equal" if parity.equal else "rounding",
        **parity.facts(),
        "tolerance": 0.0 if parity.equal else tolerance,
        "elsewhere": elsewhere,
    }


def validation_rows(run: Run, data: Path | None) -> list[Prompt]:
    """Return the rows that a run was validated on: from a folder given, or from where they were then.

    Raises:
        ConfigError: The run has none, or they are not found.
        DataError: What is there now are other rows.
    """
    if not run.facts.get("rows", {}).get("valid"):
        raise ConfigError(f"{run.folder}: was trained without validation rows, so there is nothing to verify it by.")
    noted = run.facts.get("data")
    if data is None and not isinstance(noted, dict):
        raise ConfigError(
            f"{run.folder}: does not tell where its prompts are, as runs of older versions do not. Give the prompts "
            "folder that it was trained on: --data DIR."
        )
    if data is not None:
        places = [data]
    else:
        assert isinstance(noted, dict)
        places = [run.folder / str(noted.get("path")), Path(str(noted.get("given")))]
    files = [place / VALID for place in places if (place / VALID).is_file()]
    for file in files:
        if file_hash(file) == run.facts.get("prompts", {}).get("valid"):
            return read_split(file.parent, "valid", run.task)
    if files:
        raise DataError(
            f"{files[0]}: holds other rows than those that {run.folder} was validated on. Give the prompts folder that "
            "the run was trained on: --data DIR."
        )
    if data is not None:
        raise DataError(f"{data}: has no {VALID}. Give --data the prompts folder that the run was trained on.")
    raise ConfigError(
        f"{run.folder}: was trained on the prompts in {places[-1]}, and they are not there now. Tell where they are: "
        "--data DIR."
    )


def _stored_predictions(run: Run) -> Path:
    """Return the file that is to be repeated.

    Raises:
        ArtifactError: It is missing, or not the one that the training wrote.
    """
    file = run.folder / VALID_PREDICTIONS
    if not file.is_file():
        raise ArtifactError(f"{run.folder}: {VALID_PREDICTIONS} is missing from the run. Copy the whole folder.")
    written = run.facts.get("scored_with", {}).get("predictions")
    if written is not None and file_hash(file) != written:
        raise ArtifactError(
            f"{file}: has changed since the training that run.json tells of, so there is nothing to compare with. Copy "
            "the whole run again, or train again."
        )
    return file


def _parts(run: Run, source: AnySource, model: str | None) -> Iterator[tuple[str, Run]]:
    """Yield the run, and the members of an ensemble, each with what its changes are told under."""
    yield "", run_settings(run, model)
    if isinstance(source, EnsembleSource):
        for folder, _ in source.members:
            yield f"{folder}: ", load_run(folder)


def _rows_of(part: Run, run: Run, prompts: list[Prompt]) -> list[Prompt]:
    """Return the rows at hand where the part of a run was validated on the same ones, else none."""
    hashes = [one.facts.get("prompts", {}).get("valid") for one in (part, run)]
    return prompts if hashes[0] == hashes[1] else []


def _require_same_base(run: Run, prompts: list[Prompt]) -> None:
    """Refuse another base, and say what of it is another one.

    Raises:
        ArtifactError: It is missing, or its config, tokenizer or weights changed.
    """
    from llm_clf.engine.classifier import require_same_base

    if run.kind != LORA:
        return
    try:
        require_same_base(run)
    except ArtifactError as error:
        if _tokens_differ(run, prompts):
            raise ArtifactError(f"{error} Its tokenizer makes other tokens of the validation rows.") from error
        raise


def _tokens_differ(run: Run, prompts: list[Prompt]) -> bool:
    """Whether validation rows are other tokens now; false where that cannot be told."""
    then = run.facts.get("scored_with", {}).get("tokens")
    if then is None or not prompts:
        return False
    try:
        return bool(_token_digest(run, prompts) != then)
    except LlmClfError:
        return False


def _token_digest(run: Run, prompts: list[Prompt]) -> str | None:
    from llm_clf.models.bases import base_config, load_tokenizer, prepare_libraries

    prepare_libraries()
    if run.kind == ENCODER:
        from llm_clf.baselines.encoder_model import load_classifier, row_tokenizer
        from llm_clf.models.devices import choose_device
        from llm_clf.models.encoders import load_encoder_tokenizer

        folder = run.learned.parent
        model = load_classifier(folder, run.settings, len(run.task.names), choose_device())
        tokenizer = load_encoder_tokenizer(str(folder), model.trunk)
        return text_digest(row_tokenizer(tokenizer, model, run.task, run.settings.data), prompts)
    from llm_clf.engine.classifier import prompt_tokenizer

    base = run.settings.model
    shape: Any = SimpleNamespace(config=base_config(base))
    return prompt_digest(prompt_tokenizer(load_tokenizer(base), shape, run.task, run.settings), prompts)


def _tolerance(run: Run) -> float:
    """Return how far a probability may move where only the rounding differs."""
    if run.kind not in (LORA, ENCODER):
        return ROUNDING["fp32"]
    exact = run.settings.model.dtype == "fp32" and getattr(run.settings.model, "quantization", "none") == "none"
    return ROUNDING["fp32" if exact else "bf16"]


def _changes(name: str, run: Run, prompts: list[Prompt]) -> Iterator[str]:
    """Yield what of the run is not as it was when its validation rows were scored."""
    then = run.facts.get("scored_with", {}).get("settings") or {}
    now = scoring_settings(run.settings)
    for key, value in then.items():
        if now.get(key) != value:
            yield f"{name}the setting {key} (then {value!r}, now {now.get(key)!r})"
    if _tokens_differ(run, prompts):
        yield f"{name}the tokenizer, which makes other tokens of the validation rows"


def _elsewhere(name: str, run: Run) -> Iterator[str]:
    """Yield which versions and hardware are others than those of the training."""
    then = run.facts.get("versions")
    if isinstance(then, dict):
        for package, version in package_versions(tuple(then)).items():
            if version != then[package]:
                yield f"{name}{package} (then {then[package]}, now {version})"
    code = run.facts.get("commit"), commit()
    if None not in code and code[0] != code[1]:
        yield f"{name}the commit of llm-clf (then {code[0]}, now {code[1]})"
    hardware, here = run.facts.get("hardware"), _hardware(run)
    if isinstance(hardware, dict):
        for key in HARDWARE:
            if key in hardware and hardware[key] != here.get(key):
                yield f"{name}the {key} (then {hardware[key]}, now {here.get(key)})"


def _hardware(run: Run) -> dict[str, Any]:
    if "base" not in run.facts:
        return cpu_hardware()
    from llm_clf.models.devices import choose_device, hardware

    return hardware(choose_device())


def _verified(run: Run, parity: Parity, elsewhere: list[str], tolerance: float) -> str:
    others = f" Other than in the training: {'; '.join(elsewhere)}." if elsewhere else ""
    if parity.equal:
        return f"Verified: {run.folder} gives all {parity.rows:,} validation rows what it stores, bit for bit.{others}"
    return (
        f"Verified but for rounding: {run.folder}: {parity.text()}, and {tolerance:g} is allowed on other hardware or "
        f"versions.{others}"
    )


def _differs(run: Run, parity: Parity, changes: list[str], tolerance: float | None) -> str:
    allowed = f", and {tolerance:g} is allowed on other hardware or versions" if tolerance is not None else ""
    head = f"{run.folder}: does not predict what {VALID_PREDICTIONS} holds: {parity.text()}{allowed}."
    if not changes:
        return (
            f"{head} Base, task, adapter, tokens, settings, versions and hardware are those that run.json tells of, so "
            "it is none of these. Predict twice: where that differs too, this machine does not repeat itself."
        )
    lines = "\n".join(f"  {change}" for change in changes)
    return f"{head} What is not as it was in the training:\n{lines}\nPut it back as it was, or train again."
