"""What this machine can run: devices, number types, memory, versions, the base that ships, and estimated memory."""

import platform
import shutil
import string
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llm_clf
from llm_clf.commands.training_settings import resolve_settings
from llm_clf.config import DEFAULT_BASE, Settings
from llm_clf.console import table
from llm_clf.errors import DataError
from llm_clf.files import file_hash
from llm_clf.prompting.prompts import Prompt, read_split
from llm_clf.prompting.tasks import Task, load_task
from llm_clf.runs import package_versions

SUMS = "SHA256SUMS"
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "tokenizers",
    "safetensors",
    "sentencepiece",
    "pydantic",
    "typer",
    "scikit-learn",
)
if TYPE_CHECKING:
    from llm_clf.models.budget import RowLengths


def doctor(*, model: str | None = None, set: Sequence[str] = (), data: str | Path | None = None) -> dict[str, Any]:
    """Return facts about this machine as plain values fit for JSON; sizes are in bytes.

    Args:
        model: Estimate the memory of training this base, in every mode.
        set: Settings as `section.key=value` that the estimate is for.
        data: A prompts folder: its training rows, of the default base without `model`, are what the estimate is for.

    Raises:
        ArtifactError: The base's config or tokenizer cannot be found.
        DataError: `data` is no prompts folder, or has no labelled training rows.
    """
    from llm_clf.models.bases import SHIPPED, prepare_libraries

    prepare_libraries()
    cuda = _cuda()
    memory = _memory()
    free = cuda["cards"][0]["free_bytes"] if cuda["cards"] else memory["available_bytes"]
    settings = resolve_settings(Settings, model, None, set)
    faults = shipped_faults(SHIPPED)
    return {
        "llm_clf": llm_clf.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "memory": memory,
        "torch": _torch(),
        "cuda": cuda,
        "disk": _disk(),
        "versions": package_versions(PACKAGES),
        "finetune": _finetune_choice(settings),
        "shipped_base": {"name": DEFAULT_BASE, "whole": not faults, "faults": faults},
        "estimate": None if model is None and data is None else _estimate(settings, data, free),
    }


def shipped_faults(folder: Path) -> list[str]:
    """Return what is wrong with a folder whose `SHA256SUMS` lists its files as sha256sum does; nothing if whole.

    A listed file that is missing, cannot be read or differs is a fault, and so is a file that is not listed, as
    transformers might load it. Hidden files are left out.
    """
    if not folder.is_dir():
        return [f"the folder {folder.name} is missing"]
    if not (folder / SUMS).is_file():
        return [f"{SUMS} is missing, so the files cannot be checked"]
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [f"{SUMS} cannot be read: {error}"]
    sums: dict[str, str] = {}
    faults = []
    for number, line in enumerate(lines, 1):
        digest, name = line[:64].lower(), line[66:]
        # Two signs stand between sum and name: a space, and a space for text or a star for binary.
        if len(digest) == 64 and set(digest) <= set(string.hexdigits) and line[64:66] in ("  ", " *") and name:
            sums[name.removeprefix("./")] = digest
        elif line.strip():
            faults.append(f"{SUMS} line {number} is not what sha256sum writes: {line[:80]!r}")
    if not sums:
        return [*faults, f"{SUMS} lists no file"]
    faults += [fault for name, digest in sums.items() if (fault := _file_fault(folder, name, digest))]
    present = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file())
    names = [path.as_posix() for path in present if not any(part.startswith(".") for part in path.parts)]
    return faults + [f"{name} is not listed in {SUMS}" for name in names if name not in sums and name != SUMS]


def _file_fault(folder: Path, name: str, expected: str) -> str | None:
    if not (folder / name).is_file():
        return f"{name} is missing"
    try:
        found = file_hash(folder / name)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if found == expected else f"{name} differs: sha256 {found[:12]}…, expected {expected[:12]}…"


def _cpu() -> dict[str, Any]:
    import psutil  # type: ignore[import-untyped]
    import torch

    from llm_clf.models.devices import choose_dtype

    best = choose_dtype("auto", torch.device("cpu"))
    return {
        "name": torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "bf16_in_hardware": best == "bf16",
        "dtypes": list(dict.fromkeys([best, "fp32"])),
    }


def _memory() -> dict[str, int]:
    import psutil

    memory = psutil.virtual_memory()
    return {"total_bytes": memory.total, "available_bytes": memory.available}


def _torch() -> dict[str, str | None]:
    import torch

    return {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}


def _cuda() -> dict[str, Any]:
    import torch

    # A driver that is too old, or a card in trouble, is a warning of torch and no error: the report should tell it.
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        cards = [_card(number) for number in range(torch.cuda.device_count())] if available else []
    return {"available": available, "notes": [str(note.message).splitlines()[0] for note in notes], "cards": cards}


def _card(number: int) -> dict[str, Any]:
    import torch

    with torch.cuda.device(number):
        free, total = torch.cuda.mem_get_info(number)
        return {
            "name": torch.cuda.get_device_name(number),
            "total_bytes": total,
            "free_bytes": free,
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }


def _disk() -> dict[str, dict[str, Any]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"current_folder": Path.cwd(), "model_cache": Path(HF_HUB_CACHE)}
    return {name: {"path": _tilde(place), "free_bytes": _free_disk(place)} for name, place in places.items()}


def _free_disk(place: Path) -> int:
    """Return the free bytes where a folder is, or will be."""
    return shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free


def _tilde(place: Path) -> str:
    """Return a path without the home folder: reports are shown to others."""
    home = Path.home()
    return str(Path("~") / place.relative_to(home)) if place.is_relative_to(home) else str(place)


def _finetune_choice(settings: Settings) -> dict[str, str]:
    from llm_clf.models.devices import choose_device, choose_dtype, describe

    device = choose_device()
    return {
        "device": device.type,
        "device_name": describe(device),
        "dtype": choose_dtype(settings.model.dtype, device),
    }


def _estimate(settings: Settings, data: str | Path | None, free: int) -> dict[str, Any]:
    """Return the estimated memory of a training in every mode, cut as finetune would, and whether it fits."""
    from llm_clf.models.bases import resolve_base
    from llm_clf.models.budget import Shapes, mode_of, plan_training
    from llm_clf.models.devices import choose_device, choose_dtype
    from llm_clf.models.memory import DTYPE_BYTES, MODES, QUANTIZED, empty_model

    # Broken rows show before anything of the base is read.
    prompts = None if data is None else _training_prompts(Path(data))
    device = choose_device()
    dtype = choose_dtype(settings.model.dtype, device)
    base, _ = resolve_base(settings.model)
    settings = settings.model_copy(update={"model": base.model_copy(update={"dtype": dtype})})
    # Without rows there is no task; how many labels it has hardly shows.
    model = empty_model(settings.model, ("0", "1") if prompts is None else prompts[0].names)
    lengths, facts = _row_lengths(model, prompts, settings)
    shapes = Shapes.of(model, settings)
    modes = {}
    for mode in MODES:
        size = DTYPE_BYTES[dtype if mode in QUANTIZED else mode]
        plan = plan_training(mode, size, shapes, lengths, settings, device=device.type, free=free)
        found = plan.estimate
        modes[mode] = {
            "weights_bytes": found.weights,
            "adapter_bytes": found.adapter,
            "activations_bytes": found.activations,
            "workspace_bytes": found.workspace,
            "runtime_bytes": found.runtime,
            "peak_bytes": found.peak,
            "micro_batch_tokens": plan.micro_batch_tokens,
            "gradient_checkpointing": plan.gradient_checkpointing,
            "fits": found.peak <= free,
        }
    return {
        "is_estimate": True,
        "base": settings.model.name,
        "parameters": shapes.base.parameters,
        "adapter_parameters": shapes.adapter.parameters,
        "lora_r": settings.lora.r,
        "rows": facts,
        "device": device.type,
        "free_bytes": free,
        "mode": mode_of(settings.model),
        "modes": modes,
    }


def _training_prompts(folder: Path) -> tuple[Task, list[Prompt]]:
    """Return the task and the labelled training prompts of a folder."""
    if not (folder / "task.yaml").is_file():
        raise DataError(f"{folder}: has no task.yaml. Give a folder that `llm-clf build-prompts` made.")
    task = load_task(folder / "task.yaml")
    prompts = [prompt for prompt in read_split(folder, "train", task) if prompt.label is not None]
    if not prompts:
        raise DataError(f"{folder / 'train.jsonl'}: found no labelled rows, and training needs some. Give more rows.")
    return task, prompts


def _row_lengths(
    model: Any, prompts: tuple[Task, list[Prompt]] | None, settings: Settings
) -> tuple["RowLengths", dict[str, Any]]:
    """Return how long rows are with their answers: measured, or without rows the most that is allowed."""
    from llm_clf.engine.classifier import prompt_tokenizer
    from llm_clf.engine.heads import make_head
    from llm_clf.models.bases import context_length, load_tokenizer
    from llm_clf.models.budget import RowLengths
    from llm_clf.models.memory import ANSWER_TOKENS

    if prompts is None:
        limit = context_length(model.config)
        most = min(settings.data.max_length, limit) if limit else settings.data.max_length
        facts = {"measured": False, "rows": None, "longest_tokens": most, "mean_tokens": float(most), "cut": None}
        return RowLengths(most, float(most), ANSWER_TOKENS), facts
    task, rows = prompts
    tokens = prompt_tokenizer(load_tokenizer(settings.model), model, task, settings)
    head = make_head(settings.model, tokens)
    answers = {label: len(head.answer(number)) for number, label in enumerate(task.names)}
    longest = total = cut = 0
    for prompt, example in zip(rows, tokens.encode(rows), strict=True):
        length = len(example.ids) + answers[prompt.label or ""]
        longest, total, cut = max(longest, length), total + length, cut + example.cut
    mean = round(total / len(rows), 1)
    facts = {"measured": True, "rows": len(rows), "longest_tokens": longest, "mean_tokens": mean, "cut": cut}
    return RowLengths(longest, mean, max(answers.values())), facts


def doctor_text(facts: dict[str, Any]) -> str:
    """Return the facts as a compact text, good for a bug report."""
    cpu, memory, disk, chosen = facts["cpu"], facts["memory"], facts["disk"], facts["finetune"]
    built = facts["torch"]
    build = f"CUDA {built['cuda']}" if built["cuda"] else f"ROCm {built['hip']}" if built["hip"] else "CPU only"
    hardware = "in hardware" if cpu["bf16_in_hardware"] else "not in hardware"
    lines = [
        f"llm-clf {facts['llm_clf']}, Python {facts['python']}, {facts['platform']}",
        f"CPU: {cpu['name']} ({cpu['architecture']}), {cpu['cores'] or 'unknown'} cores, {cpu['threads']} threads "
        f"(torch uses {cpu['torch_threads']}); worth using: {', '.join(cpu['dtypes'])} (bf16 is {hardware})",
        f"RAM: {_size(memory['total_bytes'])}, {_size(memory['available_bytes'])} available",
        f"torch: {built['version']}, built for {build}",
        f"CUDA: {_cuda_text(facts['cuda'])}",
        *(f"  {note}" for note in facts["cuda"]["notes"]),
        f"Disk: {_size(disk['current_folder']['free_bytes'])} free in {disk['current_folder']['path']}, "
        f"{_size(disk['model_cache']['free_bytes'])} free in {disk['model_cache']['path']} (models)",
        f"finetune would use: {chosen['device']} ({chosen['device_name']}), {chosen['dtype']}",
        *_shipped_text(facts["shipped_base"]),
    ]
    parts = ["\n".join(lines)]
    if facts["cuda"]["cards"]:
        parts.append(_cards_table(facts["cuda"]["cards"]))
    parts.append(table(["package", "version"], list(facts["versions"].items())))
    if facts["estimate"] is not None:
        parts.append(_estimate_text(facts["estimate"]))
    return "\n\n".join(parts)


def _cuda_text(cuda: dict[str, Any]) -> str:
    return f"available, {len(cuda['cards'])} cards" if cuda["available"] else "not available"


def _cards_table(cards: list[dict[str, Any]]) -> str:
    rows = [[card["name"], _size(card["total_bytes"]), _size(card["free_bytes"]), _yes(card["bf16"])] for card in cards]
    return table(["card", "memory", "free", "bf16"], rows)


def _shipped_text(base: dict[str, Any]) -> list[str]:
    if base["whole"]:
        return [f"Base that ships ({base['name']}): whole"]
    return [
        f"Base that ships ({base['name']}): NOT whole; install llm-clf again",
        *(f"  {fault}" for fault in base["faults"]),
    ]


def _estimate_text(found: dict[str, Any]) -> str:
    rows = found["rows"]
    if rows["measured"]:
        lengths = (
            f"{rows['rows']:,} training rows with their answers: longest {rows['longest_tokens']:,} tokens, "
            f"mean {rows['mean_tokens']:,}; {rows['cut']:,} cut to fit"
        )
    else:
        lengths = f"no --data, so every row is taken to be {rows['longest_tokens']:,} tokens long"
    where = "on the CUDA card" if found["device"] == "cuda" else "in RAM"
    names = ("weights", "adapter", "activations", "workspace", "runtime", "peak")
    modes = [
        [
            f"{mode}{' *' if mode == found['mode'] else ''}",
            *(_size(sizes[f"{name}_bytes"]) for name in names),
            _yes(sizes["fits"]),
            f"{sizes['micro_batch_tokens']:,}",
            _yes(sizes["gradient_checkpointing"]),
        ]
        for mode, sizes in found["modes"].items()
    ]
    return "\n".join(
        [
            f"Memory of finetune with {found['base']}: ESTIMATES from its config; nothing was loaded or measured.",
            f"{found['parameters']:,} weights, {found['adapter_parameters']:,} in the adapter (r {found['lora_r']}; "
            "with gradients and AdamW's state below)",
            lengths,
            f"free {where}: {_size(found['free_bytes'])}; * is the mode that the settings choose here",
            "",
            table(["mode", *names, "fits", "micro-batch", "checkpointing"], modes),
        ]
    )


def _size(count: int) -> str:
    """Return a number of bytes for reading."""
    if count >= 2**30:
        return f"{count / 2**30:.1f} GiB"
    return f"{count / 2**20:.1f} MiB"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
