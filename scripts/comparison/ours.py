"""llm-clf: training, prediction by scores of the labels, and the machine's rate."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from flops import matmul_rate

from comparison.meter import Marks, model_facts
from comparison.work import STEP_ROWS, Job, Row, Work
from llm_clf.config import Settings
from llm_clf.config_loading import load_settings
from llm_clf.engine.label_words import LabelWords
from llm_clf.engine.packing import common_beginning
from llm_clf.engine.scoring import LabelScorer
from llm_clf.engine.speed import speed_up
from llm_clf.engine.tokens import TrainingExample
from llm_clf.engine.training import train as train_adapter
from llm_clf.models.adapters import attach_adapter, new_adapter, save_adapter
from llm_clf.models.bases import load_model, load_tokenizer, prepare_libraries
from llm_clf.models.devices import choose_device

PAD = 0


def settings_of(base: Path, job: Job) -> Settings:
    """Return the settings of a job; what all tools have in common cannot be overridden."""
    common = [
        f"model.name={base}",
        f"model.dtype={job.dtype}",
        "lora.r=8",
        "lora.alpha=32",
        "lora.dropout=0",
        f"train.seed={job.seed}",
        f"train.epochs={job.epochs}",
        f"train.batch_size={STEP_ROWS}",
        f"train.learning_rate={job.learning_rate}",
        f"train.schedule={job.schedule}",
        # Below 1 it would be a share.
        f"train.warmup={job.warmup_steps}",
    ]
    free = ["train.micro_batch_tokens=2048", "train.gradient_checkpointing=false"]
    return load_settings(overrides=[*free, *job.overrides, *common])


class StepLog(Accelerator):  # type: ignore[misc]
    """An accelerator that notes when each optimiser step is done, and its loss: that is when the loop logs it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(cpu=device.type == "cpu")
        self.marks = Marks()
        self.losses: list[float] = []

    def log(self, values: dict[str, Any], step: int | None = None, log_kwargs: dict[str, Any] | None = None) -> None:
        """Note a step."""
        self.marks.note()
        self.losses.append(values["train/loss"])


def train(work: Work) -> dict[str, Any]:
    """Train the adapter as finetune does, without validation."""
    prepare_libraries()
    job, device = work.job(), choose_device()
    settings = settings_of(work.base, job)
    base = load_model(settings.model, dtype=job.dtype, device=device)
    model = new_adapter(base, settings.lora, seed=job.seed)
    tokenizer = load_tokenizer(settings.model)
    if job.initial is not None and not Path(job.initial).exists():
        save_adapter(model, Path(job.initial), base=str(work.base), tokenizer=tokenizer)
    log = StepLog(device)
    # A folder of its own: from a former checkpoint training would go on.
    with TemporaryDirectory(dir=work.folder) as checkpoints:
        state = train_adapter(
            model,
            LabelWords([[answer] for answer in answers_of(work.rows())]),
            [TrainingExample(row.prompt, row.answer, 1.0) for row in work.rows()],
            settings.train,
            settings.speed,
            accelerator=log,
            pad_id=PAD,
            evaluate=None,
            folder=Path(checkpoints),
        )
    if job.adapter is not None:
        save_adapter(model, Path(job.adapter), base=str(work.base), tokenizer=tokenizer)
    return {**log.marks.span(), "losses": log.losses, "tokens_seen": state.tokens, **model_facts(model)}


def predict(work: Work) -> dict[str, Any]:
    """Score all labels of every row as predict does; `log_loss` is that of the rows' own answers."""
    prepare_libraries()
    job = work.job()
    settings = settings_of(work.base, job)
    model = load_model(settings.model, dtype=job.dtype, device=choose_device())
    if job.adapter is not None:
        tokenizer = load_tokenizer(settings.model)
        model = attach_adapter(model, Path(job.adapter), merge=settings.predict.merge is True, tokenizer=tokenizer)
    rows = work.rows()
    prompts, answers = [row.prompt for row in rows], answers_of(rows)
    head = LabelWords([[answer] for answer in answers])
    packed = speed_up(model, settings.speed)
    shared = common_beginning(prompts) if settings.speed.shared_prefix else []
    scorer = LabelScorer(model, head, pad_id=PAD, packed=packed, shared=shared)
    scorer.score(prompts[:2])
    scorer.start()
    scores = torch.empty(len(rows), len(answers))
    marks = Marks()
    marks.note()
    for batch in scorer.plan([len(prompt) for prompt in prompts], settings.predict.batch_tokens):
        scores[batch] = scorer.score([prompts[index] for index in batch])
    marks.note()
    own = torch.tensor([answers.index(row.answer) for row in rows])
    log_loss = torch.nn.functional.cross_entropy(scores, own).item()
    return {**marks.span(), "log_loss": log_loss, **model_facts(model)}


def answers_of(rows: list[Row]) -> list[list[int]]:
    """Return the answers that rows have, each once."""
    return [list(answer) for answer in sorted({tuple(row.answer) for row in rows})]


def multiply(work: Work) -> dict[str, Any]:
    """Measure the machine's rate of matrix products in the type that is compared."""
    return matmul_rate(choose_device(), work.job().dtype)
