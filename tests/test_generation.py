"""Generated answers: batches equal one by one, the text column, statuses, agreement with the scores."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import llm_clf
from llm_clf.config import ModelSettings
from llm_clf.engine.generation import TextGenerator
from llm_clf.errors import ConfigError
from llm_clf.models.bases import load_tokenizer

MakeBase = Callable[..., Path]


def test_batched_answers_equal_one_by_one_and_stop_at_the_end_token(make_base: MakeBase) -> None:
    tokenizer = load_tokenizer(ModelSettings(name=str(make_base("glm"))))
    generator = TextGenerator(tiny_model("glm"), tokenizer, pad_id=3, max_new_tokens=12)
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 261, (length,), generator=draw).tolist() for length in (4, 19, 9)]
    together = generator.complete(prompts)
    assert together == [generator.complete([prompt])[0] for prompt in prompts]
    pieces: list[str] = []
    # White space around an answer is no part of it.
    assert generator.stream(prompts[1], pieces.append) == together[1].strip() == "".join(pieces).rstrip()


def test_the_bases_own_sampling_settings_do_not_matter(make_base: MakeBase) -> None:
    model = tiny_model("glm")
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    generator = TextGenerator(
        model, load_tokenizer(ModelSettings(name=str(make_base("glm")))), pad_id=3, max_new_tokens=20
    )
    assert generator.complete([[9, 8, 7]]) == generator.complete([[9, 8, 7]])


@pytest.fixture
def run(many_rows: Path, short_task: Path, base: Path, tmp_path: Path) -> Path:
    llm_clf.build_prompts(many_rows, task=short_task, out=tmp_path / "prompts", split="0.6,0.2,0.2")
    settings = ["train.epochs=30", "model.dtype=fp32", "train.learning_rate=0.01", "lora.dropout=0", "lora.r=16"]
    llm_clf.finetune(tmp_path / "prompts", out=tmp_path / "run", model=str(base), set=settings)
    return tmp_path / "run"


def test_generated_predictions_carry_text_status_and_agreement(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "prompts" / "test.jsonl"
    found = llm_clf.predict(run, test, out=tmp_path / "generated.csv", decode="generate")
    llm_clf.predict(run, test, out=tmp_path / "scored.csv")
    with open(tmp_path / "generated.csv", encoding="utf-8") as a, open(tmp_path / "scored.csv", encoding="utf-8") as b:
        generated, scored = list(csv.DictReader(a)), list(csv.DictReader(b))
    assert list(generated[0]) == [*scored[0], "text"]
    agree = 0
    for written, score in zip(generated, scored, strict=True):
        assert (written["prob_0"], written["prob_1"]) == (score["prob_0"], score["prob_1"])
        if written["text"] in ("0", "1"):
            assert (written["label"], written["status"]) == (written["text"], "ok")
        if not written["label"]:
            assert written["status"] == "unparsed"
        agree += written["label"] == score["label"]
    assert found["agreement"]["agree"] == agree and found["agreement"]["rows"] == 8
    assert f"agree on {agree} of 8 rows" in capsys.readouterr().err


def test_answers_that_are_no_label_are_unparsed_and_count_as_wrong(run: Path, base: Path, tmp_path: Path) -> None:
    """An adapter that was never trained says anything."""
    rows = tmp_path / "prompts" / "test.jsonl"
    task = tmp_path / "short.yaml"
    fresh = tmp_path / "fresh"
    llm_clf.finetune(
        tmp_path / "prompts", out=fresh, model=str(base), set=["train.epochs=1", "train.learning_rate=1e-12"]
    )
    out = tmp_path / "fresh.jsonl"
    found = llm_clf.predict(fresh / "adapter", rows, out=out, decode="generate", task=task, model=str(base))
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    unparsed = [record for record in records if record["status"] == "unparsed"]
    assert len(unparsed) == found["agreement"]["unparsed"] > 0 and all(record["label"] is None for record in unparsed)
    metrics = llm_clf.evaluate(out)
    assert metrics["status"]["unparsed"] == len(unparsed)
    assert metrics["accuracy"] <= 1 - len(unparsed) / 8


def test_interrupted_generation_resumes_to_the_same_bytes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "many.jsonl"
    monkeypatch.setattr("llm_clf.engine.classifier.WINDOW", 16)
    llm_clf.predict(run, rows, out=tmp_path / "whole.csv", decode="generate")
    original, calls = TextGenerator.complete, 0

    def counted(self: TextGenerator, prompts: list[list[int]]) -> list[str]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(self, prompts)

    monkeypatch.setattr(TextGenerator, "complete", counted)
    with pytest.raises(KeyboardInterrupt):
        llm_clf.predict(run, rows, out=tmp_path / "broken.csv", decode="generate")
    llm_clf.predict(run, rows, out=tmp_path / "broken.csv", decode="generate", resume=True)
    assert (tmp_path / "broken.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_unknown_way_to_decode_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allowed are score and generate"):
        llm_clf.predict(run, tmp_path / "many.jsonl", out=tmp_path / "x.csv", decode="beam")  # type: ignore[arg-type]
