"""What is compared with: bases, and rows behind a prompt, as texts and as tokens."""

import csv
import math
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_check import SIZES, build_base, drawn_weights

from comparison.ours import settings_of
from comparison.work import Job, Row, Work
from llm_clf.config import DEFAULT_BASE, ModelSettings
from llm_clf.engine.tokens import tokenize_text
from llm_clf.engine.training import _rows_of_step
from llm_clf.models.bases import SHIPPED
from llm_clf.models.devices import DTYPES
from llm_clf.models.memory import BaseShape, base_shape, empty_model
from llm_clf.prompting.tasks import load_task

PAPERS = Path(__file__).resolve().parent.parent.parent / "data" / "papers.csv"
TASK = "medical_paper"
TITLE_WORDS = 12
# About 350 tokens of glm-nano with the short instruction, as the rows of docs/contest.md have; one in twenty has 600.
MEAN_WORDS, SPREAD_WORDS, MIN_WORDS = 180, 64, 20
BASES = (*SIZES, DEFAULT_BASE)


@dataclass(frozen=True, slots=True)
class Text:
    """A labelled row before any prompt."""

    input: str
    label: str


def prepare_base(place: Work, name: str, dtype: str) -> BaseShape:
    """Write a base with glm-nano's tokenizer, without a chat template, and return its shape.

    Args:
        place: Where to.
        name: One of BASES; a random one of a size, or glm-nano.
        dtype: Of the weights.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    if name == DEFAULT_BASE:
        shutil.copytree(SHIPPED, place.base, ignore=shutil.ignore_patterns("chat_template*"))
    else:
        size = replace(SIZES[name], vocabulary=max(SIZES[name].vocabulary, len(tokenizer)))
        # Not on a card: its memory belongs to the tools.
        device = torch.device("cpu")
        base = build_base(size, dtype, dtype, device, drawn_weights(size, DTYPES[dtype], device))
        for config in (base.config, base.generation_config):
            config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        base.save_pretrained(place.base)
    # Raw text is what every tool can be given alike.
    tokenizer.chat_template = None
    tokenizer.save_pretrained(place.base)
    return base_shape(empty_model(ModelSettings(name=str(place.base))))


def read_texts(file: Path) -> list[Text]:
    """Return the labelled rows of a CSV file with the columns title, abstract and label, shuffled."""
    task = load_task(TASK)
    with file.open(newline="", encoding="utf-8") as opened:
        rows = [row for row in csv.DictReader(opened) if row["label"]]
    random.Random(0).shuffle(rows)
    return [Text(task.render(row), row["label"]) for row in rows]


def make_texts(count: int) -> list[Text]:
    """Return rows of words drawn from PAPERS, about as long as titles with abstracts of papers."""
    task, draw = load_task(TASK), random.Random(0)
    words = " ".join(text.input for text in read_texts(PAPERS)).split()
    texts = []
    for number in range(count):
        drawn = draw.choices(words, k=max(MIN_WORDS, round(draw.gauss(MEAN_WORDS, SPREAD_WORDS))))
        cells = {"title": " ".join(drawn[:TITLE_WORDS]), "abstract": " ".join(drawn[TITLE_WORDS:])}
        texts.append(Text(task.render(cells), str(number % 2)))
    return texts


def make_rows(texts: list[Text], base: Path, guideline: int) -> list[Row]:
    """Return rows behind the instruction, as tokens of a base.

    Args:
        texts: The rows.
        base: Whose tokenizer.
        guideline: About how many tokens the instruction has with a labelling guideline; 0: the contest's own, alone.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    instruction = _instruction(tokenizer, guideline)
    prompts = tokenize_text(tokenizer, [f"{instruction}\n{text.input}\n" for text in texts])
    answers = tokenize_text(tokenizer, [text.label for text in texts])
    return [
        Row(prompt, [*answer, tokenizer.eos_token_id], instruction, f"{text.input}\n", text.label)
        for text, prompt, answer in zip(texts, prompts, answers, strict=True)
    ]


def _instruction(tokenizer: Any, guideline: int) -> str:
    text = load_task(TASK).instruction
    draw = random.Random(1)
    topics = ["drugs", "surgery", "nursing", "imaging", "genes", "crops", "robots", "batteries", "soil", "statistics"]
    while len(tokenize_text(tokenizer, [text])[0]) < guideline:
        one, other = draw.choice(topics), draw.choice(topics)
        text += f" Papers about {one} count as {draw.choice('10')} unless {other} is only an example in the abstract."
    return text


def ordered(base: Path, rows: list[Row], job: Job) -> Job:
    """Return the job with the order in which llm-clf trains on the rows, for all tools to do the same."""
    train = settings_of(base, job).train
    steps = math.ceil(len(rows) / train.batch_size) * train.epochs
    return replace(job, order=[row for step in range(steps) for row in _rows_of_step(step, len(rows), train)])
