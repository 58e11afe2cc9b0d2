"""Pre-training of a base: what is read, what is asked, what a loss is, and that a training that was killed goes on."""

import gzip
import json
import lzma
import random
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import pretrain_base  # noqa: E402
from pretraining import training  # noqa: E402
from pretraining.corpus import Paper, read_papers  # noqa: E402
from pretraining.documents import APART, LIFE, WORD, Asker, Piece, is_life, make_documents  # noqa: E402
from pretraining.embeddings import count_embeddings  # noqa: E402
from pretraining.model import Design, Worker, build_model, rate, sample_vocabulary  # noqa: E402
from pretraining.rows import Rows, batches_forever, encode, load_batch, plan_batches, train_tokenizer  # noqa: E402

FIELDS = {
    "arxiv": [
        "galaxy",
        "telescope",
        "redshift",
        "neural",
        "network",
        "training",
        "image",
        "pixel",
        "segmentation",
        "transformer",
        "gradient",
    ],
    "asreview:Triptans": [
        "patient",
        "migraine",
        "sumatriptan",
        "placebo",
        "dose",
        "headache",
        "trial",
        "adverse",
        "efficacy",
        "nausea",
        "oral",
    ],
    "bio_ner": [
        "protein",
        "kinase",
        "promoter",
        "expression",
        "mouse",
        "cells",
        "binding",
        "transcription",
        "phosphorylation",
        "plasmid",
    ],
}
SIZES = {"vocabulary": 400, "width": 32, "layers": 2, "feed_forward": 32, "heads": 1, "kv_heads": 1}


def papers(count: int) -> list[Paper]:
    rng = random.Random(0)
    made = []
    for number in range(count):
        source = rng.choice(list(FIELDS))
        words = [rng.choice(FIELDS[source]) for _ in range(40)]
        title = "" if source == "bio_ner" else f"On {' '.join(words[:3])} {number}"
        made.append(Paper(" ".join(words) + ".", title, source))
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "papers.jsonl"
    lines = [{"abstract": paper.text, "title": paper.title, "source": paper.source} for paper in papers(600)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def test_a_folder_of_any_text_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one\nline two\n\n\nsecond text\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "third", "title": "T"}\n')
    with lzma.open(tmp_path / "deep" / "c.txt.xz", "wt", encoding="utf-8") as file:
        file.write("fourth")
    (tmp_path / "z.bin").write_bytes(b"\xff")
    assert list(read_papers(tmp_path)) == [
        Paper("one\nline two"),
        Paper("second text"),
        Paper("third", "T"),
        Paper("fourth"),
    ]


def test_a_corpus_is_read_lazily(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 5}\n', encoding="utf-8")
    reading = read_papers(tmp_path)
    assert next(reading) == Paper("good")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: expected an object"):
        next(reading)


def test_what_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected .jsonl or .txt files"):
        next(read_papers(tmp_path))


@pytest.fixture(scope="module")
def asker() -> Asker:
    asker = Asker(random.Random(1))
    for paper in papers(APART * 3):
        asker.remember(paper)
    return asker


def test_documents_take_turns_and_are_the_same_for_a_seed() -> None:
    made = list(make_documents(papers(400), 0.5, 3))
    assert made == list(make_documents(papers(400), 0.5, 3)) != list(make_documents(papers(400), 0.5, 4))
    asked = [document for document in made if len(document) > 1]
    assert len(made) == 400 and 100 < len(asked) < 250
    assert all(not document[0].answer and document[0].text.endswith(("\n", ".")) for document in asked)
    assert all(len(document) == 1 for document in make_documents(papers(100), 0.0, 3))


def test_no_question_has_the_wording_of_a_task_that_ships() -> None:
    made = list(make_documents(papers(2000), 1.0, 3))
    for task in (SCRIPTS.parent / "prompts").glob("*.yaml"):
        instruction = task.read_text(encoding="utf-8").split('instruction: "')[1].split('"')[0][:60]
        assert not any(instruction in piece.text for document in made for piece in document)


def claims(asker: Asker, ask: str, paper: Paper, count: int = 40) -> list[tuple[str, str]]:
    """Return instruction with text, and answer, of questions about a paper, asked with yes and no."""
    made = []
    while len(made) < count:
        document = getattr(asker, ask)(paper)
        question, answer = document[0].text, document[1]
        if answer.text in ("yes", "no") and question.index("yes") < question.index("no"):
            assert answer.answer and question.endswith("\n") and len(document) == 2
            made.append((question, answer.text))
    return made


@pytest.mark.parametrize("number", range(4))
def test_a_title_matches_where_it_is_the_papers_own(asker: Asker, number: int) -> None:
    paper = [paper for paper in papers(40) if paper.title][number]
    for question, answer in claims(asker, "_match", paper, 10):
        assert (paper.title in question) == (answer == "yes")


def test_a_field_is_that_of_the_source(asker: Asker) -> None:
    for paper in papers(12):
        for question, answer in claims(asker, "_field", paper, 4):
            about_life = any(claim in question for claim in LIFE)
            assert (answer == "yes") == (is_life(paper) == about_life)
    assert not is_life(Paper("", source="asreview:Kitchenham_2010")) and not is_life(Paper("", source="arxiv"))


def test_words_are_taken_out_of_their_own_text_only(asker: Asker) -> None:
    paper = next(paper for paper in papers(40) if paper.source == "arxiv")
    for _ in range(20):
        document = asker._words(paper)
        if not document:
            continue
        shown = set(WORD.findall(document[0].text.split("abstract:")[-1].split("text:")[-1].lower()))
        by_answer: dict[str, set[str]] = {}
        for word, answer in zip(document[1::2], document[2::2], strict=True):
            assert answer.answer and not word.answer
            by_answer.setdefault(answer.text, set()).add(word.text.strip())
        own = [words for words in by_answer.values() if words & set(WORD.findall(paper.text))]
        assert len(own) == 1 and own[0] <= set(WORD.findall(paper.text)) and not own[0] & shown


def test_the_chosen_title_is_named(asker: Asker) -> None:
    paper = next(paper for paper in papers(40) if paper.title)
    for _ in range(20):
        question, answer = asker._choice(paper)
        before = question.text.split(paper.title)[0].split()[-1].strip(":/")
        assert before == answer.text


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([[Piece(paper.text + paper.title + "01 yes no")] for paper in papers(200)], 400)


def test_answers_and_the_end_behind_them_are_marked(tokenizer) -> None:
    rows = encode([[Piece("mouse cells\n"), Piece("yes", answer=True)], [Piece("plain")]], tokenizer)
    first, second = (
        [
            (tokenizer.decode(token), bool(answer))
            for token, answer in zip(rows.ids[a:b], rows.answers[a:b], strict=True)
        ]
        for a, b in zip(rows.starts, rows.starts[1:], strict=False)
    )
    assert "".join(text for text, answer in first if answer) == "yes<|endoftext|>"
    assert "".join(text for text, answer in first if not answer) == "mouse cells\n"
    assert "".join(text for text, _ in second) == "plain<|endoftext|>" and not any(answer for _, answer in second)


def test_batches_hold_one_document_a_row_and_all_answers() -> None:
    lengths = [70, 130, 63, 64, 100, 5]
    starts = np.cumsum([0, *lengths])
    answers = np.zeros(starts[-1], dtype=bool)
    answers[starts[5] - 2 : starts[5]] = True
    rows = Rows(np.arange(starts[-1], dtype=np.uint16), answers, starts)
    plan = plan_batches(rows, 128, seed=1)
    # The document with answers is filled up, others lose their ends; a row shorter than all widths is kept whole.
    placed = {int(document): width for width, some in plan for document in some}
    assert placed[4] == 128 and placed[1] == 128 and set(placed.values()) == {64, 128}
    batch = load_batch(rows, 128, np.array([4]), 8.0)
    assert batch.ids[0, :100].tolist() == list(range(starts[4], starts[5]))
    assert batch.weights[0, 97:102].tolist() == [1, 8, 8, 0, 0]
    again = [some for _, some in islice(batches_forever(rows, 128, 1), len(plan) * 2)]
    assert [list(a) for a in again[: len(plan)]] == [list(some) for _, some in plan]


def test_a_sampled_vocabulary_is_right_on_average() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(300), torch.tensor([5, 9, 5])
    whole = torch.logsumexp(logits, 0).exp()
    sums = []
    for seed in range(300):
        chosen, places, added = sample_vocabulary(targets, 300, 40, torch.Generator().manual_seed(seed))
        assert len(chosen.unique()) == 40 and chosen[places].tolist() == [5, 9, 5]
        sums.append(torch.logsumexp(logits[chosen] + added, 0).exp())
    assert torch.stack(sums).mean().item() == pytest.approx(whole.item(), rel=0.02)
    chosen, _, added = sample_vocabulary(targets, 300, 1000, torch.Generator())
    assert len(chosen) == 300 and not added.any()


def test_the_rate_rises_stays_and_falls() -> None:
    rates = [rate(step, 100, 0.1, 0.2) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:81] == [1.0] * 72 and rates[90] == pytest.approx(0.5)
    assert 0 < rates[99] <= 0.051


def test_the_loss_is_transformers_own(tokenizer) -> None:
    model = build_model(Design(**SIZES), tokenizer.eos_token_id, 0)
    worker = Worker(model, torch.device("cpu"), 400, 0)
    rows = encode([[Piece(paper.text)] for paper in papers(8)], tokenizer)
    batch = load_batch(rows, 64, np.arange(4), 1.0)
    loss = worker.backward([batch], 0)
    expected = model(input_ids=batch.ids, labels=batch.ids.masked_fill(batch.weights == 0, -100)).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=5e-3)
    assert worker.measure([batch])[0] == pytest.approx(expected.item(), rel=5e-3)
    mine = model.model.layers[0].mlp.down_proj.weight.grad.clone()
    model.zero_grad()
    worker.backward([batch], 0)
    again = model.model.layers[0].mlp.down_proj.weight.grad
    assert torch.nn.functional.cosine_similarity(mine.flatten(), 2 * again.flatten(), dim=0) > 0.99


def test_threads_compute_the_same_gradient(tokenizer) -> None:
    rows = encode([[Piece(paper.text)] for paper in papers(24)], tokenizer)
    batches = [load_batch(rows, 64, np.arange(first, first + 4), 1.0) for first in (0, 4, 8)]
    found = []
    for copies in (1, 2):
        model = build_model(Design(**SIZES), tokenizer.eos_token_id, 0)
        loss = Worker(model, torch.device("cpu"), 128, 0, copies).backward(batches, 0)
        found.append((loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))
    (one, plain), (two, threaded) = found
    assert two == pytest.approx(one, rel=1e-6)
    assert ((threaded - plain).norm() / plain.norm()).item() < 0.01


def test_tokens_that_meet_begin_near_each_other(tokenizer) -> None:
    rows = encode([[Piece(paper.text)] for paper in papers(400)], tokenizer)
    vectors = count_embeddings(rows, 400, 16, 0.02, 1)
    assert vectors.shape == (400, 16) and vectors.std().item() == pytest.approx(0.02, rel=0.1)

    def of(word: str) -> torch.Tensor:
        return vectors[tokenizer(f" {word}")["input_ids"][-1]]

    near = torch.nn.functional.cosine_similarity(of("migraine"), of("placebo"), dim=0)
    far = torch.nn.functional.cosine_similarity(of("migraine"), of("galaxy"), dim=0)
    assert near > far + 0.2


def run(corpus: Path, out: Path, **options) -> None:
    pretrain_base.main(
        corpus,
        out,
        **{
            **SIZES,
            "resume": False,
            "tokens": 30 * 512,
            "corpus_tokens": 0,
            "questions": 0.5,
            "answer_weight": 8.0,
            "counted": True,
            "sampled": 128,
            "batch_tokens": 256,
            "step_batches": 2,
            "threads": 2,
            "learning_rate": 3e-3,
            "embedding_share": 0.3,
            "warmup": 0.1,
            "decay": 0.3,
            "device": "cpu",
            "seed": 1,
            **options,
        },
    )


def test_a_training_that_was_killed_ends_as_the_unbroken_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain_base, "HELD_OUT_PAPERS", 100)
    run(corpus, tmp_path / "whole")
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1)
    steps = iter(range(17))
    backward = Worker.backward
    monkeypatch.setattr(Worker, "backward", lambda *arguments: (next(steps), backward(*arguments))[1])
    # What a kill looks like from inside: the seventeen steps are over and nothing is cleaned up.
    with pytest.raises(StopIteration):
        run(corpus, tmp_path / "broken")
    monkeypatch.setattr(Worker, "backward", backward)
    with pytest.raises(Exception, match="--resume"):
        run(corpus, tmp_path / "broken")
    run(corpus, tmp_path / "broken", resume=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]


def test_the_folder_loads_with_transformers_and_is_described(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(pretrain_base, "HELD_OUT_PAPERS", 100)
    run(corpus, tmp_path / "base", tokens=60 * 512)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    ids = tokenizer("migraine \x00 \u4e2d", return_tensors="pt")
    assert tokenizer.decode(ids["input_ids"][0]) == "migraine \x00 \u4e2d" and model(**ids).logits.isfinite().all()
    log = (tmp_path / "base" / "training-log.csv").read_text(encoding="utf-8").splitlines()
    first, last = (dict(zip(log[0].split(","), line.split(","), strict=True)) for line in (log[1], log[-1]))
    assert float(last["held_out_loss"]) < float(first["loss"]) and 0 <= float(last["held_out_answers"]) <= 1
    card = (tmp_path / "base" / "README.md").read_text(encoding="utf-8")
    assert f"| {int(last['tokens']):,} | {last['loss']} | {last['held_out_loss']} |" in card
    sums = (tmp_path / "base" / "SHA256SUMS").read_text(encoding="utf-8")
    assert "model.safetensors" in sums and "README.md" in sums


def test_the_base_that_ships_has_at_most_30_mb() -> None:
    folder = SCRIPTS.parent / "llm_clf" / "models" / "glm-nano"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 30e6
