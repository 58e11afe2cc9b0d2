"""Adapters of ChatGLM's own code as native ones: the same change of the same weights, or a refusal."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llm_clf.commands.import_adapter import import_adapter
from llm_clf.errors import ArtifactError, ConfigError, LlmClfError
from llm_clf.models.adapters import attach_adapter
from llm_clf.models.chatglm import adapters
from llm_clf.models.chatglm.adapters import convert_adapter, is_legacy, native_names

LAYERS, HIDDEN, INNER, HEADS, GROUPS, WIDTH, VOCAB = 3, 24, 20, 4, 2, 8, 50
ROWS = [HEADS * WIDTH, GROUPS * WIDTH, GROUPS * WIDTH]
FOUR = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
LAYER = "base_model.model.transformer.encoder.layers"
# PEFT asks for a property whose name transformers has changed, whatever the adapter.
of_any_adapter = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def glm_config(**changes: int) -> Any:
    from transformers import GlmConfig

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": WIDTH,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
        "attention_bias": True,
    }
    return GlmConfig(**(sizes | changes))


def native_model(seed: int = 0) -> Any:
    from transformers import GlmForCausalLM

    torch.manual_seed(seed)
    return GlmForCausalLM(glm_config()).float().eval()


def legacy_model(native: Any) -> nn.Module:
    """Return the linear layers of the original, by its names, with the weights of a native model."""
    layers = nn.ModuleList()
    for native_layer in native.model.layers:
        attention, mlp = native_layer.self_attn, native_layer.mlp
        joint = torch.cat([getattr(attention, f"{letter}_proj").weight for letter in "qkv"])
        attention_names = {"query_key_value": joint, "dense": attention.o_proj.weight}
        mlp_names = {"dense_h_to_4h": mlp.gate_up_proj.weight, "dense_4h_to_h": mlp.down_proj.weight}
        layers.append(module(self_attention=linears(attention_names), mlp=linears(mlp_names)))
    head = linears({"output_layer": native.lm_head.weight}).output_layer
    return module(transformer=module(encoder=module(layers=layers), output_layer=head))


def module(**parts: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, part in parts.items():
        made.add_module(name, part)
    return made


def linears(weights: dict[str, torch.Tensor]) -> Any:
    made = module()
    for name, weight in weights.items():
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.detach().clone())
        made.add_module(name, layer)
    return made


def joined(native: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a native model under the names of the original's linear layers."""
    return {name: weight.detach() for name, weight in legacy_model(native).state_dict().items()}


def train_legacy(native: Any, folder: Path, **lora: Any) -> dict[str, torch.Tensor]:
    """Save an adapter as PEFT does on the original's names; return the weights of the base with it merged."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(legacy_model(native), LoraConfig(**({"r": 4, "lora_alpha": 6} | lora)))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_().mul_(0.5)
                parameter.copy_(parameter.abs() + 0.5 if "magnitude" in name else parameter)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return {name: weight.detach() for name, weight in adapted.merge_and_unload().state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], places: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(
            found[name], weight, rtol=0, atol=places, msg=lambda text, name=name: f"{name}: {text}"
        )


LORA = {
    "query_key_value": {"target_modules": ["query_key_value"]},
    "dense": {"target_modules": ["dense"]},
    "mlp": {"target_modules": ["dense_h_to_4h", "dense_4h_to_h"]},
    "all": {"target_modules": FOUR},
    "dropout": {"target_modules": FOUR, "lora_dropout": 0.1},
    "rslora": {"target_modules": FOUR, "use_rslora": True},
    "dora": {"target_modules": FOUR, "use_dora": True},
    "rank and alpha by name": {
        "target_modules": FOUR,
        "rank_pattern": {"dense": 2, "layers.1.self_attention.query_key_value": 5},
        "alpha_pattern": {"mlp.dense_4h_to_h": 3, r".*\.2\.self_attention\.query_key_value": 20, "dense": 1},
    },
    "rank and alpha by name, rslora": {
        "target_modules": FOUR,
        "use_rslora": True,
        "rank_pattern": {"transformer.encoder.layers.0.self_attention.query_key_value": 9},
        "alpha_pattern": {"query_key_value": 2},
    },
    "alpha by an expression": {"target_modules": FOUR, "alpha_pattern": {"dense|to_h": 9}},
    "some layers": {"target_modules": FOUR, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "layers that differ": {
        "target_modules": r".*layers\.(0\.self_attention\.query_key_value|2\.mlp\.dense_h_to_4h)",
        "rank_pattern": {"dense_h_to_4h": 3},
    },
    "head": {"target_modules": ["query_key_value", "output_layer"]},
    "head and one layer": {"target_modules": r".*(layers\.1\.self_attention\.dense|output_layer)"},
}


@pytest.mark.parametrize("lora", LORA.values(), ids=LORA.keys())
def test_a_converted_adapter_changes_the_weights_as_the_legacy_one_does(tmp_path: Path, lora: dict[str, Any]) -> None:
    native = native_model()
    before = joined(native)
    expected = train_legacy(native, tmp_path / "legacy", **lora)
    convert_adapter(tmp_path / "legacy", tmp_path / "native", native.config)
    merged = attach_adapter(native, tmp_path / "native", merge=True, tokenizer=None)
    changed = {name for name in before if not torch.equal(expected[name], before[name])}
    assert changed and all((expected[name] - before[name]).abs().max() > 0.1 for name in changed)
    assert_same(joined(merged), expected)


def test_the_update_of_a_joint_weight_is_b_times_a(tmp_path: Path) -> None:
    native, weights = native_model(), legacy_weights(rank=3)
    before = joined(native)
    write_legacy(tmp_path / "legacy", weights, r=3, lora_alpha=12)
    convert_adapter(tmp_path / "legacy", tmp_path / "native", native.config)
    merged = joined(attach_adapter(native, tmp_path / "native", merge=True, tokenizer=None))
    for number in range(LAYERS):
        name = f"encoder.layers.{number}.self_attention.query_key_value"
        a, b = (weights[f"base_model.model.transformer.{name}.lora_{part}.weight"] for part in "AB")
        before[f"transformer.{name}.weight"] += 12 / 3 * (b @ a)
    assert_same(merged, before)


def test_a_converted_adapter_gives_the_same_logits_merged_and_unmerged(tmp_path: Path) -> None:
    train_legacy(native_model(), tmp_path / "legacy", target_modules=FOUR)
    convert_adapter(tmp_path / "legacy", tmp_path / "native", glm_config())
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        plain = native_model()(ids).logits
        merged, unmerged = (
            attach_adapter(native_model(), tmp_path / "native", merge=merge, tokenizer=None)(ids).logits
            for merge in (True, False)
        )
    torch.testing.assert_close(merged, unmerged, rtol=0, atol=1e-5)
    assert (merged - plain).abs().max() > 0.1


@of_any_adapter
@pytest.mark.parametrize("lora", LORA.values(), ids=LORA.keys())
def test_peft_loads_a_converted_adapter_without_a_warning(tmp_path: Path, lora: dict[str, Any]) -> None:
    from peft import PeftModel

    train_legacy(native_model(), tmp_path / "legacy", **lora)
    convert_adapter(tmp_path / "legacy", tmp_path / "native", glm_config())
    PeftModel.from_pretrained(native_model(), str(tmp_path / "native"))


def read_config(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return content


def test_the_config_names_native_layers_and_keeps_what_was_set(tmp_path: Path) -> None:
    lora = {
        "target_modules": FOUR,
        "lora_dropout": 0.1,
        "rank_pattern": {"dense": 2},
        "alpha_pattern": {"2.mlp.dense_h_to_4h": 1},
    }
    train_legacy(native_model(), tmp_path / "legacy", use_rslora=True, **lora)
    assert read_config(tmp_path / "legacy")["auto_mapping"] is not None
    convert_adapter(tmp_path / "legacy", tmp_path / "native", glm_config())
    made = read_config(tmp_path / "native")
    assert made["target_modules"] == ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    assert (made["r"], made["lora_alpha"], made["lora_dropout"], made["use_rslora"]) == (4, 6, 0.1, True)
    assert made["rank_pattern"] == {f"model.layers.{number}.self_attn.o_proj": 2 for number in range(LAYERS)}
    assert made["alpha_pattern"] == {"model.layers.2.mlp.gate_up_proj": 1}
    assert made["auto_mapping"] is None and made["layers_to_transform"] is None and made["use_dora"] is False


@pytest.mark.parametrize(
    ("lora", "targets", "layers"),
    [
        ("query_key_value", ["k_proj", "q_proj", "v_proj"], None),
        ("some layers", ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"], [0, 2]),
        ("head", ["k_proj", "lm_head", "q_proj", "v_proj"], None),
        ("head and one layer", ["lm_head", "o_proj"], [1]),
        (
            "layers that differ",
            [f"model.layers.0.self_attn.{letter}_proj" for letter in "kqv"] + ["model.layers.2.mlp.gate_up_proj"],
            None,
        ),
    ],
)
def test_targets_are_the_layers_that_have_weights(
    tmp_path: Path, lora: str, targets: list[str], layers: list[int] | None
) -> None:
    train_legacy(native_model(), tmp_path / "legacy", **LORA[lora])
    convert_adapter(tmp_path / "legacy", tmp_path / "native", glm_config())
    made = read_config(tmp_path / "native")
    assert (made["target_modules"], made["layers_to_transform"]) == (targets, layers)


# An adapter_config.json of spring 2023.
OLD = {
    "base_model_name_or_path": "THUDM/chatglm2-6b",
    "bias": "none",
    "enable_lora": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "target_modules": ["query_key_value"],
    "task_type": "CAUSAL_LM",
}


def legacy_weights(rank: int = 8, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    weights = {}
    for number in range(layers):
        weights[f"{LAYER}.{number}.self_attention.query_key_value.lora_A.weight"] = torch.randn(rank, HIDDEN).to(dtype)
        weights[f"{LAYER}.{number}.self_attention.query_key_value.lora_B.weight"] = torch.randn(sum(ROWS), rank).to(
            dtype
        )
    return weights


def write_legacy(folder: Path, weights: dict[str, torch.Tensor], *, without: str = "", **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {key: value for key, value in (OLD | config).items() if key != without}
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_of_2023_is_converted(tmp_path: Path) -> None:
    write_legacy(tmp_path / "legacy", legacy_weights(), some_new_field={"a": 1})
    convert_adapter(tmp_path / "legacy", tmp_path / "native", glm_config())
    made = read_config(tmp_path / "native")
    assert made["base_model_name_or_path"] == "THUDM/chatglm2-6b" and made["task_type"] == "CAUSAL_LM"
    assert (made["r"], made["lora_alpha"], made["lora_dropout"]) == (8, 32, 0.1)
    assert not {"enable_lora", "merge_weights", "some_new_field"} & made.keys()
    attach_adapter(native_model(), tmp_path / "native", merge=False, tokenizer=None)


@pytest.mark.parametrize("field", ["peft_type", "r", "task_type", "lora_dropout", "target_modules", "bias"])
def test_fields_that_the_weights_say_too_may_be_missing(tmp_path: Path, field: str) -> None:
    write_legacy(tmp_path / "legacy", legacy_weights(), without=field)
    convert_adapter(tmp_path / "legacy", tmp_path / "native", glm_config())
    made = read_config(tmp_path / "native")
    assert made["r"] == 8 and made["target_modules"] == ["k_proj", "q_proj", "v_proj"] and not made["rank_pattern"]
    attach_adapter(native_model(), tmp_path / "native", merge=False, tokenizer=None)


def test_a_sequence_to_sequence_adapter_is_a_causal_one(tmp_path: Path) -> None:
    write_legacy(tmp_path / "legacy", legacy_weights(), task_type="SEQ_2_SEQ_LM")
    convert_adapter(tmp_path / "legacy", tmp_path / "native", glm_config())
    assert read_config(tmp_path / "native")["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key,
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix("base_model.model."),
    ],
)
def test_a_bin_file_and_other_spellings_give_the_same_adapter(tmp_path: Path, rename: Callable[[str], str]) -> None:
    weights = legacy_weights()
    convert_adapter(write_legacy(tmp_path / "plain", weights), tmp_path / "from-plain", glm_config())
    other = write_legacy(tmp_path / "other", weights)
    (other / "adapter_model.safetensors").unlink()
    torch.save({rename(key): weight for key, weight in weights.items()}, other / "adapter_model.bin")
    convert_adapter(other, tmp_path / "from-other", glm_config())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "from-other" / name).read_bytes() == (tmp_path / "from-plain" / name).read_bytes()


@pytest.mark.parametrize("ending", ["", ".weight", ".default", ".default.weight"])
def test_magnitudes_of_any_peft_are_split_as_rows(tmp_path: Path, ending: str) -> None:
    magnitudes = torch.arange(sum(ROWS), dtype=torch.float32) + 1
    weights = legacy_weights()
    for number in range(LAYERS):
        weights[f"{LAYER}.{number}.self_attention.query_key_value.lora_magnitude_vector{ending}"] = magnitudes + number
    write_legacy(tmp_path / "legacy", weights, use_dora=True)
    convert_adapter(tmp_path / "legacy", tmp_path / "native", glm_config())
    made = load_file(tmp_path / "native" / "adapter_model.safetensors")
    parts = [made[f"base_model.model.model.layers.1.self_attn.{letter}_proj.lora_magnitude_vector"] for letter in "qkv"]
    assert [len(part) for part in parts] == ROWS and torch.equal(torch.cat(parts), magnitudes + 1)
    attach_adapter(native_model(), tmp_path / "native", merge=False, tokenizer=None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_of_the_weights_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    write_legacy(tmp_path / "legacy", legacy_weights(dtype=dtype))
    convert_adapter(tmp_path / "legacy", tmp_path / "native", glm_config())
    made = load_file(tmp_path / "native" / "adapter_model.safetensors")
    assert {weight.dtype for weight in made.values()} == {dtype}


def test_a_pattern_that_peft_has_read_in_two_ways_is_asked_about(tmp_path: Path) -> None:
    patterns: dict[str, Any] = {
        "rank_pattern": {"query_key_value": 8},
        "alpha_pattern": {"self_attention.query_key_value": 5},
    }
    source = write_legacy(tmp_path / "legacy", legacy_weights(), **patterns)
    with pytest.raises(ArtifactError, match="PEFT before 0.14 takes alpha 32 .* later ones 5"):
        convert_adapter(source, tmp_path / "native", glm_config())
    write_legacy(source, legacy_weights(), peft_version="0.14.0", **patterns)
    convert_adapter(source, tmp_path / "native", glm_config())
    assert set(read_config(tmp_path / "native")["alpha_pattern"].values()) == {5}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING': only LoRA"),
        ({"peft_type": "P_TUNING"}, "peft_type 'P_TUNING': only LoRA"),
        ({"peft_type": None}, "peft_type None"),
        ({"enable_lora": [True, False, True]}, "enable_lora [True, False, True]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa': it was trained beside a changed base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS': its head is that of ChatGLM's own code"),
        ({"task_type": "TOKEN_CLS"}, "task_type 'TOKEN_CLS': expected CAUSAL_LM"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": "32"}, "lora_alpha is '32'"),
        ({"lora_dropout": "a"}, "lora_dropout is 'a'"),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1]"),
        ({"rank_pattern": {"query_key_value": "8"}}, "rank_pattern is {'query_key_value': '8'}"),
        ({"alpha_pattern": {"(": 3}}, "a key that is no regular expression"),
        (
            {"r": 4},
            "says rank 4 for transformer.encoder.layers.0.self_attention.query_key_value, and its weights have 8",
        ),
        ({"rank_pattern": {"query_key_value": 6}}, "says rank 6"),
        (
            {"use_dora": True},
            "is a DoRA adapter, but transformer.encoder.layers.0.self_attention.query_key_value has no",
        ),
    ],
)
def test_a_config_without_a_native_counterpart_is_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    source = write_legacy(tmp_path / "legacy", legacy_weights(), **config)
    refused(source, tmp_path, re.escape(says))


def refused(source: Path, folder: Path, says: str) -> None:
    """Expect an error with a text, and nothing left behind."""
    with pytest.raises(ArtifactError, match=says):
        convert_adapter(source, folder / "native", glm_config())
    assert list(folder.iterdir()) == [source]


FIRST = f"{LAYER}.0.self_attention.query_key_value"


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (f"{FIRST}.bias", "is a trained bias"),
        (f"{FIRST}.base_layer.bias", "is a trained bias"),
        (f"{FIRST}.lora_B.bias", "is a trained bias"),
        ("base_model.model.transformer.output_layer.modules_to_save.weight", "a whole trained layer"),
        ("base_model.model.transformer.output_layer.weight", "a whole trained layer"),
        ("base_model.model.transformer.embedding.word_embeddings.lora_embedding_A", "the embedding of tokens"),
        ("base_model.model.transformer.embedding.word_embeddings.weight", "the embedding of tokens"),
        ("transformer.prefix_encoder.embedding.weight", "P-Tuning or prefix"),
        ("prompt_embeddings", "P-Tuning or prefix"),
        ("base_model.model.transformer.layers.0.attention.query_key_value.lora_A.weight", "ChatGLM-6B version 1"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "is used as it is"),
        ("base_model.model.gpt_neox.layers.0.attention.query_key_value.lora_A.weight", "no weight of an adapter"),
        (f"{FIRST}.lora_A.other.weight", "no part of a LoRA update"),
        (f"{LAYER}.0.mlp.query_key_value.lora_A.weight", "no part of a LoRA update"),
        (f"{FIRST}.lora_A.default.weight", "stands there twice"),
        (f"{LAYER}.0.self_attention.dense.lora_A.weight", "has lora_A but no lora_B"),
        (f"{LAYER}.0.self_attention.dense.lora_B.weight", "has lora_B but no lora_A"),
        (f"{LAYER}.0.self_attention.dense.lora_magnitude_vector", "has lora_magnitude_vector but no lora_A"),
        (f"{LAYER}.{LAYERS}.self_attention.dense.lora_A.weight", r"the base has 3 layers \(0 to 2\)"),
    ],
)
def test_a_weight_that_has_no_native_place_is_refused_by_name(tmp_path: Path, key: str, says: str) -> None:
    source = write_legacy(tmp_path / "legacy", legacy_weights() | {key: torch.ones(8, HEADS * WIDTH)})
    name = key.removeprefix("base_model.model.").partition(".lora_")[0]
    refused(source, tmp_path, rf"{re.escape(name)}.*{says}")


@pytest.mark.parametrize(
    ("part", "shape", "says"),
    [
        ("lora_B", (sum(ROWS) + 8, 8), r"lora_B has the shape \[72, 8\], and the base needs \[64, 8\]: .*another base"),
        ("lora_B", (sum(ROWS), 7), r"\[64, 7\], and the base needs \[64, 8\]"),
        ("lora_A", (8, HIDDEN + 1), r"lora_A has the shape \[8, 25\], and the base needs \[8, 24\]"),
        ("lora_A", (0,), r"lora_A has the shape \[0\], and the base needs \[r, 24\]"),
        ("lora_A", (0, HIDDEN), r"lora_A has the shape \[0, 24\], and the base needs \[r, 24\]"),
    ],
)
def test_a_shape_that_the_base_does_not_have_is_refused(
    tmp_path: Path, part: str, shape: tuple[int, ...], says: str
) -> None:
    source = write_legacy(tmp_path / "legacy", legacy_weights() | {f"{FIRST}.{part}.weight": torch.ones(shape)})
    refused(source, tmp_path, says)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    weights = legacy_weights()
    weights[f"{FIRST}.lora_B.weight"][3, 3] = value
    refused(write_legacy(tmp_path / "legacy", weights), tmp_path, "lora_B .*something other than finite numbers")


def test_one_layer_without_magnitudes_is_refused(tmp_path: Path) -> None:
    weights = legacy_weights() | {f"{FIRST}.lora_magnitude_vector": torch.ones(sum(ROWS))}
    source = write_legacy(tmp_path / "legacy", weights)
    refused(source, tmp_path, "is a DoRA adapter, but transformer.encoder.layers.1.*has no lora_magnitude_vector")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("adapter_config.json", None, "has no adapter_config.json, so it is no PEFT adapter"),
        ("adapter_config.json", b"[1]", "found list, expected what PEFT writes"),
        ("adapter_config.json", b"{", "cannot be read"),
        ("adapter_config.json", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("adapter_model.safetensors", None, "holds no adapter weights"),
        ("adapter_model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("adapter_model.safetensors", b"12345678{", "is cut short or damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    source = write_legacy(tmp_path / "legacy", legacy_weights())
    (source / name).unlink()
    if content is not None:
        (source / name).write_bytes(content)
    refused(source, tmp_path, says)


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    refused(write_legacy(tmp_path / "legacy", {}), tmp_path, "holds no weights")


def test_code_in_a_bin_file_is_not_run(tmp_path: Path) -> None:
    source = write_legacy(tmp_path / "legacy", legacy_weights())
    (source / "adapter_model.safetensors").unlink()
    torch.save({"weights": Path("anything")}, source / "adapter_model.bin")
    refused(source, tmp_path, "adapter_model.bin: holds something other than tensors")


def test_a_p_tuning_checkpoint_is_known_as_such(tmp_path: Path) -> None:
    source = tmp_path / "ptuning"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "chatglm", "pre_seq_len": 128}', encoding="utf-8")
    refused(source, tmp_path, "no PEFT adapter; this looks like a P-Tuning checkpoint")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda weights, v: {v: weights[v] + 1e-3}, "query_key_value.lora_B came out other"),
        (lambda weights, v: {v: weights[v.replace("v_proj", "k_proj")]}, "query_key_value.lora_B came out other"),
        (lambda weights, v: {name: weight.double() for name, weight in weights.items()}, "came out other"),
        (lambda weights, v: {"more": torch.ones(1)}, "with weights that it does not have, first more"),
    ],
    ids=["value", "swapped", "type", "more"],
)
def test_weights_that_come_out_other_than_they_went_in_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., dict[str, torch.Tensor]], says: str
) -> None:
    def save_wrong(weights: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        name = "base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"
        wrong = {name: weight.clone() for name, weight in fault(weights, name).items()}
        save_file(weights | wrong, file, metadata=metadata)

    source = write_legacy(tmp_path / "legacy", legacy_weights())
    monkeypatch.setattr(adapters, "save_file", save_wrong)
    refused(source, tmp_path, says)


def test_what_stood_at_the_target_is_replaced_whole(tmp_path: Path) -> None:
    source = write_legacy(tmp_path / "legacy", legacy_weights())
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "old").touch()
    convert_adapter(source, tmp_path / "native", glm_config())
    assert sorted(file.name for file in (tmp_path / "native").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert sorted(tmp_path.iterdir()) == [source, tmp_path / "native"]


@pytest.mark.parametrize(
    ("names", "native"),
    [
        (["query_key_value"], ["q_proj", "k_proj", "v_proj"]),
        (FOUR, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]),
        (["self_attention.query_key_value", "mlp.dense_4h_to_h"], ["q_proj", "k_proj", "v_proj", "down_proj"]),
        (["layers.1.self_attention.dense"], ["layers.1.self_attn.o_proj"]),
        (["transformer.encoder.layers.1.mlp.dense_h_to_4h"], ["layers.1.mlp.gate_up_proj"]),
        (["output_layer", "transformer.output_layer"], ["lm_head"]),
        (["q_proj", "query_key_value"], ["q_proj", "k_proj", "v_proj"]),
        (["q_proj", "model.layers.0.mlp.down_proj"], ["q_proj", "model.layers.0.mlp.down_proj"]),
        (["mlp.query_key_value", "self_attention.dense_h_to_4h", "attention.dense", "Dense", "dense2"],) * 2,
        ([], []),
    ],
)
def test_target_modules_of_the_original_have_native_names(names: list[str], native: list[str]) -> None:
    assert native_names(names) == native


@of_any_adapter
def test_native_target_modules_are_those_that_the_original_ones_were(tmp_path: Path) -> None:
    """The same targets, given to PEFT on either network, name the same weights."""
    from peft import LoraConfig, get_peft_model

    for targets in (FOUR, ["self_attention.dense"], ["layers.1.mlp.dense_4h_to_h", "query_key_value"]):
        train_legacy(native_model(), tmp_path / "legacy", target_modules=targets)
        convert_adapter(tmp_path / "legacy", tmp_path / "native", glm_config())
        converted = load_file(tmp_path / "native" / "adapter_model.safetensors")
        fresh = get_peft_model(native_model(), LoraConfig(r=4, target_modules=native_names(targets)))
        found = {name.replace(".default", "") for name, _ in fresh.named_parameters() if "lora_" in name}
        assert found == converted.keys()


@pytest.mark.parametrize(
    ("name", "legacy"),
    [
        (f"{FIRST}.lora_A.weight", True),
        (f"{FIRST}.lora_A.default.weight", True),
        ("transformer.encoder.layers.11.mlp.dense_h_to_4h.lora_B.weight", True),
        ("base_model.model.transformer.output_layer.lora_A.weight", True),
        ("base_model.model.transformer.embedding.word_embeddings.lora_embedding_A", True),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", False),
        ("base_model.model.gpt_neox.layers.0.attention.query_key_value.lora_A.weight", False),
        ("base_model.model.transformer.h.0.self_attention.query_key_value.lora_A.weight", False),
        ("base_model.model.transformer.layers.0.attention.query_key_value.lora_A.weight", False),
    ],
)
def test_legacy_adapters_are_known_by_their_weights(name: str, legacy: bool) -> None:
    assert is_legacy([name]) is legacy
    assert is_legacy(["base_model.model.lm_head.lora_A.weight", name]) is legacy


@pytest.fixture
def chatglm(tmp_path: Path) -> Path:
    """Return the config of an original folder; its name does not say of which family it is."""
    folder = tmp_path / "base"
    folder.mkdir()
    config = {
        "model_type": "chatglm",
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": INNER,
        "num_attention_heads": HEADS,
        "multi_query_attention": True,
        "multi_query_group_num": GROUPS,
        "kv_channels": WIDTH,
        "padded_vocab_size": VOCAB,
        "add_qkv_bias": True,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_import_adapter_writes_what_the_base_takes(
    tmp_path: Path, chatglm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native = native_model()
    expected = train_legacy(native, tmp_path / "legacy", target_modules=["query_key_value"], layers_to_transform=[0, 2])
    import_adapter(tmp_path / "legacy", tmp_path / "out" / "native", base=chatglm)
    assert_same(joined(attach_adapter(native, tmp_path / "out" / "native", merge=True, tokenizer=None)), expected)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "12 weights, rank 4, alpha 6, for k_proj, q_proj, v_proj in layers 0, 2 of 3." in shown.err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["native"]


def test_import_adapter_takes_a_native_base(tmp_path: Path) -> None:
    native_model().save_pretrained(tmp_path / "base")
    write_legacy(tmp_path / "legacy", legacy_weights())
    import_adapter(str(tmp_path / "legacy"), str(tmp_path / "native"), base=str(tmp_path / "base"))
    attach_adapter(native_model(), tmp_path / "native", merge=False, tokenizer=None)


def test_import_adapter_replaces_only_an_adapter_and_only_when_told(tmp_path: Path, chatglm: Path) -> None:
    source, out = write_legacy(tmp_path / "legacy", legacy_weights()), tmp_path / "native"
    import_adapter(source, out, base=chatglm)
    first = (out / "adapter_model.safetensors").read_bytes()
    write_legacy(source, legacy_weights(rank=2), r=2)
    with pytest.raises(ConfigError, match="already there"):
        import_adapter(source, out, base=chatglm)
    assert (out / "adapter_model.safetensors").read_bytes() == first
    import_adapter(source, out, base=chatglm, overwrite=True)
    assert read_config(out)["r"] == 2
    with pytest.raises(ConfigError, match="is no adapter, so --overwrite leaves it alone"):
        import_adapter(source, chatglm, base=chatglm, overwrite=True)


def test_an_import_that_fails_leaves_what_was_there(tmp_path: Path, chatglm: Path) -> None:
    source, out = write_legacy(tmp_path / "legacy", legacy_weights()), tmp_path / "native"
    import_adapter(source, out, base=chatglm)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    write_legacy(source, legacy_weights() | {f"{FIRST}.bias": torch.ones(2)})
    with pytest.raises(ArtifactError, match="trained bias"):
        import_adapter(source, out, base=chatglm, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(tmp_path.iterdir()) == sorted([source, out, chatglm])


@pytest.mark.parametrize(
    ("source", "out", "base", "says"),
    [
        ("legacy", "legacy/native", "base", "lies in the input"),
        ("legacy", "base/native", "base", "lies in the input"),
        ("absent", "native", "base", "there is no such folder"),
        ("legacy/adapter_config.json", "native", "base", "there is no such folder"),
        ("base", "native", "base", "has no adapter_config.json"),
        ("legacy", "native", "absent/base/x", "there is no such model folder"),
        ("legacy", "native", "legacy", "has no config.json"),
        ("legacy", "native", "llama", "is a llama. Give the ChatGLM2 or ChatGLM3"),
        ("legacy", "native", "glm-nano", "adapter of another base"),
    ],
)
def test_import_adapter_refuses_what_does_not_fit(
    tmp_path: Path, chatglm: Path, monkeypatch: pytest.MonkeyPatch, source: str, out: str, base: str, says: str
) -> None:
    write_legacy(tmp_path / "legacy", legacy_weights())
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LlmClfError, match=says):
        import_adapter(source, out, base=base)
    assert sorted(tmp_path.rglob("*")) == before
