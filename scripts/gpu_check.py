"""Check on this machine's CUDA card that training and prediction fit, are right, and how fast they are.

scripts/gpu_check.py [--out FILE.json] [--size 6b|100m|tiny] [--modes fp16,bf16,8bit,4bit] [--rows 200]
                     [--seconds 120] [--memory GB] [--set train.gradient_checkpointing=true]

Needs no network and no checkpoint: the base is a Glm of ChatGLM2-6B's shape (or a smaller one) with seeded random
weights, drawn on the device in the type they are held in. For every mode, in a process of its own:

- a small base computes losses, gradients and label probabilities, which must agree with fp32 of the same weights;
- the large one trains on steps of 16 rows of full length, in micro-batches and with gradient checkpointing as finetune
  would plan them for the mode's target memory: the peak is compared with the estimate and with the target;
- then it trains on rows as long as paper abstracts, and scores two labels that share their first token: rows and tokens
  a second, and the share of the rate of one large matrix product that the useful work makes.

Without a card it runs on the CPU, where --size tiny or 100m is enough to wait for. A mode that the machine cannot run
(bitsandbytes absent, no bf16, out of memory) says so in its row. Exit 0: every mode that ran is within its bounds; 1: a
mode is not, or broke; 2: the arguments are wrong or a package is missing.
"""

import argparse
import gc
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import threading
import traceback
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

NEEDED = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "pydantic": "pydantic",
    "yaml": "PyYAML",
    "filelock": "filelock",
    "psutil": "psutil",
}
LACKING = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
if LACKING:
    print(f"gpu_check: packages are missing. Run: pip install {' '.join(LACKING)}", file=sys.stderr)
    sys.exit(2)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import GradScalerKwargs  # noqa: E402
from flops import matmul_rate, seconds_of, useful_flops  # noqa: E402
from transformers import GlmConfig, GlmForCausalLM  # noqa: E402

from llm_clf.config import LoraSettings, Settings, SpeedSettings, TrainSettings  # noqa: E402
from llm_clf.config_loading import load_settings, require_keys  # noqa: E402
from llm_clf.console import table  # noqa: E402
from llm_clf.engine.course import Progress  # noqa: E402
from llm_clf.engine.label_words import LabelWords  # noqa: E402
from llm_clf.engine.scoring import LabelScorer  # noqa: E402
from llm_clf.engine.speed import speed_up  # noqa: E402
from llm_clf.engine.tokens import TrainingExample  # noqa: E402
from llm_clf.engine.training import train  # noqa: E402
from llm_clf.errors import ConfigError, LlmClfError  # noqa: E402
from llm_clf.models.adapters import new_adapter  # noqa: E402
from llm_clf.models.bases import prepare_libraries  # noqa: E402
from llm_clf.models.budget import Plan, RowLengths, Shapes, free_memory, plan_training  # noqa: E402
from llm_clf.models.chatglm.weights import native_shapes  # noqa: E402
from llm_clf.models.devices import DTYPES, choose_device, choose_dtype, hardware  # noqa: E402
from llm_clf.models.memory import DTYPE_BYTES, MODES, QUANTIZED  # noqa: E402
from llm_clf.models.quantization import (  # noqa: E402
    dequantized,
    keep_differentiable,
    quantization_config,
    require_loaded,
)

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "numpy", "pydantic")
# Peaks that a training of the 6b size is planned for, in bytes: cards of 16, 12 and 8 GB are common.
TARGETS = {"fp16": 16 * 10**9, "bf16": 16 * 10**9, "8bit": 11 * 10**9, "4bit": 8 * 10**9}
# Largest difference from fp32 of the same weights: losses by their size, label probabilities as they are, the gradient
# by its norm. About twice what a CPU has; LLM.int8() rounds activations to 8 bits too.
BOUNDS = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2, "8bit": 5e-2, "4bit": 5e-2}
GRADIENT_BOUNDS = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 0.1, "8bit": 0.15, "4bit": 0.1}
# Largest error of a weight, by its norm: rounding to 24, 11, 8 bits; int8 of normal weights has 0.01, NF4 0.09.
WEIGHT_BOUNDS = {"fp32": 0.0, "fp16": 1e-3, "bf16": 4e-3, "8bit": 0.02, "4bit": 0.12}
BATCH = 16
SEED = 7
PAD = 0
# Two labels, `5 6 end` and `5 7 end`: told apart by their second token only.
END = 2
ANSWERS = ([5, 6, END], [5, 7, END])
HEAD = LabelWords([[answer] for answer in ANSWERS])
# Rows as long as papers' titles with abstracts, in tokens: log-normal, of at least 40, cut to what data.max_length=512
# would leave. The mean is about 330, the median 325, and one row in ten has all 512.
MEDIAN, SIGMA, SHORTEST, LONGEST = 325, 0.38, 40, 512


@dataclass(frozen=True, slots=True)
class Size:
    """A base that is measured."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    groups: int
    width: int
    """Of a head."""
    inner: int
    """Width inside the MLP."""
    longest: int = LONGEST
    """Tokens of a full row."""
    targets: dict[str, int] = field(default_factory=dict)
    """Peaks to plan for, by mode; without one: what is free."""

    def config(self) -> Any:
        """Return the config of this size, otherwise ChatGLM2's."""
        return GlmConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.width,
            attention_bias=True,
            max_position_embeddings=32768,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            eos_token_id=END,
        )


SIZES = {
    "6b": Size(65024, 4096, 28, 32, 2, 128, 13696, targets=TARGETS),
    "100m": Size(16384, 768, 12, 12, 2, 64, 2048),
    "tiny": Size(512, 128, 2, 4, 2, 32, 256, longest=64),
}
# The small base on which modes are compared with fp32: wide enough for bitsandbytes' blocks of 64 weights.
SMALL = Size(512, 128, 3, 4, 2, 32, 256, longest=64)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    size: str
    rows: int
    seconds: float
    memory: float | None
    """Gigabytes to plan for in place of the size's own targets."""
    overrides: tuple[str, ...] = ()
    """How a training is cut, in place of what follows from the memory; `--set` of finetune."""

    def target(self, mode: str) -> int | None:
        """Return the peak to plan a mode for, None for what is free."""
        return int(self.memory * 1e9) if self.memory else SIZES[self.size].targets.get(mode)

    def settings(self) -> Settings:
        """Return what finetune would be told."""
        return load_settings(overrides=[*self.overrides, f"train.batch_size={BATCH}", "train.epochs=1"])


class Drawn:
    """A weight that is drawn when it is sliced, the way in which transformers reads those of safetensors files.

    Only one of them is there in full at a time where a base is quantised, and none is ever on the host.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._name, self._shape, self._dtype, self._device = name, shape, dtype, device
        # A product multiplies the spread of its input by about 1.28, as 0.02 does in ChatGLM2-6B: through 28 random
        # layers activations stay within fp16. Calmer logits than that keep label probabilities away from 0 and 1.
        self._spread = (0.4 if name.startswith("lm_head") else 1.28) / math.sqrt(hidden)

    def __getitem__(self, _: object) -> torch.Tensor:
        """Return the weight; the same one every time."""
        generator = torch.Generator(self._device).manual_seed(SEED + zlib.crc32(self._name.encode()))
        noise = torch.randn(self._shape, generator=generator, dtype=self._dtype, device=self._device)
        return noise.mul_(self._spread).add_(1.0 if self._name.endswith("norm.weight") else 0.0)


def drawn_weights(size: Size, dtype: torch.dtype, device: torch.device) -> dict[str, Drawn]:
    """Return random weights by name; they depend on shape, type and device only."""
    shapes = native_shapes(size.config())
    return {name: Drawn(name, shape, size.hidden, dtype, device) for name, shape in shapes.items()}


def build_base(size: Size, mode: str, compute: str, device: torch.device, weights: Mapping[str, Any]) -> Any:
    """Return a frozen base with these weights.

    Args:
        size: Its shape.
        mode: How it is held, of MODES.
        compute: The type that is computed in, a name of DTYPES.
        device: Where it is made.
        weights: Tensors, or what gives one when it is sliced, by name.
    """
    options: dict[str, Any] = {"dtype": DTYPES[compute], "device_map": {"": device}, "output_loading_info": True}
    if mode in QUANTIZED:
        options["quantization_config"] = quantization_config(mode, DTYPES[compute])
    model, report = GlmForCausalLM.from_pretrained(None, config=size.config(), state_dict=weights, **options)
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    keep_differentiable(model)
    return model.eval().requires_grad_(False)


def compute_type(mode: str, device: torch.device) -> str:
    """Return the type that a mode computes in here: its own, or what finetune takes for a quantised base.

    Raises:
        ConfigError: The machine cannot run the mode.
    """
    if mode not in QUANTIZED:
        return choose_dtype(mode, device)
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:
        # A build for another CUDA or processor fails in its own ways.
        raise ConfigError(
            f"bitsandbytes cannot be used ({str(error).splitlines()[0]}): pip install bitsandbytes"
        ) from error
    return choose_dtype("auto", device)


def row_lengths(count: int, longest: int) -> list[int]:
    """Return lengths as paper abstracts have them, in tokens with the answer; see MEDIAN. Shorter by the longest."""
    draws = torch.randn(count, generator=torch.Generator().manual_seed(SEED)) * SIGMA + math.log(MEDIAN)
    return [int(length * longest / LONGEST) for length in draws.exp().clamp(SHORTEST, LONGEST).tolist()]


def make_examples(lengths: Sequence[int], vocabulary: int, shared: int = 0) -> list[TrainingExample]:
    """Return rows of random tokens of these lengths, answers included; the labels take turns.

    Args:
        lengths: Tokens of each row.
        vocabulary: Tokens that there are.
        shared: Tokens that all rows begin with, as they do with an instruction.
    """
    generator = torch.Generator().manual_seed(SEED)
    beginning = torch.randint(10, vocabulary, (shared,), generator=generator).tolist()
    examples = []
    for number, length in enumerate(lengths):
        answer = ANSWERS[number % 2]
        own = max(1, length - len(answer) - shared)
        ids = torch.randint(10, vocabulary, (own,), generator=generator).tolist()
        examples.append(TrainingExample([*beginning, *ids], answer, 1.0))
    return examples


class Recorder(Accelerator):  # type: ignore[misc]
    """An accelerator as finetune makes it, which keeps what goes through it."""

    def __init__(self, compute: str, device: torch.device, scale: float = 2.0**16) -> None:
        on_cpu = device.type == "cpu"
        super().__init__(
            cpu=on_cpu,
            mixed_precision="fp16" if compute == "fp16" and not on_cpu else "no",
            kwargs_handlers=[GradScalerKwargs(init_scale=scale)],
        )
        self.losses: list[float] = []
        self.gradient: torch.Tensor | None = None

    def log(self, values: dict[str, Any], step: int | None = None, log_kwargs: dict[str, Any] | None = None) -> None:
        """Keep the loss of a step."""
        self.losses.append(values["train/loss"])

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """Keep the gradient of the first step, as it was before it was clipped."""
        norm = super().clip_grad_norm_(parameters, max_norm, norm_type)
        if self.gradient is None:
            whole = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
            self.gradient = whole * max(1.0, float(norm) / max_norm)
        return norm


def run_training(
    model: Any, examples: Sequence[TrainingExample], settings: TrainSettings, speed: SpeedSettings, recorder: Recorder
) -> Progress:
    """Train as finetune does, checkpoint at the end included."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        return train(
            model, HEAD, examples, settings, speed, accelerator=recorder, pad_id=PAD, evaluate=None, folder=place
        )


def label_scorer(model: Any, speed: SpeedSettings, shared: Sequence[int] = ()) -> LabelScorer:
    """Return what scores the two labels with a model, as predict does."""
    return LabelScorer(model, HEAD, pad_id=PAD, packed=speed_up(model, speed), shared=shared)


# --- Correctness


@dataclass(frozen=True, slots=True)
class SmallRun:
    """What a few steps on the small base come to."""

    losses: list[float]
    """Of each step."""
    gradient: torch.Tensor
    """Of the first step, all weights of the adapter in one."""
    probs: torch.Tensor
    """Of the labels, before training and after it."""


def small_run(base: Any, compute: str, *, plain: bool) -> SmallRun:
    """Score rows, train on them and score them again.

    That they are scored first is what a validation amid a training does: it must not change a gradient.

    Args:
        base: The small base.
        compute: What it computes in.
        plain: Spare no work, and keep all activations.
    """
    speed = SpeedSettings(packing=False, shared_prefix=False, fast_lora=False) if plain else SpeedSettings()
    model = new_adapter(base, LoraSettings(dropout=0.0), seed=SEED)
    examples = make_examples(row_lengths(4 * BATCH, SMALL.longest), SMALL.vocabulary, shared=8)
    prompts = [example.ids for example in examples]
    scorer = label_scorer(model, speed, prompts[0][:8])
    before = scorer.score(prompts)
    settings = TrainSettings(
        epochs=1,
        batch_size=BATCH,
        micro_batch_tokens=8 * SMALL.longest,
        learning_rate=1e-3,
        schedule="constant",
        warmup=0,
        gradient_checkpointing=not plain,
    )
    # A scale that does not overflow: a first step that is left out could not be compared.
    recorder = Recorder(compute, base.device, scale=2.0**8)
    run_training(model, examples, settings, speed, recorder)
    assert recorder.gradient is not None
    scorer.start()
    return SmallRun(recorder.losses, recorder.gradient, torch.cat([before, scorer.score(prompts)]).softmax(dim=1))


def check_correctness(mode: str, compute: str, device: torch.device) -> dict[str, Any]:
    """Compare a mode, packed and with gradient checkpointing, with fp32 by the plain way, on the small base.

    Where weights are quantised, fp32 gets them as they are held: what is compared is the arithmetic. What quantisation
    did to the weights is `weight_error`, and what that does to probabilities `quantised_probability_difference`: much,
    since a random base, unlike a trained one, turns a small change of its weights into another answer.
    """
    weights = {name: weight[...] for name, weight in drawn_weights(SMALL, torch.float32, device).items()}
    base = build_base(SMALL, mode, compute, device, weights)
    require_loaded(base, weights, "the small base")
    held = {name: dequantized(parameter).detach().float() for name, parameter in base.named_parameters()}
    plain = small_run(build_base(SMALL, "fp32", "fp32", device, weights), "fp32", plain=True)
    wanted = plain
    if mode in QUANTIZED:
        wanted = small_run(build_base(SMALL, "fp32", "fp32", device, held), "fp32", plain=True)
    found = small_run(base, compute, plain=False)
    apart = {
        "loss": max(abs(loss / other - 1) for loss, other in zip(found.losses, wanted.losses, strict=True)),
        "gradient": _relative(found.gradient, wanted.gradient),
        "probability": float((found.probs - wanted.probs).abs().max()),
        "weight": max(_relative(held[name], weight) for name, weight in weights.items()),
    }
    bounds = dict.fromkeys(apart, BOUNDS[mode])
    bounds |= {"gradient": GRADIENT_BOUNDS[mode], "weight": WEIGHT_BOUNDS[mode]}
    return {
        "differences": apart,
        "bounds": bounds,
        # A NaN is within no bound.
        "within_bounds": all(apart[name] <= bounds[name] for name in apart),
        "losses": found.losses,
        "losses_fp32": wanted.losses,
        "quantised_probability_difference": float((wanted.probs - plain.probs).abs().max()),
    }


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


# --- Memory


@dataclass(slots=True)
class Peak:
    """Most memory that a block took, in bytes."""

    measured: int = 0
    """CUDA: allocated. CPU: anonymous (RssAnon), which the machine must hold, without mapped files."""
    whole: int = 0
    """CUDA: reserved by the allocator. CPU: all resident memory."""


def memory_now(device: torch.device) -> tuple[int, int]:
    """Return what Peak calls measured and whole, as it is now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * int(lines["RssAnon"].split()[0]), 1024 * int(lines["VmRSS"].split()[0])


@contextmanager
def watching(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of a block: by the allocator on CUDA, sampled a hundred times a second on CPU (Linux)."""
    gc.collect()
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            yield peak
        finally:
            peak.measured = torch.cuda.max_memory_allocated(device)
            peak.whole = torch.cuda.max_memory_reserved(device)
        return
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.01):
            measured, whole = memory_now(device)
            peak.measured, peak.whole = max(peak.measured, measured), max(peak.whole, whole)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()


def compare_memory(plan: Plan, peak: Peak, target: int | None) -> dict[str, Any]:
    """Return the measured peak beside its estimate and the target."""
    parts = ("weights", "adapter", "activations", "workspace", "runtime")
    return {
        "estimated_bytes": plan.estimate.peak,
        "estimated_parts": {name: getattr(plan.estimate, name) for name in parts},
        "measured_bytes": peak.measured,
        "whole_bytes": peak.whole,
        "relative_error": plan.estimate.peak / peak.measured - 1,
        "target_bytes": target,
        "within_target": None if target is None else peak.measured <= target,
    }


# --- Speed


def plan_for(
    size: Size, mode: str, compute: str, device: torch.device, target: int | None, settings: Settings
) -> tuple[Shapes, Plan]:
    """Return the shapes of base and adapter, and the plan that finetune would make for full rows."""
    with torch.device("meta"):
        shapes = Shapes.of(GlmForCausalLM(size.config()), settings)
    rows = RowLengths(size.longest, size.longest, len(ANSWERS[0]))
    free = free_memory(device)
    plan = plan_training(
        mode, DTYPE_BYTES[compute], shapes, rows, settings, device=device.type, free=min(free, target or free)
    )
    return shapes, plan


@dataclass(frozen=True, slots=True)
class Bench:
    """A base with its adapter, and what its speed is compared with."""

    model: Any
    size: Size
    shapes: Shapes
    compute: str
    matmul: dict[str, Any]

    def rates(self, rows: int, tokens: int, seconds: float, flops: int) -> dict[str, Any]:
        """Return what a timed run came to."""
        return {
            "rows": rows,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "rows_per_second": rows / seconds,
            "tokens_per_second": tokens / seconds,
            "matmul_share": flops / seconds / self.matmul["flops_per_second"],
        }


def measure(result: dict[str, Any], mode: str, compute: str, options: Options, device: torch.device) -> None:
    """Build the base, train and score with it; `result` has what was measured, also where memory runs out."""
    size, target = SIZES[options.size], options.target(mode)
    given = options.settings()
    shapes, plan = plan_for(size, mode, compute, device, target, given)
    cut = {"micro_batch_tokens": plan.micro_batch_tokens, "gradient_checkpointing": plan.gradient_checkpointing}
    result["plan"] = cut
    result["matmul"] = matmul_rate(device, choose_dtype("auto", device))
    before = memory_now(device)[0]
    base = build_base(size, mode, compute, device, drawn_weights(size, DTYPES[compute], device))
    gc.collect()
    result["weights_bytes"] = memory_now(device)[0] - before
    bench = Bench(new_adapter(base, LoraSettings(), seed=SEED), size, shapes, compute, result["matmul"])
    settings = given.train.model_copy(update=cut)
    # On a card the first step is slow, and the optimiser's state is there from the second on.
    steps = 2 if device.type == "cuda" else 1
    full = make_examples([size.longest] * BATCH * steps, size.vocabulary)
    with watching(device) as peak:
        state = run_training(bench.model, full, settings, SpeedSettings(), Recorder(compute, device))
    result["memory"] = compare_memory(plan, peak, target)
    # A timed row has two thirds of a full one's tokens, and half of the time goes to training.
    affordable = int(options.seconds / 2 / state.seconds * state.rows * 1.5)
    lengths = row_lengths(max(BATCH, min(options.rows, affordable // BATCH * BATCH)), size.longest)
    result["training"] = time_training(bench, lengths, settings)
    with watching(device) as peak:
        result["prediction"] = time_prediction(bench, lengths)
    # On a CPU that would be what training left in the heap.
    result["prediction"]["peak_bytes"] = peak.measured if device.type == "cuda" else None


def time_training(bench: Bench, lengths: Sequence[int], settings: TrainSettings) -> dict[str, Any]:
    """Train on rows of real lengths; the time is that of the steps, checkpoints left out."""
    examples = make_examples(lengths, bench.size.vocabulary)
    recorder = Recorder(bench.compute, bench.model.device)
    state = run_training(bench.model, examples, settings, SpeedSettings(), recorder)
    # The last token of an answer is predicted and never read.
    read = [length - 1 for length in lengths]
    flops = useful_flops(bench.shapes.base, read, places=len(ANSWERS[0]), backward=True)
    finite = all(map(math.isfinite, recorder.losses))
    return {**bench.rates(state.rows, state.tokens, state.seconds, flops), "finite": finite}


def time_prediction(bench: Bench, lengths: Sequence[int]) -> dict[str, Any]:
    """Score the rows' prompts in the batches that predict would make; the first batch is scored once before."""
    prompts = [example.ids for example in make_examples(lengths, bench.size.vocabulary)]
    scorer = label_scorer(bench.model, SpeedSettings())
    batches = scorer.plan([len(ids) for ids in prompts], Settings().predict.batch_tokens)

    def score() -> None:
        for batch in batches:
            scorer.score([prompts[row] for row in batch])

    scorer.score([prompts[row] for row in batches[0]])
    seconds = seconds_of(score, bench.model.device)
    # Behind a prompt stand three tokens of answers, the shared one and both others; an answer has as many.
    flops = useful_flops(bench.shapes.base, lengths, places=len(ANSWERS[0]) + 1, backward=False)
    return bench.rates(len(prompts), sum(len(ids) for ids in prompts), seconds, flops)


# --- Modes


def check_mode(mode: str, options: Options, device: torch.device) -> dict[str, Any]:
    """Return all that is found about a mode; `status` is ok, skipped, out of memory, or failed."""
    result: dict[str, Any] = {"mode": mode, "status": "ok"}
    try:
        result["compute"] = compute_type(mode, device)
    except ConfigError as error:
        return {"mode": mode, "status": "skipped", "reason": str(error)}
    try:
        result["correctness"] = check_correctness(mode, result["compute"], device)
        measure(result, mode, result["compute"], options, device)
    except Exception as error:
        lacking = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        result["status"] = "out of memory" if lacking else "failed"
        result["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if not lacking and not isinstance(error, LlmClfError):
            traceback.print_exc()
    return result


def check_mode_apart(mode: str, options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check a mode in a process of its own, so that none leaves memory or a broken card to the next.

    Returns:
        Its result, and the machine that it ran on.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "result.json"
        words = [sys.executable, __file__, "--alone", mode, "--out", str(found), "--size", options.size]
        words += ["--rows", str(options.rows), "--seconds", str(options.seconds)]
        words += ["--memory", str(options.memory)] if options.memory else []
        words += [word for override in options.overrides for word in ("--set", override)]
        # Through a pipe no progress bar is drawn.
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            print(f"{mode}: {line}", end="", file=sys.stderr, flush=True)
        code = child.wait()
        if found.is_file():
            content = json.loads(found.read_text())
            return content["result"], content["machine"]
    reason = f"its process ended with {code}" + (", as the system ends one for lack of memory" if code == -9 else "")
    return {"mode": mode, "status": "out of memory" if code == -9 else "failed", "reason": reason}, {}


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return hardware and versions."""
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    card = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return {
        **hardware(device),
        "cuda": torch.version.cuda,
        "compute_capability": card,
        "python": sys.version.split()[0],
        "versions": versions,
    }


def is_sound(result: dict[str, Any]) -> bool:
    """Whether a mode is what it should be: skipped, or run to its end within its bounds, without a NaN."""
    if result["status"] == "skipped":
        return True
    return (
        result["status"] == "ok"
        and result["correctness"]["within_bounds"]
        and result["training"]["finite"]
        and result["memory"]["within_target"] is not False
    )


# --- What a person reads


def report_text(report: dict[str, Any]) -> str:
    """Return the findings as tables."""
    machine, results = report["machine"], report["modes"]
    versions = ", ".join(f"{name} {number or 'absent'}" for name, number in machine.get("versions", {}).items())
    lines = [f"{machine.get('device', 'unknown device')}; {versions}", "", _correctness_text(results)]
    if any("memory" in result for result in results):
        lines += ["", _memory_text(results), "", _speed_text(results)]
        rate = next(result["matmul"] for result in results if "matmul" in result)
        lines.append(f"Shares are of {rate['flops_per_second'] / 1e12:.2f} TFLOP/s, a product in {rate['dtype']}.")
    lines += [f"{result['mode']}: {result['status']}: {result['reason']}" for result in results if "reason" in result]
    return "\n".join(lines)


def _correctness_text(results: Sequence[dict[str, Any]]) -> str:
    names = ("loss", "gradient", "probability", "weight")
    rows = []
    for result in results:
        found = result.get("correctness")
        cells = [f"{found['differences'][name]:.1e} ({found['bounds'][name]:g})" if found else "-" for name in names]
        verdict = _verdict(found["within_bounds"]) if found else "-"
        rows.append([result["mode"], result.get("compute", "-"), *cells, verdict, result["status"]])
    return table(["against fp32 (bound)", "computes in", *names, "within", "status"], rows)


def _memory_text(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in (result for result in results if "memory" in result):
        found, plan = result["memory"], result["plan"]
        cut = [f"{plan['micro_batch_tokens']:,}", "yes" if plan["gradient_checkpointing"] else "no"]
        sizes = [_gigabytes(found["estimated_bytes"]), _gigabytes(found["measured_bytes"])]
        aim = [_gigabytes(found["target_bytes"]), _verdict(found["within_target"])]
        scoring = _gigabytes(result.get("prediction", {}).get("peak_bytes"))
        rows.append([result["mode"], *cut, *sizes, f"{found['relative_error']:+.0%}", *aim, scoring])
    header = ["peak in GB", "micro-batch", "checkpointing", "estimated", "measured", "error", "target", "within"]
    return table([*header, "predicting"], rows)


def _speed_text(results: Sequence[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        cells = [result["mode"]]
        for kind in ("training", "prediction"):
            found = result.get(kind)
            formats = {"rows_per_second": ".1f", "tokens_per_second": ",.0f", "matmul_share": ".0%"}
            cells += [format(found[name], form) if found else "-" for name, form in formats.items()]
        rows.append(cells)
    header = ["speed", "train rows/s", "tokens/s", "share", "predict rows/s", "tokens/s", "share"]
    return table(header, rows)


def _verdict(holds: bool | None) -> str:
    return "-" if holds is None else "yes" if holds else "NO"


def _gigabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e9:.2f}"


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write everything that was found as JSON")
    parser.add_argument("--size", choices=SIZES, default="6b")
    parser.add_argument("--modes", default="fp16,bf16,8bit,4bit", help=f"of {','.join(MODES)}")
    parser.add_argument("--rows", type=int, default=200, help="rows of real lengths that are timed")
    parser.add_argument("--seconds", type=float, default=120, help="about the most to time a mode for")
    parser.add_argument("--memory", type=float, help="gigabytes to plan for, in place of the targets")
    parser.add_argument("--set", action="append", default=[], help="how a training is cut, as finetune takes it")
    parser.add_argument("--alone", choices=MODES, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    wrong = [mode for mode in given.modes.split(",") if mode not in MODES]
    if wrong or given.rows < 1 or given.seconds <= 0:
        parser.error(f"unknown modes {wrong}" if wrong else "--rows and --seconds must be above 0")
    try:
        require_keys(given.set, ("train.micro_batch_tokens", "train.gradient_checkpointing"), "this check")
        load_settings(overrides=given.set)
    except ConfigError as error:
        parser.error(str(error))
    return given


def main(words: Sequence[str] | None = None) -> int:
    """Do what the arguments say; return the exit code."""
    given = parse(words)
    options = Options(given.size, given.rows, given.seconds, given.memory, tuple(given.set))
    if given.alone:
        prepare_libraries()
        device = choose_device()
        result = check_mode(given.alone, options, device)
        given.out.write_text(json.dumps({"result": result, "machine": machine_facts(device)}))
        return 0
    results: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    for mode in given.modes.split(","):
        result, where = check_mode_apart(mode, options)
        results.append(result)
        machine = where or machine
    report = {"size": given.size, "machine": machine, "modes": results, "sound": all(map(is_sound, results))}
    print(report_text(report))
    if given.out:
        given.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if report["sound"] else 1


if __name__ == "__main__":
    sys.exit(main())
