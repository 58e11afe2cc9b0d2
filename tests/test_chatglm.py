"""ChatGLM2 and ChatGLM3 against numbers that their own code produced (tests/golden says how).

LLM_CLF_GOLDEN may name a folder with more cases of the same layout, LLM_CLF_CHATGLM_TOKENIZER the published
tokenizer.model, which is not part of this project.
"""

import json
import lzma
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_clf.config import ModelSettings
from llm_clf.engine.tokens import PromptTokenizer, encode_messages
from llm_clf.errors import ArtifactError, ConfigError
from llm_clf.models.adapters import attach_adapter
from llm_clf.models.bases import base_config, load_model, load_tokenizer
from llm_clf.models.chatglm.config import family_of
from llm_clf.models.chatglm.tokenizer import build_tokenizer, end_ids
from llm_clf.models.chatglm.weights import native_weights
from llm_clf.prompting.prompts import Prompt
from llm_clf.prompting.tasks import load_task

SHIPPED = Path(__file__).resolve().parent / "golden"
GOLDEN = Path(os.environ.get("LLM_CLF_GOLDEN", SHIPPED))
PUBLISHED = os.environ.get("LLM_CLF_CHATGLM_TOKENIZER")
CASES = [
    pytest.param(case / layout, id=f"{case.name}-{layout}")
    for case in sorted(GOLDEN.glob("glm*"))
    for layout in ("bin", "safetensors")
    if (case / layout).is_dir()
]
ADAPTERS = [pytest.param(folder, id=f"{folder.parts[-3]}-{folder.name}") for folder in sorted(GOLDEN.glob("*/lora/*"))]
CPU = torch.device("cpu")
# Reached on the machines that made the data: 0 with SDPA, 1e-5 with other kernels. Wrong mappings are off by 1 or more.
TOLERANCE = 5e-5


def load(folder: Path, **settings: Any) -> Any:
    return load_model(ModelSettings(name=str(folder), **settings), dtype="fp32", device=CPU)


def inputs_of(reference: Any) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield each input's name, and the arguments of the forward."""
    fields = ("input_ids", "attention_mask", "position_ids", "labels")
    for name in sorted({key.rpartition(".")[0] for key in reference.files if key.endswith(".logits")}):
        yield (
            name,
            {key: torch.from_numpy(reference[f"{name}.{key}"]) for key in fields if f"{name}.{key}" in reference},
        )


def assert_equals_reference(model: Any, reference: Any, prefix: str = "", tolerance: float = TOLERANCE) -> None:
    """Compare logits where there is a token, loss, and greedy answers."""
    compared = 0
    for name, arguments in inputs_of(reference):
        if not name.startswith(prefix):
            continue
        with torch.inference_mode():
            out = model(**arguments)
        real = arguments.get("attention_mask", torch.ones_like(arguments["input_ids"])).bool()
        expected = torch.from_numpy(reference[f"{name}.logits"])
        assert (out.logits - expected)[real].abs().max() <= tolerance, name
        if f"{name}.loss" in reference:
            assert out.loss.item() == pytest.approx(float(reference[f"{name}.loss"]), abs=tolerance)
        if f"{name}.generated" in reference:
            assert_same_answers(model, arguments, torch.from_numpy(reference[f"{name}.generated"]))
        compared += 1
    assert compared > 0


def assert_same_answers(model: Any, arguments: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    ids = arguments["input_ids"]
    mask = arguments.get("attention_mask", torch.ones_like(ids))
    tokens = expected.shape[1] - ids.shape[1]
    answers = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens)
    assert torch.equal(answers, expected)


@pytest.mark.parametrize("folder", CASES)
def test_model_equals_the_original_code(folder: Path) -> None:
    assert_equals_reference(load(folder), np.load(folder.parent / "reference.npz"))


@pytest.mark.parametrize("folder", CASES)
def test_every_weight_is_the_checkpoints_and_a_view_of_its_file(folder: Path) -> None:
    config = base_config(ModelSettings(name=str(folder)))
    weights = native_weights(folder, config)
    stored = {tensor.dtype for tensor in weights.values()}
    assert len(stored) == 1
    names = {torch.float32: "fp32", torch.float16: "fp16"}
    model = load_model(ModelSettings(name=str(folder)), dtype=names[stored.pop()], device=CPU)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[key]), key


@pytest.mark.parametrize("merge", [False, True], ids=["beside", "merged"])
@pytest.mark.parametrize("folder", ADAPTERS)
def test_adapter_of_the_original_code_gives_its_logits(folder: Path, merge: bool) -> None:
    case = folder.parent.parent
    base = load(next(case / layout for layout in ("bin", "safetensors") if (case / layout).is_dir()))
    model = attach_adapter(base, folder, merge=merge, tokenizer=None)
    reference = np.load(case / "lora_reference.npz")
    assert_equals_reference(model, reference, f"{folder.name}.", tolerance=1e-4 if merge else TOLERANCE)


@pytest.mark.parametrize("config", json.loads((GOLDEN / "configs_to_refuse.json").read_text()), ids=lambda c: c["name"])
def test_network_that_glm_lacks_is_refused_by_name(config: dict[str, Any], tmp_path: Path) -> None:
    telling = {
        "bias_everywhere": "add_bias_linear true",
        "layernorm_instead_of_rmsnorm": "rmsnorm false",
        "post_ln_residual": "apply_residual_connection_post_layernorm true",
        "no_final_norm": "post_layer_norm false",
        "prequantised_int4": "quantization_bit 4",
        "ptuning_v2_prefix": "pre_seq_len 128",
    }
    (tmp_path / "config.json").write_text(json.dumps(config["config"]))
    with pytest.raises(ArtifactError, match="Give ") as refusal:
        base_config(ModelSettings(name=str(tmp_path)))
    assert telling.get(config["name"], "") in str(refusal.value)


# The tokenizer.

MODELS = [pytest.param(SHIPPED / "tokenizer" / "small_sp.model", "small", id="small")]
MODELS += [
    pytest.param(Path(PUBLISHED or "absent"), "real", id="published", marks=pytest.mark.skipif(
        PUBLISHED is None or not (GOLDEN / "tokenizer" / "chatglm2_real.json").is_file(),
        reason="needs LLM_CLF_CHATGLM_TOKENIZER and LLM_CLF_GOLDEN",
    ))
]  # fmt: skip


def golden_tokens(name: str) -> Any:
    file = GOLDEN / "tokenizer" / f"{name}.json"
    return json.loads(file.read_bytes() if file.is_file() else lzma.decompress(Path(f"{file}.xz").read_bytes()))


@pytest.fixture
def tokenizers(tmp_path: Path) -> Callable[[Path, str], list[Any]]:
    """Return a maker of a model file's tokenizer: as it is built, and saved and loaded again by transformers alone."""
    from transformers import AutoTokenizer

    def make(model: Path, family: str) -> list[Any]:
        shutil.copy(model, tmp_path / "tokenizer.model")
        built = build_tokenizer(tmp_path, family=family)
        built.save_pretrained(str(tmp_path / "saved"))
        return [built, AutoTokenizer.from_pretrained(str(tmp_path / "saved"))]

    return make


@pytest.mark.parametrize(("model", "name"), MODELS)
def test_tokens_equal_the_original_on_every_string(
    model: Path, name: str, tokenizers: Callable[[Path, str], list[Any]]
) -> None:
    golden = golden_tokens(f"chatglm2_{name}")
    assert len(golden["items"]) == 816
    for tokenizer in tokenizers(model, "chatglm2"):
        assert len(tokenizer) == golden["vocab_size"]
        for special, number in golden["special_ids"].items():
            if not special.startswith("<"):
                assert tokenizer.convert_tokens_to_ids(special) == number
        for item in golden["items"]:
            assert tokenizer(item["text"])["input_ids"] == item["ids"], item["text"]
            assert tokenizer.decode(item["ids"], skip_special_tokens=True) == item["decoded_skip_special"]
        for item in golden["decode_only"]:
            assert tokenizer.decode(item["ids"], skip_special_tokens=True) == item["decoded"]
        for pair in golden["pairs"]:
            assert tokenizer(pair["a"], pair["b"])["input_ids"] == pair["ids"]


@pytest.mark.parametrize(("model", "name"), MODELS)
def test_padding_and_truncation_equal_the_original(
    model: Path, name: str, tokenizers: Callable[[Path, str], list[Any]]
) -> None:
    golden = golden_tokens(f"chatglm2_{name}")
    options: dict[str, dict[str, Any]] = {
        "padded_batch": {"padding": True},
        "padded_maxlen24_trunc": {"padding": "max_length", "max_length": 24, "truncation": True},
        "padded_multiple8": {"padding": True, "pad_to_multiple_of": 8},
    }
    for tokenizer in tokenizers(model, "chatglm2"):
        for key, arguments in options.items():
            batch = tokenizer(golden[key]["texts"], **arguments)
            assert batch["input_ids"] == golden[key]["input_ids"]
            assert batch["attention_mask"] == golden[key]["attention_mask"]


@pytest.mark.parametrize(("model", "name"), MODELS)
def test_chatglm2_prompts_are_those_of_build_prompt(
    model: Path, name: str, tokenizers: Callable[[Path, str], list[Any]]
) -> None:
    for tokenizer in tokenizers(model, "chatglm2"):
        for item in golden_tokens(f"chatglm2_{name}")["build_prompt"]:
            messages = [
                {"role": role, "content": text}
                for turn in item["history"]
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
            messages.append({"role": "user", "content": item["query"]})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert text == item["prompt"]
            assert tokenizer(text)["input_ids"] == item["ids"]
            assert encode_messages(tokenizer, messages) == item["ids"]


@pytest.mark.parametrize(("model", "name"), MODELS)
def test_chatglm3_prompts_are_those_of_build_chat_input(
    model: Path, name: str, tokenizers: Callable[[Path, str], list[Any]]
) -> None:
    golden = golden_tokens(f"chatglm3_chat_{name}")
    for tokenizer in tokenizers(model, "chatglm3"):
        assert {token: tokenizer.convert_tokens_to_ids(token) for token in golden["special_ids"]} == golden[
            "special_ids"
        ]
        for item in golden["chat"]:
            messages = [*item["history"], {"role": item["role"], "content": item["query"]}]
            assert encode_messages(tokenizer, messages) == item["ids"]
            # transformers alone must be told to read the template's special tokens.
            alone = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenizer_kwargs={"split_special_tokens": False}
            )
            assert alone["input_ids"] == item["ids"]
        for item in golden["plain"]:
            assert tokenizer(item["text"])["input_ids"] == item["ids"]


@pytest.mark.parametrize(("model", "name"), MODELS)
def test_tokens_equal_sentencepiece_on_random_strings(
    model: Path, name: str, tokenizers: Callable[[Path, str], list[Any]]
) -> None:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(model))
    tokenizer = tokenizers(model, "chatglm2")[0]
    draw = np.random.default_rng(0)
    kinds = ["abcdeop ", "0123456789 .,-", " \t\n\r", "中文标题摘要：，。", "▁<>s/|[]MASKgeop", "é̈ßЖ😀\u200b\u3000\x00"]
    for _ in range(500):
        text = "".join(draw.choice(list(kinds[draw.integers(len(kinds))])) for _ in range(draw.integers(1, 60)))
        assert tokenizer(text)["input_ids"][2:] == pieces.encode(text), repr(text)


def test_prompt_of_a_row_is_round_1_with_instruction_newline_and_input(
    tokenizers: Callable[[Path, str], list[Any]],
) -> None:
    task = load_task("medical_paper")
    for family in ("chatglm2", "chatglm3"):
        tokenizer = tokenizers(SHIPPED / "tokenizer" / "small_sp.model", family)[0]
        tokens = PromptTokenizer(tokenizer, task, max_length=1024)
        text = task.render({column: "People, neoplasm: a [MASK] in sop, eop </s>" for column in task.columns})
        ids = list(tokens.encode([Prompt("0", text, None, {})])[0].ids)
        query = f"{task.instruction}\n{text}"
        if family == "chatglm2":
            assert ids == tokenizer(f"[Round 1]\n\n问：{query}\n\n答：")["input_ids"]
        else:
            user, assistant = (tokenizer.convert_tokens_to_ids(role) for role in ("<|user|>", "<|assistant|>"))
            plain = [tokenizer(part)["input_ids"][2:] for part in ("\n", query)]
            assert ids == [*tokenizer("")["input_ids"], user, *plain[0], *plain[1], assistant]
        assert not {tokenizer.convert_tokens_to_ids(token) for token in ("[MASK]", "eop", "</s>")} & set(ids)


# Settings.


def test_family_and_rope_are_what_the_names_or_the_settings_say(tmp_path: Path) -> None:
    config: dict[str, Any] = json.loads((SHIPPED / "glm2_32k_tiny" / "bin" / "config.json").read_text())
    ratio = config["rope_ratio"]

    def rope(name: str, folder: str = "here", **settings: str) -> Any:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(config | {"_name_or_path": name}))
        return base_config(ModelSettings.model_validate({"name": str(place), **settings})).rope_parameters

    linear = {"rope_type": "linear", "factor": ratio, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    theta = {"rope_type": "default", "rope_theta": 10000.0 * ratio, "partial_rotary_factor": 0.5}
    assert rope("THUDM/chatglm2-6b-32k") == rope("THUDM/codegeex2-6b") == linear
    assert rope("THUDM/chatglm3-6b-32k") == rope("", "chatglm3-6b-128k") == theta
    assert rope("mine", family="chatglm3") == rope("THUDM/chatglm2-6b-32k", rope_ratio="theta") == theta
    with pytest.raises(ConfigError, match="Set model.family"):
        rope("/models/checkpoint-500")
    with pytest.raises(ConfigError, match="Set model.family"):
        rope("chatglm2-and-chatglm3")
    assert family_of(tmp_path / "chatglm3-6b-128k") == "chatglm3"


def test_settings_of_chatglm_are_refused_for_other_bases() -> None:
    for settings in ({"family": "chatglm2"}, {"rope_ratio": "linear"}):
        with pytest.raises(ConfigError, match=f"model.{next(iter(settings))}"):
            base_config(ModelSettings.model_validate({"name": "glm-nano", **settings}))


def test_chatglm3_ends_an_answer_where_another_would_speak(tmp_path: Path) -> None:
    shutil.copy(SHIPPED / "tokenizer" / "small_sp.model", tmp_path / "tokenizer.model")
    assert end_ids(tmp_path, family="chatglm3") == [2, 3006, 3008]
    assert end_ids(tmp_path, family="chatglm2") == [2]


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED / "glm2_tiny" / "bin", tmp_path / "base")
    shutil.copy(SHIPPED / "tokenizer" / "small_sp.model", tmp_path / "base" / "tokenizer.model")
    with pytest.raises(ArtifactError, match=r"3005 tokens.*room for 512"):
        load_tokenizer(ModelSettings(name=str(tmp_path / "base")))
