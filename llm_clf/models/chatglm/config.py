"""An original ChatGLM config as the GlmConfig of the same network, or the reason why there is none."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_clf.errors import ArtifactError, ConfigError
from llm_clf.files import read_json

CHATGLM2, CHATGLM3 = "chatglm2", "chatglm3"
# CodeGeeX2 is a ChatGLM2 that was trained on.
NAMES = {"chatglm2": CHATGLM2, "codegeex2": CHATGLM2, "chatglm3": CHATGLM3}
LINEAR, THETA = "linear", "theta"
# How the family's own code reads `rope_ratio`: ChatGLM2 divides positions by it, ChatGLM3 multiplies the base.
ROPE = {CHATGLM2: LINEAR, CHATGLM3: THETA}
ROPE_THETA = 10_000.0
# The end token; the pad token is the unknown token.
EOS, PAD = 2, 0
# What the original's own config class takes for a key that config.json does not have.
DEFAULTS: dict[str, Any] = {
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "seq_length": 2048,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "multi_query_attention": False,
    "multi_query_group_num": 1,
    "original_rope": True,
    "rope_ratio": 1,
    "quantization_bit": 0,
    "pre_seq_len": None,
}
SIZES = ("num_layers", "padded_vocab_size", "hidden_size", "ffn_hidden_size", "kv_channels", "num_attention_heads",
         "seq_length", "multi_query_group_num")  # fmt: skip
STORED = ("float32", "float16", "bfloat16")
HALF_PRECISION = "Give the half-precision checkpoint"


def is_chatglm(folder: Path) -> bool:
    """Whether a folder holds a ChatGLM of any version as its authors published it, going by `config.json`."""
    try:
        return is_chatglm_config(read_json(folder / "config.json"))
    except ArtifactError:
        # Whoever loads it as another model says what is wrong with it.
        return False


def is_chatglm_config(config: Any) -> bool:
    """Whether the content of a `config.json` is that of a ChatGLM as its authors published it."""
    return isinstance(config, dict) and config.get("model_type") == "chatglm"


def read_config(folder: Path) -> dict[str, Any]:
    """Return the original config with the defaults of its own code.

    Raises:
        ArtifactError: Glm has no such network; all reasons at once.
    """
    own: dict[str, Any] = read_json(folder / "config.json")
    config = DEFAULTS | {key: value for key, value in own.items() if value is not None or key not in DEFAULTS}
    faults = list(_faults(own, config))
    if faults:
        raise ArtifactError(f"{folder}: this ChatGLM cannot be used. " + " ".join(faults))
    return config


def _faults(own: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the native network cannot represent: what was found, and what to do."""
    if "position_encoding_2d" in own or "inner_hidden_size" in own or own.get("vocab_size") == 130528:
        yield "It is ChatGLM-6B of version 1, another network (2D positions). Give ChatGLM2-6B or ChatGLM3-6B."
        return
    if re.search(r"glm-?4", _name_in(own).lower()):
        yield "It is a GLM-4, which transformers knows itself. Give the release whose name ends in -hf."
        return
    for key in SIZES:
        if not isinstance(config[key], int) or isinstance(config[key], bool) or config[key] < 1:
            yield f"{key} is {config[key]!r}, and must be a whole number above 0."
    for key in ("layernorm_epsilon", "rope_ratio"):
        if not (_is_number(config[key]) and config[key] > 0):
            yield f"{key} is {config[key]!r}, and must be a number above 0."
    if not (_is_number(config["attention_dropout"]) and 0 <= config["attention_dropout"] < 1):
        yield f"attention_dropout is {config['attention_dropout']!r}, and must be a number from 0 to below 1."
    if config["add_qkv_bias"] not in (True, False):
        yield f"add_qkv_bias is {config['add_qkv_bias']!r}, and must be true or false."
    if config.get("torch_dtype") not in (None, *STORED):
        yield f"torch_dtype is {config['torch_dtype']!r}, and must be one of {', '.join(STORED)}."
    if config["quantization_bit"]:
        yield (
            f"quantization_bit {config['quantization_bit']}: its weights were quantised beforehand. {HALF_PRECISION}, "
            f"and set model.quantization to {'8bit' if config['quantization_bit'] == 8 else '4bit'}."
        )
    if config["pre_seq_len"]:
        yield (
            f"pre_seq_len {config['pre_seq_len']}: it holds a P-tuning prefix, which is no LoRA adapter. Give the "
            "base alone (pre_seq_len null), and fine-tune it anew."
        )
    network = "; Glm has no such network. Give ChatGLM2-6B, ChatGLM3-6B, or a checkpoint trained on from one of these."
    for key, needed, found in (
        ("add_bias_linear", False, "biases in all linear layers"),
        ("rmsnorm", True, "LayerNorm in place of RMSNorm"),
        ("apply_residual_connection_post_layernorm", False, "residuals from behind the norm"),
        ("post_layer_norm", True, "no norm behind the last layer"),
        ("multi_query_attention", True, "as many keys and values as heads"),
        ("original_rope", True, "another rotary embedding"),
    ):
        if bool(config[key]) != needed:
            yield f"{key} {str(bool(config[key])).lower()}: {found}{network}"
    if config["hidden_dropout"]:
        yield f"hidden_dropout {config['hidden_dropout']}: Glm has none. Set it to 0 in config.json."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def family_of(folder: Path, wanted: str = "auto") -> str:
    """Return `chatglm2` or `chatglm3`: what is wanted, else what the folder's names say.

    The two families share network and vocabulary; special tokens, chat template and the meaning of `rope_ratio` differ.

    Raises:
        ConfigError: Nothing says it, or the names contradict each other.
    """
    if wanted != "auto":
        return wanted
    for name in _names(folder):
        found = {family for part, family in NAMES.items() if part in name.lower()}
        if len(found) == 1:
            return found.pop()
    raise ConfigError(
        f"{folder}: neither config.json (_name_or_path), tokenizer_config.json (name_or_path) nor the folder's name "
        "says whether this is a ChatGLM2 or a ChatGLM3, and their prompts differ. Set model.family to chatglm2 or "
        "chatglm3 (--set model.family=chatglm2)."
    )


def _names(folder: Path) -> Iterator[str]:
    yield _name_in(read_json(folder / "config.json"))
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = read_json(folder / "tokenizer_config.json")
        yield str(tokenizer.get("name_or_path", "")) if isinstance(tokenizer, dict) else ""
    yield folder.resolve().name


def _name_in(config: Mapping[str, Any]) -> str:
    return str(config.get("_name_or_path", ""))


def native_config(folder: Path, *, rope_ratio: str) -> Any:
    """Return the GlmConfig of an original folder.

    Args:
        folder: The original folder.
        rope_ratio: What the config's `rope_ratio` means: `linear` divides positions by it (chatglm2-6b-32k), `theta`
            multiplies the rotary base by it (chatglm3-6b-32k).

    Raises:
        ArtifactError: Glm has no such network.
    """
    from transformers import GlmConfig

    config = read_config(folder)
    native = GlmConfig(
        vocab_size=config["padded_vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["ffn_hidden_size"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["multi_query_group_num"],
        head_dim=config["kv_channels"],
        attention_dropout=config["attention_dropout"],
        max_position_embeddings=config["seq_length"],
        rms_norm_eps=float(config["layernorm_epsilon"]),
        attention_bias=bool(config["add_qkv_bias"]),
        rope_parameters=_rope(config["rope_ratio"], rope_ratio),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        dtype=config.get("torch_dtype"),
        architectures=["GlmForCausalLM"],
    )
    native.name_or_path = str(folder)
    return native


def _rope(ratio: float, kind: str) -> dict[str, Any]:
    """Return Glm's rotary parameters; half of each head is rotated in every ChatGLM2 and ChatGLM3."""
    parameters = {"rope_type": "default", "rope_theta": ROPE_THETA, "partial_rotary_factor": 0.5}
    if ratio == 1:
        return parameters
    if kind == LINEAR:
        return parameters | {"rope_type": "linear", "factor": float(ratio)}
    return parameters | {"rope_theta": ROPE_THETA * ratio}
