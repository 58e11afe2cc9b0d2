"""The report on this machine, the check of the base that ships, and the memory estimate."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_clf.commands.doctor import PACKAGES, SUMS, doctor, doctor_text, shipped_faults
from llm_clf.config import LoraSettings, ModelSettings, SpeedSettings
from llm_clf.engine.label_words import LabelWords
from llm_clf.engine.packing import NOTHING
from llm_clf.engine.speed import speed_up
from llm_clf.engine.tokens import PromptTokenizer, TrainingExample
from llm_clf.errors import ArtifactError, DataError
from llm_clf.models.adapters import new_adapter
from llm_clf.models.bases import SHIPPED
from llm_clf.models.memory import (
    DTYPE_BYTES,
    MODES,
    RETAINED_BYTES,
    RETAINED_SHARE,
    RETAINED_SHARE_CHECKPOINTING,
    RETAINED_SHARE_CHECKPOINTING_QUANTIZED,
    RUNTIME_BYTES,
    AdapterShape,
    BaseShape,
    MicroBatch,
    adapter_bytes,
    adapter_shape,
    base_shape,
    empty_model,
    estimate,
    largest_micro_batch,
    runtime_bytes,
    weight_bytes,
    workspace_bytes,
)


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return doctor()


def test_facts_are_complete_and_plain(facts: dict[str, Any]) -> None:
    assert json.loads(json.dumps(facts)) == facts
    assert set(facts) == {
        "llm_clf", "python", "platform", "cpu", "memory", "torch", "cuda", "disk", "versions", "finetune",
        "shipped_base", "estimate",
    }  # fmt: skip
    assert set(facts["versions"]) == set(PACKAGES) and facts["versions"]["torch"] == torch.__version__
    assert 0 < facts["memory"]["available_bytes"] <= facts["memory"]["total_bytes"]
    assert facts["cpu"]["name"] and facts["cpu"]["threads"] >= 1
    assert facts["cpu"]["dtypes"] == (["bf16", "fp32"] if facts["cpu"]["bf16_in_hardware"] else ["fp32"])
    assert {disk["free_bytes"] > 0 for disk in facts["disk"].values()} == {True}
    assert facts["torch"]["version"] == torch.__version__ and facts["cuda"]["available"] == torch.cuda.is_available()
    assert facts["finetune"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert facts["finetune"]["dtype"] in ("bf16", "fp16", "fp32") and facts["estimate"] is None
    faults = shipped_faults(SHIPPED)
    assert facts["shipped_base"] == {"name": "glm-nano", "whole": not faults, "faults": faults}


def test_text_holds_the_main_lines(facts: dict[str, Any]) -> None:
    text = doctor_text(facts)
    for start in (
        "llm-clf ",
        "CPU: ",
        "RAM: ",
        "torch: ",
        "CUDA: ",
        "Disk: ",
        "finetune would use: ",
        "Base that ships",
    ):
        assert any(line.startswith(start) for line in text.splitlines()), start
    assert all(name in text for name in PACKAGES) and "ESTIMATES" not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_text_names_what_is_wrong_with_the_base(facts: dict[str, Any]) -> None:
    damaged = {"name": "glm-nano", "whole": False, "faults": ["model.safetensors is missing"]}
    text = doctor_text({**facts, "shipped_base": damaged})
    assert "Base that ships (glm-nano): NOT whole" in text and "  model.safetensors is missing\n" in text
    whole = doctor_text({**facts, "shipped_base": {"name": "glm-nano", "whole": True, "faults": []}})
    assert "Base that ships (glm-nano): whole\n" in whole


def test_cards_are_listed(monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any]) -> None:
    card = {"name": "Card X", "total_bytes": 24 * 2**30, "free_bytes": 20 * 2**30, "bf16": False}
    cuda = {"available": True, "notes": ["The driver is old."], "cards": [card]}
    text = doctor_text({**facts, "cuda": cuda, "torch": {"version": "2.9", "cuda": "12.8", "hip": None}})
    row = next(line for line in text.splitlines() if line.startswith("Card X"))
    assert row.split() == ["Card", "X", "24.0", "GiB", "20.0", "GiB", "no"]
    assert "built for CUDA 12.8" in text and "CUDA: available, 1 cards\n  The driver is old." in text


def base_folder(place: Path) -> Path:
    """Make a folder of two files with their sums, one in binary mode, one upper-case."""
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").write_bytes(b"\x00\x01")
    (place / ".hidden").write_text("is left out")
    config = hashlib.sha256(b"{}").hexdigest()
    weights = hashlib.sha256(b"\x00\x01").hexdigest().upper()
    (place / SUMS).write_text(f"{config}  config.json\n{weights} *model.safetensors\n")
    return place


def test_a_whole_base(tmp_path: Path) -> None:
    assert shipped_faults(base_folder(tmp_path / "base")) == []


def test_damage_is_named(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base")
    (folder / "config.json").write_text("{ }")
    (folder / "model.safetensors").unlink()
    (folder / "added.json").write_text("")
    with open(folder / SUMS, "a") as sums:
        sums.write("nonsense\n\n")
    found, expected = (hashlib.sha256(content).hexdigest()[:12] for content in (b"{ }", b"{}"))
    assert shipped_faults(folder) == [
        "SHA256SUMS line 3 is not what sha256sum writes: 'nonsense'",
        f"config.json differs: sha256 {found}…, expected {expected}…",
        "model.safetensors is missing",
        "added.json is not listed in SHA256SUMS",
    ]


def test_missing_or_broken_sums_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    assert shipped_faults(folder) == ["the folder base is missing"]
    base_folder(folder)
    (folder / SUMS).write_text("")
    assert shipped_faults(folder) == ["SHA256SUMS lists no file"]
    (folder / SUMS).write_bytes(b"\xff\xfe")
    assert shipped_faults(folder)[0].startswith("SHA256SUMS cannot be read")
    (folder / SUMS).unlink()
    assert shipped_faults(folder) == ["SHA256SUMS is missing, so the files cannot be checked"]


# The tiny GLM of conftest: hidden 32, 2 layers, MLP 64, 4 heads of 8, 2 of them for key and value, 261 tokens.
LINEARS = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 128), (64, 32)]
LAYER_WEIGHTS = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 32 * 128 + 64 * 32
LAYER_BIASES, LAYER_NORMS = 32 + 16 + 16, 2 * 32
PARAMETERS = 2 * 261 * 32 + 32 + 2 * (LAYER_WEIGHTS + LAYER_BIASES + LAYER_NORMS)
ADAPTER = 2 * 8 * sum(inputs + outputs for inputs, outputs in LINEARS)


def test_shapes_of_a_tiny_base(base: Path) -> None:
    model = empty_model(ModelSettings(name=str(base)))
    shape = base_shape(model)
    assert sorted(shape.linears) == sorted(2 * LINEARS)
    assert shape.parameters == PARAMETERS
    assert (shape.layers, shape.hidden, shape.attention, shape.intermediate, shape.vocabulary) == (2, 32, 32, 64, 261)
    assert adapter_shape(new_adapter(model, LoraSettings(), seed=0)) == AdapterShape(
        ADAPTER, inputs=2 * (5 * 32 + 64), ranks=2 * 6 * 8
    )
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_estimate_of_a_tiny_base_by_hand(base: Path) -> None:
    model = empty_model(ModelSettings(name=str(base)))
    shape, adapter = base_shape(model), adapter_shape(new_adapter(model, LoraSettings(), seed=0))
    batch = largest_micro_batch(100, 50.0, answer=2, batch_size=4, budget=300)
    assert batch == MicroBatch(tokens=300, rows=4, longest=100, answer=2)

    def layer(size: int, kept_inputs: int) -> int:
        """Norms, attention, MLP, what the adapter's inputs take, between its matrices."""
        return 300 * (2 * 4 * 32 + 4 * 32 * size + 3 * 64 * size + kept_inputs + 4 * 6 * 8)

    plain = {"device": "cpu", "dropout": False, "checkpointing": False, "packed": False, "fast_lora": False}

    def found(mode: str, **changes: Any) -> Any:
        options = {**plain, **changes}
        size = options.pop("size", DTYPE_BYTES.get(mode, 2))
        return estimate(mode, size, shape, adapter, batch, **options)

    fp32 = found("fp32")
    assert fp32.weights == 4 * PARAMETERS and fp32.adapter == 16 * ADAPTER
    assert fp32.activations == 2 * layer(4, 4 * (2 * 32 + 64))
    assert fp32.workspace == 300 * 128 * (4 + 12) + 300 * 100 * 4
    assert fp32.runtime == RUNTIME_BYTES["cpu"] + int(RETAINED_SHARE * (fp32.activations + fp32.workspace))
    assert found("fp32", device="cuda").runtime == RUNTIME_BYTES["cuda"]
    assert fp32.peak == fp32.weights + fp32.adapter + fp32.activations + fp32.workspace + fp32.runtime
    inputs = 5 * 32 + 64
    assert found("bf16") == found("fp16") and found("bf16").activations == 2 * layer(2, 4 * inputs)
    assert found("bf16", dropout=True).activations == 2 * layer(2, (4 + 4) * inputs)
    assert found("bf16", dropout=True, device="cuda").activations == 2 * layer(2, (4 + 1) * inputs)
    assert found("8bit").activations == 2 * layer(2, 4 * inputs + 2 * (2 * 32 + 64))
    # What computes in fp32 needs no copy of the input that bitsandbytes keeps.
    assert found("8bit", size=4).activations == fp32.activations
    assert found("bf16", checkpointing=True).activations == 2 * 300 * 32 * 2 + layer(2, 4 * inputs)
    half = 2 * (PARAMETERS - 2 * LAYER_WEIGHTS)
    assert found("8bit").weights == half + 2 * (LAYER_WEIGHTS + 4 * (32 + 16 + 16 + 32 + 128 + 32))
    # 4 bits a weight, a byte for 64 of them, 4 bytes for 256 of those bytes; each of the layers has less than 256.
    assert found("4bit").weights == half + 2 * (LAYER_WEIGHTS // 2 + LAYER_WEIGHTS // 64 + 6 * 4)
    assert found("4bit").workspace == 300 * 128 * (2 + 12) + 32 * 128 * 2 + 300 * 100 * 2


def test_estimate_of_packed_rows_by_hand(base: Path) -> None:
    model = empty_model(ModelSettings(name=str(base)))
    shape, adapter = base_shape(model), adapter_shape(new_adapter(model, LoraSettings(), seed=0))
    batch = MicroBatch(tokens=300, rows=4, longest=100, answer=2)
    rest, copies, inputs = (2 * 32 + 2 * 64) * 2, 2 * 32 + 64 + 32, 5 * 32 + 64
    # Query, keys and values of 2 heads, and softmax of 4 heads over the row; on CUDA four of all heads.
    cpu, cuda = 2 * 32 * 2 + 4 * 100 * 2, 4 * 32 * 2
    # Of the last of two layers its input, normed too, and keys and values.
    last = 300 * (2 * 32 + 2 * 16) * 2

    def found(mode: str = "bf16", device: str = "cpu", *, dropout: bool = True, fused: bool = True) -> Any:
        return estimate(
            mode, 2, shape, adapter, batch, device=device, dropout=dropout, checkpointing=False, fused=fused
        )

    assert found().activations == 300 * (rest + cpu + (2 + 2) * copies + 2 * 6 * 8) + last
    assert found(dropout=False).activations == 300 * (rest + cpu + 2 * copies + 2 * 6 * 8) + last
    assert found(device="cuda").activations == 300 * (rest + cuda + (2 + 1) * copies + 2 * 6 * 8) + last
    # PEFT's forward at quantised layers, in fp32.
    assert found("4bit").activations == 300 * (rest + cpu + (4 + 4) * inputs + 4 * 6 * 8) + last
    assert found("8bit").activations == 300 * (rest + cpu + (4 + 4) * inputs + 4 * 6 * 8 + 2 * copies) + last
    plain = 2 * 4 * 32 + 3 * 64 * 2
    assert found(fused=False).activations == 2 * 300 * (plain + cpu + (2 + 2) * inputs + 2 * 6 * 8)
    assert found().workspace == 300 * 128 * 5 + 100 * 100 * 2


def test_logits_are_the_workspace_of_a_large_vocabulary() -> None:
    base = BaseShape(10, ((8, 8),), layers=1, hidden=8, attention=8, intermediate=8, vocabulary=100_000)
    found = workspace_bytes("fp32", 4, base, MicroBatch(64, 4, 16, 3), packed=False, fast=False)
    assert found == 4 * 4 * 100_000 * 16 + 64 * 16 * 4


def test_the_allocator_holds_back_a_share_and_no_more_than_so_much() -> None:
    shares = {("bf16", False): RETAINED_SHARE, ("4bit", False): RETAINED_SHARE}
    shares[("bf16", True)] = RETAINED_SHARE_CHECKPOINTING
    shares[("4bit", True)] = RETAINED_SHARE_CHECKPOINTING_QUANTIZED
    for (mode, checkpointing), share in shares.items():
        some, much = (runtime_bytes(mode, "cpu", size, checkpointing=checkpointing) for size in (2**20, 2**40))
        assert some == RUNTIME_BYTES["cpu"] + share * 2**20
        assert much == RUNTIME_BYTES["cpu"] + RETAINED_BYTES


def test_a_micro_batch_holds_a_row_that_is_longer_than_the_budget() -> None:
    assert largest_micro_batch(500, 400.0, answer=2, batch_size=16, budget=300) == MicroBatch(500, 2, 500, 2)
    assert largest_micro_batch(10, 5.0, answer=2, batch_size=16, budget=4096) == MicroBatch(160, 16, 10, 2)


@pytest.mark.parametrize("family", ["glm", "llama", "qwen2", "gpt2", "gpt_neox", "bloom"])
def test_fewer_bits_take_less(make_base: Any, family: str) -> None:
    shape = base_shape(empty_model(ModelSettings(name=str(make_base(family)))))
    size = {mode: weight_bytes(mode, DTYPE_BYTES.get(mode, 2), shape) for mode in MODES}
    assert size["4bit"] < size["8bit"] < size["fp16"] == size["bf16"] < size["fp32"]


def kept_bytes(model: Any, rows: int, tokens: int, *, lean: bool) -> int:
    """Return the bytes that autograd keeps in a forward, the weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    speed_up(model, SpeedSettings(packing=lean, shared_prefix=lean, fast_lora=lean, fused_layers=lean))
    ids = torch.randint(5, 261, (rows, tokens))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if lean:
            # The last token of the answer is not read.
            examples = [TrainingExample(row[:-1].tolist(), [5, 6], 1.0) for row in ids]
            LabelWords([[[5, 6]]]).packed_loss(model, examples, NOTHING)
        else:
            mask = torch.ones_like(ids)
            mask[0, :3] = 0
            model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["glm", "llama"])
def test_activations_are_what_autograd_keeps(family: str, mode: str, dropout: float, lean: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=261,
        hidden_size=128,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        pad_token_id=3,
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[mode]
    model = AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False)
    shape = base_shape(model)
    adapted = new_adapter(model, LoraSettings(r=4, dropout=dropout), seed=0).train()
    batch = MicroBatch(tokens=4 * 32, rows=4, longest=32, answer=1)
    found = estimate(
        mode,
        DTYPE_BYTES[mode],
        shape,
        adapter_shape(adapted),
        batch,
        device="cpu",
        dropout=dropout > 0,
        checkpointing=False,
        packed=lean,
        fast_lora=lean,
        fused=lean,
    )
    assert found.activations == pytest.approx(kept_bytes(adapted, 4, 32, lean=lean), rel=0.1)


def test_parameters_of_a_chatglm2_6b() -> None:
    from transformers import AutoModelForCausalLM, GlmConfig

    config = GlmConfig(
        vocab_size=65024,
        hidden_size=4096,
        intermediate_size=13696,
        num_hidden_layers=28,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        attention_bias=True,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = base_shape(model)
    assert shape.parameters == 6_243_584_000
    assert weight_bytes("fp16", 2, shape) == 12_487_168_000
    assert 3.9e9 < weight_bytes("4bit", 2, shape) < 4.2e9 and 6.7e9 < weight_bytes("8bit", 2, shape) < 6.9e9
    adapter = adapter_shape(new_adapter(model, LoraSettings(r=8), seed=0))
    assert adapter.parameters == 28 * 8 * (8192 + 2 * (4096 + 256) + 8192 + (4096 + 27392) + (13696 + 4096))
    assert adapter_bytes(adapter.parameters) == 16 * adapter.parameters


def test_estimate_without_rows_takes_the_longest_allowed(base: Path) -> None:
    facts = doctor(model=str(base))
    found = facts["estimate"]
    assert json.loads(json.dumps(facts)) == facts
    assert found["is_estimate"] and list(found["modes"]) == list(MODES) and found["parameters"] == PARAMETERS
    assert found["adapter_parameters"] == ADAPTER
    assert found["rows"]["measured"] is False and found["rows"]["longest_tokens"] == 512
    text = doctor_text(facts)
    assert "ESTIMATES" in text and "every row is taken to be 512 tokens long" in text
    for mode in MODES:
        sizes = found["modes"][mode]
        assert sizes["fits"] == (sizes["peak_bytes"] <= found["free_bytes"])
        line = next(line for line in text.splitlines() if line.startswith(f"{mode} "))
        assert line.split()[-3:] == ["yes" if sizes["fits"] else "no", "2,048", "no"]
        assert (" * " in line) == (mode == found["mode"])


def test_estimate_measures_the_training_rows(base: Path, prompts: Path) -> None:
    from llm_clf.models.bases import load_tokenizer
    from llm_clf.prompting.prompts import read_split
    from llm_clf.prompting.tasks import load_task

    found = doctor(model=str(base), data=prompts)["estimate"]
    task = load_task(prompts / "task.yaml")
    tokens = PromptTokenizer(load_tokenizer(ModelSettings(name=str(base))), task, max_length=512)
    train = read_split(prompts, "train", task)
    lengths = [
        len(example.ids) + len(tokens.answers[task.names.index(prompt.label)][0])
        for prompt, example in zip(train, tokens.encode(train), strict=True)
        if prompt.label
    ]
    assert found["rows"] == {
        "measured": True,
        "rows": len(lengths),
        "longest_tokens": max(lengths),
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
        "cut": 0,
    }
    for sizes in found["modes"].values():
        assert sizes["micro_batch_tokens"] == 2048 and not sizes["gradient_checkpointing"]


def test_rows_without_a_model_are_of_the_default_base(
    base: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_clf.models.bases.SHIPPED", base)
    facts = doctor(data=prompts)
    assert facts["estimate"]["base"] == "glm-nano" and facts["estimate"]["parameters"] == PARAMETERS
    assert "training rows with their answers" in doctor_text(facts)


def test_what_does_not_fit_is_said(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_clf.commands.doctor._memory", lambda: {"total_bytes": 10, "available_bytes": 10})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = doctor(model=str(base))
    assert not any(sizes["fits"] for sizes in facts["estimate"]["modes"].values())
    assert "free in RAM: 0.0 MiB" in doctor_text(facts)


def test_wrong_input_is_refused(base: Path, tmp_path: Path, prompts: Path) -> None:
    with pytest.raises(ArtifactError, match="no such model folder"):
        doctor(model=str(tmp_path / "absent"))
    with pytest.raises(ArtifactError, match="the config cannot be loaded"):
        doctor(model="nobody/no-such-base")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ArtifactError, match="the config cannot be loaded"):
        doctor(model=str(broken))
    with pytest.raises(DataError, match=r"has no task\.yaml"):
        doctor(model=str(base), data=tmp_path)
    (prompts / "train.jsonl").write_text("")
    with pytest.raises(DataError, match="no labelled rows"):
        doctor(model=str(base), data=prompts)
