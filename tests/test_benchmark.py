"""The comparison with other tools: its arithmetic by hand, and ours and `generate` at the smallest size."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import benchmark  # noqa: E402
from comparison import dropout, figures, growth, learning, ours, with_generate  # noqa: E402
from comparison.inputs import make_rows, make_texts, ordered, prepare_base, read_texts  # noqa: E402
from comparison.processes import Tools, last_line  # noqa: E402
from comparison.report import Report  # noqa: E402
from comparison.speed import Bench, compare_speed  # noqa: E402
from comparison.tasks import FUNCTIONS, TASKS, environment_of, kind_of  # noqa: E402
from comparison.work import STEP_ROWS, Job, Row, Work  # noqa: E402
from flops import useful_flops  # noqa: E402

from llm_clf.engine.label_words import LabelWords  # noqa: E402
from llm_clf.engine.tokens import TrainingExample  # noqa: E402
from llm_clf.models.memory import BaseShape  # noqa: E402

# One layer of 10 + 20 weights, 3 numbers of queries, and a vocabulary of 100 on 2.
SMALL = BaseShape(
    parameters=230, linears=((2, 5), (5, 4)), layers=1, hidden=2, attention=3, intermediate=4, vocabulary=100
)
COUNT = 2 * STEP_ROWS


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Return a tiny base with rows of one prompt."""
    work = Work(tmp_path_factory.mktemp("work"))
    prepare_base(work, "tiny", "fp32")
    rows = make_rows([replace(text, input=text.input[:120]) for text in make_texts(COUNT)], work.base, 0)
    work.give(rows, ordered(work.base, rows, Job([], dtype="fp32")))
    return work


# --- Arithmetic


def test_flops_by_hand() -> None:
    # 5 tokens x 30 weights, 1 place x 200 weights; 15 pairs of tokens x 3 numbers, for scores and for values.
    assert useful_flops(SMALL, [5], places=1, backward=False) == 2 * 5 * 30 + 2 * 200 + 4 * 15 * 3
    assert useful_flops(SMALL, [5], places=1, backward=True) == 2 * (2 * 5 * 30 + 2 * 200) + 3 * 4 * 15 * 3


def test_shared_tokens_are_read_once() -> None:
    apart = useful_flops(SMALL, [5, 6], places=1, backward=False)
    together = useful_flops(SMALL, [5, 6], places=1, backward=False, shared=4)
    # The second row reads 4 tokens less, which see 10 pairs.
    assert apart - together == 2 * 4 * 30 + 4 * 10 * 3


def row(size: int, answer: list[int]) -> Row:
    return Row([7, 7, *range(10, 8 + size)], answer)


def test_amounts() -> None:
    rows = [row(4 + number, [5 + number % 2, 0]) for number in range(COUNT)]
    job = Job(order=list(reversed(range(COUNT))))
    amount = figures.training_amount(SMALL, rows, job)
    # The step that is not timed has the longer rows.
    lengths = [4 + number + 1 for number in range(STEP_ROWS)]
    shared = 2 + 2
    assert amount.rows == STEP_ROWS and amount.tokens == sum(lengths) + STEP_ROWS
    assert amount.flops == useful_flops(SMALL, lengths, places=2, backward=True, shared=shared - 1)
    assert amount.given == sum(len(one.prompt) + 2 for one in rows)
    # Two labels of a token and the end: two nodes behind each prompt.
    amount = figures.prediction_amount(SMALL, rows)
    lengths = [len(one.prompt) + 2 for one in rows]
    assert amount.rows == COUNT
    assert amount.flops == useful_flops(SMALL, lengths, places=3, backward=False, shared=shared - 1)


def timed(task: str, repeat: int, seconds: float, **more: Any) -> dict[str, Any]:
    amount = figures.Amount(rows=16, tokens=1600, flops=800, given=3200)
    facts = {"device": "cpu", "base_dtype": "torch.bfloat16", "trained_weights": 3, "peak_bytes": 10**9}
    return {"task": task, "repeat": repeat, **figures.with_rates({"seconds": seconds, **facts, **more}, amount)}


def matmul(repeat: int, rate: float) -> dict[str, Any]:
    return {"task": "matmul", "repeat": repeat, "flops_per_second": rate}


RUNS = [
    *(matmul(repeat, 1000) for repeat in (1, 2, 3)),
    *(timed("ours: train", repeat, seconds) for repeat, seconds in ((1, 2.0), (2, 1.0), (3, 4.0))),
    *(timed("TRL: train", repeat, seconds) for repeat, seconds in ((1, 4.0), (2, 4.0), (3, 8.0))),
    {"task": "LLaMA-Factory: train", "repeat": 1, "error": "Traceback\nKeyError: 'x'\nended with 1"},
]


def test_summary() -> None:
    ours, trl, broken = figures.summarise(RUNS)
    assert (ours.task, ours.rows, ours.ratio) == ("ours: train", 16, None)
    assert ours.rate == figures.Spread(8, 4, 16) and ours.tokens == figures.Spread(800, 400, 1600)
    assert ours.share == figures.Spread(0.4, 0.2, 0.8)
    # Repeat by repeat: 2, 4 and 2 times as fast.
    assert trl.ratio == figures.Spread(2, 2, 4)
    assert broken.error is not None and broken.rows is None and last_line(broken.error) == "KeyError: 'x'"


def test_ratios_are_by_tokens_where_rows_differ() -> None:
    few = {**timed("TRL: train", 1, 2.0), "rows_per_second": 1.0}
    assert figures.summarise([timed("ours: train", 1, 2.0), few])[1].ratio == figures.Spread(1, 1, 1)


def test_tools_that_do_something_else_are_named() -> None:
    odd = timed("TRL: train", 1, 2.0, device="cuda", trained_weights=4, tokens_seen=3000)
    assert figures.differences([timed("ours: train", 1, 2.0), odd, odd]) == [
        "TRL: train: device cuda, ours cpu",
        "TRL: train: trained_weights 4, ours 3",
        "TRL: train: read 3,000 tokens where 3,200 were given",
    ]


def test_spread_in_words() -> None:
    assert figures.Spread(2, 1, 3).text(".1f") == "2.0 (1.0–3.0)" and figures.Spread(2, 2, 2).text(".1f") == "2.0"


# --- Rows and prompts


def test_prompts(work: Work) -> None:
    texts = make_texts(40)
    short, long = (make_rows(texts, work.base, tokens) for tokens in (0, 500))
    size = len(long[0].prompt) - len(short[0].prompt)
    assert all(len(one.prompt) - len(other.prompt) == size for one, other in zip(long, short, strict=True))
    assert 500 - 50 < size < 500 + 50
    mean = sum(len(one.prompt) for one in make_rows(make_texts(400), work.base, 0)) / 400
    assert mean == pytest.approx(350, rel=0.05)
    assert {tuple(one.answer) for one in short} == {tuple(one.answer) for one in long}
    assert short[0].output == "0" and short[0].answer[-1] == 0


def test_rows_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("title,abstract,label\n" + "".join(f"t{n},a{n},{n % 2}\n" for n in range(9)) + "none,none,\n")
    texts = read_texts(file)
    assert sorted(text.input for text in texts) == [f"title:t{n},abstract:a{n}" for n in range(9)]
    assert texts == read_texts(file) and [text.input[7] for text in texts] != list("012345678")


def test_the_order_has_every_row_once_an_epoch(work: Work) -> None:
    job = ordered(work.base, work.rows(), replace(work.job(), epochs=2))
    first, second = job.order[:COUNT], job.order[COUNT:]
    assert sorted(first) == sorted(second) == list(range(COUNT)) and first != second


# --- Ours and generate


def test_ours_trains_on_the_rows_that_others_get_and_measures_their_loss(work: Work, tmp_path: Path) -> None:
    job = replace(work.job(), initial=str(tmp_path / "initial"), adapter=str(tmp_path / "adapter"))
    work.give(work.rows(), job)
    found = ours.train(work)
    assert found["stretches"] == 1 and found["seconds"] > 0 and len(found["losses"]) == 2
    assert found["base_dtype"] == "torch.float32" and found["trained_weights"] > 0
    assert found["tokens_seen"] == figures.training_amount(SMALL, work.rows(), job).given
    # The first step is done by an adapter that changes nothing yet.
    model = ours.load_model(ours.settings_of(work.base, job).model, dtype="fp32", device=torch.device("cpu"))
    step = [TrainingExample(one.prompt, one.answer, 1.0) for one in work.rows_in_order()[:STEP_ROWS]]
    loss = LabelWords([[one.answer] for one in work.rows_in_order()]).padded_loss(model, step, 0).item() / STEP_ROWS
    assert found["losses"][0] == pytest.approx(loss, rel=1e-5)
    assert (tmp_path / "initial" / "adapter_config.json").is_file()
    # Again: it begins anew, with the same weights.
    assert ours.train(work)["losses"] == found["losses"]
    with_adapter = ours.predict(work)["log_loss"]
    work.give(work.rows(), replace(job, adapter=None))
    assert ours.predict(work)["log_loss"] != with_adapter


@pytest.mark.parametrize("predict", [ours.predict, with_generate.one_row, with_generate.batched])
def test_predictions(work: Work, predict: Any) -> None:
    work.give(work.rows(), replace(work.job(), initial=None, adapter=None))
    found = predict(work)
    assert found["seconds"] > 0 and found["stretches"] == 1
    assert found["device"] in ("cpu", "cuda") and found["trained_weights"] == 0


def test_generate_writes_as_many_tokens_as_a_label_has(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GlmForCausalLM

    written = []
    generate = GlmForCausalLM.generate

    def watched(model: Any, **arguments: Any) -> Any:
        done = generate(model, **arguments)
        written.append((len(done), done.shape[1] - arguments["input_ids"].shape[1]))
        return done

    monkeypatch.setattr(GlmForCausalLM, "generate", watched)
    with_generate.batched(work)
    assert written == [(1, 2), (16, 2), (16, 2)]


# --- Processes


def bench(work: Work, pythons: dict[str, str], out: Path, limit: float = 120) -> Bench:
    tools = Tools(pythons, limit)
    return Bench(work, SMALL, tools, Job([], dtype="fp32"), 1, Report(out, {"cpu": "x"}, {"count": COUNT}))


@pytest.mark.slow
def test_a_comparison_in_processes(
    work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: no trl' >&2\nexit 3\n")
    broken.chmod(0o755)
    out = tmp_path / "found.json"
    made = bench(work, {"ours": sys.executable, "trl": str(broken), "llamafactory": "/no/such/python"}, out)
    tasks = ["TRL: train", "LLaMA-Factory: predict", "ours: predict"]
    lines = compare_speed(made, work.rows(), tasks, peer_count=STEP_ROWS, guideline=0)
    assert [line.error is None for line in lines] == [False, False, True]
    assert lines[2].rate is not None and lines[2].share is not None and lines[2].peak > 10**8
    printed = capsys.readouterr()
    assert "TRL: train failed: ImportError: no trl" in printed.out and "No such file" in printed.out
    assert f"other tools get the first {STEP_ROWS}" in printed.out
    report = json.loads(out.read_text())
    assert [run["task"] for run in report["speed"]] == ["matmul", *tasks]
    assert report["versions"]["ours"]["torch"] == torch.__version__
    assert report["machine"] == {"cpu": "x"} and report["settings"] == {"count": COUNT}


def test_a_tool_that_hangs_is_stopped(work: Work, tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    found = Tools({"trl": str(slow)}, limit=0.3).run("TRL: train", work)
    assert "was stopped after 0 seconds" in found["error"]


def test_every_task_has_its_environment_and_kind() -> None:
    assert {environment_of(task) for task in FUNCTIONS} == {"ours", "trl", "llamafactory"}
    assert environment_of("TRL: train") == "trl" and environment_of("generate, one row: predict") == "ours"
    assert {kind_of(task) for task in TASKS} == {"train", "predict"}
    assert not Tools({"ours": sys.executable}, 1).has("TRL: train")


# --- Other comparisons


def learned(way: str, seed: int, losses: list[float], log_loss: float) -> learning.Learned:
    return learning.Learned("bf16", seed, way, losses, log_loss)


def test_learning_in_words() -> None:
    found = [
        *(learned(learning.OURS, seed, [2.0, 1.0], 0.5) for seed in (1, 2)),
        *(learned(learning.PLAIN, seed, [2.25, 1.5], 0.75) for seed in (1, 2)),
        learned(learning.TRL, 1, [2.0, 0.875], 0.25),
        learned(learning.TRL, 2, [2.0, 1.0], 0.75),
    ]
    assert learning.differences(found, learning.TRL) == [[0, 0.125], [0, 0]]
    lines = [" ".join(line.split()) for line in learning.learning_text(found).splitlines()]
    assert "2 1.000000 1.500000 0.875000" in lines
    assert "ours, plain 2.5e-01 5.0e-01 3.8e-01" in lines and "TRL 0.0e+00 1.2e-01 3.1e-02" in lines
    assert "TRL 0.5000 0.3536 0.2500 0.7500" in lines
    # Where TRL failed, the others' seed does not count either.
    assert "ours 0.5000 - 0.5000" in [" ".join(line.split()) for line in learning.learning_text(found[:5]).splitlines()]


def test_growth_varies_one_thing_at_a_time() -> None:
    tried = growth.shapes_to_try(32)
    assert [shape.rows for _, shape in tried["rows"]] == [32, 64, 128, 256]
    assert {shape.length for _, shape in tried["labels"]} == {300}
    rows = growth.made_rows(growth.Shape(rows=64, length=100, labels=32, shared=20), 500)
    assert len({tuple(one.answer) for one in rows}) == 32
    assert figures.common_beginning(one.prompt for one in rows)[:20] == rows[0].prompt[:20]
    assert all(20 + 50 <= len(one.prompt) <= 20 + 150 for one in rows)
    runs = [matmul(1, 1000), timed("ours: train", 1, 2.0), timed("ours: predict", 1, 1.0)]
    text = growth.growth_text("rows", [(32, figures.summarise(runs))])
    assert " ".join(text.splitlines()[1].split()) == "32 125.0 800 40% 1.00 GB 62.5 1,600 80% 1.00 GB"


def test_dropout_goes_on_and_compares_seed_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    accuracy = {"shared-1": 0.875, "anew-1": 0.75, "shared-2": 0.5, "anew-2": 0.75}

    def command(words: list[str]) -> dict[str, Any]:
        commands.append(words)
        if words[0] == "build-prompts":
            Path(words[words.index("--out") + 1]).mkdir(parents=True)
        if words[0] == "finetune":
            run = Path(words[words.index("--out") + 1])
            run.mkdir(exist_ok=True)
            metrics = {"accuracy": accuracy[run.name], "f1": 0.5, "log_loss": 0.1}
            (run / "metrics.json").write_text(json.dumps(metrics))
            (run / "run.json").write_text(json.dumps({"training": {"rows_per_second": 3.0}}))
        return {}

    monkeypatch.setattr(dropout, "command", command)
    monkeypatch.setattr(dropout.llm_clf, "evaluate", lambda _: {"accuracy": 0.6, "f1": 0.5, "log_loss": 0.1})
    rows = tmp_path / "rows.csv"
    rows.write_text("x")
    study = dropout.Study(rows, tmp_path / "keep", seeds=2, epochs=3, overrides=("train.batch_size=8",))
    found = dropout.compare_dropout(study, Report(None, {}, {}))
    assert [(one["seed"], one["valid_accuracy"]) for one in found] == [(1, 0.875), (1, 0.75), (2, 0.5), (2, 0.75)]
    assert [words[0] for words in commands] == ["build-prompts", *["finetune", "predict"] * 4]
    trained = [words for words in commands if words[0] == "finetune"]
    assert all("--resume" in words and "train.epochs=3" in words and "lora.dropout=0.1" in words for words in trained)
    assert [("speed.shared_prefix=true" in words) for words in trained] == [True, False, True, False]
    last = capsys.readouterr().out.rstrip().splitlines()
    line = next(" ".join(text.split()) for text in reversed(last) if text.startswith("valid accuracy"))
    assert line == "valid accuracy 0.6875 ± 0.2652 0.7500 ± 0.0000 -0.0625 ± 0.1875"
    # Other settings are another comparison; the same ones find their prompts.
    assert replace(study, epochs=2).folder != study.folder
    dropout.compare_dropout(study, Report(None, {}, {}))
    assert [words[0] for words in commands].count("build-prompts") == 1


def test_a_failed_run_leaves_its_pair_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "command", lambda words: {"error": "out of memory\nended with 1"})
    (tmp_path / "rows.csv").write_text("x")
    study = dropout.Study(tmp_path / "rows.csv", tmp_path, seeds=1, epochs=1, overrides=())
    (study.folder / "prompts").mkdir(parents=True)
    found = dropout.compare_dropout(study, Report(None, {}, {}))
    assert all("error" in one for one in found) and "no seed" in dropout.dropout_text(found)


@pytest.mark.parametrize("words", [["--count", "40"], ["--peer-count", "16"], ["--only", "no such tool"]])
def test_wrong_arguments_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        benchmark.parse(words)
    assert refusal.value.code == 2


def test_arguments() -> None:
    given = benchmark.parse(["--guideline", "0,1500", "--count", "64", "--peer-count", "32", "--only", "TRL: train"])
    assert (given.guideline, given.count, given.peer_count, given.only) == ([0, 1500], 64, 32, ["TRL: train"])
    assert benchmark.parse([]).peer_count == 256 and benchmark.parse([]).only == list(TASKS)
