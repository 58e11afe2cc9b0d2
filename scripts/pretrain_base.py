"""Pre-train glm-nano, the base that ships inside the package, from a file of abstracts.

    python scripts/pretrain_base.py CORPUS.jsonl.xz --out llm_clf/models/glm-nano

CORPUS holds one JSON object a line with "source", "title" and "abstract" (.xz or plain).
Three steps: train a byte-level BPE tokenizer, write all documents as one stream of token ids,
train a small GLM on windows of that stream. The result is a standard transformers folder in
bf16; `training-log.csv` beside the weights holds the losses that the model card quotes.
"""

import csv
import hashlib
import json
import lzma
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast, get_scheduler

END = "<|endoftext|>"
# What a user turn and an answer look like; a base that has seen only documents needs no markers.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)
CONTEXT = 1024
CARD = """# glm-nano

A small causal language model, `GlmForCausalLM`, that ships inside llm-clf so that every command works at
once, without a network and without a GPU. It is made to be fine-tuned as a text classifier on English
abstracts and to try the tool out. It is no chat partner: it has read abstracts and nothing else, it follows
no instructions, and what it writes is made up.

| | |
|---|---|
| parameters | {parameters:,} (embeddings tied) |
| layers, width, feed-forward | {layers}, {hidden}, {intermediate} |
| heads, key-value heads | {heads}, {kv_heads} |
| vocabulary | {vocabulary:,}, byte-level BPE, digits alone |
| context | {context:,} tokens |
| weights | {megabytes:.1f} MB, bf16 |

## Training

`python scripts/pretrain_base.py CORPUS.jsonl.xz --out llm_clf/models/glm-nano`: {tokens:,} tokens, each seen
once, Muon for the matrices and AdamW for the rest, cosine schedule, bf16 autocast; {minutes} minutes on 2 CPU
cores that other work shared. Half of the titled documents read `title:...,abstract:...`, the others title,
line break, abstract. Loss in nats per token, on windows of 1,024 tokens; the held-out documents were not
trained on. The last value is {held_out}.

| tokens | training loss | held-out loss |
|---|---|---|
{losses}

## Sources and licences

Titles and abstracts of arXiv papers (metadata CC0 1.0), systematic-review data sets of ASReview (CC-BY 4.0
and CC0 1.0), and sentences of biomedical corpora joined to passages (CC-BY 4.0). The text itself is not
distributed. The weights and the tokenizer are under Apache-2.0.
"""
HELD_OUT_DOCUMENTS = 1000


def read_documents(corpus: Path) -> Iterator[str]:
    """Yield each paper as text: half of the titled ones in the form of a labelling prompt."""
    rng = random.Random(0)
    opened = lzma.open(corpus, "rt", encoding="utf-8") if corpus.suffix == ".xz" else open(corpus, encoding="utf-8")
    with opened as lines:
        for line in lines:
            paper = json.loads(line)
            title, abstract = paper["title"].strip(), paper["abstract"].strip()
            if title and rng.random() < 0.5:
                yield f"title:{title},abstract:{abstract}"
            else:
                yield f"{title}\n{abstract}".strip()


def train_tokenizer(documents: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: any text is encodable, digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )


def encode_documents(documents: Iterator[str], tokenizer: PreTrainedTokenizerFast, limit: int) -> np.ndarray:
    """Return about `limit` token ids of the documents, each closed by the end token."""
    end = np.array([tokenizer.eos_token_id], dtype=np.uint16)
    parts: list[np.ndarray] = []
    tokens = 0
    batch: list[str] = []
    for document in documents:
        batch.append(document)
        if len(batch) == 1000:
            for ids in tokenizer(batch, verbose=False)["input_ids"]:
                parts += [np.array(ids, dtype=np.uint16), end]
                tokens += len(ids) + 1
            batch = []
            if tokens >= limit:
                break
    for ids in tokenizer(batch, verbose=False)["input_ids"] if batch else []:
        parts += [np.array(ids, dtype=np.uint16), end]
    return np.concatenate(parts)


def windows(stream: np.ndarray) -> torch.Tensor:
    """Cut the stream into rows of CONTEXT tokens, shape `(windows, CONTEXT)`."""
    rows = len(stream) // CONTEXT
    return torch.from_numpy(stream[: rows * CONTEXT].astype(np.int64)).view(rows, CONTEXT)


def build_model(vocab_size: int, end: int) -> GlmForCausalLM:
    """Return the randomly initialised model: about 5.3 M parameters, embeddings tied."""
    config = GlmConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        attention_bias=False,
        tie_word_embeddings=True,
        pad_token_id=end,
        eos_token_id=end,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    return GlmForCausalLM(config)


def optimizers(model: GlmForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def held_out_loss(model: Any, rows: torch.Tensor, batch: int) -> float:
    """Return the mean loss in nats per token over held-out windows."""
    model.eval()
    losses: list[float] = []
    for first in range(0, len(rows) - batch + 1, batch):
        inputs = rows[first : first + batch]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(model(input_ids=inputs, labels=inputs, use_cache=False).loss.item())
    model.train()
    return sum(losses) / len(losses)


def write_card(folder: Path) -> None:
    """Write the model card from what the folder holds, and the hashes by which a damaged copy is found."""
    with open(folder / "training-log.csv", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    measured = [row for row in log if row["held_out_loss"]]
    losses = "\n".join(f"| {int(row['tokens']):,} | {row['loss']} | {row['held_out_loss']} |" for row in measured)
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
        held_out=measured[-1]["held_out_loss"],
        losses=losses,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    files = sorted(file for file in folder.iterdir() if file.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def main(
    corpus: Path,
    out: Annotated[Path, typer.Option(help="Folder for the finished base.")],
    tokens: Annotated[int, typer.Option(help="Training tokens, each seen once.")] = 8_500_000,
    batch: Annotated[int, typer.Option(help="Windows of 1,024 tokens a step.")] = 4,
    vocab_size: int = 8192,
    learning_rate: float = 3e-3,
    seed: int = 42,
) -> None:
    """Train tokenizer and model, and write them with the log of losses."""
    torch.manual_seed(seed)
    started = time.monotonic()
    documents = read_documents(corpus)
    sample = [document for document, _ in zip(documents, range(30_000), strict=False)]
    tokenizer = train_tokenizer(iter(sample), vocab_size)

    documents = read_documents(corpus)
    held_out = windows(encode_documents((next(documents) for _ in range(HELD_OUT_DOCUMENTS)), tokenizer, 10**9))
    rows = windows(encode_documents(documents, tokenizer, tokens))
    steps = min(tokens // CONTEXT, len(rows)) // batch
    print(f"{len(rows)} windows, {steps} steps, {time.monotonic() - started:.0f} s so far", flush=True)

    model = build_model(vocab_size, tokenizer.eos_token_id)
    print(f"{model.num_parameters():,} parameters", flush=True)
    compiled: Any = torch.compile(model)
    stepping: list[Any] = optimizers(model, learning_rate)
    schedules = [
        get_scheduler("cosine_with_min_lr", o, steps // 50, steps, scheduler_specific_kwargs={"min_lr_rate": 0.02})
        for o in stepping
    ]
    order = torch.randperm(len(rows))
    log: list[tuple[int, float, str, float]] = []
    window_loss = torch.zeros(())
    for step in range(steps):
        inputs = rows[order[step * batch : (step + 1) * batch]]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(stepping, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        window_loss += loss.detach()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            since = step % 50 + 1
            valid = held_out_loss(compiled, held_out, batch) if (step + 1) % 500 == 0 or step + 1 == steps else None
            seen, mean = (step + 1) * batch * CONTEXT, window_loss.item() / since
            seconds = time.monotonic() - started
            log.append((seen, round(mean, 4), "" if valid is None else f"{valid:.4f}", round(seconds)))
            print(f"tokens {seen:>11,}  loss {mean:.4f}  held-out {log[-1][2] or '-':>6}  {seconds:.0f} s", flush=True)
            window_loss.zero_()

    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    with open(out / "training-log.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["tokens", "loss", "held_out_loss", "seconds"])
        writer.writerows(log)
    write_card(out)


if __name__ == "__main__":
    typer.run(main)
