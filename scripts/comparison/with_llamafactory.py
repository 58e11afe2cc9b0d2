"""LLaMA-Factory's own command, on the rows' texts."""

import json
from typing import Any

import torch
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback

from comparison.meter import Marks, model_facts
from comparison.work import STEP_ROWS, Job, Row, Work

MICRO_ROWS = 4
PREDICT_ROWS = 8


class Watch(TrainerCallback):  # type: ignore[misc]
    """Notes when each optimiser step, or each batch of a prediction, is done, and what was read."""

    def __init__(self) -> None:
        self.marks = Marks()
        self.facts: dict[str, Any] = {}

    def on_train_begin(self, *_: Any, model: Any, train_dataloader: Any, **__: Any) -> None:
        """Note what is trained, and how many tokens there are: LLaMA-Factory tokenises by itself."""
        tokens = sum(len(row["input_ids"]) for row in train_dataloader.dataset)
        self.facts = {**model_facts(model), "tokens_seen": tokens}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note a step."""
        self.marks.note()

    def on_prediction_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Note a batch."""
        self.marks.note()
        if model is not None:
            self.facts = model_facts(model)


def train(work: Work) -> dict[str, Any]:
    """Train an adapter on all linear layers."""
    job, watch = work.job(), Watch()
    _write_rows(work, work.rows_in_order())
    training = {
        "do_train": True,
        "dataset": "rows",
        "lora_rank": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "per_device_train_batch_size": MICRO_ROWS,
        "gradient_accumulation_steps": STEP_ROWS // MICRO_ROWS,
        "num_train_epochs": 1,
        "disable_shuffling": True,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": job.schedule,
        "warmup_steps": job.warmup_steps,
        "weight_decay": 0.0,
        "seed": job.seed,
        "save_strategy": "no",
        "disable_gradient_checkpointing": True,
        "logging_strategy": "no",
    }
    run_exp({**_common(work, job), **training}, callbacks=[watch])
    return {**watch.marks.span(), **watch.facts}


def predict(work: Work) -> dict[str, Any]:
    """Let the model write every answer; a batch in front, which warms up, is not timed."""
    job, rows, watch = work.job(), work.rows(), Watch()
    _write_rows(work, [*rows[:PREDICT_ROWS], *rows])
    prediction = {
        "do_predict": True,
        "eval_dataset": "rows",
        "predict_with_generate": True,
        "per_device_eval_batch_size": PREDICT_ROWS,
        "max_new_tokens": max(len(row.answer) for row in rows),
        "do_sample": False,
    }
    run_exp({**_common(work, job), **prediction}, callbacks=[watch])
    return {**watch.marks.span(), **watch.facts}


def _write_rows(work: Work, rows: list[Row]) -> None:
    """Write the rows in the form that LLaMA-Factory reads; it puts a newline between instruction and input."""
    texts = [{"instruction": row.instruction, "input": row.input, "output": row.output} for row in rows]
    (work.folder / "texts.json").write_text(json.dumps(texts))
    (work.folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "texts.json"}}))


def _common(work: Work, job: Job) -> dict[str, Any]:
    return {
        "model_name_or_path": str(work.base),
        "stage": "sft",
        "finetuning_type": "lora",
        "template": "empty",
        "dataset_dir": str(work.folder),
        "cutoff_len": 8192,
        "overwrite_cache": True,
        "preprocessing_num_workers": 1,
        "output_dir": str(work.folder / "llamafactory"),
        "overwrite_output_dir": True,
        "report_to": "none",
        "bf16": job.dtype == "bf16",
        "use_cpu": not torch.cuda.is_available(),
    }
