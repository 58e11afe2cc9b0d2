"""Make a ChatGLM2 checkpoint of true size with random weights, and measure loading and importing it.

scripts/chatglm_memory.py make DIR                    about 12.5 GB: 7 files of fp16, as THUDM published ChatGLM2-6B
scripts/chatglm_memory.py load DIR [none|8bit|4bit] [DTYPE]
scripts/chatglm_memory.py import DIR OUT

`load` and `import` print seconds and the peaks of the process's anonymous memory (RssAnon: what the machine must hold,
without mapped files) and of its whole resident memory. Linux only.
"""

import argparse
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "num_layers": 28,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "multi_query_group_num": 2,
    "padded_vocab_size": 65024,
    "seq_length": 32768,
}
REST = {
    "_name_or_path": "THUDM/chatglm2-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "torch_dtype": "float16",
}
SHARDS = 7
# Small enough for the activations of 28 random layers to stay within fp16.
SPREAD = 0.02


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every original tensor, in the order in which they lie in the files."""
    hidden, inner = config["hidden_size"], config["ffn_hidden_size"]
    width = config["num_attention_heads"] * config["kv_channels"]
    joint = width + 2 * config["multi_query_group_num"] * config["kv_channels"]
    found: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (config["padded_vocab_size"], hidden),
        "transformer.rotary_pos_emb.inv_freq": (config["kv_channels"] // 4,),
    }
    for number in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{number}."
        found |= {
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}self_attention.query_key_value.weight": (joint, hidden),
            f"{layer}self_attention.query_key_value.bias": (joint,),
            f"{layer}self_attention.dense.weight": (hidden, width),
            f"{layer}post_attention_layernorm.weight": (hidden,),
            f"{layer}mlp.dense_h_to_4h.weight": (2 * inner, hidden),
            f"{layer}mlp.dense_4h_to_h.weight": (hidden, inner),
        }
    return found | {
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (config["padded_vocab_size"], hidden),
    }


def make(folder: Path, sizes: dict[str, int], seed: int = 0) -> None:
    """Write a checkpoint with random weights in the original layout; it has no tokenizer."""
    config = REST | sizes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generator = torch.Generator().manual_seed(seed)
    wanted = shapes(config)
    share = sum(torch.Size(shape).numel() for shape in wanted.values()) / SHARDS
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number, held = 1, 0
    for key, shape in wanted.items():
        gain = 1.0 if "layernorm" in key else 0.0
        shard[key] = (torch.randn(shape, generator=generator) * SPREAD + gain).half()
        held += shard[key].numel()
        if held >= share * number or key == list(wanted)[-1]:
            name = f"pytorch_model-{number:05d}-of-{SHARDS:05d}.bin"
            torch.save(shard, folder / name)
            places |= dict.fromkeys(shard, name)
            shard, number = {}, number + 1
    index = {"metadata": {"total_size": 2 * held}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")


def resident() -> dict[str, int]:
    """Return the bytes of anonymous and of all resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return {key: 1024 * int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("RssAnon", "VmRSS")}  # type: ignore[index]


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Print the seconds of a block and the peaks of memory within it, by sampling a hundred times a second."""
    peaks = resident()
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.01):
            for key, value in resident().items():
                peaks[key] = max(peaks[key], value)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    started = time.monotonic()
    try:
        yield
    finally:
        seconds = time.monotonic() - started
        stop.set()
        sampler.join()
    gigabytes = ", ".join(f"{key} {value / 1e9:.2f} GB" for key, value in peaks.items())
    print(f"{what}: {seconds:.1f} s, peak {gigabytes}", flush=True)


def main() -> None:
    """Do what the arguments say."""
    from llm_clf import import_chatglm
    from llm_clf.config import ModelSettings
    from llm_clf.models.bases import load_model, prepare_libraries

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "load", "import"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args()
    prepare_libraries()
    if given.what == "make":
        make(given.folder, SIZES)
    elif given.what == "import":
        with measured("import"):
            import_chatglm(given.folder, given.rest[0], only="weights")
    else:
        mode, dtype = [*given.rest, "none", "fp16"][:2] if len(given.rest) != 1 else (given.rest[0], "fp16")
        base = ModelSettings(name=str(given.folder), quantization=mode)  # type: ignore[arg-type]
        with measured(f"load {mode} {dtype}"):
            load_model(base, dtype=dtype, device=torch.device("cpu"))


if __name__ == "__main__":
    main()
