"""Merging: each weight rounded once, a folder that loads without this package, and its validation measured again."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import CHAT_TEMPLATE, byte_tokenizer, tied_base, tiny_model, trainer, word_prompts
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import llm_clf
from llm_clf import cli
from llm_clf.commands import merge as merge_module
from llm_clf.config import LoraSettings, ModelSettings
from llm_clf.decisions.decisions import load_decisions
from llm_clf.decisions.rules import Threshold
from llm_clf.errors import ArtifactError, ConfigError, DataError, LlmClfError
from llm_clf.files import file_hash, partial_name
from llm_clf.models.adapters import attach_adapter, merge_adapter, new_adapter, save_adapter
from llm_clf.models.bases import base_identity, load_model, load_tokenizer
from llm_clf.models.devices import DTYPES

MakeBase = Callable[..., Path]
Train = Callable[..., Path]
CPU = torch.device("cpu")
FAST = ["train.epochs=1", "train.batch_size=8", "train.learning_rate=0.004", "model.dtype=fp32", "lora.dropout=0"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return word_prompts(tmp_path_factory.mktemp("prompts"), rows=60, lengths=9, split="0.6,0.3,0.1")


@pytest.fixture(scope="module")
def train(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that trains a run on a base; the same one for the same words."""
    return trainer(prompts, tmp_path_factory, FAST)


@pytest.fixture(scope="module")
def run(train: Train, make_base: MakeBase) -> Path:
    """Return a run that learned enough for its labels to differ."""
    return train(make_base("glm", template=CHAT_TEMPLATE), "train.epochs=6")


@pytest.fixture(scope="module")
def merged(run: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("merged") / "model"
    llm_clf.merge(run, out=place, data=prompts)
    return place


def command(words: list[object], *, expect: int = 0, typed: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "llm_clf", *map(str, words)],
        capture_output=True,
        text=True,
        input=typed,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"},
        check=False,
    )
    assert done.returncode == expect, done.stderr
    return done


def facts_of(model: Path) -> dict[str, Any]:
    return dict(json.loads((model / "merge.json").read_text(encoding="utf-8")))


def load(folder: Path, dtype: str = "fp32") -> Any:
    return load_model(ModelSettings(name=str(folder)), dtype=dtype, device=CPU)


def adapted(run: Path, dtype: str = "fp32") -> Any:
    """Return the base of a run with the adapter beside it."""
    name = yaml.safe_load((run / "config.yaml").read_text())["model"]["name"]
    return attach_adapter(load(name, dtype), run / "adapter", merge=False, tokenizer=load_tokenizer_of(name))


def load_tokenizer_of(folder: Path | str) -> Any:
    return load_tokenizer(ModelSettings(name=str(folder)))


def logits(model: Any, rows: int = 261) -> torch.Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        return model(input_ids=torch.randint(5, rows, (3, 40))).logits.float()


# The sum, and how often it is rounded


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def randomised(model: Any, settings: LoraSettings, seed: int = 3) -> Any:
    """Return the model with an adapter beside it that changes much."""
    beside = new_adapter(model, settings, seed=seed)
    with torch.no_grad():
        for name, parameter in beside.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "lora_" in name:
                parameter.normal_(std=0.1)
    return beside.eval()


def by_hand(before: dict[str, torch.Tensor], beside: Any, settings: LoraSettings) -> dict[str, torch.Tensor]:
    """Return what the merged weights are in fp64, from the adapter's own."""
    parts = {name: tensor.detach().double() for name, tensor in beside.named_parameters() if "lora_" in name}
    scale = settings.alpha / (settings.r**0.5 if settings.use_rslora else settings.r)
    expected = {name: tensor.double() for name, tensor in before.items()}
    for name, a in parts.items():
        if "lora_A" not in name:
            continue
        layer = name.removeprefix("base_model.model.").partition(".lora_A")[0]
        key = f"{layer}.weight"
        change = scale * parts[name.replace("lora_A", "lora_B")] @ a
        # GPT-2's layers hold their weights as (in, out).
        transposed = any(part in layer for part in ("c_attn", "c_proj", "c_fc"))
        summed = expected[key].T + change if transposed else expected[key] + change
        if settings.use_dora:
            magnitude = parts[name.replace("lora_A.default", "lora_magnitude_vector.default")]
            summed = summed * (magnitude / summed.norm(dim=1))[:, None]
        expected[key] = summed.T if transposed else summed
    return expected


def assert_rounded_once(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Each number is the nearest one of its type, or so close to the middle of two that fp32 cannot tell."""
    assert found.keys() == exact.keys()
    digits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype]
    for name, weight in exact.items():
        assert found[name].dtype == dtype, name
        exponent = torch.frexp(weight).exponent.double()
        # fp16's smallest numbers stand 2^-24 apart.
        half = torch.maximum(2.0 ** (exponent - digits - 1), torch.tensor(2.0**-25 if dtype == torch.float16 else 0.0))
        allowed = half * (1.001 if dtype != torch.float32 else 1) + weight.abs().max() * (
            2e-6 if dtype == torch.float32 else 2e-7
        )
        worst = ((found[name].double() - weight).abs() / allowed).max().item()
        assert worst <= 1, (name, worst)


KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["glm", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_the_sum_rounded_once(kind: str, family: str, dtype: str) -> None:
    model = tiny_model(family).to(DTYPES[dtype])
    before, settings = weights(model), LoraSettings(r=4, alpha=6, dropout=0.0, **KINDS[kind])
    beside = randomised(model, settings)
    exact = by_hand(before, beside, settings)
    merged = weights(merge_adapter(beside))
    if family == "gpt2":
        merged.pop("lm_head.weight"), exact.pop("lm_head.weight")
    assert_rounded_once(merged, exact, DTYPES[dtype])
    assert sum(not torch.equal(merged[name], before[name]) for name in merged) >= 8


def test_rounding_twice_would_show() -> None:
    """The yardstick of the test above: what PEFT's own safe merge does in bf16 does not pass it."""
    model = tiny_model("glm").bfloat16()
    before, settings = weights(model), LoraSettings(r=4, alpha=6, dropout=0.0)
    beside = randomised(model, settings)
    exact = by_hand(before, beside, settings)
    with pytest.raises(AssertionError):
        assert_rounded_once(weights(beside.merge_and_unload(safe_merge=True)), exact, torch.bfloat16)


def mixture() -> Any:
    config = AutoConfig.for_model(
        "mixtral", vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, pad_token_id=3, eos_token_id=0,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_experts_that_lie_in_one_tensor_are_merged_too() -> None:
    settings = LoraSettings(r=4, dropout=0.0, target_modules=["w1", "w2", "w3", "q_proj"])
    beside = randomised(mixture(), settings)
    before, expected = weights(mixture()), logits(beside)
    merged = merge_adapter(beside)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    changed = {name.rpartition(".")[2] for name, tensor in weights(merged).items() if not tensor.equal(before[name])}
    assert changed == {"gate_up_proj", "down_proj", "weight"}
    halved = mixture().bfloat16()
    exact = weights(merge_adapter(randomised(mixture().bfloat16().float(), settings)))
    exact = {name: tensor.double() for name, tensor in exact.items()}
    assert_rounded_once(weights(merge_adapter(randomised(halved, settings))), exact, torch.bfloat16)


def test_a_weight_beyond_the_largest_number_is_refused() -> None:
    beside = randomised(tiny_model("glm").half(), LoraSettings(r=4, dropout=0.0))
    with torch.no_grad():
        next(p for name, p in beside.named_parameters() if "layers.1.mlp.down_proj.lora_B" in name).mul_(1e7)
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.down_proj: .* torch\.float16.*bf16 or fp32"):
        merge_adapter(beside)


# The folder


def test_the_folder_holds_a_model_its_task_and_where_it_comes_from(merged: Path, run: Path, prompts: Path) -> None:
    assert {place.name for place in merged.iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "task.yaml",
        "merge.json",
        "predictions-valid.parquet",
    }
    facts, trained = facts_of(merged), json.loads((run / "run.json").read_text())
    assert facts["kind"] == "merged" and facts["name"] == "model" and facts["dtype"] == "fp32"
    assert facts["run"] == {"name": "run", "adapter": trained["adapter"]["hash"]}
    assert facts["base"] == trained["base"] and facts["task"] == trained["task"]
    assert facts["versions"]["peft"] == trained["versions"]["peft"] and facts["trained_quantization"] == "none"
    assert (merged / "task.yaml").read_bytes() == (run / "task.yaml").read_bytes()
    config = json.loads((merged / "config.json").read_text())
    assert config["model_type"] == "glm" and config["architectures"] == ["GlmForCausalLM"]
    assert not any("lora" in name for name in load_file(merged / "model.safetensors"))
    modes = {stat.S_IMODE(file.stat().st_mode) for file in merged.iterdir()}
    assert len(modes) == 1, "whoever may read one file may read the model"
    assert not partial_name(merged).exists()


def test_merged_logits_are_those_of_base_and_adapter(merged: Path, run: Path) -> None:
    beside = adapted(run)
    with beside.disable_adapter():
        base = logits(beside)
    torch.testing.assert_close(logits(load(merged)), logits(beside), rtol=0, atol=1e-5)
    assert (logits(beside) - base).abs().max() > 0.1


IN_ANOTHER_PROGRAM = """
import sys
sys.modules["llm_clf"] = sys.modules["peft"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": sys.argv[3]}]
if "Round" in tokenizer.chat_template:
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]
else:
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits
answer = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
save_file({"ids": torch.tensor(ids), "logits": logits[0], "answer": answer[0]}, sys.argv[2])
print(type(model).__name__, model.dtype, model.generation_config.eos_token_id)
"""


def in_another_program(model: Path, place: Path, text: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return what a program without this package makes of a text."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", IN_ANOTHER_PROGRAM, model, place / "seen.safetensors", text],
        cwd=place,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return load_file(place / "seen.safetensors"), done.stdout.split()


def test_the_folder_loads_where_this_package_is_not(merged: Path, run: Path, tmp_path: Path) -> None:
    seen, said = in_another_program(merged, tmp_path, "Medical? 1 or 0\nheart:dose")
    assert said == ["GlmForCausalLM", "torch.float32", "0"]
    beside = adapted(run)
    with torch.no_grad():
        expected = beside(input_ids=seen["ids"][None]).logits[0]
    torch.testing.assert_close(seen["logits"], expected, rtol=0, atol=1e-5)
    tokenizer = load_tokenizer_of(merged)
    assert tokenizer.decode(seen["ids"]) == "<|user|>Medical? 1 or 0\nheart:dose<|end|><|assistant|>"


def test_bf16_weights_are_rounded_once_in_the_folder_too(
    train: Train, make_base: MakeBase, prompts: Path, tmp_path: Path
) -> None:
    base = make_base("glm")
    run = train(base, "model.dtype=bf16")
    facts = llm_clf.merge(run, out=tmp_path / "model", data=prompts)
    beside = adapted(run, "bf16")
    exact = by_hand(weights(load(base, "bf16")), beside, LoraSettings())
    assert_rounded_once(load_file(tmp_path / "model" / "model.safetensors"), exact, torch.bfloat16)
    assert facts["dtype"] == "bf16" and facts["changes"]["largest_probability_change"] < 0.05
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_variants_of_lora_merge_exactly(
    train: Train, make_base: MakeBase, prompts: Path, tmp_path: Path, kind: str
) -> None:
    run = train(make_base("glm"), f"lora.use_{kind}=true")
    facts = llm_clf.merge(run, out=tmp_path / "model", data=prompts)
    torch.testing.assert_close(logits(load(tmp_path / "model")), logits(adapted(run)), rtol=0, atol=1e-5)
    assert facts["changes"]["largest_probability_change"] < 1e-5


def test_tied_embeddings_stay_tied(train: Train, prompts: Path, tmp_path: Path) -> None:
    base = tied_base(tmp_path / "base")
    llm_clf.merge(train(base), out=tmp_path / "model", data=prompts)
    held = load_file(tmp_path / "model" / "model.safetensors")
    assert "lm_head.weight" not in held
    torch.testing.assert_close(held["model.embed_tokens.weight"], load(base).lm_head.weight.data, rtol=0, atol=0)
    model = load(tmp_path / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_with_an_adapter_of_its_own_leaves_the_embeddings_alone(
    train: Train, prompts: Path, tmp_path: Path
) -> None:
    base = tied_base(tmp_path / "base")
    run = train(base, "lora.target_modules=[q_proj,lm_head]")
    facts = llm_clf.merge(run, out=tmp_path / "model", data=prompts)
    model = load(tmp_path / "model")
    torch.testing.assert_close(logits(model), logits(adapted(run)), rtol=0, atol=1e-5)
    assert torch.equal(model.model.embed_tokens.weight, load(base).model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"]
    assert facts["changes"]["largest_probability_change"] < 1e-5


def test_a_generation_config_that_transformers_calls_wrong_is_kept(train: Train, prompts: Path, tmp_path: Path) -> None:
    """Llama 2's own says temperature without sampling, and a changed one like it could not be saved."""
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    byte_tokenizer(base)
    own = {"eos_token_id": 0, "pad_token_id": 3, "do_sample": False, "temperature": 0.9, "top_p": 0.6}
    (base / "generation_config.json").write_text(json.dumps(own))
    llm_clf.merge(train(base), out=tmp_path / "model", data=prompts)
    kept = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert {key: kept[key] for key in own if key != "do_sample"} == {k: v for k, v in own.items() if k != "do_sample"}


@pytest.mark.parametrize(
    ("family", "dtype", "targets"),
    # Where one of three parts of a tensor is merged, the others still lie in one piece of the mapped file.
    [("chatglm2", "fp32", "all-linear"), ("chatglm3", "fp16", "[q_proj]"), ("chatglm2", "bf16", "[query_key_value]")],
)
def test_an_original_chatglm_becomes_a_folder_of_the_native_network(
    make_chatglm: MakeBase, train: Train, prompts: Path, tmp_path: Path, family: str, dtype: str, targets: str
) -> None:
    base = make_chatglm(family, dtype=DTYPES[dtype])
    run = train(base, f"lora.target_modules={targets}", f"model.dtype={dtype}")
    facts = llm_clf.merge(run, out=tmp_path / "model", data=prompts)
    seen, said = in_another_program(tmp_path / "model", tmp_path, "Medical? 1 or 0\nheart:dose")
    settings = ModelSettings(name=str(base), family=family)
    native = load_model(settings, dtype=dtype, device=CPU)
    beside = attach_adapter(native, run / "adapter", merge=False, tokenizer=load_tokenizer(settings))
    with torch.no_grad():
        expected = beside(input_ids=seen["ids"][None]).logits[0]
    closest = {"fp32": 3e-5, "fp16": 0.05, "bf16": 0.4}[dtype]
    torch.testing.assert_close(seen["logits"], expected, rtol=0, atol=closest, check_dtype=True)
    assert said[0] == "GlmForCausalLM" and facts["changes"]["largest_probability_change"] < closest
    llm_clf.import_chatglm(base, tmp_path / "native", set=[f"model.family={family}"])
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        one, other = (json.loads((tmp_path / place / name).read_text()) for place in ("model", "native"))
        if name == "generation_config.json":
            one, other = ([*np.atleast_1d(ids["eos_token_id"]), ids["pad_token_id"]] for ids in (one, other))
        assert one == other, name


# What is measured


def test_metrics_are_those_of_the_run_and_of_a_prediction_with_the_merged_model(
    merged: Path, run: Path, prompts: Path, tmp_path: Path
) -> None:
    """An adapter that changes nothing lets predict answer with the merged model alone."""
    nothing = new_adapter(load(merged), LoraSettings(dropout=0.0), seed=0)
    save_adapter(nothing, tmp_path / "nothing", base=str(merged), tokenizer=load_tokenizer_of(merged))
    llm_clf.predict(
        tmp_path / "nothing",
        [prompts / "valid.jsonl"],
        out=tmp_path / "valid.parquet",
        task=merged / "task.yaml",
        model=str(merged),
        set=["model.dtype=fp32"],
    )
    metrics = facts_of(merged)["metrics"]
    assert metrics["merged"] == llm_clf.evaluate(tmp_path / "valid.parquet")
    assert metrics["merged"] == llm_clf.evaluate(merged / "predictions-valid.parquet")
    stored = json.loads((run / "metrics.json").read_text())
    assert metrics["run"] == {name: stored[name] for name in metrics["run"]}
    assert metrics["run"]["accuracy"] > 0.5 and metrics["run"]["rows_with_gold"] == 18


def test_decisions_that_stay_behind_are_told_of(
    train: Train, make_base: MakeBase, prompts: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(train(make_base("glm")), run)
    assert "holds no decisions" not in command(["merge", run, "--data", prompts, "--out", tmp_path / "bare"]).stderr
    assert facts_of(tmp_path / "bare")["decisions"] is None
    decisions = replace(load_decisions(run / "decisions.json", ("0", "1")), rule=Threshold(0.9))
    decisions.save(run / "decisions.json")
    facts = json.loads((run / "run.json").read_text())
    facts["decisions"]["hash"] = file_hash(run / "decisions.json")
    (run / "run.json").write_text(json.dumps(facts))
    done = command(["merge", run, "--data", prompts, "--out", tmp_path / "model"])
    assert "a model folder holds no decisions" in done.stderr
    assert facts_of(tmp_path / "model")["decisions"] == decisions.facts()


def probabilities_of(folder: Path) -> np.ndarray:
    held = pq.read_table(folder / "predictions-valid.parquet")
    return np.stack([held[f"prob_{label}"].to_numpy() for label in "01"], axis=1)


def test_changes_are_counted_and_told(train: Train, make_base: MakeBase, prompts: Path, tmp_path: Path) -> None:
    """A run whose predictions are those of another model, with two labels and a probability changed by hand."""
    run = tmp_path / "run"
    shutil.copytree(train(make_base("glm")), run)
    file = run / "predictions-valid.parquet"
    held = pq.read_table(file).to_pylist()
    for row in held[:2]:
        row["label"] = "10"[int(row["label"])]
    held[5] |= {"prob_0": held[5]["prob_0"] - 0.25, "prob_1": held[5]["prob_1"] + 0.25}
    pq.write_table(type(pq.read_table(file)).from_pylist(held, pq.read_schema(file)), file)
    done = command(["merge", run, "--data", prompts, "--out", tmp_path / "model"])
    facts = facts_of(tmp_path / "model")
    assert facts["changes"]["rows"] == 18 and facts["changes"]["labels_changed"] == 2
    assert facts["changes"]["largest_probability_change"] == pytest.approx(0.25, abs=1e-5)
    before, after = facts["metrics"]["run"], facts["metrics"]["merged"]
    line = next(line.split() for line in done.stderr.splitlines() if line.startswith("log_loss"))
    assert line[1:3] == [f"{before['log_loss']:.4f}", f"{after['log_loss']:.4f}"]
    assert line[3] == f"{after['log_loss'] - before['log_loss']:+.4f}"
    assert "metric" in done.stderr and "merged" in done.stderr and done.stdout == ""
    assert "Of 18 validation rows 2 have another label now; the largest change of a probability is 0.25." in done.stderr


def test_probabilities_hardly_change_in_fp32(merged: Path, run: Path) -> None:
    change = abs(probabilities_of(merged) - probabilities_of(run)).max()
    assert facts_of(merged)["changes"]["largest_probability_change"] == pytest.approx(change, rel=1e-3)
    assert change < 1e-5 and facts_of(merged)["changes"]["labels_changed"] == 0


def test_a_run_without_validation_rows_needs_no_prompts(base: Path, prompts: Path, tmp_path: Path) -> None:
    shutil.copytree(prompts, tmp_path / "prompts")
    (tmp_path / "prompts" / "valid.jsonl").write_text("")
    llm_clf.finetune(tmp_path / "prompts", out=tmp_path / "run", model=str(base), set=FAST)
    for name, data in (("a", None), ("b", tmp_path / "prompts")):
        facts = llm_clf.merge(tmp_path / "run", out=tmp_path / name, data=data)
        assert facts["metrics"] is None and facts["changes"] is None and load(tmp_path / name)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_rows_without_a_label_are_compared_too(
    base: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(prompts, tmp_path / "prompts")
    file = tmp_path / "prompts" / "valid.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row | {"output": ""}) + "\n" for row in rows))
    llm_clf.finetune(tmp_path / "prompts", out=tmp_path / "run", model=str(base), set=FAST)
    capsys.readouterr()
    facts = llm_clf.merge(tmp_path / "run", out=tmp_path / "model", data=tmp_path / "prompts")
    assert facts["changes"]["rows"] == 18 and facts["metrics"]["merged"]["rows_with_gold"] == 0
    assert "metric" not in capsys.readouterr().err


def test_the_folder_is_a_base_that_chat_classifies_with(merged: Path, prompts: Path) -> None:
    row = json.loads((prompts / "valid.jsonl").read_text().splitlines()[0])
    probs = probabilities_of(merged)[0]
    words = ["chat", "--model", merged, "--task", merged / "task.yaml", "--set", "model.dtype=fp32"]
    shown = command(words, typed=f"/classify {row['input']}\n").stdout
    found = [float(line.split()[-1]) for line in shown.splitlines()]
    assert found == pytest.approx(list(probs), abs=6e-5)


def test_the_folder_is_a_base_that_can_be_trained(merged: Path, train: Train, prompts: Path, tmp_path: Path) -> None:
    run = train(merged)
    llm_clf.merge(run, out=tmp_path / "model", data=prompts)
    assert facts_of(tmp_path / "model")["base"]["name"] == str(merged)


# Quantised bases


@pytest.mark.parametrize("mode", ["4bit", "8bit"])
def test_a_run_on_a_quantised_base_is_merged_into_the_half_precision_one_alone(
    mode: str, wide: Path, train: Train, prompts: Path, tmp_path: Path
) -> None:
    run = train(wide, f"model.quantization={mode}")
    done = command(["merge", run, "--data", prompts, "--out", tmp_path / "model"], expect=2)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert f"in {mode[0]} bits (model.quantization {mode})" in done.stderr and f"--model {wide}" in done.stderr
    assert not any(tmp_path.iterdir())
    facts = llm_clf.merge(run, out=tmp_path / "model", data=prompts, model=str(wide))
    assert facts["trained_quantization"] == mode and facts["changes"]["rows"] == 18
    before = load(wide)
    beside = attach_adapter(load(wide), run / "adapter", merge=False, tokenizer=load_tokenizer_of(wide))
    torch.testing.assert_close(logits(load(tmp_path / "model")), logits(beside), rtol=0, atol=1e-5)
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == before.state_dict().keys()
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())


def test_a_quantised_run_is_merged_into_its_own_base_only(
    wide: Path, train: Train, prompts: Path, tmp_path: Path
) -> None:
    run = train(wide, "model.quantization=4bit")
    other = tmp_path / "other"
    shutil.copytree(wide, other)
    held = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in held.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="is not the one that the run was trained on"):
        llm_clf.merge(run, out=tmp_path / "model", data=prompts, model=str(other))
    assert {place.name for place in tmp_path.iterdir()} == {"other"}


def test_a_base_that_is_quantised_on_disk_is_refused(wide: Path, own: Path, prompts: Path) -> None:
    packed = own / "packed"
    load_model(ModelSettings(name=str(wide), quantization="4bit"), dtype="fp32", device=CPU).save_pretrained(packed)
    byte_tokenizer(packed)
    facts = json.loads((own / "run" / "run.json").read_text())
    (own / "run" / "run.json").write_text(json.dumps(facts | {"base": base_identity(str(packed))}))
    with pytest.raises(ArtifactError, match="packed: its weights are quantised on disk"):
        llm_clf.merge(own / "run", out=own / "model", data=prompts, model=str(packed))
    assert {place.name for place in own.iterdir()} == {"run", "prompts", "packed"}


# What is wrong, and what is left behind


def test_a_base_that_was_moved_is_told_with_model(base: Path, prompts: Path, tmp_path: Path) -> None:
    first, then = tmp_path / "first", tmp_path / "then"
    shutil.copytree(base, first)
    llm_clf.finetune(prompts, out=tmp_path / "run", model=str(first), set=FAST)
    first.rename(then)
    with pytest.raises(ArtifactError, match="there is no such model folder"):
        llm_clf.merge(tmp_path / "run", out=tmp_path / "model", data=prompts)
    facts = llm_clf.merge(tmp_path / "run", out=tmp_path / "model", data=prompts, model=str(then))
    assert facts["base"]["name"] == str(then) and facts["base"]["hash"] == base_identity(str(then))["hash"]
    (then / "tokenizer_config.json").write_text((then / "tokenizer_config.json").read_text() + " ")
    with pytest.raises(ArtifactError, match="is not the one that the run was trained on"):
        llm_clf.merge(tmp_path / "run", out=tmp_path / "again", data=prompts, model=str(then))
    assert not (tmp_path / "again").exists() and not partial_name(tmp_path / "again").exists()


@pytest.fixture
def own(run: Path, prompts: Path, tmp_path: Path) -> Path:
    """Return a folder with copies of run and prompts, to be spoiled."""
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(prompts, tmp_path / "prompts")
    return tmp_path


def spoil_rows(folder: Path) -> None:
    (folder / "prompts" / "valid.jsonl").write_text((folder / "prompts" / "test.jsonl").read_text())


def leave(folder: Path, name: str, file: str = "x") -> None:
    (folder / name).mkdir()
    (folder / name / file).write_text("mine")


WRONG: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no such run": (lambda f: None, ["nothing", "--out", "m"], "there is no such folder"),
    "no run": (lambda f: None, ["prompts", "--out", "m"], "has no run.json, so it is no run"),
    "an adapter": (lambda f: None, ["run/adapter", "--out", "m"], "has no run.json, so it is no run"),
    "unfinished": (lambda f: (f / "run").rename(f / "run.partial"), ["run", "--out", "m"], "the run is not finished"),
    "no data": (lambda f: None, ["run", "--out", "m"], "was validated on 18 rows.*--data DIR"),
    "data without rows": (
        lambda f: (f / "prompts" / "valid.jsonl").unlink(),
        ["run", "--data", "prompts", "--out", "m"],
        "has no valid.jsonl. Give --data",
    ),
    "no such data": (lambda f: None, ["run", "--data", "no", "--out", "m"], "has no valid.jsonl. Give --data"),
    "other data": (spoil_rows, ["run", "--data", "prompts", "--out", "m"], "holds other rows than those that run"),
    "no predictions": (
        lambda f: (f / "run" / "predictions-valid.parquet").unlink(),
        ["run", "--data", "prompts", "--out", "m"],
        "predictions-valid.parquet is missing from the run",
    ),
    "taken": (lambda f: leave(f, "m"), ["run", "--data", "prompts", "--out", "m"], "m: something is already there"),
    "taken by another": (
        lambda f: leave(f, "m", "config.json"),
        ["run", "--data", "prompts", "--out", "m", "--overwrite"],
        "m: is not what merge wrote, so --overwrite leaves it alone",
    ),
    "a file": (
        lambda f: (f / "m").write_text("mine"),
        ["run", "--data", "prompts", "--out", "m", "--overwrite"],
        "m: is not what merge wrote, so --overwrite leaves it alone",
    ),
    "left": (
        lambda f: leave(f, "m.partial"),
        ["run", "--data", "prompts", "--out", "m"],
        "m.partial: an interrupted command left this. --overwrite starts anew",
    ),
    "inside the run": (lambda f: None, ["run", "--data", "prompts", "--out", "run/m"], "lies in the input run"),
    "over the run": (lambda f: None, ["run", "--data", "prompts", "--out", "run"], "run: something is already there"),
    "over the run, forced": (
        lambda f: None,
        ["run", "--data", "prompts", "--out", "run", "--overwrite"],
        "run: is not what merge wrote",
    ),
    "inside the prompts": (
        lambda f: None,
        ["run", "--data", "prompts", "--out", "prompts/m"],
        "lies in the input prompts",
    ),
    "no name": (lambda f: None, ["run", "--data", "prompts", "--out", "."], "has no name of its own"),
    "no such base": (
        lambda f: None,
        ["run", "--data", "prompts", "--out", "m", "--model", "./no"],
        "./no: there is no such model folder",
    ),
    "another base": (
        lambda f: None,
        ["run", "--data", "prompts", "--out", "m", "--model", "glm-nano"],
        "the base glm-nano is not the one that the run was trained on",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_told_and_nothing_is_written(
    fault: str, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    prepare, words, message = WRONG[fault]
    prepare(own)
    before = everything(own)
    monkeypatch.chdir(own)
    monkeypatch.setattr(sys, "argv", ["llm-clf", "merge", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    shown = capsys.readouterr()
    assert left.value.code == 2 and shown.out == ""
    assert re.search(message, shown.err) and len(shown.err.splitlines()) == 1, shown.err
    assert everything(own) == before


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        str(place.relative_to(folder)): place.read_bytes() if place.is_file() else None for place in folder.rglob("*")
    }


def test_the_base_is_never_written_to(run: Path, prompts: Path) -> None:
    base = Path(yaml.safe_load((run / "config.yaml").read_text())["model"]["name"])
    before = everything(base)
    for out, overwrite in ((base, False), (base, True), (base / "m", False)):
        with pytest.raises(ConfigError):
            llm_clf.merge(run, out=out, data=prompts, overwrite=overwrite)
    assert everything(base) == before


def test_overwrite_replaces_what_merge_wrote(own: Path) -> None:
    llm_clf.merge(own / "run", out=own / "m", data=own / "prompts")
    (own / "m" / "model.safetensors").write_text("spoilt")
    leave(own, "m.partial")
    with pytest.raises(ConfigError, match="something is already there"):
        llm_clf.merge(own / "run", out=own / "m", data=own / "prompts")
    llm_clf.merge(own / "run", out=own / "m", data=own / "prompts", overwrite=True)
    assert load(own / "m") and not partial_name(own / "m").exists()
    assert {place.name for place in own.iterdir()} == {"run", "prompts", "m"}


class Killed(BaseException):
    """Stands for Ctrl-C at the worst moment."""


FULL, STOP, FAULT = OSError(28, "No space left on device"), Killed(), ArtifactError("broken")


@pytest.mark.parametrize(
    ("step", "error"),
    [("_write_model", FULL), ("_require_same_weights", FAULT), ("_measure", STOP), ("write_json", FULL)]
    + [("replace_folder", error) for error in (FULL, STOP, FAULT)],
)
@pytest.mark.parametrize("before", [False, True], ids=["free", "overwrite"])
def test_nothing_half_written_is_left(
    own: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException, before: bool
) -> None:
    if before:
        llm_clf.merge(own / "run", out=own / "m", data=own / "prompts")
    there = everything(own)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(merge_module, step, fail)
    expected = DataError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        llm_clf.merge(own / "run", out=own / "m", data=own / "prompts", overwrite=before)
    assert everything(own) == there


def test_a_full_disk_is_told(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    def full(self: Any, folder: str, **_: object) -> None:
        from safetensors import SafetensorError

        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise SafetensorError('Error while serializing: I/O error: Os { code: 28, message: "No space left on device" }')

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(DataError, match="Make room on the disk"):
        llm_clf.merge(own / "run", out=own / "m", data=own / "prompts")
    assert {place.name for place in own.iterdir()} == {"run", "prompts"}


def test_a_place_that_is_being_written_is_refused(own: Path) -> None:
    with (
        FileLock(own / ".m.lock"),
        pytest.raises(ConfigError, match="another command is writing it now"),
    ):
        llm_clf.merge(own / "run", out=own / "m", data=own / "prompts")
    assert not (own / "m").exists() and not partial_name(own / "m").exists()


@pytest.mark.slow
def test_a_killed_merge_leaves_only_what_is_named_partial(own: Path) -> None:
    words = [sys.executable, "-m", "llm_clf", "merge", own / "run", "--data", own / "prompts", "--out", own / "m"]
    process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while not partial_name(own / "m").is_dir() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (own / "m").exists() and partial_name(own / "m").is_dir()
    with pytest.raises(ConfigError, match="an interrupted command left this"):
        llm_clf.merge(own / "run", out=own / "m", data=own / "prompts")
    llm_clf.merge(own / "run", out=own / "m", data=own / "prompts", overwrite=True)
    assert load(own / "m") and not partial_name(own / "m").exists()


def spoil_a_number(file: Path) -> None:
    held = load_file(file)
    held["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.01
    save_file(held, file, {"format": "pt"})


def drop_a_weight(file: Path) -> None:
    held = load_file(file)
    del held["model.norm.weight"]
    save_file(held, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_a_number, r"1 weights are not what was written .* first model\.layers\.1\.mlp\.down_proj\.weight"),
        (drop_a_weight, r"first model\.norm\.weight"),
        (lambda file: os.truncate(file, 5000), "cannot be loaded"),
    ],
    ids=["number", "weight", "half"],
)
def test_a_file_that_is_not_what_was_written_never_takes_the_name(
    own: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], message: str
) -> None:
    original = merge_module._write_model

    def spoilt(run: Any, folder: Path) -> Any:
        written = original(run, folder)
        spoil(folder / "model.safetensors")
        return written

    monkeypatch.setattr(merge_module, "_write_model", spoilt)
    with pytest.raises(ArtifactError, match=message):
        llm_clf.merge(own / "run", out=own / "m", data=own / "prompts")
    assert {place.name for place in own.iterdir()} == {"run", "prompts"}


def test_predictions_of_other_rows_are_no_yardstick(own: Path) -> None:
    llm_clf.predict(own / "run", [own / "prompts" / "test.jsonl"], out=own / "new.parquet")
    (own / "new.parquet").replace(own / "run" / "predictions-valid.parquet")
    with pytest.raises(LlmClfError, match="is not what finetune wrote"):
        llm_clf.merge(own / "run", out=own / "m", data=own / "prompts")
    assert not (own / "m").exists() and not partial_name(own / "m").exists()


def test_help_has_an_example_and_says_what_data_is() -> None:
    shown = command(["merge", "--help"]).stdout
    assert "llm-clf merge " in shown and "validation" in shown and "--data" in shown
