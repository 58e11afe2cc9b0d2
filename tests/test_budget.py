"""How a training is cut to the memory there is, and what is refused before anything is loaded."""

import os
from pathlib import Path
from typing import Any

import pytest

from llm_clf import finetune
from llm_clf.config import Settings
from llm_clf.config_loading import load_settings
from llm_clf.errors import ConfigError
from llm_clf.models.bases import prepare_libraries
from llm_clf.models.budget import SHARE, Plan, RowLengths, Shapes, plan_training, require_fit
from llm_clf.models.memory import AdapterShape, BaseShape

# About a ChatGLM2-6B: what counts here is that plans differ by gigabytes.
BASE = BaseShape(
    parameters=6_243_584_000,
    linears=((4096, 4608), (4096, 4096), (4096, 27392), (13696, 4096)) * 28,
    layers=28,
    hidden=4096,
    attention=4096,
    intermediate=13696,
    vocabulary=65024,
)
SHAPES = Shapes(BASE, AdapterShape(parameters=15_000_000, inputs=28 * 26_000, ranks=28 * 32), can_checkpoint=True)
ROWS = RowLengths(longest=512, mean=300.0, answer=3)


def plan(free: float, mode: str = "fp16", shapes: Shapes = SHAPES, **train: Any) -> Plan:
    settings = Settings.model_validate({"train": train, "lora": {"dropout": 0.0}})
    return plan_training(mode, 2, shapes, ROWS, settings, device="cuda", free=int(free * 1e9))


def test_less_memory_gives_smaller_micro_batches_then_checkpointing() -> None:
    found = [plan(free) for free in (200, 80, 40, 24, 20, 17, 14)]
    keys = [(item.gradient_checkpointing, -item.micro_batch_tokens) for item in found]
    assert keys == sorted(keys) and len(set(keys)) >= 4
    assert keys[0] == (False, -16384) and found[-1].gradient_checkpointing
    for item, free in zip(found, (200, 80, 40, 24, 20, 17, 14), strict=True):
        assert item.estimate.peak <= SHARE * free * 1e9 or item == plan(0)


def test_what_the_settings_fix_is_kept() -> None:
    assert plan(1, micro_batch_tokens=4096).micro_batch_tokens == 4096
    assert plan(1, micro_batch_tokens=4096).gradient_checkpointing
    assert not plan(1, gradient_checkpointing=False).gradient_checkpointing
    assert plan(200, gradient_checkpointing=True).gradient_checkpointing
    assert not plan(1, shapes=Shapes(BASE, SHAPES.adapter, can_checkpoint=False)).gradient_checkpointing


def test_what_does_not_fit_is_refused_and_the_mode_that_would_is_named() -> None:
    settings = Settings.model_validate({"lora": {"dropout": 0.0}})

    def refuse(free: float) -> str:
        lean = plan(free)
        with pytest.raises(ConfigError) as refusal:
            require_fit("fp16", 2, lean, SHAPES, ROWS, settings, device="cuda", free=int(free * 1e9))
        return str(refusal.value)

    assert "model.quantization=8bit (about" in refuse(10) and "model.quantization=4bit (about" in refuse(10)
    assert "4bit" in refuse(7) and "8bit" not in refuse(7) and "model.dtype" not in refuse(7)
    assert "take a smaller base" in refuse(1)
    require_fit("fp16", 2, plan(14), SHAPES, ROWS, settings, device="cuda", free=14 * 10**9)


def test_finetune_stops_before_loading(
    prompts: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("llm_clf.commands.lora_training._fit", loaded)
    monkeypatch.setattr("llm_clf.models.budget.free_memory", lambda device: 10**6)
    with pytest.raises(ConfigError, match="would not fit"):
        finetune(prompts, out=tmp_path / "run", model=str(base))
    assert not (tmp_path / "run").exists() and not (tmp_path / "run.partial").exists()


def test_run_records_what_auto_meant_and_resume_keeps_it(
    prompts: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llm_clf.engine.training as training

    whole = training._checkpoint

    def interrupt(*arguments: Any) -> None:
        whole(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_checkpoint", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune(prompts, out=tmp_path / "run", model=str(base), set=["train.epochs=2", "train.eval_every=1"])
    monkeypatch.setattr(training, "_checkpoint", whole)
    recorded = load_settings([tmp_path / "run.partial" / "config.yaml"])
    assert recorded.train.micro_batch_tokens == 2048 and recorded.train.gradient_checkpointing is False
    # Less memory now would cut otherwise, and refuse; the run goes on as it began.
    monkeypatch.setattr("llm_clf.models.budget.free_memory", lambda device: 10**6)
    finetune(prompts, out=tmp_path / "run", model=str(base), set=["train.epochs=2", "train.eval_every=1"], resume=True)
    finished = load_settings([tmp_path / "run" / "config.yaml"])
    assert recorded.predict.merge == "auto" and finished == recorded.merging(finished.predict.merge is True)


def test_4_bits_need_layers_of_whole_blocks_on_a_cpu(make_base: Any) -> None:
    import torch

    from llm_clf.config import ModelSettings
    from llm_clf.models.bases import load_model

    # The tiny base's layers have 32 inputs.
    base = ModelSettings(name=str(make_base("glm")), quantization="4bit")
    with pytest.raises(ConfigError, match=r"has 32 inputs.*multiple of 64.*Use 8bit"):
        load_model(base, dtype="fp32", device=torch.device("cpu"))


@pytest.mark.parametrize(("given", "kept"), [(None, "128"), ("7", "7")])
def test_few_kernels_are_kept_unless_the_user_says_how_many(
    given: str | None, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    if given is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, given)
    prepare_libraries()
    assert os.environ[name] == kept
