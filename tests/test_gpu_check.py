"""The check for CUDA cards, on the CPU at its smallest size: what it finds, and that it would find what is wrong."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import gpu_check  # noqa: E402
from gpu_check import Options  # noqa: E402

ALL = ("fp32", "fp16", "bf16", "8bit", "4bit")
CPU = torch.device("cpu")
TINY = Options("tiny", rows=16, seconds=1.0, memory=None)


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """Return what is found about every mode, on the CPU also where there is a card."""
    gpu_check.prepare_libraries()
    return {mode: gpu_check.check_mode(mode, TINY, CPU) for mode in ALL}


@pytest.mark.parametrize("mode", ALL)
def test_a_mode_agrees_with_fp32(results: dict[str, dict[str, Any]], mode: str) -> None:
    result = results[mode]
    assert result["status"] == "ok", result
    assert gpu_check.is_sound(result)
    found = result["correctness"]
    assert found["within_bounds"] and len(found["losses"]) == len(found["losses_fp32"]) == 4
    assert list(found["differences"]) == list(found["bounds"]) == ["loss", "gradient", "probability", "weight"]
    # Not what fp32 computes once more: a mode that was not applied would differ by nothing.
    assert (max(found["differences"].values()) > 1e-4) == (mode != "fp32")


@pytest.mark.parametrize("mode", ALL)
def test_what_is_measured(results: dict[str, dict[str, Any]], mode: str) -> None:
    result = json.loads(json.dumps(results[mode]))
    memory = result["memory"]
    assert memory["measured_bytes"] > 0 and memory["estimated_bytes"] == sum(memory["estimated_parts"].values())
    assert memory["target_bytes"] is None and memory["within_target"] is None
    assert result["plan"] == {"micro_batch_tokens": 2048, "gradient_checkpointing": False}
    for kind in ("training", "prediction"):
        found = result[kind]
        assert found["rows"] == 16 and found["seconds"] > 0 and found["matmul_share"] > 0
        assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"], rel=0.1)
    assert result["training"]["tokens"] == sum(gpu_check.row_lengths(16, 64))
    assert result["training"]["finite"]


def test_quantised_weights_take_less(results: dict[str, dict[str, Any]]) -> None:
    weights = {mode: results[mode]["memory"]["estimated_parts"]["weights"] for mode in ALL}
    assert weights["4bit"] < weights["8bit"] < weights["bf16"] == weights["fp16"] < weights["fp32"]


def test_tables_show_every_mode(results: dict[str, dict[str, Any]]) -> None:
    skipped = {"mode": "8bit", "status": "skipped", "reason": "no such library"}
    lacking = {**results["bf16"], "status": "out of memory", "reason": "OutOfMemoryError: 1 GiB"}
    del lacking["training"], lacking["prediction"]
    modes = [results["fp16"], lacking, skipped]
    text = gpu_check.report_text({"machine": gpu_check.machine_facts(CPU), "modes": modes})
    assert "8bit: skipped: no such library" in text and "bf16: out of memory: OutOfMemoryError: 1 GiB" in text
    assert "torch " + torch.__version__ in text
    speed = text[text.index("speed ") :].splitlines()
    assert speed[1].startswith("fp16 ") and speed[2].split() == ["bf16", *"------"]


def test_a_difference_above_its_bound_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_check.BOUNDS, "bf16", 1e-9)
    monkeypatch.setattr(gpu_check, "measure", lambda *_: None)
    result = gpu_check.check_mode("bf16", TINY, CPU)
    assert result["status"] == "ok" and not result["correctness"]["within_bounds"]
    assert not gpu_check.is_sound(result)
    assert " NO " in gpu_check.report_text({"machine": {}, "modes": [result]})


def test_wrong_arithmetic_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product whose gradient is lost passes for right in every score; the comparison of gradients finds it."""

    def lose(gradient: Any, gate: Any, up: Any, for_gate: Any, for_up: Any) -> None:
        for_gate.zero_()
        for_up.zero_()

    monkeypatch.setattr(gpu_check, "measure", lambda *_: None)

    def broken(base: Any, compute: str, *, plain: bool) -> Any:
        with monkeypatch.context() as patch:
            if not plain:
                patch.setattr("llm_clf.engine.kernels._gated_backward", lose)
            return run(base, compute, plain=plain)

    run = gpu_check.small_run
    monkeypatch.setattr(gpu_check, "small_run", broken)
    found = gpu_check.check_mode("fp32", TINY, CPU)["correctness"]
    assert found["differences"]["gradient"] > 0.1 and not found["within_bounds"]


def test_a_peak_above_its_target_is_no_success(results: dict[str, dict[str, Any]]) -> None:
    within = {**results["bf16"], "memory": {**results["bf16"]["memory"], "target_bytes": 1, "within_target": False}}
    assert not gpu_check.is_sound(within)
    assert " NO" in gpu_check.report_text({"machine": {}, "modes": [within]})


def test_the_targets_of_chatglm2_6b_are_planned_for() -> None:
    options = Options("6b", rows=1, seconds=1.0, memory=None)
    for mode, target in gpu_check.TARGETS.items():
        assert options.target(mode) == target
        size = gpu_check.SIZES["6b"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu_check, "free_memory", lambda _: 80 * 10**9)
            _, plan = gpu_check.plan_for(size, mode, "bf16", torch.device("cuda"), target, options.settings())
        assert plan.estimate.peak <= 0.9 * target and plan.gradient_checkpointing
    assert Options("6b", rows=1, seconds=1.0, memory=5).target("bf16") == 5 * 10**9


def test_no_memory_is_said_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(gpu_check, "check_correctness", lambda *_: {})
    monkeypatch.setattr(gpu_check, "measure", lack)
    result = gpu_check.check_mode("bf16", TINY, CPU)
    assert result["status"] == "out of memory" and "2 GiB" in result["reason"] and not gpu_check.is_sound(result)


def test_a_mode_that_the_machine_cannot_run_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(gpu_check, "check_correctness", lambda *_: {})
    monkeypatch.setattr(gpu_check, "measure", lambda *_: None)
    assert gpu_check.check_mode("bf16", TINY, CPU)["status"] == "ok"
    for mode in ("8bit", "4bit"):
        result = gpu_check.check_mode(mode, TINY, CPU)
        assert result["status"] == "skipped" and "pip install bitsandbytes" in result["reason"]
        assert gpu_check.is_sound(result)


def without(package: str, folder: Path) -> dict[str, str]:
    """Return an environment in which a package is not there."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules['{package}'] = None\n")
    return {"PYTHONPATH": str(folder), "PATH": "", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_script(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(SCRIPTS / "gpu_check.py"), *words]
    return subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_without_bitsandbytes(tmp_path: Path) -> None:
    words = ["--size", "tiny", "--modes", "bf16,4bit", "--seconds", "1", "--out", str(tmp_path / "found.json")]
    done = run_script(words, without("bitsandbytes", tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["sound"] and report["size"] == "tiny"
    assert [result["status"] for result in report["modes"]] == ["ok", "skipped"]
    assert report["machine"]["versions"]["torch"] and report["machine"]["threads"] == 1
    assert "4bit: skipped: bitsandbytes cannot be used" in done.stdout


def test_without_pydantic_it_says_what_to_install(tmp_path: Path) -> None:
    done = run_script([], without("pydantic", tmp_path))
    assert done.returncode == 2 and done.stderr.endswith("Run: pip install pydantic\n")


@pytest.mark.parametrize(
    "words", [["--modes", "bf16,int3"], ["--rows", "0"], ["--size", "7b"], ["--set", "train.epochs=3"]]
)
def test_wrong_arguments_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        gpu_check.main(words)
    assert refusal.value.code == 2


def test_a_training_is_cut_as_asked() -> None:
    asked = replace(TINY, overrides=("train.gradient_checkpointing=true", "train.micro_batch_tokens=256"))
    result = gpu_check.check_mode("fp32", asked, CPU)
    assert result["status"] == "ok"
    assert result["plan"] == {"micro_batch_tokens": 256, "gradient_checkpointing": True}


def test_rows_are_as_long_as_abstracts() -> None:
    lengths = gpu_check.row_lengths(5000, 512)
    assert min(lengths) >= 40 and max(lengths) == 512
    assert sum(lengths) / len(lengths) == pytest.approx(330, rel=0.03)
    examples = gpu_check.make_examples([40, 512], 1000, shared=8)
    assert [len(example.ids) + len(example.answer) for example in examples] == [40, 512]
    assert examples[0].ids[:8] == examples[1].ids[:8] and examples[0].ids[8:20] != examples[1].ids[8:20]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_a_card_is_sound(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    words = [sys.executable, str(SCRIPTS / "gpu_check.py"), "--size", "100m", "--rows", "64", "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [result for result in json.loads(out.read_text())["modes"] if result["status"] == "ok"]
    assert ran and all(abs(result["memory"]["relative_error"]) < 0.3 for result in ran)
