"""The model card, made from what the finished folder holds, and the hashes by which a damaged copy is found."""

import csv
import hashlib
from pathlib import Path

from transformers import GlmConfig, GlmForCausalLM

CARD = """# glm-nano

A small causal language model, `GlmForCausalLM`, that ships inside llm-clf so that every command works at
once, without a network and without a GPU. It is made to be fine-tuned as a text classifier on English
abstracts and to try the tool out. It is no chat partner: it has read abstracts and questions about them and
nothing else, and what it writes is made up.

| | |
|---|---|
| parameters | {parameters:,} (embeddings tied) |
| layers, width, feed-forward | {layers}, {hidden}, {intermediate} |
| heads, key-value heads | {heads}, {kv_heads} |
| vocabulary | {vocabulary:,}, byte-level BPE, digits alone |
| context | {context:,} tokens |
| weights | {megabytes:.1f} MB, bf16 |

## Training

`python scripts/pretrain_base.py CORPUS --out llm_clf/models/glm-nano`: {tokens:,} tokens; Muon for the
matrices and AdamW for the rest, warm-up, stable rate and linear decay, bf16; {minutes} minutes of wall-clock time on
CPU cores that other work had first. First embeddings are factored from counts of the corpus. A part of the documents
asks what the paper itself answers: whether a title belongs to a text, which words were taken out of it, which field
it is from. Loss in nats per token of text; answers: how often the held-out questions were answered right. The
held-out documents were not trained on.

| tokens | training loss | held-out loss | answers |
|---|---|---|---|
{losses}

## Sources and licences

Titles and abstracts of arXiv papers (metadata CC0 1.0), systematic-review data sets of ASReview (CC-BY 4.0
and CC0 1.0), and sentences of biomedical corpora joined to passages (CC-BY 4.0). The text itself is not
distributed. The weights and the tokenizer are under Apache-2.0.
"""
MOST_LINES = 12


def write_card(folder: Path) -> None:
    """Write README.md and SHA256SUMS into a finished folder with its `training-log.csv`."""
    with open(folder / "training-log.csv", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    measured = [line for line in log if line["held_out_loss"]]
    shown = [*measured[:: -(-len(measured) // MOST_LINES)], measured[-1]]
    losses = "\n".join(
        f"| {int(line['tokens']):,} | {line['loss']} | {line['held_out_loss']} | {line['held_out_answers']} |"
        for line in dict((line["step"], line) for line in shown).values()
    )
    config = GlmConfig.from_pretrained(folder)
    card = CARD.format(
        parameters=GlmForCausalLM.from_pretrained(folder).num_parameters(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        tokens=int(log[-1]["tokens"]),
        minutes=round(int(log[-1]["seconds"]) / 60),
        losses=losses,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    files = sorted(file for file in folder.iterdir() if file.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
