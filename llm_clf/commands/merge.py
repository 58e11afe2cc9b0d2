"""A run to a model folder of its own: the adapter added into the base's weights, read back and measured again."""

import gc
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

from llm_clf.config import Settings
from llm_clf.config_loading import load_settings
from llm_clf.console import say
from llm_clf.decisions.decisions import Decisions
from llm_clf.decisions.predictions import read_predictions
from llm_clf.decisions.stored import run_decisions
from llm_clf.errors import ArtifactError, ConfigError, DataError
from llm_clf.evaluation.intervals import measure
from llm_clf.evaluation.tables import changes_text
from llm_clf.files import (
    cannot_write,
    file_hash,
    locked,
    partial_name,
    path_of,
    replace_folder,
    require_apart,
    require_free,
    write_json,
    writing,
)
from llm_clf.prompting.prompts import Prompt, read_split
from llm_clf.runs import CONFIG, LORA, TASK, VALID_PREDICTIONS, Run, commit, load_run, package_versions, task_facts
from llm_clf.sources import LoraSource

FORMAT = 1
MERGE = "merge.json"
# Of one file: what other programs, and hubs, take well.
SHARD = "4GB"


def merge(
    run: str | Path,
    *,
    out: str | Path,
    data: str | Path | None = None,
    model: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write base and adapter of a run as one model folder, and return what its merge.json says.

    A run with a linear head becomes a model for sequence classification, whose config names the labels. The folder
    holds weights in the type that the run computed in (safetensors), config, generation config, tokenizer with chat
    template, the task, the validation predictions of the merged model, and merge.json: where it comes from, and the
    metrics before and after. Each sum of weight and adapter is made in fp32 and rounded once. Before the
    folder takes its name, the model is loaded from it as any other base: each weight must be the one that was written,
    and the run's validation rows are scored again.

    In memory stand the merged weights, in their type, and one layer of them in fp32.

    Args:
        run: A run folder.
        out: The model folder; until it is complete it stands beside its place as `out.partial`.
        data: The prompts folder that the run was trained on; needed where the run has validation rows.
        model: Where the run's base is now, if it was moved; for a run on a base in 8 or 4 bits the half-precision
            checkpoint that was quantised while it was loaded.
        overwrite: Replace `out`, if merge wrote it.

    Raises:
        LlmClfError: The run is none, unfinished or on a quantised base; the base or the validation rows are not those
            of the run; or `out` is taken. Nothing is written then.
    """
    place = path_of(out)
    require_free(place, overwrite=overwrite, what="something")
    if place.exists() and not (place.is_dir() and ((place / MERGE).is_file() or not any(place.iterdir()))):
        raise ConfigError(f"{place}: is not what merge wrote, so --overwrite leaves it alone. Give another --out.")
    source = _find_run(path_of(run), model)
    valid = _validation(source, path_of(data) if data is not None else None)
    base = path_of(source.settings.model.name)
    require_apart(place, [source.folder, *([base] if base.is_dir() else []), *([path_of(data)] if data else [])])
    with locked(place):
        unfinished = partial_name(place)
        if unfinished.exists() and not overwrite:
            raise ConfigError(f"{unfinished}: an interrupted command left this. --overwrite starts anew.")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            with writing(unfinished):
                facts = _merge(source, valid, unfinished, place.name)
                replace_folder(unfinished, place)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    say(f"The model is in {place}.")
    if facts["decisions"] is not None:
        say(
            "Note: a model folder holds no decisions. The run's calibration, threshold or abstention are in none of "
            "its weights: whoever loads it gets bare probabilities. merge.json tells what they were (`decisions`); the "
            "figures and the predictions beside it are with them."
        )
    return facts


def _find_run(folder: Path, model: str | None) -> Run:
    """Return the run with the settings that its base is merged with: not quantised, and where it is now.

    Raises:
        ArtifactError: It is no run.
        ConfigError: It has no adapter, its head reads a mean, or it was trained on a quantised base and no other is
            given.
    """
    run = load_run(folder)
    if run.kind != LORA:
        raise ConfigError(
            f"{folder}: is a run of kind {run.kind}, with neither adapter nor base. Give one that finetune made."
        )
    if run.settings.model.pooling != "last":
        raise ConfigError(
            f"{folder}: its linear head reads the mean of all tokens' states (model.pooling mean), and the models of "
            "transformers that it could become read the last token's. `llm-clf predict` takes the run as it is."
        )
    changes = [f"model.name={json.dumps(model)}"] if model is not None else []
    mode = run.settings.model.quantization
    if mode != "none":
        if model is None:
            raise ConfigError(
                f"{folder}: was trained on a base in {mode.removesuffix('bit')} bits (model.quantization {mode}), and "
                "rounding the merged weights to so few would blur what was learned. Give the half-precision base that "
                "was quantised while it was loaded, and the adapter is merged into that one: --model "
                f"{run.settings.model.name}"
            )
        changes.append("model.quantization=none")
    return replace(run, settings=load_settings([folder / CONFIG], changes))


def _validation(run: Run, folder: Path | None) -> list[Prompt]:
    """Return the run's validation rows, none where it had none.

    Raises:
        ArtifactError: The run lacks their predictions.
        ConfigError: The prompts folder is not given.
        DataError: It is not the one that the run was trained on.
    """
    rows = run.facts.get("rows", {}).get("valid", 0)
    if folder is None:
        if rows:
            raise ConfigError(
                f"{run.folder}: was validated on {rows:,} rows, and the merged model is measured on the same ones. "
                "Give the prompts folder that the run was trained on: --data DIR."
            )
        return []
    file = folder / "valid.jsonl"
    if not file.is_file():
        raise DataError(f"{folder}: has no valid.jsonl. Give --data the prompts folder that the run was trained on.")
    if file_hash(file) != run.facts.get("prompts", {}).get("valid"):
        raise DataError(
            f"{file}: holds other rows than those that {run.folder} was validated on. Give --data the prompts folder "
            "that the run was trained on."
        )
    prompts = read_split(folder, "valid", run.task)
    if prompts and not (run.folder / VALID_PREDICTIONS).is_file():
        raise ArtifactError(f"{run.folder}: {VALID_PREDICTIONS} is missing from the run. Copy the whole folder.")
    return prompts


def _merge(run: Run, valid: list[Prompt], folder: Path, name: str) -> dict[str, Any]:
    """Fill the unfinished folder; its merge.json comes last."""
    from llm_clf.engine.classifier import require_same_base
    from llm_clf.models.bases import prepare_libraries
    from llm_clf.models.devices import choose_device, choose_dtype

    clock = time.monotonic()
    prepare_libraries()
    settings, decisions = run.settings, run_decisions(run)
    choose_dtype(settings.model.dtype, choose_device())
    require_same_base(run)
    folder.mkdir(parents=True)
    written = _write_model(run, folder)
    merged = settings.model.model_copy(update={"name": str(folder), "family": "auto", "rope_ratio": "auto"})
    _require_same_weights(folder, written, settings.model_copy(update={"model": merged}), run.task.names)
    run.task.save(folder / TASK)
    facts = {
        "format": FORMAT,
        "kind": "merged",
        "name": name,
        "run": {"name": run.facts.get("name"), "adapter": run.facts["adapter"]["hash"]},
        "base": {**run.facts["base"], "name": settings.model.name},
        "dtype": settings.model.dtype,
        "trained_quantization": load_settings([run.folder / CONFIG]).model.quantization,
        "task": task_facts(run.task),
        "prompts": {"valid": run.facts.get("prompts", {}).get("valid")},
        "decisions": decisions.facts() if decisions is not None and not decisions.plain else None,
        "versions": package_versions(),
        "commit": commit(),
        **_measure(run, valid, settings.model_copy(update={"model": merged}), folder, decisions),
        "seconds": round(time.monotonic() - clock, 2),
    }
    write_json(folder / MERGE, facts)
    return facts


def _write_model(run: Run, folder: Path) -> dict[str, tuple[Any, ...]]:
    """Merge on the CPU and write model and tokenizer; return what each weight was, as _sums does.

    Raises:
        ArtifactError: Base or adapter cannot be loaded, do not fit each other, or the base is quantised on disk.
        DataError: The disk is full.
    """
    import torch
    from safetensors import SafetensorError

    from llm_clf.models.adapters import attach_adapter
    from llm_clf.models.bases import is_quantized, load_model, load_tokenizer
    from llm_clf.models.heads import as_stored

    base = run.settings.model
    if is_quantized(base):
        raise ArtifactError(
            f"{base.name}: its weights are quantised on disk, and rounding the merged ones to so few bits would blur "
            "what was learned. Train on its half-precision release, with model.quantization where memory is "
            "short; such a run can be merged."
        )
    say(f"Merging {run.folder} into {base.name} in {base.dtype}.")
    tokenizer = load_tokenizer(base)
    model = load_model(base, dtype=base.dtype, device=torch.device("cpu"), labels=run.task.names)
    model = attach_adapter(model, run.adapter, merge=True, tokenizer=tokenizer)
    try:
        with as_stored(model, tokenizer):
            model.save_pretrained(str(folder), max_shard_size=SHARD)
    except SafetensorError as error:
        raise cannot_write(folder, error) from error
    # safetensors lets nobody but the owner read what it writes.
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)
    tokenizer.save_pretrained(str(folder))
    return _sums(model)


def _require_same_weights(
    folder: Path, written: dict[str, tuple[Any, ...]], settings: Settings, labels: Sequence[str]
) -> None:
    """Load the folder as any base, and compare.

    Raises:
        ArtifactError: A weight is not the one that was written.
    """
    import torch

    from llm_clf.models.bases import load_model

    # What was merged is a knot of objects that point at each other; its memory is needed now.
    gc.collect()
    base, cpu = settings.model, torch.device("cpu")
    found = _sums(load_model(base, dtype=base.dtype, device=cpu, labels=labels, complete=True))
    wrong = sorted(key for key in found.keys() | written.keys() if found.get(key) != written.get(key))
    if wrong:
        raise ArtifactError(
            f"{folder}: {len(wrong)} weights are not what was written when they are read back, first {wrong[0]}. See "
            "to the disk; if that is sound, report it with the output of `llm-clf doctor`."
        )


def _sums(model: Any) -> dict[str, tuple[Any, ...]]:
    """Return type, shape and a checksum of each weight by its name."""
    import torch

    return {
        key: (tensor.dtype, tuple(tensor.shape), crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
        for key, tensor in model.state_dict().items()
    }


def _measure(
    run: Run, valid: list[Prompt], settings: Settings, folder: Path, decisions: Decisions | None
) -> dict[str, Any]:
    """Score the validation rows with the merged model; return its metrics, the run's, and what changed."""
    from llm_clf.commands.predict import predict_prompts

    if not valid:
        say("The run has no validation rows: nothing is measured.")
        return {"metrics": None, "changes": None}
    # Decided as the run decides, so that what differs is the merging.
    source = LoraSource(None, run.task, settings, None, decisions)
    predict_prompts(source, valid, folder / VALID_PREDICTIONS)
    before, after = (read_predictions(place / VALID_PREDICTIONS) for place in (run.folder, folder))
    if before.ids != after.ids or before.labels != after.labels or before.probs is None or after.probs is None:
        raise ArtifactError(
            f"{run.folder / VALID_PREDICTIONS}: is not what finetune wrote. Copy the whole run again, or train again."
        )
    metrics = {"run": measure(before), "merged": measure(after)}
    changes = {
        "rows": len(valid),
        "labels_changed": sum(one != other for one, other in zip(before.predicted, after.predicted, strict=True)),
        "largest_probability_change": float(abs(after.probs - before.probs).max()),
    }
    if metrics["run"]["rows_with_gold"]:
        say(changes_text(metrics["run"], metrics["merged"], ("run", "merged")))
    say(
        f"Of {changes['rows']:,} validation rows {changes['labels_changed']:,} have another label now; the largest "
        f"change of a probability is {changes['largest_probability_change']:.2g}."
    )
    return {"metrics": metrics, "changes": changes}
