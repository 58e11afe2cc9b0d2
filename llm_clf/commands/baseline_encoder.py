"""A prompts folder to a run of an encoder: fine-tune all of it with a head, score the validation rows as predict."""

import json
import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_clf.commands.finetune import shipped_recipe
from llm_clf.commands.parity import MeasuredRows, check_against_training, scored_with, text_digest
from llm_clf.commands.validation import decide_validation, score_all
from llm_clf.config import DEFAULT_BASE, EncoderSettings, load_tree, settings_to_dict
from llm_clf.console import say
from llm_clf.decisions.fitting import require_decidable
from llm_clf.errors import ConfigError, LlmClfError
from llm_clf.evaluation.metrics import NO_LABEL, compute_metrics
from llm_clf.files import file_hash, locked, partial_name, path_of, replace_folder, require_apart, write_json, writing
from llm_clf.prompting.training_data import TrainingData, read_training_data
from llm_clf.runs import (
    CHECKPOINTS,
    CONFIG,
    ENCODER,
    INPUTS,
    KINDS,
    LOG,
    commit,
    is_finished,
    is_run,
    package_versions,
    prompts_place,
    require_run_place,
    require_same_inputs,
    run_metrics,
    save_facts,
    save_inputs,
    save_trained_rows,
    task_facts,
)
from llm_clf.sources import EncoderSource

PACKAGES = ("llm-clf", "torch", "transformers", "accelerate", "tokenizers", "safetensors")
GOES_ON = "Then --resume goes on from the last checkpoint."


def baseline_encoder(
    data: str | Path,
    *,
    out: str | Path,
    model: str | None = None,
    config: str | Path | None = None,
    set: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fine-tune an encoder with a head on a prompts folder and write the run folder `out`; return its metrics.

    Args:
        data: A folder that `build_prompts` made.
        out: The run folder; until it is complete it stands beside its place as `out.partial`.
        model: The encoder, in place of the setting `model.name`.
        config: A YAML file of settings, those of `EncoderSettings`.
        set: Settings as `section.key=value`, stronger than the file.
        resume: Go on with what an interrupted training left.
        overwrite: Replace `out`.

    Raises:
        LlmClfError: Settings, prompts or encoder are wrong, or the loss is not a number.
    """
    place = path_of(out)
    if resume and is_finished(place, ENCODER):
        say(f"{place} is finished; nothing to do.")
        return run_metrics(place)
    require_run_place(place, overwrite=overwrite)
    settings = resolve_encoder_settings(model, config, set)
    base, folder = path_of(settings.model.name), path_of(data)
    require_apart(place, [folder, *([base] if base.is_dir() else [])])
    rows = read_training_data(folder)
    _check_settings(settings, rows)
    with locked(place):
        unfinished = partial_name(place)
        if unfinished.exists() and not (resume or overwrite):
            raise ConfigError(
                f"{unfinished}: an interrupted training left this. --resume goes on with it, --overwrite starts anew."
            )
        try:
            with writing(unfinished, GOES_ON):
                if not (resume and is_finished(unfinished, ENCODER)):
                    _train_run(settings, rows, unfinished, resume=resume)
                shutil.rmtree(unfinished / CHECKPOINTS, ignore_errors=True)
                (unfinished / INPUTS).unlink(missing_ok=True)
                replace_folder(unfinished, place)
        except LlmClfError:
            _drop_fruitless(unfinished)
            raise
    say(f"The run is in {place}.")
    return run_metrics(place)


def resolve_encoder_settings(model: str | None, config: str | Path | None, overrides: Sequence[str]) -> EncoderSettings:
    """Return the settings: defaults, the recipe of the base that ships where it is used, the file, the overrides."""
    if model is not None and (path_of(model) / "config.json").is_file():
        model = str(path_of(model).resolve())
    files = [Path(config)] if config is not None else []
    changes = [*overrides, *([f"model.name={json.dumps(model)}"] if model is not None else [])]
    settings = load_tree(EncoderSettings, files, changes)
    if settings.model.name == DEFAULT_BASE:
        recipe = shipped_recipe().with_name(f"encoder-{DEFAULT_BASE}.yaml")
        settings = load_tree(EncoderSettings, [recipe, *files], changes)
    return settings


def _check_settings(settings: EncoderSettings, data: TrainingData) -> None:
    """Refuse settings that do not fit the task, before any model is loaded."""
    require_decidable(settings.decide, data.task.names, [prompt.label for prompt in data.valid])
    names = data.task.names
    if settings.head.loss == "bce" and len(names) != 2:
        raise ConfigError(
            f"head.loss bce: one logit stands for two labels, and the task has {len(names)}: {', '.join(names)}. Leave "
            "it at cross-entropy."
        )
    validated = {prompt.label for prompt in data.valid if prompt.label is not None}
    if settings.train.metric == "roc_auc" and len(validated) == 1:
        raise ConfigError(
            f"train.metric roc_auc: all validation rows with a label have {validated.pop()!r}, and a ROC curve needs "
            "two labels. Choose another metric, or build the prompts with a larger share for validation."
        )
    if isinstance(settings.train.class_weights, dict):
        unknown = sorted(settings.train.class_weights.keys() - set(names))
        if unknown:
            raise ConfigError(f"train.class_weights: {unknown[0]!r} is no label; the labels are {', '.join(names)}.")


def _drop_fruitless(unfinished: Path) -> None:
    """Remove an unfinished run in which nothing was learned yet: there is nothing to go on with."""
    from llm_clf.engine.course import has_checkpoint

    if not is_run(unfinished) and not has_checkpoint(unfinished / CHECKPOINTS):
        shutil.rmtree(unfinished, ignore_errors=True)


def _train_run(settings: EncoderSettings, data: TrainingData, folder: Path, *, resume: bool) -> None:
    """Fill the unfinished run folder; its run.json comes last."""
    from llm_clf.engine.fitting import memory_explained
    from llm_clf.models.bases import base_identity, quiet_libraries
    from llm_clf.models.budget import AUTO, BUDGETS
    from llm_clf.models.devices import choose_device, describe, hardware, peak_memory
    from llm_clf.models.encoders import require_encoder

    started, clock = datetime.now(UTC), time.monotonic()
    quiet_libraries()
    device = choose_device()
    require_encoder(settings.model.name)
    settings = settings.having("model", dtype=_trainable_type(settings.model.dtype, device))
    if settings.train.micro_batch_tokens == AUTO:
        settings = settings.having("train", micro_batch_tokens=BUDGETS[device.type][0])
    base = base_identity(settings.model.name)
    if _claim(folder, settings, data, base, resume=resume):
        settings = load_tree(EncoderSettings, [folder / CONFIG])
    else:
        save_inputs(folder, data.task, settings_to_dict(settings))
    say(f"Encoder {settings.model.name} in {settings.model.dtype} on {describe(device)}.")

    with memory_explained():
        trained, tokens = _fit(settings, data, folder, device)
    settings = load_tree(EncoderSettings, [folder / CONFIG])
    decided = _score_validation(settings, data, folder)
    settings = load_tree(EncoderSettings, [folder / CONFIG])
    measured = MeasuredRows(folder / CHECKPOINTS).of(trained["training"]["best_step"], trained["evaluations"])
    facts = {
        "kind": ENCODER,
        "name": folder.name.removesuffix(".partial"),
        "base": base,
        "task": task_facts(data.task),
        **trained,
        "decisions": decided,
        "verified": check_against_training(folder, measured),
        "prompts": data.hashes,
        "data": prompts_place(data.folder, folder),
        "scored_with": scored_with(folder, settings, tokens),
        "seed": settings.train.seed,
        "versions": package_versions(PACKAGES),
        "commit": commit(),
        "hardware": hardware(device),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 2),
        "peak_memory": peak_memory(device),
    }
    save_trained_rows(folder, data.train)
    save_facts(folder, facts)


def _trainable_type(wanted: str, device: Any) -> str:
    """Return the number type to train in.

    Raises:
        ConfigError: The device has none such, or trains badly in it.
    """
    from llm_clf.models.devices import choose_dtype

    if wanted == "fp16" and device.type == "cpu":
        raise ConfigError("model.dtype fp16: a CPU has no loss scaling for it; use bf16, fp32 or auto.")
    return choose_dtype(wanted, device)


def _claim(folder: Path, settings: EncoderSettings, data: TrainingData, base: dict[str, Any], *, resume: bool) -> bool:
    """Make the unfinished run folder, or check that the one there belongs to the same training; return whether it does.

    Raises:
        ConfigError: Settings, prompts or encoder are not those that the interrupted training had.
    """
    prompts = {**data.hashes, "task": task_facts(data.task)["hash"]}
    inputs = {"settings": settings_to_dict(settings), "prompts": prompts, "base": base}
    if resume and (folder / INPUTS).is_file():
        require_same_inputs(folder, inputs)
        return (folder / CONFIG).is_file()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / CHECKPOINTS).mkdir(parents=True)
    write_json(folder / INPUTS, inputs)
    return False


def _fit(settings: EncoderSettings, data: TrainingData, folder: Path, device: Any) -> tuple[dict[str, Any], str | None]:
    """Train and save encoder and head; return what run.json says of it, and a hash of tokens of validation rows."""
    from llm_clf.baselines.encoder import LabelledRow, train
    from llm_clf.baselines.encoder_model import EncoderScorer, new_classifier, row_tokenizer, save_classifier
    from llm_clf.engine.training import row_weights
    from llm_clf.models.encoders import load_encoder_tokenizer

    names = data.task.names
    model = new_classifier(settings, len(names), device)
    tokenizer = load_encoder_tokenizer(settings.model.name, model.trunk)
    tokens = row_tokenizer(tokenizer, model, data.task, settings.data)
    encoded = tokens.encode([prompt.input for prompt in data.train])
    labels = [prompt.label for prompt in data.train if prompt.label is not None]
    weights = row_weights(labels, settings.train.class_weights)
    rows = [
        LabelledRow(example.ids, names.index(label), weight)
        for example, label, weight in zip(encoded, labels, weights, strict=True)
    ]
    cut = sum(example.cut for example in encoded)
    parameters = sum(weight.numel() for weight in model.parameters())
    say(
        f"{len(rows):,} training rows ({cut:,} cut to fit, {data.unlabelled:,} without a label left out), "
        f"{len(data.valid):,} validation rows; {parameters:,} weights, all trained."
    )
    scorer = EncoderScorer(model, tokens, labels=len(names), batch_tokens=settings.predict.batch_tokens)
    accelerator = _accelerator(settings, device, folder)
    try:
        state = train(
            model,
            rows,
            settings.train,
            accelerator=accelerator,
            evaluate=(lambda: _measure(scorer, data, folder)) if data.validates else None,
            folder=folder / CHECKPOINTS,
            found=lambda tokens: _record(folder, data, "train", micro_batch_tokens=tokens),
        )
    finally:
        accelerator.end_training()
    learned = folder / KINDS[ENCODER].learned
    save_classifier(model, tokenizer, learned.parent)
    facts = {
        "encoder": {
            "hash": file_hash(learned),
            "parameters": parameters,
            "max_length": tokens.max_length,
            "pooled": model.pooled_from,
        },
        "rows": {
            "train": len(rows),
            "train_cut": cut,
            "train_unlabelled": data.unlabelled,
            "valid": len(data.valid),
            "labels": data.counts,
        },
        "training": {
            "steps": state.step,
            "best_step": state.best_step,
            "stopped_early": state.stopped_early,
            "seconds": round(state.seconds, 2),
            "rows_per_second": round(state.rows / max(state.seconds, 1e-9), 2),
            "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1),
        },
        "evaluations": state.evaluations,
    }
    return facts, text_digest(tokens, data.valid)


def _accelerator(settings: EncoderSettings, device: Any, folder: Path) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="fp16" if settings.model.dtype == "fp16" else "no",
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder)),
    )
    if accelerator.num_processes > 1:
        raise ConfigError("baseline encoder trains in one process; start it without `accelerate launch` or torchrun.")
    accelerator.init_trackers(LOG)
    return accelerator


def _measure(scorer: Any, data: TrainingData, folder: Path) -> dict[str, float]:
    """Return the validation metrics of the model as it is now, by the path that predict takes."""
    from llm_clf.decisions.decide import decide, probabilities

    before = scorer.batch_tokens
    probs = probabilities(scorer.score_all(data.valid))
    if scorer.batch_tokens != before:
        _record(folder, data, "predict", batch_tokens=scorer.batch_tokens)
    predicted = [data.task.names[choice] for choice in decide(probs)]
    gold = [prompt.label or NO_LABEL for prompt in data.valid]
    found = compute_metrics(gold, predicted, probs, data.task.names)
    metrics = {name: value for name, value in found.items() if isinstance(value, float)}
    MeasuredRows(folder / CHECKPOINTS).keep(metrics, probs)
    return metrics


def _record(folder: Path, data: TrainingData, section: str, **found: int) -> None:
    """Put into the run's settings what was found while it runs: --resume goes on with it, and predict takes it."""
    settings = load_tree(EncoderSettings, [folder / CONFIG]).having(section, **found)
    save_inputs(folder, data.task, settings_to_dict(settings))


def _score_validation(settings: EncoderSettings, data: TrainingData, folder: Path) -> dict[str, Any]:
    """Score the validation rows with the saved encoder exactly as predict will, and decide them.

    Where memory runs out, all rows are scored anew in batches that fit: predict will make these.

    Returns:
        What run.json says of the decisions.
    """
    learned, scored = (folder / KINDS[ENCODER].learned).parent, None
    if not data.valid:
        say("No validation rows: the last step's weights are kept.")
    while data.valid:
        found = score_all(EncoderSource(learned, data.task, settings), data.valid)
        scored = found.scored
        if found.batch_tokens is None or found.batch_tokens == settings.predict.batch_tokens:
            break
        _record(folder, data, "predict", batch_tokens=found.batch_tokens)
        settings = settings.having("predict", batch_tokens=found.batch_tokens)
    return decide_validation(settings, data.task, data.valid, scored, folder, counts=data.counts)
