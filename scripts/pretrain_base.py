"""Pre-train a small base, such as the glm-nano that ships inside the package, from a file or folder of text.

    python scripts/pretrain_base.py CORPUS --out llm_clf/models/glm-nano

CORPUS: `.jsonl` with "text" or "abstract" (and "title", "source"), or `.txt`, plain or packed, or a folder of them.
Steps: train a byte-level BPE tokenizer; write all documents, a part of them with questions, as one stream of token ids;
take first embeddings from counts; train a small GLM on rows of one document each. The result is a standard transformers
folder in bf16 with a card; `training-log.csv` beside the weights holds the losses. What is needed to go on stands in
`OUT.work` until it is removed: `--resume` continues, also with more or fewer `--tokens`, which moves the decay of the
learning rate: an unfinished training is cooled down by a smaller number.
"""

import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from pretraining.card import write_card
from pretraining.corpus import read_papers
from pretraining.documents import make_documents
from pretraining.embeddings import count_embeddings
from pretraining.model import Design, Worker, build_model, build_optimizers
from pretraining.rows import Rows, encode, train_tokenizer
from pretraining.training import Plan, has_checkpoint, train, write_log
from transformers import AutoTokenizer

HELD_OUT_PAPERS = 1000
TOKENIZER_PAPERS = 30_000


def main(
    corpus: Path,
    out: Annotated[Path, typer.Option(help="Folder for the finished base.")],
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUT.work.")] = False,
    tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 10_000_000,
    corpus_tokens: Annotated[int, typer.Option(help="Tokens to read; 0 reads the whole corpus.")] = 26_000_000,
    vocabulary: int = 16384,
    width: int = 256,
    layers: int = 4,
    feed_forward: int = 512,
    heads: int = 4,
    kv_heads: int = 2,
    questions: Annotated[float, typer.Option(help="Share of documents that ask something.")] = 0.5,
    answer_weight: Annotated[float, typer.Option(help="Weight of an answer's token, against 1 of text.")] = 8.0,
    counted: Annotated[bool, typer.Option(help="Take first embeddings from counts.")] = True,
    sampled: Annotated[
        int, typer.Option(help="Tokens that a loss is computed over; its own targets are among.")
    ] = 2048,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of one forward and backward.")] = 4096,
    step_batches: Annotated[int, typer.Option(help="Of these to one optimiser step.")] = 2,
    threads: Annotated[int, typer.Option(help="Batches computed at the same time, each on a thread (CPU).")] = 2,
    learning_rate: float = 3e-3,
    embedding_share: Annotated[float, typer.Option(help="Learning rate of embeddings, as a share.")] = 0.3,
    warmup: float = 0.02,
    decay: Annotated[float, typer.Option(help="Share of all steps in which the rate falls to 0.")] = 0.25,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    seed: int = 42,
) -> None:
    """Train tokenizer and model, and write them with the log of losses."""
    work = out.with_name(f"{out.name}.work")
    if has_checkpoint(work) and not resume:
        raise typer.BadParameter(f"{work} holds a training: give --resume to go on with it, or remove it.")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer, rows, held_out = _prepared(corpus, work, vocabulary, questions, seed, corpus_tokens)
    print(f"{len(rows):,} documents, {len(rows.ids):,} tokens; {len(held_out):,} held out", flush=True)

    design = Design(vocabulary, width, layers, feed_forward, heads, kv_heads)
    model = build_model(design, tokenizer.eos_token_id, seed)
    print(f"{model.num_parameters():,} parameters", flush=True)
    if counted and not has_checkpoint(work):
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(count_embeddings(rows, vocabulary, width, 0.02, seed))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if name == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // threads))
    worker = Worker(model, torch.device(name), sampled, seed, threads if name == "cpu" else 1)
    plan = Plan(tokens, step_batches, batch_tokens, learning_rate, warmup, decay, answer_weight, seed)
    state = train(worker, build_optimizers(model, embedding_share), rows, held_out, plan, work)

    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_log(state, out / "training-log.csv")
    write_card(out)


def _prepared(
    corpus: Path, work: Path, vocabulary: int, questions: float, seed: int, limit: int
) -> tuple[Any, Rows, Rows]:
    """Return tokenizer, rows and held-out rows; made once, then read from the work folder."""
    if not (work / "tokenizer").exists():
        papers = islice(read_papers(corpus), TOKENIZER_PAPERS)
        train_tokenizer(make_documents(papers, questions, seed), vocabulary).save_pretrained(work / "tokenizer.writing")
        (work / "tokenizer.writing").rename(work / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    if not (work / "rows").exists():
        shutil.rmtree(work / "rows.writing", ignore_errors=True)
        documents = make_documents(read_papers(corpus), questions, seed)
        _save(encode(islice(documents, HELD_OUT_PAPERS), tokenizer), work / "rows.writing" / "held-out")
        _save(encode(documents, tokenizer, limit or None), work / "rows.writing" / "train")
        (work / "rows.writing").rename(work / "rows")
    return tokenizer, _load(work / "rows" / "train"), _load(work / "rows" / "held-out")


def _save(rows: Rows, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in Rows.__slots__:
        np.save(folder / f"{name}.npy", getattr(rows, name))


def _load(folder: Path) -> Rows:
    return Rows(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Rows.__slots__))


if __name__ == "__main__":
    typer.run(main)
