"""One training of an adapter: settings cut to the memory, the training, its validation rows scored as predict does."""

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_clf.commands.parity import MeasuredRows, check_against_training, prompt_digest, scored_with
from llm_clf.commands.training_run import claim, measure, record, training_facts
from llm_clf.commands.validation import decide_validation, score_validation
from llm_clf.config import Settings, settings_to_dict
from llm_clf.config_loading import load_settings
from llm_clf.console import say
from llm_clf.files import file_hash
from llm_clf.prompting.training_data import TrainingData
from llm_clf.runs import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    CHECKPOINTS,
    CONFIG,
    LORA,
    commit,
    package_versions,
    prompts_place,
    save_facts,
    save_inputs,
    save_trained_rows,
    task_facts,
)

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


def train_run(
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
    from llm_clf.engine.fitting import memory_explained
    from llm_clf.models.adapters import require_mergeable
    from llm_clf.models.bases import base_identity, prepare_libraries, resolve_base
    from llm_clf.models.budget import mode_of
    from llm_clf.models.devices import choose_device, choose_dtype, describe, hardware, peak_memory
    from llm_clf.models.memory import empty_model

    started, clock = datetime.now(UTC), time.monotonic()
    prepare_libraries()
    device = choose_device()
    dtype = choose_dtype(settings.model.dtype, device)
    resolved, _ = resolve_base(settings.model)
    settings = settings.model_copy(update={"model": resolved}).having("model", dtype=dtype)
    if settings.predict.merge is True:
        require_mergeable(settings.model)
    base = base_identity(settings.model.name)
    empty = empty_model(settings.model, data.task.names)
    rows = _tokenize(empty, data, settings)
    inputs = {"settings": settings_to_dict(settings), "prompts": data.hashes, "base": base}
    if claim(folder, inputs, resume=resume):
        # Whether to merge is decided at the end, by what was asked for; a kill after that may have left an answer here.
        settings = _as_found(settings, folder)
    else:
        settings = _cut_to_memory(settings, empty, rows, device)
        save_inputs(folder, data.task, settings_to_dict(settings))
    say(
        f"Base {settings.model.name} in {mode_of(settings.model)} on {describe(device)}; micro-batches of "
        f"{settings.train.micro_batch_tokens:,} tokens{CHECKPOINTED[bool(settings.train.gradient_checkpointing)]}."
    )

    with memory_explained():
        trained = _fit(settings, data, folder, device, rows, watch)
    settings = _as_found(settings, folder)
    choice, fits, scored = score_validation(settings, data.task, data.valid, folder)
    settings = settings.having("predict", batch_tokens=fits, merge=choice.merged)
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
    return settings.having(
        "train", micro_batch_tokens=plan.micro_batch_tokens, gradient_checkpointing=plan.gradient_checkpointing
    )


def _as_found(settings: Settings, folder: Path) -> Settings:
    """Return the settings with the token budgets that were found while it ran."""
    found = load_settings([folder / CONFIG])
    return settings.model_copy(update={"train": found.train}).having("predict", batch_tokens=found.predict.batch_tokens)


def _fit(
    settings: Settings, data: TrainingData, folder: Path, device: Any, rows: _Rows, watch: "Watch | None"
) -> dict[str, Any]:
    """Train and save the adapter; return what run.json says of it."""
    from llm_clf.engine.classifier import Classifier
    from llm_clf.engine.one_process import accelerated
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
    with accelerated(folder, device, settings.model.dtype, "finetune") as accelerator:
        state = train(
            model,
            rows.head,
            examples,
            settings.train,
            settings.speed,
            accelerator=accelerator,
            pad_id=tokens.pad_id,
            evaluate=(lambda: measure(classifier, data, folder, Settings)) if data.validates else None,
            folder=folder / CHECKPOINTS,
            found=lambda tokens: record(folder, data, Settings, "train", micro_batch_tokens=tokens),
            watch=watch,
        )
    save_adapter(model, folder / ADAPTER, base=settings.model.name, tokenizer=rows.tokenizer)
    return {
        "adapter": {"hash": file_hash(folder / ADAPTER / ADAPTER_WEIGHTS), "parameters": parameters},
        **training_facts(data, state, rows.cut),
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
