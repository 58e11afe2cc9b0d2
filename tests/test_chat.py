"""Conversations: scripted against a mock model, and with a real tiny base through the command line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE

import llm_clf
from llm_clf.config import ModelSettings
from llm_clf.conversation import Conversation, Write, converse
from llm_clf.errors import ArtifactError, ConfigError
from llm_clf.models.bases import load_tokenizer

MakeBase = Callable[..., Path]


class Echo:
    """Answers with the number of messages and the last one."""

    has_adapter = True
    adapter_on = True

    def answer(self, messages: list[dict[str, str]], write: Write) -> str:
        text = f"{len(messages)}:{messages[-1]['content']}:{'adapter' if self.adapter_on else 'base'}"
        for piece in (text[:2], text[2:]):
            write(piece)
        return text

    def classify(self, text: str) -> tuple[str | None, list[tuple[str, float]]]:
        if text == "bad":
            raise ConfigError("There is no task here.")
        return {"unsure": None, "a threshold": "0"}.get(text, "1"), [("0", 0.25), ("1", 0.75)]


def talk(*lines: str | type[BaseException]) -> str:
    """Return what is written when a user types the lines."""
    script: Iterator[str | type[BaseException]] = iter([*lines, EOFError])
    written: list[str] = []

    def read() -> str:
        line = next(script)
        if isinstance(line, str):
            return line
        raise line

    converse(Echo(), read, written.append)
    return "".join(written)


def test_history_is_kept_and_cleared() -> None:
    assert talk("hi", "there", "/clear", "again") == (
        "1:hi:adapter\n3:there:adapter\nThe conversation is forgotten.\n1:again:adapter\n"
    )


def test_base_switches_the_adapter_off_and_on() -> None:
    shown = talk("/base", "a", "/base", "b")
    assert shown == "The adapter is off: this is the base.\n1:a:base\nThe adapter is on.\n3:b:adapter\n"


def test_classify_marks_the_label_that_was_decided_on() -> None:
    assert talk("/classify some text") == "  0  0.2500\n> 1  0.7500\n"
    assert talk("/classify a threshold") == "> 0  0.2500\n  1  0.7500\n"
    assert talk("/classify unsure").endswith(
        "  1  0.7500\nNo label is given: this is too uncertain (decide.abstain).\n"
    )


def test_a_mistake_is_shown_and_the_talk_goes_on() -> None:
    assert talk("/classify bad", "/classify", "hi") == (
        "There is no task here.\nGive a text: /classify TEXT\n1:hi:adapter\n"
    )


def test_unknown_commands_show_the_list_and_help_does() -> None:
    assert talk("/what") == f"There is no /what.\n{talk('/help')}" and "/classify TEXT" in talk("/help")


def test_exit_ends_and_ctrl_c_does_not() -> None:
    assert talk("a", "/exit", "b") == "1:a:adapter\n"
    assert talk(KeyboardInterrupt, "a") == "\n1:a:adapter\n"
    assert talk("", "  ") == ""


def test_save_writes_the_conversation_and_never_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    assert talk("hi 中", f"/save {file}").endswith(f"2 messages are in {file}.\n")
    assert json.loads(file.read_text(encoding="utf-8")) == [
        {"role": "user", "content": "hi 中"},
        {"role": "assistant", "content": "1:hi 中:adapter"},
    ]
    assert "is already there" in talk(f"/save {file}") and len(json.loads(file.read_text(encoding="utf-8"))) == 2
    assert "Give a file" in talk("/save")
    assert "cannot be written" in talk(f"/save {file}/below/a/file")


def test_conversation_returns_the_answer() -> None:
    assert Conversation(Echo(), lambda _: None).say("x") == "1:x:adapter"


def chat(words: list[object], typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llm_clf", "chat", *map(str, words)],
        input=typed,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture
def run(many_rows: Path, short_task: Path, base: Path, tmp_path: Path) -> Path:
    llm_clf.build_prompts(many_rows, task=short_task, out=tmp_path / "prompts")
    settings = ["train.epochs=1", "model.dtype=fp32", "train.learning_rate=0.01"]
    llm_clf.finetune(tmp_path / "prompts", out=tmp_path / "run", model=str(base), set=settings)
    return tmp_path / "run"


def test_once_gives_the_greedy_answer_of_the_base(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(ModelSettings(name=str(base)))
    ids = torch.tensor([tokenizer.encode("Hello\n", add_special_tokens=False)])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = model.generate(ids, max_new_tokens=256, do_sample=False)[0, ids.shape[1] :]
    answer = llm_clf.chat(model=str(base), once="Hello")
    # bf16 and fp32 may part ways after a while; they begin alike.
    assert answer is not None
    assert tokenizer.decode(expected, skip_special_tokens=True)[:3] == answer[:3]


def test_chat_of_a_run_from_a_pipe(run: Path) -> None:
    typed = '/classify heart heart\n/base\n/classify heart heart\n/classify {"title": "star", "abstract": ""}\n/exit\n'
    done = chat([run], typed)
    assert done.returncode == 0, done.stderr
    assert str(run) in done.stderr.splitlines()[0] and "/help" in done.stderr.splitlines()[0]
    lines = done.stdout.splitlines()
    assert len(lines) == 7 and lines[2] == "The adapter is off: this is the base."
    assert lines[:2] != lines[3:5] and not done.stdout.startswith(">>")
    probs = [float(line.split()[-1]) for line in lines[:2]]
    assert sum(probs) == pytest.approx(1, abs=1e-3)


def test_classify_in_chat_equals_predict(run: Path, tmp_path: Path) -> None:
    rows = tmp_path / "one.jsonl"
    rows.write_text(json.dumps({"title": "star", "abstract": "star star"}) + "\n")
    llm_clf.predict(run, rows, out=tmp_path / "one-out.jsonl")
    prediction = json.loads((tmp_path / "one-out.jsonl").read_text())
    shown = chat([run], '/classify {"title": "star", "abstract": "star star"}\n').stdout.splitlines()
    assert [float(line.split()[-1]) for line in shown] == pytest.approx(
        [prediction["prob_0"], prediction["prob_1"]], abs=1e-4
    )


def test_bare_adapter_needs_a_base_and_takes_a_task(run: Path, base: Path, short_task: Path) -> None:
    adapter = run / "adapter"
    assert "tell its base: --model BASE" in chat([adapter]).stderr
    done = chat([adapter, "--model", base, "--task", short_task], "/classify heart\n")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert "There is no task here" in chat(["--model", base], "/classify heart\n").stdout


def test_template_and_special_tokens_in_what_is_typed(make_base: MakeBase) -> None:
    base = make_base("glm", template=CHAT_TEMPLATE)
    assert isinstance(llm_clf.chat(model=str(base), once="<|end|> hi"), str)


def test_long_conversation_drops_its_oldest_turns(make_base: MakeBase, capsys: pytest.CaptureFixture[str]) -> None:
    from llm_clf.commands.chat import _load

    loaded = _load(None, str(make_base("glm")), None, ())
    messages = [{"role": role, "content": "x" * 90} for role in ("user", "assistant") * 2] + [
        {"role": "user", "content": "y"}
    ]
    loaded.answer(messages, lambda _: None)
    assert "(The first 2 messages no longer fit and were left out.)" in capsys.readouterr().err
    with pytest.raises(llm_clf.LlmClfError, match="this base reads 512"):
        loaded.answer([{"role": "user", "content": "x" * 600}], lambda _: None)


def test_adapter_of_another_shape_or_tokenizer_is_refused_by_name(
    run: Path, make_base: MakeBase, short_task: Path, tmp_path: Path
) -> None:
    from conftest import tiny_config
    from transformers import AutoModelForCausalLM

    rows = tmp_path / "one.jsonl"
    rows.write_text(json.dumps({"title": "star", "abstract": "star"}) + "\n")
    config = tiny_config("glm")
    config.num_hidden_layers = 3
    deeper = tmp_path / "deeper"
    AutoModelForCausalLM.from_config(config).save_pretrained(deeper)
    load_tokenizer(ModelSettings(name=str(make_base("glm")))).save_pretrained(deeper)
    other = tmp_path / "other-words"
    AutoModelForCausalLM.from_config(tiny_config("glm")).save_pretrained(other)
    tokenizer = load_tokenizer(ModelSettings(name=str(make_base("glm"))))
    tokenizer.add_tokens(["heart"])
    tokenizer.save_pretrained(other)
    for base, reason in (
        (deeper, "no counterpart"),
        (make_base("gpt2"), "does not fit the base"),
        (other, "another tokenizer"),
    ):
        with pytest.raises(ArtifactError, match=reason) as caught:
            llm_clf.predict(run / "adapter", rows, out=tmp_path / "out.csv", task=short_task, model=str(base))
        assert str(base) in str(caught.value) and not (tmp_path / "out.csv").exists()
