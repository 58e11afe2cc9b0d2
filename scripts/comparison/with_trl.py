"""TRL's SFTTrainer: rows come tokenised, with labels on the answer only."""

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from comparison.meter import TYPES, Marks, model_facts
from comparison.work import STEP_ROWS, Job, Work

MICRO_ROWS = 4
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


class StepMarks(TrainerCallback):  # type: ignore[misc]
    """Notes when each optimiser step is done."""

    def __init__(self) -> None:
        self.marks = Marks()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note a step."""
        self.marks.note()


class PerAnswerTrainer(SFTTrainer):  # type: ignore[misc]
    """Divides the loss of a step by its answers, as llm-clf does, and not by their tokens; keeps it."""

    answer_tokens = 1
    """Tokens of an answer, the same for all."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.parts: list[float] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's own loss of a micro-batch, of which those of a step add up to its loss."""
        answers = num_items_in_batch / self.answer_tokens
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=answers)
        self.parts.append((found[0] if return_outputs else found).item())
        return found

    def losses(self) -> list[float]:
        """Return the loss of every step."""
        each = STEP_ROWS // MICRO_ROWS
        return [sum(self.parts[first : first + each]) for first in range(0, len(self.parts), each)]


def train(work: Work) -> dict[str, Any]:
    """Train an adapter; from the job's initial one where there is one, and then with llm-clf's measure of the loss."""
    job, rows = work.job(), work.rows_in_order()
    model = AutoModelForCausalLM.from_pretrained(work.base, dtype=TYPES[job.dtype])
    adapter: dict[str, Any] = {"peft_config": LoraConfig(
        r=8, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=LAYERS
    )}  # fmt: skip
    if job.initial is not None:
        model, adapter = PeftModel.from_pretrained(model, job.initial, is_trainable=True), {}
    steps = StepMarks()
    trainer = (SFTTrainer if job.initial is None else PerAnswerTrainer)(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(work.base),
        train_dataset=Dataset.from_list(
            [{"input_ids": row.prompt + row.answer, "labels": [-100] * len(row.prompt) + row.answer} for row in rows]
        ),
        callbacks=[steps],
        args=_arguments(work, job),
        **adapter,
    )
    found: dict[str, Any] = {"tokens_seen": sum(len(row["input_ids"]) for row in trainer.train_dataset)}
    if isinstance(trainer, PerAnswerTrainer):
        sizes = {len(row.answer) for row in rows}
        assert len(sizes) == 1, f"answers of {sizes} tokens weigh differently in TRL's loss and in ours"
        trainer.answer_tokens = sizes.pop()
        trainer.train()
        found["losses"] = trainer.losses()
    else:
        trainer.train()
    if job.adapter is not None:
        trainer.model.save_pretrained(job.adapter)
    return {**steps.marks.span(), **model_facts(trainer.model), **found}


def _arguments(work: Work, job: Job) -> SFTConfig:
    """Return a configuration like that of llm-clf; the rows, every epoch of them, come once and in their order."""
    return SFTConfig(
        output_dir=str(work.folder / "trl"),
        per_device_train_batch_size=MICRO_ROWS,
        gradient_accumulation_steps=STEP_ROWS // MICRO_ROWS,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant_with_warmup" if job.schedule == "constant" else job.schedule,
        warmup_steps=job.warmup_steps,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        completion_only_loss=False,
        max_length=None,
        bf16=job.dtype == "bf16",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=job.seed,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
