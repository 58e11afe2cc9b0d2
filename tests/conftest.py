"""Shared fixtures: tiny bases with random weights and a byte tokenizer, six rows, a prompts folder."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

# The same examples in every run.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>", "<|start|>"]


def byte_tokenizer(
    folder: Path, *, template: str | None = None, padding_side: str = "right", bos: bool = False
) -> None:
    """Save a tokenizer that knows every byte and a few merges, so that labels share their first token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", vocab["<|start|>"])]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        bos_token="<|start|>" if bos else None,
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        padding_side=padding_side,
        chat_template=template,
    ).save_pretrained(folder)


def tiny_config(family: str):
    """Return a config of two layers for a family of decoders."""
    from transformers import AutoConfig

    sizes = {
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 3,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    if family == "gpt2":
        sizes = {"vocab_size": 261, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "eos_token_id": 0}
        sizes |= {"bos_token_id": None, "pad_token_id": 3}
    if family == "gpt_neox":
        sizes.pop("num_key_value_heads")
        sizes.pop("head_dim")
    if family == "bloom":
        sizes = {"vocab_size": 261, "hidden_size": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 0, "pad_token_id": 3}
    if family == "mistral":
        sizes["sliding_window"] = None
    if family == "mistral-window":
        family, sizes["sliding_window"] = "mistral", 16
    return AutoConfig.for_model(family, **sizes)


def tiny_model(family: str, seed: int = 0):
    """Return a random model of a family, in fp32, with weights large enough that its answers differ."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


class Bigrams(torch.nn.Module):
    """A model whose next token depends on the last one alone."""

    def __init__(self, probs: dict[int, dict[int, float]]) -> None:
        super().__init__()
        self.config, self.device, self.dtype = tiny_config("bloom"), torch.device("cpu"), torch.float32
        self.table = torch.full((261, 261), 1e-9)
        for token, following in probs.items():
            for other, prob in following.items():
                self.table[token, other] = prob

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids].log())


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes a base folder: family, template, padding side; the same one for the same words."""
    made: dict[tuple[object, ...], Path] = {}

    def make(
        family: str = "glm",
        *,
        template: str | None = None,
        padding_side: str = "right",
        bos: bool = False,
        seed: int = 0,
    ) -> Path:
        key = (family, template, padding_side, bos, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"base-{family}")
            tiny_model(family, seed).save_pretrained(folder)
            byte_tokenizer(folder, template=template, padding_side=padding_side, bos=bos)
            made[key] = folder
        return made[key]

    return make


def tied_base(folder: Path) -> Path:
    """Save a base whose head shares its weights with the embeddings."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base whose layers are wide enough for bitsandbytes' blocks of 64 on a CPU."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    config = tiny_config("glm")
    config.update({"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


@pytest.fixture
def prompts(many_rows: Path, short_task: Path, tmp_path: Path) -> Path:
    """Return a prompts folder of 40 rows, with some to train, to validate and to test."""
    from llm_clf.commands.build_prompts import build_prompts

    folder = tmp_path / "prompts"
    build_prompts([many_rows], task=short_task, out=folder, split="0.6,0.2,0.2")
    return folder


@pytest.fixture(scope="session")
def base(make_base: Callable[..., Path]) -> Path:
    """Return the tiny base that most tests use."""
    return make_base("glm")


WORDS = {"1": ["heart", "lung", "fever", "dose"], "0": ["steel", "star", "court", "bridge"]}
"""Of rows whose label a small model can learn."""


ROWS = [
    {"uuid": "a", "title": "Heart", "abstract": "Aspirin after surgery.", "label": "1"},
    {"uuid": "b", "title": "Bridge", "abstract": "Steel under load.", "label": "0"},
    {"uuid": "c", "title": "Lung", "abstract": "Inhaled steroids in asthma, a trial.", "label": "1"},
    {"uuid": "d", "title": "Star", "abstract": "Spectra of dwarfs.", "label": "0"},
    {"uuid": "e", "title": "Skin", "abstract": "Eczema in infants and what helps against it.", "label": "1"},
    {"uuid": "f", "title": "Law", "abstract": "Courts and contracts.", "label": "0"},
]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Return a JSONL file of six rows."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file


@pytest.fixture
def many_rows(tmp_path: Path) -> Path:
    """Return a JSONL file of forty rows whose label a small model can learn."""
    file = tmp_path / "many.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        for number in range(40):
            label = str(number % 2)
            word = WORDS[label][number // 2 % 4]
            row = {
                "uuid": f"r{number}",
                "title": word,
                "abstract": f"{word} " * (number % 7 + 1) + str(number),
                "label": label,
            }
            lines.write(json.dumps(row) + "\n")
    return file


def word_prompts(folder: Path, *, rows: int, lengths: int, split: str) -> Path:
    """Make prompts of rows whose word tells the label, in so many lengths, and return their folder."""
    from llm_clf.commands.build_prompts import build_prompts

    with open(folder / "rows.csv", "w", encoding="utf-8") as lines:
        lines.write("uuid,title,abstract,label\n")
        for number in range(rows):
            word = WORDS[str(number % 2)][number // 2 % 4]
            lines.write(f"r{number},{word},{(word + ' ') * (number % lengths + 1)}{number},{number % 2}\n")
    (folder / "task.yaml").write_text(SHORT_TASK, encoding="utf-8")
    build_prompts([folder / "rows.csv"], task=folder / "task.yaml", out=folder / "prompts", split=split)
    return folder / "prompts"


def trainer(prompts: Path, tmp_path_factory: pytest.TempPathFactory, settings: Sequence[str]) -> Callable[..., Path]:
    """Return a function that trains a run on a base, with further settings; the same run for the same words."""
    from llm_clf.commands.finetune import finetune

    made: dict[tuple[str, ...], Path] = {}

    def trained(base: Path, *more: str) -> Path:
        key = (str(base), *more)
        if key not in made:
            run = tmp_path_factory.mktemp("trained") / "run"
            finetune(prompts, out=run, model=str(base), set=[*settings, *more])
            made[key] = run
        return made[key]

    return trained


SHORT_TASK = """\
instruction: "Medical? 1 or 0"
input: "{title}:{abstract}"
id_column: uuid
label_column: label
cut: abstract
labels: ["0", "1"]
"""


@pytest.fixture
def short_task(tmp_path: Path) -> Path:
    """Return a task file with a short instruction, for tests that train."""
    file = tmp_path / "short.yaml"
    file.write_text(SHORT_TASK, encoding="utf-8")
    return file


SMALL_SENTENCEPIECE = Path(__file__).resolve().parent / "golden" / "tokenizer" / "small_sp.model"
CHATGLM_SIZES = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "multi_query_group_num": 2,
    "kv_channels": 16,
    "ffn_hidden_size": 96,
    # The small tokenizer has 3000 pieces, and a ChatGLM3 nine tokens more; the rest is padding.
    "padded_vocab_size": 3072,
    "seq_length": 512,
}


def chatglm_weights(sizes: dict[str, int], *, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 0.2):
    """Return random weights under the original names, in the order in which they lie in the files."""
    heads, groups, width, inner, tokens, hidden = (
        sizes[key]
        for key in (
            "num_attention_heads",
            "multi_query_group_num",
            "kv_channels",
            "ffn_hidden_size",
            "padded_vocab_size",
            "hidden_size",
        )
    )
    rows = (heads + 2 * groups) * width
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (tokens, hidden)}
    for number in range(sizes["num_layers"]):
        layer = f"encoder.layers.{number}."
        shapes |= {
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}self_attention.query_key_value.weight": (rows, hidden),
            f"{layer}self_attention.query_key_value.bias": (rows,),
            f"{layer}self_attention.dense.weight": (hidden, heads * width),
            f"{layer}post_attention_layernorm.weight": (hidden,),
            f"{layer}mlp.dense_h_to_4h.weight": (2 * inner, hidden),
            f"{layer}mlp.dense_4h_to_h.weight": (hidden, inner),
        }
    shapes |= {"encoder.final_layernorm.weight": (hidden,), "output_layer.weight": (tokens, hidden)}
    draw = torch.Generator().manual_seed(seed)
    # Large enough that answers differ, and no norm gain or bias is what a fresh model has.
    weights = {
        f"transformer.{name}": (torch.randn(shape, generator=draw) * spread + ("layernorm" in name)).to(dtype)
        for name, shape in shapes.items()
    }
    return {"transformer.rotary_pos_emb.inv_freq": torch.ones(width // 4, dtype=dtype), **weights}


def save_chatglm(folder: Path, shards: list[dict[str, torch.Tensor]], form: str = "bin") -> None:
    """Write weights as the files of an original folder and their index, in place of those that are there."""
    from safetensors.torch import save_file

    for old in [*folder.glob("*.bin"), *folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        old.unlink()
    stem, suffix = ("pytorch_model", ".bin") if form == "bin" else ("model", ".safetensors")
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}"
        if form == "bin":
            torch.save(shard, folder / name)
        else:
            save_file(shard, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, name)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture(scope="session")
def make_chatglm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes an original ChatGLM folder; the same one for the same words.

    Its words: family, file format (bin or safetensors), type of the weights, number of files, seed, spread of the
    weights, and sizes as config.json names them.
    """
    made: dict[tuple[object, ...], Path] = {}

    def make(
        family: str = "chatglm2",
        *,
        form: str = "bin",
        dtype: torch.dtype = torch.float32,
        shards: int = 3,
        seed: int = 0,
        spread: float = 0.2,
        **sizes: int,
    ) -> Path:
        key = (family, form, dtype, shards, seed, spread, *sorted(sizes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"original-{form}")
            config = CHATGLM_SIZES | sizes
            facts = {
                "_name_or_path": f"THUDM/{family}-6b",
                "model_type": "chatglm",
                "architectures": ["ChatGLMModel"],
                "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
                "add_bias_linear": False,
                "add_qkv_bias": True,
                "layernorm_epsilon": 1e-5,
                "multi_query_attention": True,
                "torch_dtype": str(dtype).removeprefix("torch."),
            }
            (folder / "config.json").write_text(json.dumps(facts | config, indent=2))
            weights = list(chatglm_weights(config, seed=seed, dtype=dtype, spread=spread).items())
            each = -(-len(weights) // shards)
            save_chatglm(folder, [dict(weights[i : i + each]) for i in range(0, len(weights), each)], form)
            shutil.copy(SMALL_SENTENCEPIECE, folder / "tokenizer.model")
            made[key] = folder
        return made[key]

    return make
