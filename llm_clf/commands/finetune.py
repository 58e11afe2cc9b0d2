"""A prompts folder to a run: train the adapter, score the validation rows as predict does, write the run folder."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_clf.commands.folds import fold_folders, require_folds, run_folds
from llm_clf.commands.parity import MeasuredRows, check_against_training, prompt_digest, scored_with
from llm_clf.commands.sweep import run_sweep, trial_folders
from llm_clf.commands.validation import decide_validation, score_validation
from llm_clf.config import DEFAULT_BASE, Settings, load_settings, settings_to_dict
from llm_clf.console import say
from llm_clf.decisions.fitting import require_decidable
from llm_clf.errors import ConfigError, LlmClfError
from llm_clf.evaluation.metrics import NO_LABEL, compute_metrics
from llm_clf.files import (
    file_hash,
    locked,
    partial_name,
    path_of,
    replace_folder,
    require_apart,
    write_json,
    writing,
)
from llm_clf.prompting.tasks import Task
from llm_clf.prompting.training_data import TrainingData, read_training_data
from llm_clf.runs import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG,
    ENSEMBLE,
    FOLDS,
    INPUTS,
    LOG,
    LORA,
    SWEEP,
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
from llm_clf.sweeping.space import Sweep, ends, load_sweep

if TYPE_CHECKING:
    from llm_clf.engine.training import Watch

TOKENS = "tokens"
"""In the prompts folder: tokens of its rows, which trainings make and find again."""
CHECKPOINTED = ("", ", activations computed again in the backward")


@dataclass(frozen=True, slots=True)
class _Rows:
    """The training rows as tokens."""

    tokenizer: Any
    tokens: Any
    """What made them, and makes those of the validation rows: a PromptTokenizer."""
    head: Any
    """Reads labels from the model: a Head."""
    examples: list[Any]
    cut: int
    """How many were cut to fit."""


def finetune(
    data: str | Path,
    *,
    out: str | Path,
    model: str | None = None,
    config: str | Path | None = None,
    set: Sequence[str] = (),
    sweep: str | Path | None = None,
    folds: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a LoRA adapter on a prompts folder and write the run folder `out`; return its metrics.

    Args:
        data: A folder that `build_prompts` made.
        out: The run folder; until it is complete it stands beside its place as `out.partial`.
        model: The base, in place of the setting `model.name`.
        config: A YAML file of settings.
        set: Settings as `section.key=value`, stronger than the file.
        sweep: A YAML file of settings to try; the best of these trainings becomes the run.
        folds: Cut the training rows into so many folds and train on the rest of each; the run is the mean of all.
        resume: Go on with what an interrupted training left.
        overwrite: Replace `out`.

    Raises:
        LlmClfError: Settings, prompts or base are wrong, or the loss is not a number.
    """
    if folds is not None and sweep is not None:
        raise ConfigError("--folds: a sweep compares its trials by the validation rows. Sweep first, then --folds.")
    place = path_of(out)
    if resume and is_finished(place, LORA if folds is None else ENSEMBLE):
        say(f"{place} is finished; nothing to do.")
        return run_metrics(place)
    require_run_place(place, overwrite=overwrite)
    settings = resolve_settings(model, config, set)
    base, folder = path_of(settings.model.name), path_of(data)
    require_apart(place, [folder, *([base] if base.is_dir() else [])])
    prompts = read_training_data(folder)
    _check_settings(settings, prompts)
    plan = _read_sweep(sweep, settings, prompts) if sweep is not None else None
    if folds is not None:
        require_folds(folds, settings, prompts)
    with locked(place):
        unfinished = partial_name(place)
        if unfinished.exists() and not (resume or overwrite):
            raise ConfigError(
                f"{unfinished}: an interrupted training left this. --resume goes on with it, --overwrite starts anew."
            )
        if not overwrite:
            _require_same_kind(unfinished, SWEEP if plan is not None else FOLDS if folds is not None else None)
        try:
            with writing(unfinished, "Then --resume goes on from the last checkpoint."):
                if not (resume and is_run(unfinished)):
                    if plan is not None:
                        train = partial(_train_run, data=prompts, resume=True)
                        run_sweep(plan, settings, prompts.hashes, unfinished, train, resume=resume)
                    elif folds is not None:
                        train_fold = partial(_train_run, resume=True)
                        run_folds(folds, settings, prompts, unfinished, train_fold, resume=resume)
                    else:
                        _train_run(settings, prompts, unfinished, resume=resume)
                metrics = _finish(unfinished, place)
        except LlmClfError:
            _drop_fruitless(unfinished)
            raise
    say(f"The run is in {place}.")
    return metrics


def resolve_settings(model: str | None, config: str | Path | None, overrides: Sequence[str]) -> Settings:
    """Return the settings: defaults, the recipe of the base that ships where it is used, the file, the overrides."""
    if model is not None and (path_of(model) / "config.json").is_file():
        model = str(path_of(model).resolve())
    files = [Path(config)] if config is not None else []
    changes = [*overrides, *([f"model.name={json.dumps(model)}"] if model is not None else [])]
    settings = load_settings(files, changes)
    if settings.model.name == DEFAULT_BASE:
        settings = load_settings([shipped_recipe(), *files], changes)
    return settings


def shipped_recipe() -> Path:
    """Return the settings that suit the base that ships."""
    package = Path(__file__).resolve().parent.parent
    # The wheel carries configs/ inside the package; in a checkout it stands beside it.
    places = (package / "configs", package.parent / "configs")
    return next(place for place in places if place.is_dir()) / f"{DEFAULT_BASE}.yaml"


def _check_settings(settings: Settings, data: TrainingData) -> None:
    """Refuse settings that do not fit the task, before any model is loaded."""
    require_decidable(settings.decide, data.task.names, [prompt.label for prompt in data.valid])
    if settings.data.cut is not None and settings.data.cut not in data.task.columns:
        raise ConfigError(
            f"data.cut: {settings.data.cut!r} is no column of the task; these are {', '.join(data.task.columns)}."
        )
    validated = {prompt.label for prompt in data.valid if prompt.label is not None}
    if settings.train.metric == "roc_auc" and len(validated) == 1:
        raise ConfigError(
            f"train.metric roc_auc: all validation rows with a label have {validated.pop()!r}, and a ROC curve needs "
            "two labels. Choose another metric, or build the prompts with a larger share for validation."
        )
    if isinstance(settings.train.class_weights, dict):
        unknown = sorted(settings.train.class_weights.keys() - set(data.task.names))
        if unknown:
            raise ConfigError(
                f"train.class_weights: {unknown[0]!r} is no label; the labels are {', '.join(data.task.names)}."
            )


def _read_sweep(file: str | Path, settings: Settings, data: TrainingData) -> Sweep:
    """Return what a sweep tries; each of it must fit the task, and there must be rows to compare trials by."""
    sweep = load_sweep(path_of(file), settings)
    if not data.validates:
        raise ConfigError(
            "A sweep compares its trials by the validation rows, and none of these has a label. Build the prompts with "
            "a larger share for validation."
        )
    for changed in ends(sweep, settings):
        _check_settings(changed, data)
    return sweep


def _require_same_kind(unfinished: Path, wanted: str | None) -> None:
    """Refuse to go on with a sweep, or with folds, as with another training.

    Args:
        unfinished: What was interrupted, if anything.
        wanted: The folder that a sweep or folds have in it, None for a single training.

    Raises:
        ConfigError: What was interrupted is another one.
    """
    found = next((name for name in (SWEEP, FOLDS) if (unfinished / name).is_dir()), None)
    if (unfinished / INPUTS).is_file() and found != wanted:
        words = {
            SWEEP: ("an interrupted sweep", "Give its --sweep"),
            FOLDS: ("an interrupted cross-validation", "Give its --folds"),
            None: ("an interrupted single training", f"Leave out --{wanted}"),
        }
        left, advice = words[found]
        raise ConfigError(f"{unfinished}: {left} left this. {advice}, or --overwrite to start anew.")


def _train_run(
    settings: Settings, data: TrainingData, folder: Path, *, resume: bool, watch: "Watch | None" = None
) -> None:
    """Fill the unfinished run folder; its run.json comes last.

    Args:
        settings: Of the training.
        data: What is trained and validated on.
        folder: The unfinished run.
        resume: Go on with what is there.
        watch: Is told of each evaluation, as `train` tells it.
    """
    from llm_clf.models.adapters import require_mergeable
    from llm_clf.models.bases import base_identity, quiet_libraries, resolve_base
    from llm_clf.models.budget import mode_of
    from llm_clf.models.devices import choose_device, choose_dtype, describe, hardware, peak_memory
    from llm_clf.models.memory import empty_model

    started, clock = datetime.now(UTC), time.monotonic()
    quiet_libraries()
    device = choose_device()
    dtype = choose_dtype(settings.model.dtype, device)
    resolved, _ = resolve_base(settings.model)
    settings = settings.model_copy(update={"model": resolved.model_copy(update={"dtype": dtype})})
    if settings.predict.merge is True:
        require_mergeable(settings.model)
    base = base_identity(settings.model.name)
    empty = empty_model(settings.model, data.task.names)
    rows = _tokenize(empty, data, settings)
    if _claim(folder, settings, data, base, resume=resume):
        # Whether to merge is decided at the end, by what was asked for; a kill after that may have left an answer here.
        settings = _as_found(settings, folder)
    else:
        settings = _cut_to_memory(settings, empty, rows, device)
        save_inputs(folder, data.task, settings_to_dict(settings))
    say(
        f"Base {settings.model.name} in {mode_of(settings.model)} on {describe(device)}; micro-batches of "
        f"{settings.train.micro_batch_tokens:,} tokens{CHECKPOINTED[bool(settings.train.gradient_checkpointing)]}."
    )

    trained = _fit(settings, data, folder, device, rows, watch)
    settings = _as_found(settings, folder)
    choice, fits, scored = score_validation(settings, data.task, data.valid, folder)
    settings = settings.model_copy(update={"predict": settings.predict.model_copy(update={"batch_tokens": fits})})
    settings = settings.merging(choice.merged)
    save_inputs(folder, data.task, settings_to_dict(settings))
    save_trained_rows(folder, data.train)
    decided = decide_validation(settings, data.task, data.valid, scored, folder, counts=data.counts)
    measured = MeasuredRows(folder / CHECKPOINTS).of(trained["training"]["best_step"], trained["evaluations"])
    rounding = "the adapter is merged into the base's weights now" if choice.merged else None
    facts = {
        "kind": LORA,
        "name": folder.name.removesuffix(".partial"),
        "base": base,
        "task": task_facts(data.task),
        **trained,
        "merge": asdict(choice),
        "decisions": decided,
        "verified": check_against_training(folder, measured, rounding=rounding),
        "prompts": data.hashes,
        "data": prompts_place(data.folder, folder),
        "scored_with": scored_with(folder, settings, prompt_digest(rows.tokens, data.valid)),
        "seed": settings.train.seed,
        "versions": package_versions(),
        "commit": commit(),
        "hardware": hardware(device),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 2),
        "peak_memory": peak_memory(device),
    }
    save_facts(folder, facts)


def _finish(unfinished: Path, place: Path) -> dict[str, Any]:
    """Give a run that has all its files its name; return its metrics."""
    shutil.rmtree(unfinished / CHECKPOINTS, ignore_errors=True)
    (unfinished / INPUTS).unlink(missing_ok=True)
    replace_folder(unfinished, place)
    return run_metrics(place)


def _drop_fruitless(unfinished: Path) -> None:
    """Remove an unfinished run in which nothing was learned yet: there is nothing to go on with."""
    from llm_clf.engine.course import has_checkpoint

    places = [unfinished, *trial_folders(unfinished), *fold_folders(unfinished)]
    if not any(is_run(place) or has_checkpoint(place / CHECKPOINTS) for place in places):
        shutil.rmtree(unfinished, ignore_errors=True)


def _cut_to_memory(settings: Settings, empty: Any, rows: _Rows, device: Any) -> Settings:
    """Return the settings with what `auto` means for the memory that is free now.

    Raises:
        ConfigError: The training would not fit.
    """
    from llm_clf.models.budget import RowLengths, Shapes, free_memory, mode_of, plan_training, require_fit
    from llm_clf.models.memory import DTYPE_BYTES

    sizes = [len(example.ids) + len(example.answer) for example in rows.examples]
    answer = max(len(example.answer) for example in rows.examples)
    lengths = RowLengths(max(sizes), sum(sizes) / len(sizes), answer)
    shapes, mode, size = Shapes.of(empty, settings), mode_of(settings.model), DTYPE_BYTES[settings.model.dtype]
    free = free_memory(device)
    plan = plan_training(mode, size, shapes, lengths, settings, device=device.type, free=free)
    require_fit(mode, size, plan, shapes, lengths, settings, device=device.type, free=free)
    found = {"micro_batch_tokens": plan.micro_batch_tokens, "gradient_checkpointing": plan.gradient_checkpointing}
    return settings.model_copy(update={"train": settings.train.model_copy(update=found)})


def _record(folder: Path, task: Task, section: str, **found: int) -> None:
    """Put into the run's settings what was found while it runs: --resume goes on with it, and predict takes it."""
    settings = load_settings([folder / CONFIG])
    changed = getattr(settings, section).model_copy(update=found)
    save_inputs(folder, task, settings_to_dict(settings.model_copy(update={section: changed})))


def _as_found(settings: Settings, folder: Path) -> Settings:
    """Return the settings with the token budgets that were found while it ran."""
    found = load_settings([folder / CONFIG])
    predict = settings.predict.model_copy(update={"batch_tokens": found.predict.batch_tokens})
    return settings.model_copy(update={"train": found.train, "predict": predict})


def _fit(
    settings: Settings, data: TrainingData, folder: Path, device: Any, rows: _Rows, watch: "Watch | None"
) -> dict[str, Any]:
    """Train and save the adapter; return what run.json says of it."""
    from llm_clf.engine.fitting import memory_explained

    with memory_explained():
        return _fit_in_memory(settings, data, folder, device, rows, watch)


def _fit_in_memory(
    settings: Settings, data: TrainingData, folder: Path, device: Any, rows: _Rows, watch: "Watch | None"
) -> dict[str, Any]:
    from llm_clf.engine.classifier import Classifier
    from llm_clf.engine.training import train
    from llm_clf.models.adapters import new_adapter, save_adapter, trainable
    from llm_clf.models.bases import load_model

    base = load_model(settings.model, dtype=settings.model.dtype, device=device, labels=data.task.names)
    model = new_adapter(base, settings.lora, seed=settings.train.seed)
    tokens, examples = rows.tokens, rows.examples
    parameters = sum(parameter.numel() for parameter in trainable(model))
    say(
        f"{len(examples):,} training rows ({rows.cut:,} cut to fit, {data.unlabelled:,} without a label left out), "
        f"{len(data.valid):,} validation rows; {parameters:,} adapter weights."
    )
    classifier = Classifier(model, tokens, rows.head, batch_tokens=settings.predict.batch_tokens, speed=settings.speed)
    accelerator = _accelerator(settings, device, folder)
    try:
        state = train(
            model,
            rows.head,
            examples,
            settings.train,
            settings.speed,
            accelerator=accelerator,
            pad_id=tokens.pad_id,
            evaluate=(lambda: _measure(classifier, data, folder)) if data.validates else None,
            folder=folder / CHECKPOINTS,
            found=lambda tokens: _record(folder, data.task, "train", micro_batch_tokens=tokens),
            watch=watch,
        )
    finally:
        accelerator.end_training()
    save_adapter(model, folder / ADAPTER, base=settings.model.name, tokenizer=rows.tokenizer)
    return {
        "adapter": {"hash": file_hash(folder / ADAPTER / "adapter_model.safetensors"), "parameters": parameters},
        "rows": {
            "train": len(examples),
            "train_cut": rows.cut,
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


def _tokenize(base: Any, data: TrainingData, settings: Settings) -> _Rows:
    """Return the training rows as tokens with their answers."""
    from llm_clf.engine.classifier import prompt_tokenizer
    from llm_clf.engine.heads import make_head
    from llm_clf.engine.token_cache import TokenCache
    from llm_clf.engine.tokens import TrainingExample
    from llm_clf.engine.training import row_weights
    from llm_clf.models.bases import load_tokenizer

    tokenizer = load_tokenizer(settings.model)
    cache = TokenCache(data.folder / TOKENS) if settings.data.token_cache else None
    tokens = prompt_tokenizer(tokenizer, base, data.task, settings, cache)
    head = make_head(settings.model, tokens)
    encoded = tokens.encode(data.train)
    labels = [prompt.label for prompt in data.train if prompt.label is not None]
    weights = row_weights(labels, settings.train.class_weights)
    examples = [
        TrainingExample(example.ids, head.answer(data.task.names.index(label)), weight)
        for example, label, weight in zip(encoded, labels, weights, strict=True)
    ]
    return _Rows(tokenizer, tokens, head, examples, sum(example.cut for example in encoded))


def _claim(folder: Path, settings: Settings, data: TrainingData, base: dict[str, Any], *, resume: bool) -> bool:
    """Make the unfinished run folder, or check that the one there belongs to the same training; return whether it does.

    Raises:
        ConfigError: Settings, prompts or base are not those that the interrupted training had.
    """
    inputs = {"settings": settings_to_dict(settings), "prompts": data.hashes, "base": base}
    if resume and (folder / INPUTS).is_file():
        require_same_inputs(folder, inputs)
        return (folder / CONFIG).is_file()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / CHECKPOINTS).mkdir(parents=True)
    write_json(folder / INPUTS, inputs)
    return False


def _accelerator(settings: Settings, device: Any, folder: Path) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    on_cpu = device.type == "cpu"
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="fp16" if settings.model.dtype == "fp16" and not on_cpu else "no",
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder)),
    )
    if accelerator.num_processes > 1:
        raise ConfigError("finetune trains in one process; start it without `accelerate launch` or torchrun.")
    accelerator.init_trackers(LOG)
    return accelerator


def _measure(classifier: Any, data: TrainingData, folder: Path) -> dict[str, float]:
    """Return the validation metrics of the model as it is now, by the path that predict takes."""
    from llm_clf.decisions.decide import decide, probabilities

    before = classifier.batch_tokens
    probs = probabilities(classifier.score_all(data.valid))
    if classifier.batch_tokens != before:
        _record(folder, data.task, "predict", batch_tokens=classifier.batch_tokens)
    predicted = [data.task.names[choice] for choice in decide(probs)]
    gold = [prompt.label or NO_LABEL for prompt in data.valid]
    found = compute_metrics(gold, predicted, probs, data.task.names)
    metrics = {name: value for name, value in found.items() if isinstance(value, float)}
    MeasuredRows(folder / CHECKPOINTS).keep(metrics, probs)
    return metrics
