"""Training and prediction speed beside other tools: the same rows, base, LoRA settings and number of steps.

scripts/benchmark.py [--rows FILE.csv] [--count 256] [--guideline TOKENS] [--repeats 3]
                     [--trl PYTHON] [--llamafactory PYTHON] [--only NAME,NAME] [--out FILE.json]

The base is a random Glm of about 100 million weights (hidden 768, 12 layers, 12 heads on 2, FFN 2048, vocabulary
16,000) in bf16, LoRA r 8 on all linear layers, no dropout, 16 rows a step. PYTHON is the interpreter of an
environment of its own (`pip install trl peft accelerate datasets transformers`, `pip install llamafactory`); without
one that tool is left out. Each runs in a process of its own, in turn, `--repeats` times; the time of training is that
from the end of the first step to the end of the last, the time of prediction that of all rows without loading. Rows of
a CSV file need the columns title, abstract and label; without a file words are drawn so that rows are about as long as
paper abstracts.
"""

import argparse
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
STEP_ROWS = 16
INSTRUCTION = (
    "Read the title and the abstract of a scientific paper. Answer 1 when the paper is about medicine and 0 when it is "
    "about something else. Answer with the number alone."
)
PEERS = ("trl", "llamafactory")


# What runs in the process of each tool. Only `ours` imports llm_clf; the others see a folder with base and rows.


def ours_train(work: Path) -> dict[str, Any]:
    """Train with llm-clf."""
    import torch
    from accelerate import Accelerator

    from llm_clf.config import load_settings
    from llm_clf.engine.training import TrainingExample, train
    from llm_clf.models.adapters import new_adapter
    from llm_clf.models.bases import load_model

    settings = load_settings(overrides=[f"model.name={work / 'base'}", "lora.dropout=0", *_overrides(work)])
    base = load_model(settings.model, dtype="bf16", device=torch.device("cpu"))
    model = new_adapter(base, settings.lora, seed=1)
    rows = _tokens(work)
    examples = [TrainingExample(prompt, answer, 1.0) for prompt, answer in rows]
    marks: list[float] = []
    accelerator = Accelerator(cpu=True)
    _mark_steps(accelerator, marks)
    train(
        model,
        examples,
        settings.train.model_copy(
            update={
                "epochs": 1, "batch_size": STEP_ROWS, "micro_batch_tokens": 4096, "gradient_checkpointing": False,
                "learning_rate": 2e-4, "schedule": "constant", "warmup": 0.0,
            }
        ),
        settings.speed,
        accelerator=accelerator,
        pad_id=0,
        evaluate=None,
        folder=work / "checkpoints",
    )  # fmt: skip
    return _trained(marks, rows)


def _mark_steps(accelerator: Any, marks: list[float]) -> None:
    """Note when each optimiser step is done: that is when the loop logs it."""
    log = accelerator.log

    def noted(values: dict[str, Any], step: int | None = None, **more: Any) -> None:
        marks.append(time.monotonic())
        log(values, step=step, **more)

    accelerator.log = noted


def ours_predict(work: Path) -> dict[str, Any]:
    """Score both labels of every row with llm-clf."""
    import torch

    from llm_clf.config import load_settings
    from llm_clf.engine.packing import common_beginning
    from llm_clf.engine.scoring import LabelScorer
    from llm_clf.engine.speed import speed_up
    from llm_clf.models.bases import load_model

    settings = load_settings(overrides=[f"model.name={work / 'base'}", *_overrides(work)])
    model = load_model(settings.model, dtype="bf16", device=torch.device("cpu"))
    rows = _tokens(work)
    prompts = [prompt for prompt, _ in rows]
    answers = [[list(answer)] for answer in sorted({tuple(answer) for _, answer in rows})]
    packed = speed_up(model, settings.speed)
    shared = common_beginning(prompts) if settings.speed.shared_prefix else []
    scorer = LabelScorer(model, answers, pad_id=0, packed=packed, shared=shared)
    scorer.score(prompts[:2])
    scorer.start()
    started = time.monotonic()
    for batch in scorer.plan([len(prompt) for prompt in prompts], settings.predict.batch_tokens):
        scorer.score([prompts[index] for index in batch])
    return _predicted(started, rows)


def trl_train(work: Path) -> dict[str, Any]:
    """Train with TRL's SFTTrainer; rows come tokenised, with labels on the answer only."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    marks: list[float] = []

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.monotonic())

    rows = _tokens(work)
    data = Dataset.from_list(
        [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in rows]
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16),
        processing_class=AutoTokenizer.from_pretrained(work / "base"),
        train_dataset=data,
        peft_config=LoraConfig(
            r=8, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
        ),
        callbacks=[Marks()],
        args=SFTConfig(
            output_dir=str(work / "trl"), per_device_train_batch_size=4, gradient_accumulation_steps=STEP_ROWS // 4,
            num_train_epochs=1, learning_rate=2e-4, lr_scheduler_type="constant", completion_only_loss=False,
            max_length=None, bf16=True, gradient_checkpointing=False, use_cpu=True, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, seed=1, dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        ),
    )  # fmt: skip
    trainer.train()
    return _trained(marks, rows)


def generate_one(work: Path) -> dict[str, Any]:
    """Let transformers write each answer, one row at a time, as the project of 2023 did."""
    return _generate(work, 1)


def generate_batched(work: Path) -> dict[str, Any]:
    """Let transformers write the answers of 16 rows at a time, padded on the left, sorted by length."""
    return _generate(work, 16)


def _generate(work: Path, size: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16).eval()
    rows = sorted(_tokens(work), key=lambda row: len(row[0]))
    tokens = max(len(answer) for _, answer in rows)

    def answer(some: list[Any]) -> None:
        longest = max(len(prompt) for prompt, _ in some)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in some])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in some])
        # A random base never ends its answer by itself; it writes as many tokens as a label has.
        model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
            pad_token_id=0,
        )  # fmt: skip

    answer(rows[:1])
    started = time.monotonic()
    for first in range(0, len(rows), size):
        answer(rows[first : first + size])
    return _predicted(started, rows)


def llamafactory_train(work: Path) -> dict[str, Any]:
    """Train with LLaMA-Factory's own command."""
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    marks: list[float] = []

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.monotonic())

    run_exp(
        _llamafactory(work)
        | {
            "do_train": True, "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target": "all",
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": STEP_ROWS // 4, "num_train_epochs": 1,
            "learning_rate": 2e-4, "lr_scheduler_type": "constant", "bf16": True, "save_strategy": "no",
            "disable_gradient_checkpointing": True, "logging_strategy": "no",
        },
        callbacks=[Marks()],
    )  # fmt: skip
    return _trained(marks, _tokens(work))


def llamafactory_predict(work: Path) -> dict[str, Any]:
    """Predict with LLaMA-Factory's `do_predict`; its own count of seconds, loading left out."""
    from llamafactory.train.tuner import run_exp

    run_exp(
        _llamafactory(work)
        | {
            "do_predict": True, "dataset": None, "eval_dataset": "rows", "predict_with_generate": True,
            "per_device_eval_batch_size": 8, "max_new_tokens": 3,
            "do_sample": False, "finetuning_type": "lora", "bf16": True,
        }
    )  # fmt: skip
    found = json.loads((work / "llamafactory" / "predict_results.json").read_text())
    rows = _tokens(work)
    seconds = float(found["predict_runtime"])
    return {"seconds": seconds, "rows": len(rows), "tokens": _count(rows), "peak_bytes": _peak()}


def _llamafactory(work: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(work / "base"), "stage": "sft", "finetuning_type": "lora", "template": "empty",
        "dataset_dir": str(work), "dataset": "rows", "eval_dataset": None, "cutoff_len": 4096, "overwrite_cache": True,
        "output_dir": str(work / "llamafactory"), "report_to": "none", "use_cpu": True, "overwrite_output_dir": True,
        "preprocessing_num_workers": 1,
    }  # fmt: skip


TASKS: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "ours: train": ("ours", ours_train),
    "TRL: train": ("trl", trl_train),
    "LLaMA-Factory: train": ("llamafactory", llamafactory_train),
    "ours: predict": ("ours", ours_predict),
    "LLaMA-Factory: predict": ("llamafactory", llamafactory_predict),
    "generate, one row: predict": ("ours", generate_one),
    "generate, 16 rows: predict": ("ours", generate_batched),
}


def _trained(marks: list[float], rows: list[Any]) -> dict[str, Any]:
    """Return the figures of a training: the first step, which also warms up, is left out."""
    steps = len(marks) - 1
    share = steps / (steps + 1)
    return {
        "seconds": marks[-1] - marks[0],
        "rows": steps * STEP_ROWS,
        "tokens": round(_count(rows) * share),
        "peak_bytes": _peak(),
    }


def _predicted(started: float, rows: list[Any]) -> dict[str, Any]:
    return {
        "seconds": time.monotonic() - started,
        "rows": len(rows),
        "tokens": _count(rows),
        "peak_bytes": _peak(),
    }


def _count(rows: list[Any]) -> int:
    return sum(len(prompt) + len(answer) for prompt, answer in rows)


def _peak() -> int:
    """Return the most memory that this process held, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _tokens(work: Path) -> list[Any]:
    rows: list[Any] = json.loads((work / "tokens.json").read_text())
    return rows


def _overrides(work: Path) -> list[str]:
    return list(json.loads((work / "set.json").read_text()))


# What the script itself does: prepare, call the tools in turn, compare.


def prepare(work: Path, file: Path | None, count: int, guideline: int, overrides: list[str]) -> None:
    """Write the base, the rows and their tokens."""
    import torch
    from transformers import AutoTokenizer, GlmConfig, GlmForCausalLM

    from llm_clf.models.bases import SHIPPED

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=max(16_000, len(tokenizer)), hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=2, head_dim=64, max_position_embeddings=8192,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GlmForCausalLM(config).to(torch.bfloat16).save_pretrained(work / "base")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(work / "base")
    head = _instruction(tokenizer, guideline)
    texts = _texts(file, count)

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return found

    end = tokenizer.eos_token_id
    rows = [(ids(f"{head}\n{text}\n"), [*ids(label), end]) for text, label in texts]
    (work / "tokens.json").write_text(json.dumps(rows))
    (work / "set.json").write_text(json.dumps(overrides))
    (work / "rows.json").write_text(
        json.dumps([{"instruction": head, "input": f"{text}\n", "output": label} for text, label in texts])
    )
    (work / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))


def _instruction(tokenizer: Any, guideline: int) -> str:
    """Return the instruction, with a labelling guideline of about so many tokens behind it."""
    if not guideline:
        return INSTRUCTION
    draw = random.Random(1)
    rule = "Papers about {} count as {} unless the abstract says that {} is only an example.".format
    words = ["drugs", "surgery", "nursing", "imaging", "genes", "crops", "robots", "batteries", "soil", "statistics"]
    text = INSTRUCTION
    while len(tokenizer(text)["input_ids"]) < guideline:
        text += " " + rule(draw.choice(words), draw.choice(["1", "0"]), draw.choice(words))
    return text


def _texts(file: Path | None, count: int) -> list[tuple[str, str]]:
    if file is not None:
        import csv

        with open(file, newline="", encoding="utf-8") as opened:
            rows = [row for row in csv.DictReader(opened) if row["label"]]
        random.Random(0).shuffle(rows)
        return [(f"title:{row['title']},abstract:{row['abstract']}", row["label"]) for row in rows[:count]]
    draw = random.Random(0)
    words = (ROOT / "data" / "papers.csv").read_text(encoding="utf-8").split()
    sizes = [min(400, max(30, round(math.exp(draw.gauss(5.2, 0.4))))) for _ in range(count)]
    return [(" ".join(draw.choices(words, k=size)), str(number % 2)) for number, size in enumerate(sizes)]


def matmul_rate() -> float:
    """Return the bf16 operations a second of a large matrix product here; a multiply-add counts as two."""
    import torch

    left, right = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    times = []
    for _ in range(12):
        started = time.monotonic()
        left @ right
        times.append(time.monotonic() - started)
    return 2 * 2048**3 / statistics.median(times[2:])


def run(name: str, python: str, work: Path) -> dict[str, Any]:
    """Run one tool in a process of its own and return its figures."""
    result = work / "result.json"
    result.unlink(missing_ok=True)
    done = subprocess.run(
        [python, str(HERE), "--inside", name, str(work)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode or not result.is_file():
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def summary(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Return a line for each tool: medians, and how many times faster ours is at the same."""
    rate = {name: statistics.median(run["rows"] / run["seconds"] for run in runs) for name, runs in found.items()}
    lines = []
    for name, runs in found.items():
        ours = rate.get(f"ours: {name.rpartition(': ')[2]}")
        peak = statistics.median(run["peak_bytes"] for run in runs)
        lines.append(
            [
                name,
                f"{rate[name]:.2f}",
                f"{statistics.median(run['tokens'] / run['seconds'] for run in runs):,.0f}",
                f"{peak / 1e9:.2f} GB",
                f"{ours / rate[name]:.2f}" if ours else "-",
                " ".join(f"{run['rows'] / run['seconds']:.2f}" for run in runs),
            ]
        )
    return lines


def main() -> None:
    """Compare."""
    if sys.argv[1:2] == ["--inside"]:
        work = Path(sys.argv[3])
        figures = TASKS[sys.argv[2]][1](work)
        (work / "result.json").write_text(json.dumps(figures))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--guideline", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="names of the table, comma-separated")
    parser.add_argument("--set", action="append", default=[], help="a setting of ours, such as speed.packing=false")
    parser.add_argument("--out", type=Path)
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="PYTHON")
    given = parser.parse_args()
    pythons = {"ours": sys.executable, "trl": given.trl, "llamafactory": given.llamafactory}
    from llm_clf.console import table

    names = given.only.split(",") if given.only else list(TASKS)
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place), given.rows, given.count, given.guideline, given.set)
        lengths = [len(prompt) for prompt, _ in _tokens(Path(place))]
        found: dict[str, list[dict[str, Any]]] = {}
        for number in range(given.repeats):
            for name in names:
                python = pythons[TASKS[name][0]]
                if python is not None:
                    found.setdefault(name, []).append(run(name, python, Path(place)))
                    figures = found[name][-1]
                    print(f"{number + 1}. {name}: {figures['rows'] / figures['seconds']:.2f} rows/s", file=sys.stderr)
    print(
        f"{given.count} rows, {statistics.mean(lengths):.0f} tokens on average, longest {max(lengths)}; "
        f"{platform.machine()}; a bf16 product of 2048 x 2048 reaches {matmul_rate() / 1e9:,.0f} GFLOP/s\n"
    )
    print(table(["tool", "rows/s", "tokens/s", "peak memory", "ours is … times as fast", "runs"], summary(found)))
    if given.out:
        given.out.write_text(json.dumps({"lengths": lengths, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
