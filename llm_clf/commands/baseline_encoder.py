"""A prompts folder to a run of an encoder: fine-tune all of it with a head, score the validation rows as predict."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_clf.commands.parity import MeasuredRows, check_against_training, scored_with, text_digest
from llm_clf.commands.training_run import claim, completing, measure, record, training_facts, unfinished_run
from llm_clf.commands.training_settings import require_fitting, resolve_settings
from llm_clf.commands.validation import decide_validation, score_all
from llm_clf.config import EncoderSettings, settings_to_dict
from llm_clf.config_loading import load_tree
from llm_clf.console import say
from llm_clf.decisions.fitting import require_decidable
from llm_clf.errors import ConfigError
from llm_clf.files import file_hash, path_of, require_apart
from llm_clf.prompting.training_data import TrainingData, read_training_data
from llm_clf.runs import (
    CHECKPOINTS,
    CONFIG,
    ENCODER,
    KINDS,
    commit,
    is_finished,
    package_versions,
    prompts_place,
    require_run_place,
    run_metrics,
    save_facts,
    save_inputs,
    save_trained_rows,
    task_facts,
)
from llm_clf.sources import EncoderSource

PACKAGES = ("llm-clf", "torch", "transformers", "accelerate", "tokenizers", "safetensors")


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
    settings = resolve_settings(EncoderSettings, model, config, set)
    base, folder = path_of(settings.model.name), path_of(data)
    require_apart(place, [folder, *([base] if base.is_dir() else [])])
    rows = read_training_data(folder)
    _check_settings(settings, rows)
    with unfinished_run(place, resume=resume, overwrite=overwrite) as unfinished, completing(unfinished, place):
        if not (resume and is_finished(unfinished, ENCODER)):
            _train_run(settings, rows, unfinished, resume=resume)
    say(f"The run is in {place}.")
    return run_metrics(place)


def _check_settings(settings: EncoderSettings, data: TrainingData) -> None:
    """Refuse settings that do not fit the task, before any model is loaded."""
    require_decidable(settings.decide, data.task.names, [prompt.label for prompt in data.valid])
    names = data.task.names
    if settings.head.loss == "bce" and len(names) != 2:
        raise ConfigError(
            f"head.loss bce: one logit stands for two labels, and the task has {len(names)}: {', '.join(names)}. Leave "
            "it at cross-entropy."
        )
    require_fitting(settings.train, data)


def _train_run(settings: EncoderSettings, data: TrainingData, folder: Path, *, resume: bool) -> None:
    """Fill the unfinished run folder; its run.json comes last."""
    from llm_clf.engine.fitting import memory_explained
    from llm_clf.models.bases import base_identity, prepare_libraries
    from llm_clf.models.budget import AUTO, BUDGETS
    from llm_clf.models.devices import choose_device, describe, hardware, peak_memory
    from llm_clf.models.encoders import require_encoder

    started, clock = datetime.now(UTC), time.monotonic()
    prepare_libraries()
    device = choose_device()
    require_encoder(settings.model.name)
    settings = settings.having("model", dtype=_trainable_type(settings.model.dtype, device))
    if settings.train.micro_batch_tokens == AUTO:
        settings = settings.having("train", micro_batch_tokens=BUDGETS[device.type][0])
    base = base_identity(settings.model.name)
    prompts = {**data.hashes, "task": task_facts(data.task)["hash"]}
    inputs = {"settings": settings_to_dict(settings), "prompts": prompts, "base": base}
    if claim(folder, inputs, resume=resume):
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


def _fit(settings: EncoderSettings, data: TrainingData, folder: Path, device: Any) -> tuple[dict[str, Any], str | None]:
    """Train and save encoder and head; return what run.json says of it, and a hash of tokens of validation rows."""
    from llm_clf.baselines.encoder import LabelledRow, train
    from llm_clf.baselines.encoder_model import EncoderScorer, new_classifier, row_tokenizer, save_classifier
    from llm_clf.engine.one_process import accelerated
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
    with accelerated(folder, device, settings.model.dtype, "baseline encoder") as accelerator:
        state = train(
            model,
            rows,
            settings.train,
            accelerator=accelerator,
            evaluate=(lambda: measure(scorer, data, folder, EncoderSettings)) if data.validates else None,
            folder=folder / CHECKPOINTS,
            found=lambda tokens: record(folder, data, EncoderSettings, "train", micro_batch_tokens=tokens),
        )
    learned = folder / KINDS[ENCODER].learned
    save_classifier(model, tokenizer, learned.parent)
    facts = {
        "encoder": {
            "hash": file_hash(learned),
            "parameters": parameters,
            "max_length": tokens.max_length,
            "pooled": model.pooled_from,
        },
        **training_facts(data, state, cut),
    }
    return facts, text_digest(tokens, data.valid)


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
        record(folder, data, EncoderSettings, "predict", batch_tokens=found.batch_tokens)
        settings = settings.having("predict", batch_tokens=found.batch_tokens)
    return decide_validation(settings, data.task, data.valid, scored, folder, counts=data.counts)
