"""Original ChatGLM folders as a user meets them: broken ones, imports, the way from rows to metrics, few bits.

What the weights and tokens are compared with in the end, the numbers of ChatGLM's own code, is in test_chatglm.py.
"""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import CHATGLM_SIZES, SHORT_TASK, SMALL_SENTENCEPIECE, chatglm_weights, save_chatglm
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_bad_input import CSV, FAST, SETTINGS, Place, refused, snapshot

import llm_clf
from llm_clf.commands import chat as chatting
from llm_clf.commands import import_chatglm as importing
from llm_clf.config import ModelSettings
from llm_clf.decisions.predictions import read_predictions
from llm_clf.engine.generation import TextGenerator
from llm_clf.errors import ArtifactError
from llm_clf.models.bases import base_config, load_model, load_tokenizer
from llm_clf.models.chatglm.weights import native_weights
from llm_clf.models.quantization import require_loaded

MakeChatglm = Callable[..., Path]
CPU = torch.device("cpu")
LAYER = "transformer.encoder.layers"
PAPERS = Path(__file__).resolve().parent.parent / "data" / "papers.csv"
# Anything that runs code of the folder leaves this file.
TRACE = "code-of-the-folder-ran"
CODE = f"open({TRACE!r}, 'w').close()\n"
# The tests make ids by SentencePiece itself and the numbers that follow its pieces, not by what they test.
PIECES = SentencePieceProcessor(model_file=str(SMALL_SENTENCEPIECE))
GMASK, SOP = PIECES.get_piece_size() + 1, PIECES.get_piece_size() + 3
USER, ASSISTANT = PIECES.get_piece_size() + 6, PIECES.get_piece_size() + 7


def load(folder: Path, **settings: Any) -> Any:
    return load_model(ModelSettings(name=str(folder), **settings), dtype="fp32", device=CPU)


def legacy_adapter(folder: Path, sizes: dict[str, int], rank: int = 4) -> None:
    """Write an adapter of the joint weights as PEFT did on the original code."""
    rows = (sizes["num_attention_heads"] + 2 * sizes["multi_query_group_num"]) * sizes["kv_channels"]
    draw = torch.Generator().manual_seed(5)
    weights = {
        f"base_model.model.{LAYER}.{number}.self_attention.query_key_value.lora_{part}.weight": (
            torch.randn(shape, generator=draw) * 0.3
        )
        for number in range(sizes["num_layers"])
        for part, shape in (("A", (rank, sizes["hidden_size"])), ("B", (rows, rank)))
    }
    folder.mkdir()
    torch.save(weights, folder / "adapter_model.bin")
    config = {
        "base_model_name_or_path": "THUDM/chatglm2-6b",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": ["query_key_value"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_chatglm: MakeChatglm) -> Path:
    """Make a base with code in it, rows, prompts, a run, its adapter, an adapter of former years; tests get copies."""
    folder = tmp_path_factory.mktemp("chatglm")
    words = {"1": ["heart", "lung", "fever", "dose"], "0": ["steel", "star", "court", "bridge"]}
    lines = [f"r{i},{words[str(i % 2)][i // 2 % 4]},text {i},{i % 2}\n" for i in range(24)]
    (folder / "many.csv").write_text("uuid,title,abstract,label\n" + "".join(lines))
    (folder / "rows.csv").write_text(CSV)
    (folder / "task.yaml").write_text(SHORT_TASK)
    shutil.copytree(make_chatglm(), folder / "base")
    for name in ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py"):
        (folder / "base" / name).write_text(CODE)
    legacy_adapter(folder / "legacy", CHATGLM_SIZES)
    with contextlib.chdir(folder):
        llm_clf.build_prompts(["many.csv"], task="task.yaml", out="prompts", split="0.5,0.25,0.25")
        llm_clf.finetune("prompts", out="run", model="base", set=FAST)
    shutil.copytree(folder / "run" / "adapter", folder / "adapter")
    assert not (folder / TRACE).exists()
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    folder = tmp_path / "place"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return Place(folder, monkeypatch, capsys)


def done(place: Place, *words: object) -> tuple[str, str]:
    """Run a command that must succeed; return what it wrote to standard output and standard error."""
    code, out, err = place.command(*words)
    assert code == 0, err
    return out, err


# --- broken folders ---------------------------------------------------------------------------------------------------

Damage = Callable[[Path], None]
Register = Callable[[Damage], Damage]
FP32 = ("--set", "model.dtype=fp32")
FINETUNE = ("finetune", "prompts", "--model", "base", "--out", "new", *SETTINGS)
PREDICT = ("predict", "adapter", "rows.csv", "--task", "task.yaml", "--model", "base", "--out", "new.csv", *FP32)
CHAT = ("chat", "--model", "base", "--once", "hi", *FP32)
IMPORT = ("import-chatglm", "base", "new")
DOCTOR = ("doctor", "--model", "base")
DOCTOR_WITH_ROWS = (*DOCTOR, "--data", "prompts")
READ_WEIGHTS = (FINETUNE, PREDICT, CHAT, IMPORT)
KINDS: dict[str, tuple[Damage, tuple[tuple[str, ...], ...], tuple[str, ...]]] = {}


def kind(name: str, *telling: str, commands: tuple[tuple[str, ...], ...] = READ_WEIGHTS) -> Register:
    """Register a kind of broken folder: a function that breaks it, the commands that meet it, what they must say."""

    def register(damage: Damage) -> Damage:
        assert name not in KINDS
        KINDS[name] = (damage, commands, telling)
        return damage

    return register


def config_kind(name: str, *telling: str) -> Register:
    return kind(name, *telling, commands=(*READ_WEIGHTS, DOCTOR))


def tokenizer_kind(name: str, *telling: str) -> Register:
    return kind(name, *telling, commands=(*READ_WEIGHTS, DOCTOR_WITH_ROWS))


def read_shards(base: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(file, weights_only=True) for file in sorted(base.glob("*.bin"))]


def as_safetensors(base: Path) -> None:
    save_chatglm(base, read_shards(base), "safetensors")


def edit_config(base: Path, **changes: object) -> None:
    config = json.loads((base / "config.json").read_text()) | changes
    (base / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_index(base: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = base / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    edit(content["weight_map"])
    index.write_text(json.dumps(content))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def point(file: Path) -> None:
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234567\n")


@kind(
    "a shard that is missing",
    "base: 1 of 3 files of weights are missing: pytorch_model-00002-of-00003.bin",
    "Copy them from where the others came",
)
def _(base: Path) -> None:
    (base / "pytorch_model-00002-of-00003.bin").unlink()


@kind("no weights", "base: holds no weights; expected model.safetensors or pytorch_model.bin", "Copy the whole")
def _(base: Path) -> None:
    save_chatglm(base, [])
    (base / "pytorch_model.bin.index.json").unlink()


@kind("a shard that is cut short", "base/pytorch_model-00003-of-00003.bin: is cut short or damaged", "Copy it")
def _(base: Path) -> None:
    cut(base / "pytorch_model-00003-of-00003.bin")


@kind(
    "a safetensors shard that is cut short",
    "base/model-00001-of-00003.safetensors: is cut short or damaged",
    "Copy it again",
)
def _(base: Path) -> None:
    as_safetensors(base)
    cut(base / "model-00001-of-00003.safetensors")


@kind(
    "a shard of an early torch that is cut short",
    "base/pytorch_model-00002-of-00003.bin: is cut short",
    "Copy it again",
)
def _(base: Path) -> None:
    file = base / "pytorch_model-00002-of-00003.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    cut(file)


@kind("a shard that stands in Git LFS", "base/pytorch_model-00001-of-00003.bin: is a Git LFS pointer", "git lfs pull")
def _(base: Path) -> None:
    point(base / "pytorch_model-00001-of-00003.bin")


@kind(
    "a safetensors shard that stands in Git LFS", "base/model-00002-of-00003.safetensors: is a Git LFS", "git lfs pull"
)
def _(base: Path) -> None:
    as_safetensors(base)
    point(base / "model-00002-of-00003.safetensors")


@kind("an index that stands in Git LFS", "base/pytorch_model.bin.index.json: is a Git LFS pointer", "git lfs")
def _(base: Path) -> None:
    point(base / "pytorch_model.bin.index.json")


@kind("an index without a map", "base/pytorch_model.bin.index.json: has no weight_map", "Copy it again")
def _(base: Path) -> None:
    (base / "pytorch_model.bin.index.json").write_text('{"metadata": {"total_size": 1}}')


@kind("an index that is no JSON", "base/pytorch_model.bin.index.json: cannot be read")
def _(base: Path) -> None:
    cut(base / "pytorch_model.bin.index.json")


@kind(
    "an index that names what its file lacks",
    "base/pytorch_model-00001-of-00003.bin: lacks 1 weights that "
    "the index places there, first transformer.output_layer.weight",
    "from one place",
)
def _(base: Path) -> None:
    edit_index(base, lambda places: places.update({"transformer.output_layer.weight": min(places.values())}))


@kind(
    "an index that leads out of the folder",
    "base/pytorch_model.bin.index.json: places transformer.output_layer.weight in '../x.bin'",
    "file of the same folder",
)
def _(base: Path) -> None:
    shutil.copy(base / "pytorch_model-00003-of-00003.bin", base.parent / "x.bin")
    edit_index(base, lambda places: places.update({"transformer.output_layer.weight": "../x.bin"}))


@kind(
    "an index that names a whole path",
    "base/pytorch_model.bin.index.json: places",
    "/etc/passwd.bin'; expected a .bin or .safetensors file of the same folder",
)
def _(base: Path) -> None:
    edit_index(base, lambda places: places.update({"transformer.output_layer.weight": "/etc/passwd.bin"}))


@kind(
    "an unknown key",
    "base/pytorch_model-00001-of-00001.bin: transformer.encoder.layers.0.mlp.router.weight "
    "is no weight of a ChatGLM2 or ChatGLM3 with this config",
    "Copy the whole folder",
)
def _(base: Path) -> None:
    save_chatglm(base, [chatglm_weights(CHATGLM_SIZES) | {f"{LAYER}.0.mlp.router.weight": torch.ones(2, 2)}])


@kind("biases that the config says are not there", "query_key_value.bias is no weight of a ChatGLM2 or")
def _(base: Path) -> None:
    edit_config(base, add_qkv_bias=False)


@kind(
    "a missing key",
    "base: 1 of 25 weights are missing, first transformer.encoder.layers.1.mlp.dense_4h_to_h.weight",
    "Copy the whole folder again",
)
def _(base: Path) -> None:
    weights = chatglm_weights(CHATGLM_SIZES)
    del weights[f"{LAYER}.1.mlp.dense_4h_to_h.weight"]
    save_chatglm(base, [weights])


@kind(
    "a missing joint weight",
    "base: 3 of 25 weights are missing, first transformer.encoder.layers.0.self_attention.query_key_value.weight",
)
def _(base: Path) -> None:
    weights = chatglm_weights(CHATGLM_SIZES)
    del weights[f"{LAYER}.0.self_attention.query_key_value.weight"]
    save_chatglm(base, [weights])


def reshaped(base: Path, key: str, *shape: int) -> None:
    save_chatglm(base, [chatglm_weights(CHATGLM_SIZES) | {key: torch.ones(shape)}])


@kind(
    "a weight of another shape",
    "pytorch_model-00001-of-00001.bin: transformer.encoder.layers.1.mlp.dense_h_to_4h.weight",
    "the shape (190, 64); config.json makes it (192, 64)",
    "must come from one model",
)
def _(base: Path) -> None:
    reshaped(base, f"{LAYER}.1.mlp.dense_h_to_4h.weight", 190, 64)


@kind(
    "an embedding of another vocabulary",
    "word_embeddings.weight gives model.embed_tokens.weight the shape (3000, 64); config.json makes it (3072, 64)",
)
def _(base: Path) -> None:
    reshaped(base, "transformer.embedding.word_embeddings.weight", 3000, 64)


@kind(
    "a joint weight with other rows",
    "query_key_value.weight has the shape (120, 64); config.json makes it 128 rows",
    "must come from one model",
)
def _(base: Path) -> None:
    reshaped(base, f"{LAYER}.0.self_attention.query_key_value.weight", 120, 64)


@kind(
    "a joint weight with other columns",
    "query_key_value.weight gives model.layers.0.self_attn.q_proj.weight"
    " the shape (64, 63); config.json makes it (64, 64)",
)
def _(base: Path) -> None:
    reshaped(base, f"{LAYER}.0.self_attention.query_key_value.weight", 128, 63)


@kind("a joint weight that is a number", "query_key_value.bias has the shape (); config.json makes it 128 rows")
def _(base: Path) -> None:
    reshaped(base, f"{LAYER}.1.self_attention.query_key_value.bias")


@kind(
    "a key in two shards",
    "base: transformer.encoder.final_layernorm.weight stands in pytorch_model-00001-of-"
    "00002.bin and again in pytorch_model-00002-of-00002.bin",
    "Remove one",
)
def _(base: Path) -> None:
    name = "transformer.encoder.final_layernorm.weight"
    save_chatglm(base, [chatglm_weights(CHATGLM_SIZES), {name: torch.ones(64)}])


@kind(
    "one layer more than the config says",
    "pytorch_model-00001-of-00001.bin: transformer.encoder.layers.2.",
    "is one layer more than config.json (num_layers) says",
    "Copy both again",
)
def _(base: Path) -> None:
    save_chatglm(base, [chatglm_weights(CHATGLM_SIZES | {"num_layers": 3})])


def quantise_beforehand(base: Path, bits: int) -> None:
    """Make of the folder what its authors published as int8 or int4: bytes, with a scale for each row."""
    weights: dict[str, torch.Tensor] = {}
    for key, weight in chatglm_weights(CHATGLM_SIZES, dtype=torch.float16).items():
        if "layers" in key and weight.ndim == 2:
            weights[key] = torch.ones(weight.shape[0], weight.shape[1] * bits // 8, dtype=torch.int8)
            weights[f"{key}_scale"] = torch.ones(weight.shape[0], dtype=torch.float16)
        else:
            weights[key] = weight
    save_chatglm(base, [weights])


@kind(
    "bytes that hold two weights of 4 bits",
    "transformer.encoder.layers.0.self_attention.query_key_value.weight holds int8, so it was quantised beforehand",
    "Give the half-precision checkpoint, and set model.quantization",
)
def _(base: Path) -> None:
    quantise_beforehand(base, 4)


@kind(
    "bytes that hold a weight of 8 bits",
    "query_key_value.weight holds int8, so it was quantised beforehand",
    "model.quantization",
)
def _(base: Path) -> None:
    quantise_beforehand(base, 8)


@kind(
    "scales of weights that were quantised",
    "query_key_value.weight_scale is a scale of weights that were quantised beforehand",
    "Give the half-precision checkpoint, and set model.quantization",
)
def _(base: Path) -> None:
    quantise_beforehand(base, 4)
    (weights,) = read_shards(base)
    # In safetensors the order is not that of the network.
    save_chatglm(base, [dict(sorted(weights.items(), key=lambda item: not item[0].endswith("_scale")))])


@kind(
    "a prefix of P-tuning",
    "transformer.prefix_encoder.embedding.weight is a P-tuning prefix, which is no LoRA adapter",
    "Give the base alone, and fine-tune it anew",
)
def _(base: Path) -> None:
    save_chatglm(base, [{"transformer.prefix_encoder.embedding.weight": torch.ones(8, 64)}])


@kind(
    "weights of version 1",
    "transformer.word_embeddings.weight is a weight of ChatGLM-6B version 1",
    "Give ChatGLM2-6B or ChatGLM3-6B",
)
def _(base: Path) -> None:
    save_chatglm(base, [{"transformer.word_embeddings.weight": torch.ones(3072, 64)}])


class Code:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return (exec, (CODE,))


HARMFUL = (
    "pytorch_model-00001-of-00003.bin: holds something other than tensors",
    "could be code",
    "Give the file that the model's authors published",
)


@kind("a shard with code in it", *HARMFUL)
def _(base: Path) -> None:
    torch.save({"transformer.output_layer.weight": Code()}, base / "pytorch_model-00001-of-00003.bin")


@kind("a shard of an early torch with code in it", *HARMFUL)
def _(base: Path) -> None:
    file = base / "pytorch_model-00001-of-00003.bin"
    torch.save({"transformer.output_layer.weight": Code()}, file, _use_new_zipfile_serialization=False)


@kind("a shard that is a pickle with code in it", *HARMFUL)
def _(base: Path) -> None:
    (base / "pytorch_model-00001-of-00003.bin").write_bytes(pickle.dumps(Code(), protocol=2))


@kind("a safetensors shard that is a pickle", "model-00001-of-00003.safetensors: is cut short or damaged")
def _(base: Path) -> None:
    as_safetensors(base)
    (base / "model-00001-of-00003.safetensors").write_bytes(pickle.dumps(Code(), protocol=2))


@kind("a shard that is a page of the web", "pytorch_model-00001-of-00003.bin: holds something other than")
def _(base: Path) -> None:
    (base / "pytorch_model-00001-of-00003.bin").write_text("<!DOCTYPE html><title>404</title>")


@kind("a shard that holds no tensors", "pytorch_model-00001-of-00003.bin: holds something other than tensors by")
def _(base: Path) -> None:
    torch.save({"model": {"transformer.output_layer.weight": torch.ones(1)}}, base / "pytorch_model-00001-of-00003.bin")


@config_kind(
    "a size that is a string",
    "base: this ChatGLM cannot be used. num_layers is '2', and must be a whole number above 0",
)
def _(base: Path) -> None:
    edit_config(base, num_layers="2")


@config_kind(
    "many faults in the config",
    "padded_vocab_size is '3072'",
    "kv_channels is 0",
    "layernorm_epsilon is '1e-5', and must be a number above 0",
    "rope_ratio is '8', and must be a number above 0",
    "attention_dropout is 1",
    "add_qkv_bias is 'true', and must be true or false",
    "torch_dtype is 'float8', and must be one of float32",
    "add_bias_linear true: biases in all linear layers; Glm has no such network",
    "hidden_dropout 0.1: Glm has none. Set it to 0 in config.json",
)
def _(base: Path) -> None:
    edit_config(base, padded_vocab_size="3072", kv_channels=0, layernorm_epsilon="1e-5", rope_ratio="8")
    edit_config(base, attention_dropout=1, add_qkv_bias="true", torch_dtype="float8", add_bias_linear=True)
    edit_config(base, hidden_dropout=0.1)


@config_kind(
    "a checkpoint that is quantised by its config",
    "quantization_bit 4: its weights were quantised beforehand",
    "Give the half-precision checkpoint, and set model.quantization to 4bit",
)
def _(base: Path) -> None:
    edit_config(base, quantization_bit=4)


@config_kind(
    "a prefix of P-tuning by the config",
    "pre_seq_len 128: it holds a P-tuning prefix, which is no LoRA",
    "Give the base alone (pre_seq_len null), and fine-tune it anew",
)
def _(base: Path) -> None:
    edit_config(base, pre_seq_len=128)


VERSION_1 = ("base: this ChatGLM cannot be used. It is ChatGLM-6B of version 1", "Give ChatGLM2-6B or ChatGLM3-6B")


@config_kind("version 1 by its positions", *VERSION_1)
def _(base: Path) -> None:
    edit_config(base, position_encoding_2d=True)


@config_kind("version 1 by its inner size", *VERSION_1)
def _(base: Path) -> None:
    edit_config(base, inner_hidden_size=16384, num_layers="28")


@config_kind("version 1 by its vocabulary", *VERSION_1)
def _(base: Path) -> None:
    edit_config(base, vocab_size=130528)
    (base / "tokenizer.model").rename(base / "ice_text.model")


@config_kind("a GLM-4", "It is a GLM-4, which transformers knows itself", "Give the release whose name ends in -hf")
def _(base: Path) -> None:
    edit_config(base, _name_or_path="THUDM/glm-4-9b-chat", padded_vocab_size=151552, rope_ratio=500)


@config_kind(
    "a name that says neither family",
    "base: neither config.json (_name_or_path), tokenizer_config.json (name_or_path) nor the folder's name says",
    "Set model.family to chatglm2 or chatglm3 (--set model.family=chatglm2)",
)
def _(base: Path) -> None:
    edit_config(base, _name_or_path="/models/autodl-tmp/checkpoint-500")
    (base / "tokenizer_config.json").write_text("[]")


@tokenizer_kind("no tokenizer", "base: needs tokenizer.model; found none", "Copy it from the same place as the weights")
def _(base: Path) -> None:
    (base / "tokenizer.model").unlink()


@tokenizer_kind(
    "the tokenizer of version 1",
    "base: needs tokenizer.model; found ice_text.model, so it is a ChatGLM-6B of version 1",
)
def _(base: Path) -> None:
    (base / "tokenizer.model").rename(base / "ice_text.model")


@tokenizer_kind("a tokenizer that is garbage", "base/tokenizer.model: is no SentencePiece model, or damaged", "Copy it")
def _(base: Path) -> None:
    (base / "tokenizer.model").write_bytes(bytes(range(256)) * 20)


@tokenizer_kind("a tokenizer that is cut short", "base/tokenizer.model: is no SentencePiece model, or damaged")
def _(base: Path) -> None:
    cut(base / "tokenizer.model")


@tokenizer_kind("a tokenizer that stands in Git LFS", "base/tokenizer.model: is a Git LFS pointer", "git lfs pull")
def _(base: Path) -> None:
    point(base / "tokenizer.model")


@tokenizer_kind(
    "a tokenizer of another kind",
    "base/tokenizer.model: is not of ChatGLM's kind",
    "bytes as pieces",
    "Give the tokenizer.model that belongs to the weights",
)
def _(base: Path) -> None:
    with open(base / "tokenizer.model", "wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(CSV.split()), model_writer=model, vocab_size=60, minloglevel=2, num_threads=1
        )


@tokenizer_kind(
    "more tokens than the vocabulary",
    "base: tokenizer.model makes 3005 tokens; config.json (padded_vocab_size) has room for 3001",
    "Give the tokenizer that belongs to the weights",
)
def _(base: Path) -> None:
    edit_config(base, padded_vocab_size=3001)
    save_chatglm(base, [chatglm_weights(CHATGLM_SIZES | {"padded_vocab_size": 3001})])


@pytest.mark.parametrize(("damage", "commands", "telling"), KINDS.values(), ids=KINDS.keys())
def test_broken_folders_are_refused_with_what_to_do(
    place: Place, damage: Damage, commands: tuple[tuple[str, ...], ...], telling: tuple[str, ...]
) -> None:
    damage(place.path("base"))
    for words in commands:
        refused(place, words, *telling)
    assert not place.path(TRACE).exists()


def test_family_that_no_name_says_is_a_setting(place: Place) -> None:
    edit_config(place.path("base"), _name_or_path="", rope_ratio=4)
    family = ("--set", "model.family=chatglm2")
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    done(place, *FINETUNE, *family)
    settings = yaml.safe_load(place.path("new/config.yaml").read_text())["model"]
    assert settings["family"] == "chatglm2" and settings["rope_ratio"] == "linear"
    # The run knows it; a bare adapter must be told.
    done(place, "predict", "new", "rows.csv", "--out", "run.csv", "--set", "predict.merge=false")
    refused(place, ("predict", "new/adapter", *PREDICT[2:]), "Set model.family")
    done(place, "predict", "new/adapter", *PREDICT[2:], *family)
    assert place.path("run.csv").read_bytes() == place.path("new.csv").read_bytes()
    done(place, "import-chatglm", "base", "native", *family)
    assert json.loads(place.path("native/config.json").read_text())["rope_parameters"] == rope
    done(place, *CHAT, *family)
    done(place, *DOCTOR, *family)
    # The name of the folder says it too.
    place.path("base").rename(place.path("my-chatglm3"))
    done(place, "import-chatglm", "my-chatglm3", "native3")
    assert json.loads(place.path("native3/config.json").read_text())["rope_parameters"]["rope_theta"] == 40000.0


def test_safetensors_that_are_not_whole_give_way_to_bin(place: Place) -> None:
    original = load(place.path("base")).state_dict()
    index = json.dumps({"weight_map": {"transformer.output_layer.weight": "model-00001-of-00002.safetensors"}})
    place.write("base/model.safetensors.index.json", index)
    found = load(place.path("base")).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_one_file_without_an_index(make_chatglm: MakeChatglm, tmp_path: Path, form: str) -> None:
    shutil.copytree(make_chatglm(form=form, shards=1), tmp_path / "one")
    (index,) = (tmp_path / "one").glob("*.index.json")
    index.unlink()
    (weights,) = (tmp_path / "one").glob(f"*.{form}")
    weights.rename(tmp_path / "one" / ("pytorch_model.bin" if form == "bin" else "model.safetensors"))
    found, expected = load(tmp_path / "one").state_dict(), load(make_chatglm()).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("form", "both"), [("bin", False), ("safetensors", False), ("safetensors", True)])
def test_of_a_folder_on_the_hub_only_what_is_needed_is_fetched(
    place: Place, make_chatglm: MakeChatglm, monkeypatch: pytest.MonkeyPatch, form: str, both: bool
) -> None:
    hub, cache = place.path("hub"), place.path("cache/snapshots/0123abcd")
    shutil.copytree(make_chatglm(form=form), hub)
    if both:
        shutil.copytree(make_chatglm(form="bin"), hub, dirs_exist_ok=True)

    def fetch(name: str, allow_patterns: list[str], revision: str = "main") -> str:
        assert name == "THUDM/chatglm2-6b" and revision in ("main", cache.name)
        cache.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for file in hub.glob(pattern):
                shutil.copy(file, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: f"{fetch(name, [file])}/{file}")
    done(place, "doctor", "--model", "THUDM/chatglm2-6b", "--data", "prompts")
    small = {file.name for file in hub.iterdir() if file.suffix in (".json", ".model")}
    assert {file.name for file in cache.iterdir()} == small
    done(place, "predict", "adapter", *(word if word != "base" else "THUDM/chatglm2-6b" for word in PREDICT[2:]))
    assert {file.name for file in cache.iterdir()} == small | {file.name for file in hub.glob(f"*.{form}")}
    done(place, *PREDICT[:-3], "local.csv", *FP32)
    assert place.path("local.csv").read_bytes() == place.path("new.csv").read_bytes()


@pytest.mark.parametrize("kind", ["native", "legacy"])
def test_an_adapter_of_another_base_is_refused(place: Place, make_chatglm: MakeChatglm, kind: str) -> None:
    adapter = "adapter" if kind == "native" else "legacy"
    deeper, wider = make_chatglm(num_layers=3), make_chatglm(hidden_size=96)
    third = make_chatglm("chatglm3")
    cases = [(wider, "size mismatch" if kind == "native" else "adapter of another base")]
    if kind == "native":
        cases += [(deeper, "no counterpart"), (third, "another tokenizer than that of the base")]
    else:
        # An adapter of some layers is one of a deeper base too; of a less deep one it is not.
        shallow = make_chatglm(num_layers=1)
        cases += [(shallow, "and the base has 1 layers (0 to 0): this is an adapter of another base")]
    for base, telling in cases:
        words = [str(base) if word == "base" else word for word in PREDICT]
        refused(place, ("predict", adapter, *words[2:]), telling, adapter)
        refused(place, ("chat", adapter, "--model", base, "--once", "hi", *FP32), telling, adapter)


# --- import-chatglm ---------------------------------------------------------------------------------------------------

# Of texts with what tokenizers stumble over; the special names in them are text.
TEXTS = [
    "Heart attack in 2023: a trial",
    "你好，世界",
    "  two  spaces\n\n\ttab ",
    "[gMASK] sop eop </s> neoplasm",
    "",
    "é😀",
]
IDS = [[GMASK, SOP, *range(5, 45)], [GMASK, SOP, *range(900, 940)]]
# Nothing of llm_clf can be imported there: the folder must do alone.
WITHOUT_US = """\
import json, sys, warnings
sys.modules["llm_clf"] = None
warnings.simplefilter("error")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

given = json.load(sys.stdin)
for folder, out in given["folders"]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(torch.tensor(given["ids"])).logits
    torch.save({"logits": logits, "dtype": str(AutoModelForCausalLM.from_pretrained(folder).dtype),
                "ends": GenerationConfig.from_pretrained(folder).eos_token_id,
                "tokens": [tokenizer(text)["input_ids"] for text in given["texts"]],
                "prompt": tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False,
                                                        add_generation_prompt=True)}, out)
"""
KINDS_OF_WEIGHTS = [
    ("chatglm2", "bin", torch.float32),
    ("chatglm2", "bin", torch.float16),
    ("chatglm3", "safetensors", torch.bfloat16),
]


def test_imported_folders_load_without_this_package(make_chatglm: MakeChatglm, tmp_path: Path) -> None:
    folders = []
    for number, (family, form, dtype) in enumerate(KINDS_OF_WEIGHTS):
        llm_clf.import_chatglm(make_chatglm(family, form=form, dtype=dtype), tmp_path / str(number))
        folders.append((str(tmp_path / str(number)), str(tmp_path / f"{number}.pt")))
    subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_US],
        input=json.dumps({"folders": folders, "ids": IDS, "texts": TEXTS}),
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        text=True,
        check=True,
        cwd=tmp_path,
    )
    for (family, form, dtype), (_, out) in zip(KINDS_OF_WEIGHTS, folders, strict=True):
        original = make_chatglm(family, form=form, dtype=dtype)
        found = torch.load(out, weights_only=True)
        with torch.inference_mode():
            assert torch.equal(found["logits"], load(original)(torch.tensor(IDS)).logits)
        assert found["dtype"] == str(dtype)
        assert found["ends"] == ([2, 3006, 3008] if family == "chatglm3" else 2)
        assert found["tokens"] == [[GMASK, SOP, *PIECES.encode(text)] for text in TEXTS]
        tokenizer = load_tokenizer(ModelSettings(name=str(original)))
        assert found["tokens"] == [tokenizer(text)["input_ids"] for text in TEXTS]
        assert found["prompt"] == {
            "chatglm2": "[Round 1]\n\n问：x\n\n答：",
            "chatglm3": "[gMASK]sop<|user|>\n x<|assistant|>",
        }.get(family)


@pytest.mark.parametrize(("family", "form", "dtype"), KINDS_OF_WEIGHTS)
def test_import_keeps_numbers_and_types(
    make_chatglm: MakeChatglm, tmp_path: Path, family: str, form: str, dtype: torch.dtype
) -> None:
    llm_clf.import_chatglm(make_chatglm(family, form=form, dtype=dtype), tmp_path / "native")
    made: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "native").glob("*.safetensors")):
        made |= load_file(file)
    assert {tensor.dtype for tensor in made.values()} == {dtype}
    index = json.loads((tmp_path / "native" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == made.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in made.values())
    given = chatglm_weights(CHATGLM_SIZES, dtype=dtype)
    joined = {
        "transformer.embedding.word_embeddings.weight": made.pop("model.embed_tokens.weight"),
        "transformer.encoder.final_layernorm.weight": made.pop("model.norm.weight"),
        "transformer.output_layer.weight": made.pop("lm_head.weight"),
    }
    for number in range(CHATGLM_SIZES["num_layers"]):
        layer, native = f"{LAYER}.{number}", f"model.layers.{number}"
        for part in ("weight", "bias"):
            three = [made.pop(f"{native}.self_attn.{letter}_proj.{part}") for letter in "qkv"]
            joined[f"{layer}.self_attention.query_key_value.{part}"] = torch.cat(three)
        joined |= {
            f"{layer}.self_attention.dense.weight": made.pop(f"{native}.self_attn.o_proj.weight"),
            f"{layer}.mlp.dense_h_to_4h.weight": made.pop(f"{native}.mlp.gate_up_proj.weight"),
            f"{layer}.mlp.dense_4h_to_h.weight": made.pop(f"{native}.mlp.down_proj.weight"),
            f"{layer}.input_layernorm.weight": made.pop(f"{native}.input_layernorm.weight"),
            f"{layer}.post_attention_layernorm.weight": made.pop(f"{native}.post_attention_layernorm.weight"),
        }
    del given["transformer.rotary_pos_emb.inv_freq"]
    assert not made and joined.keys() == given.keys()
    assert all(torch.equal(joined[key], given[key]) for key in given)


TOKENIZER_FILES = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
WEIGHTS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
WEIGHTS_FILES = ["config.json", "generation_config.json", *WEIGHTS, "model.safetensors.index.json"]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_import_of_one_half(place: Place) -> None:
    assert "base/tokenizer.model" in snapshot(place.folder)
    done(place, *IMPORT, "--only", "tokenizer")
    assert names(place.path("new")) == TOKENIZER_FILES
    place.path("base/tokenizer.model").rename(place.path("base/away"))
    done(place, "import-chatglm", "base", "weights", "--only", "weights")
    assert names(place.path("weights")) == WEIGHTS_FILES
    shutil.copytree(place.path("new"), place.path("weights"), dirs_exist_ok=True)
    place.path("base/away").rename(place.path("base/tokenizer.model"))
    done(place, "import-chatglm", "base", "both", "--only", "all")
    assert snapshot(place.path("weights")) == snapshot(place.path("both"))
    for file in place.path("base").glob("*.bin"):
        file.unlink()
    done(place, "import-chatglm", "base", "again", "--only", "tokenizer")
    assert snapshot(place.path("again")) == snapshot(place.path("new"))


def test_words_of_import_that_are_wrong(place: Place) -> None:
    refused(place, (*IMPORT, "--only", "half"), "--only 'half': allowed are all, weights, tokenizer")
    refused(place, (*IMPORT, "--set", "model.family=llama"), "model.family", "chatglm2")
    refused(place, (*IMPORT, "--set", "lora.r=4"), "an import heeds model.family and model.rope_ratio only")
    refused(place, ("import-chatglm", "nowhere", "new"), "nowhere: is no original ChatGLM folder", "found none")
    refused(place, ("import-chatglm", "adapter", "new"), "adapter: is no original ChatGLM folder", "found none")
    done(place, *IMPORT, "--only", "weights")
    refused(place, ("import-chatglm", "new", "newer"), "is no original ChatGLM folder", "found one of another model")
    point(place.path("base/config.json"))
    refused(place, ("import-chatglm", "base", "newer"), "is no original ChatGLM folder", "or damaged")


def test_import_into_or_around_its_source_is_refused(place: Place) -> None:
    for out in ("base", "base/native", "."):
        refused(place, ("import-chatglm", "base", out, "--overwrite"), "--out")


@pytest.mark.parametrize("name", ["007", "a: b #c", "no", "[x]"])
def test_folder_whose_name_yaml_would_read_as_something_else(place: Place, name: str) -> None:
    place.path("base").rename(place.path(name))
    done(place, "import-chatglm", name, "new", "--only", "tokenizer")


def test_a_place_that_is_taken(place: Place) -> None:
    taken = place.write("new/notes.txt", "mine").parent
    refused(place, IMPORT, "new: something is already there", "--overwrite")
    refused(place, (*IMPORT, "--resume"), "new: something is already there", "--overwrite")
    refused(place, (*IMPORT, "--overwrite"), "new: is no model folder, so --overwrite leaves it alone")
    (taken / "notes.txt").unlink()
    refused(place, (*IMPORT, "--resume"), "new: something is already there")
    done(place, *IMPORT, "--overwrite", "--only", "tokenizer")
    refused(place, (*IMPORT, "--resume"), "new: something is already there")
    _, err = done(place, *IMPORT, "--resume", "--only", "tokenizer")
    assert err == "new is finished; nothing to do.\n"
    done(place, *IMPORT, "--overwrite")
    before = snapshot(place.folder)
    _, err = done(place, *IMPORT, "--resume")
    assert err == "new is finished; nothing to do.\n" and snapshot(place.folder) == before
    refused(place, IMPORT, "new: something is already there")
    place.write("new/old.safetensors", "of the former model")
    done(place, *IMPORT, "--overwrite")
    assert snapshot(place.folder) == before


@pytest.fixture
def whole(place: Place) -> dict[str, bytes | None]:
    """Return the content of an import that nothing interrupted."""
    done(place, "import-chatglm", "base", "whole")
    return snapshot(place.path("whole"))


def interrupt(place: Place, files: int, *words: str) -> None:
    """Import, and press Ctrl-C when so many files of weights are written."""
    write = importing._write_shard
    written: list[Path] = []

    def write_some(file: Path, tensors: Any) -> None:
        if len(written) == files:
            raise KeyboardInterrupt
        write(file, tensors)
        written.append(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importing, "_write_shard", write_some)
        code, out, err = place.command(*(words or IMPORT))
    assert code == 130 and out == "" and "--resume goes on" in err
    assert not place.path("new").exists() and len(list(place.path("new.partial").glob("*.safetensors"))) == files


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("*.safetensors")}


def test_an_interrupted_import_goes_on(place: Place, whole: dict[str, bytes | None]) -> None:
    interrupt(place, 2)
    written = identities(place.path("new.partial"))
    refused(
        place, IMPORT, "new.partial: an interrupted import left this", "--resume goes on", "--overwrite starts anew"
    )
    done(place, *IMPORT, "--resume")
    assert snapshot(place.path("new")) == whole and not place.path("new.partial").exists()
    assert written.items() <= identities(place.path("new")).items()


def test_overwrite_starts_an_interrupted_import_anew(place: Place, whole: dict[str, bytes | None]) -> None:
    interrupt(place, 2)
    written = identities(place.path("new.partial"))
    place.write("new.partial/rest", "of something")
    done(place, *IMPORT, "--overwrite")
    assert snapshot(place.path("new")) == whole and not place.path("new.partial").exists()
    assert not written.items() & identities(place.path("new")).items()


def test_resume_with_nothing_there_starts_afresh(place: Place, whole: dict[str, bytes | None]) -> None:
    done(place, *IMPORT, "--resume")
    assert snapshot(place.path("new")) == whole


def test_files_that_an_interruption_damaged_are_written_again(place: Place, whole: dict[str, bytes | None]) -> None:
    interrupt(place, 2)
    first, second = (place.path("new.partial") / name for name in WEIGHTS[:2])
    kept = identities(place.path("new.partial"))[second.name]
    cut(first)
    # What a killed process leaves of a file that it was writing, and of one that it had not begun.
    place.write(f"new.partial/.{WEIGHTS[2]}.writing", "half")
    place.write(f"new.partial/{WEIGHTS[2]}", "")
    done(place, *IMPORT, "--resume")
    assert snapshot(place.path("new")) == whole
    assert identities(place.path("new"))[second.name] == kept


@pytest.mark.parametrize("damage", ["a number", "a type", "a name", "a weight less"])
def test_a_file_that_differs_is_written_again(place: Place, whole: dict[str, bytes | None], damage: str) -> None:
    interrupt(place, 2)
    file = place.path("new.partial") / WEIGHTS[1]
    weights = load_file(file)
    name = min(weights)
    tensor = weights.pop(name)
    if damage == "a number":
        tensor.view(-1)[7] += 1e-6
    if damage != "a weight less":
        weights[f"{name}.other" if damage == "a name" else name] = tensor.half() if damage == "a type" else tensor
    save_file(weights, file, metadata={"format": "pt"})
    assert file.read_bytes() != whole[WEIGHTS[1]]
    done(place, *IMPORT, "--resume")
    assert snapshot(place.path("new")) == whole


def test_resume_with_another_source_leaves_nothing_of_the_first(
    place: Place, make_chatglm: MakeChatglm, whole: dict[str, bytes | None]
) -> None:
    other = make_chatglm(shards=2, seed=1)
    interrupt(place, 2)
    done(place, "import-chatglm", other, "new", "--resume")
    done(place, "import-chatglm", other, "other")
    assert snapshot(place.path("new")) == snapshot(place.path("other"))
    assert not set(WEIGHTS) & set(names(place.path("new")))


def test_a_disk_that_is_full_for_the_tokenizer(
    place: Place, whole: dict[str, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    def save(self: Any, folder: str) -> None:
        # As tokenizers raises it.
        raise Exception("No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
        code, out, err = place.command(*IMPORT)
    assert code == 2 and out == "" and "new.partial: cannot be written: No space left on device" in err, err
    assert "Make room on the disk" in err and not place.path("new").exists()
    done(place, *IMPORT, "--resume")
    assert snapshot(place.path("new")) == whole


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["pytorch_model-00002-of-00003.bin", "tokenizer.model"])
def test_a_file_that_may_not_be_read(place: Place, name: str) -> None:
    place.path(f"base/{name}").chmod(0)
    code, out, err = place.command(*IMPORT)
    assert code == 2 and out == "" and f"base/{name}: cannot be read: Permission denied" in err
    assert not place.path("new.partial").exists()


def test_weights_that_the_disk_changed_are_found_in_the_end(
    place: Place, whole: dict[str, bytes | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = importing._write_shard

    def write_wrongly(file: Path, tensors: Any) -> None:
        write(file, tensors)
        if file.name == WEIGHTS[1]:
            content = bytearray(file.read_bytes())
            content[-3] ^= 1
            file.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(importing, "_write_shard", write_wrongly)
        code, out, err = place.command(*IMPORT)
    assert code == 2 and out == ""
    assert f"error: new.partial/{WEIGHTS[1]}: is not what base/pytorch_model-00002-of-00003.bin holds after it" in err
    assert "--resume writes this file again" in err and not place.path("new").exists()
    done(place, *IMPORT, "--resume")
    assert snapshot(place.path("new")) == whole


# --- from rows to metrics ---------------------------------------------------------------------------------------------


def probabilities(file: Path) -> np.ndarray:
    return np.asarray(read_predictions(file).probs)


def test_the_run_says_what_the_folder_left_open(place: Place) -> None:
    settings = yaml.safe_load(place.path("run/config.yaml").read_text())["model"]
    assert {key: settings[key] for key in ("dtype", "quantization", "family", "rope_ratio")} == {
        "dtype": "fp32",
        "quantization": "none",
        "family": "chatglm2",
        "rope_ratio": "linear",
    }
    config = json.loads(place.path("run/adapter/adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
    )


def test_predictions_of_a_run_an_adapter_and_the_imported_base_are_equal(place: Place) -> None:
    # The base was moved since the training; by its content it is the same.
    # In fp32 the run merges its adapter, which a bare one never is.
    done(place, "predict", "run", "rows.csv", "--out", "run.csv", "--model", "base", "--set", "predict.merge=false")
    done(place, *PREDICT)
    done(place, "import-chatglm", "base", "native")
    done(place, *(word if word != "base" else "native" for word in PREDICT[:-3]), "native.csv", *FP32)
    shown, _ = done(place, "evaluate", "run.csv")
    assert "accuracy" in shown
    expected = probabilities(place.path("run.csv"))
    assert np.ptp(expected) > 0.01
    for name in ("new.csv", "native.csv"):
        assert np.array_equal(probabilities(place.path(name)), expected), name
    # The rows of the validation are scored as they were in the training.
    done(place, "predict", "run", "prompts/valid.jsonl", "--out", "valid.parquet", "--model", "base")
    assert np.array_equal(
        probabilities(place.path("valid.parquet")), probabilities(place.path("run/predictions-valid.parquet"))
    )
    edit_config(place.path("base"), layernorm_epsilon=1e-6)
    refused(
        place, ("predict", "run", "rows.csv", "--out", "other.csv", "--model", "base"), "is not the one that the run"
    )


def test_papers_with_a_chatglm3(place: Place, make_chatglm: MakeChatglm) -> None:
    place.write("papers.csv", "\n".join(PAPERS.read_text(encoding="utf-8").splitlines()[:33]) + "\n")
    base = make_chatglm("chatglm3", form="safetensors", dtype=torch.bfloat16, seq_length=160)
    done(place, "build-prompts", "papers.csv", "--task", "medical_paper", "--out", "papers", "--split", "0.5,0.25,0.25")
    settings = ["model.dtype=fp32", "train.epochs=1", "lora.target_modules=[query_key_value]"]
    words = [word for setting in settings for word in ("--set", setting)]
    done(place, "finetune", "papers", "--model", base, "--out", "third", *words)
    resolved = yaml.safe_load(place.path("third/config.yaml").read_text())["model"]
    assert resolved["family"] == "chatglm3" and resolved["rope_ratio"] == "theta"
    adapter = place.path("third/adapter")
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    weights = load_file(adapter / "adapter_model.safetensors")
    assert sorted(targets) == sorted({key.split(".")[-3] for key in weights}) == ["k_proj", "q_proj", "v_proj"]
    assert len(weights) == 2 * 3 * CHATGLM_SIZES["num_layers"]
    done(place, "predict", "third", "papers.csv", "--out", "third.parquet")
    shown, _ = done(place, "evaluate", "third.parquet")
    expected = probabilities(place.path("third.parquet"))
    assert "accuracy" in shown and expected.shape == (32, 2)
    done(place, "import-chatglm", base, "native")
    bare = ("predict", adapter, "papers.csv", "--task", "medical_paper", *FP32)
    done(place, *bare, "--model", base, "--out", "original.parquet")
    done(place, *bare, "--model", "native", "--out", "native.parquet")
    for name in ("original", "native"):
        assert np.array_equal(probabilities(place.path(f"{name}.parquet")), expected), name


def test_adapters_of_former_years_are_used_as_they_are(place: Place) -> None:
    legacy = ("predict", "legacy", *PREDICT[2:])
    done(place, *legacy)
    done(place, "import-adapter", "legacy", "converted", "--base", "base")
    done(place, "predict", "converted", *PREDICT[2:], "--overwrite", "--out", "converted.csv")
    assert place.path("converted.csv").read_bytes() == place.path("new.csv").read_bytes()
    # The update added to the joint weights of the base, by hand; the adapter then changes nothing.
    weights = torch.load(place.path("legacy/adapter_model.bin"), weights_only=True)
    shards = read_shards(place.path("base"))
    for shard in shards:
        for key in shard:
            if f"base_model.model.{key.removesuffix('weight')}lora_A.weight" in weights:
                a, b = (weights[f"base_model.model.{key.removesuffix('weight')}lora_{p}.weight"] for p in "AB")
                shard[key] += 32 / 4 * (b @ a)
    save_chatglm(place.path("base"), shards)
    zeros = {key: weight * 0 for key, weight in weights.items()}
    torch.save(zeros, place.path("legacy/adapter_model.bin"))
    done(place, *legacy, "--overwrite")
    expected = probabilities(place.path("new.csv"))
    assert np.abs(probabilities(place.path("converted.csv")) - expected).max() < 1e-5
    assert np.ptp(expected) > 0.01


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """Return a list that gets the ids of every prompt and answer of a conversation."""
    turns: list[tuple[list[int], list[int]]] = []
    generate = TextGenerator._generate

    def listen(self: TextGenerator, ids: torch.Tensor, mask: torch.Tensor, **extra: Any) -> torch.Tensor:
        written = generate(self, ids, mask, **extra)
        turns.append((ids[0].tolist(), written[0, ids.shape[1] :].tolist()))
        return written

    monkeypatch.setattr(TextGenerator, "_generate", listen)
    monkeypatch.setattr(chatting, "MAX_NEW_TOKENS", 20)
    return turns


def build_prompt(messages: list[dict[str, str]]) -> list[int]:
    """Return the ids of ChatGLM2's own build_prompt and tokenizer; the last message is the question."""
    texts = [message["content"] for message in messages]
    rounds = [
        f"[Round {n}]\n\n问：{q}\n\n答：{a}\n\n"
        for n, (q, a) in enumerate(zip(texts[::2], texts[1::2], strict=False), 1)
    ]
    prompt = "".join([*rounds, f"[Round {len(rounds) + 1}]\n\n问：{texts[-1]}\n\n答："])
    return [GMASK, SOP, *PIECES.encode(prompt)]


def build_chat_input(messages: list[dict[str, str]]) -> list[int]:
    """Return the ids of ChatGLM3's own build_chat_input; the last message is the question."""
    ids = [GMASK, SOP]
    for message in messages:
        ids += [USER if message["role"] == "user" else ASSISTANT]
        ids += PIECES.encode("\n") + PIECES.encode(message["content"])
    return [*ids, ASSISTANT]


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
def test_once_answers_as_greedy_generation_does(
    place: Place, make_chatglm: MakeChatglm, spoken: list[tuple[list[int], list[int]]], family: str
) -> None:
    base = make_chatglm(family)
    out, _ = done(place, "chat", "--model", base, "--once", "你好", *FP32)
    ((prompt, answer),) = spoken
    message = [{"role": "user", "content": "你好"}]
    assert prompt == (build_prompt(message) if family == "chatglm2" else build_chat_input(message))
    ids = torch.tensor([prompt])
    expected = load(base).generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    assert answer == expected[0, len(prompt) :].tolist() and len(answer) == 20
    tokenizer = load_tokenizer(ModelSettings(name=str(base)))
    assert out.rstrip("\n") == tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_a_chatglm3_stops_where_another_would_speak(
    place: Place, make_chatglm: MakeChatglm, spoken: list[tuple[list[int], list[int]]]
) -> None:
    shutil.copytree(make_chatglm("chatglm3"), place.path("third"))
    prompt = build_chat_input([{"role": "user", "content": "hi"}])
    with torch.inference_mode():
        last = load(place.path("third")).model(torch.tensor([prompt])).last_hidden_state[0, -1].clone()
    shards = read_shards(place.path("third"))
    # The role is now the most probable token behind this prompt.
    shards[-1]["transformer.output_layer.weight"][USER] = 10 * last
    save_chatglm(place.path("third"), shards)
    out, _ = done(place, "chat", "--model", "third", "--once", "hi", *FP32)
    assert spoken == [(prompt, [USER])] and out == "\n"


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
def test_conversation_sends_what_the_original_would(
    place: Place, make_chatglm: MakeChatglm, spoken: list[tuple[list[int], list[int]]], family: str
) -> None:
    place.stdin("你好\nWhat of [gMASK] in neoplasms?\nAnd then?\n/save talk.json\n/exit\n".encode())
    done(place, "chat", "--model", make_chatglm(family), *FP32)
    messages = json.loads(place.path("talk.json").read_text(encoding="utf-8"))
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3 and len(spoken) == 3
    build = build_prompt if family == "chatglm2" else build_chat_input
    for turn, (prompt, _) in enumerate(spoken):
        assert prompt == build(messages[: 2 * turn + 1])


@pytest.mark.parametrize("adapter", ["adapter", "legacy"])
def test_chat_with_an_adapter(place: Place, spoken: list[tuple[list[int], list[int]]], adapter: str) -> None:
    plain, _ = done(place, *CHAT)
    first, note = done(place, "chat", adapter, *CHAT[1:])
    assert f"base with the adapter of {adapter}, fp32" in note
    assert spoken[0][0] == spoken[1][0] and (adapter == "adapter" or first != plain)
    if adapter == "legacy":
        done(place, "import-adapter", "legacy", "converted", "--base", "base")
        assert done(place, "chat", "converted", *CHAT[1:])[0] == first
    place.stdin(b"/classify heart\n/base\n/classify heart\n/exit\n")
    shown, _ = done(place, "chat", adapter, "--task", "task.yaml", "--model", "base", *FP32)
    lines = shown.splitlines()
    assert lines[2] == "The adapter is off: this is the base." and lines[:2] != lines[3:]
    done(place, "predict", adapter, place.write("one.csv", "title,abstract\n,heart\n"), *PREDICT[3:])
    probs = probabilities(place.path("new.csv"))[0]
    assert [float(line.split()[-1]) for line in lines[:2]] == pytest.approx(list(probs), abs=1e-4)


# --- few bits, and the check after loading ----------------------------------------------------------------------------

# On a CPU bitsandbytes takes 64 inputs at a time.
FOR_4_BITS: dict[str, Any] = {
    "dtype": torch.float16,
    "spread": 0.1,
    "hidden_size": 128,
    "kv_channels": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 192,
}


@pytest.mark.parametrize(("mode", "least"), [("8bit", 0.999), ("4bit", 0.9)])
def test_quantised_while_loading(make_chatglm: MakeChatglm, mode: str, least: float) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    folder = make_chatglm(**FOR_4_BITS)
    model = load(folder, quantization=mode)
    kind = {"8bit": Linear8bitLt, "4bit": Linear4bit}[mode]
    linears = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert linears == {"lm_head"} | {
        f"model.layers.{number}.{name}"
        for number in range(2)
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        )
    }
    assert {name for name in linears if isinstance(model.get_submodule(name), kind)} == linears - {"lm_head"}
    ids = torch.tensor(IDS)
    with torch.inference_mode():
        expected, found = load(folder)(ids).logits, model(ids).logits
    correlation = float(torch.corrcoef(torch.stack([expected.flatten(), found.float().flatten()]))[0, 1])
    assert least < correlation < 1 - 1e-9


SWAPS = [
    ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"),
    ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
    ("model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"),
    ("model.layers.0.self_attn.k_proj.bias", "model.layers.0.self_attn.v_proj.bias"),
    ("model.embed_tokens.weight", "lm_head.weight"),
]


@pytest.mark.parametrize("mode", ["none", "8bit", "4bit"])
def test_a_weight_that_is_anothers_is_found(make_chatglm: MakeChatglm, mode: str) -> None:
    folder = make_chatglm(**FOR_4_BITS)
    model = load(folder, quantization=mode)
    weights = native_weights(folder, base_config(ModelSettings(name=str(folder))))
    require_loaded(model, weights, "here")
    for one, other in SWAPS:
        swapped = weights | {one: weights[other], other: weights[one]}
        with pytest.raises(ArtifactError, match="here: model.* is not the checkpoint's after loading"):
            require_loaded(model, swapped, "here")
    gate, up = weights["model.layers.0.mlp.gate_up_proj.weight"].chunk(2)
    with pytest.raises(ArtifactError, match="gate_up_proj.weight is not the checkpoint's"):
        require_loaded(model, weights | {"model.layers.0.mlp.gate_up_proj.weight": torch.cat([up, gate])}, "here")


@pytest.mark.parametrize("mode", ["none", "8bit", "4bit"])
def test_a_model_that_came_out_wrong_is_refused(
    place: Place, make_chatglm: MakeChatglm, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    from transformers import GlmForCausalLM

    read = GlmForCausalLM.from_pretrained

    def read_wrongly(*words: Any, **options: Any) -> Any:
        model, report = read(*words, **options)
        layers = model.model.layers
        layers[0].mlp.down_proj, layers[1].mlp.down_proj = layers[1].mlp.down_proj, layers[0].mlp.down_proj
        return model, report

    monkeypatch.setattr(GlmForCausalLM, "from_pretrained", read_wrongly)
    base = make_chatglm(**FOR_4_BITS)
    words = ("chat", "--model", base, "--once", "hi", *FP32, "--set", f"model.quantization={mode}")
    refused(place, words, "model.layers.0.mlp.down_proj.weight is not the checkpoint's after loading", "llm-clf doctor")


def test_doctor_estimates_an_original_folder(place: Place) -> None:
    out, _ = done(place, *DOCTOR_WITH_ROWS, "--json")
    estimate = json.loads(out)["estimate"]
    assert estimate["parameters"] == sum(weight.numel() for weight in load(place.path("base")).parameters())
    assert estimate["rows"]["measured"] and estimate["rows"]["rows"] == 12
