"""Running out of memory, on a card that is made up: a model whose forward has no room for more than so many tokens."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model
from safetensors.torch import load_file

import llm_clf
from llm_clf.commands import validation
from llm_clf.config import LoraSettings, SpeedSettings
from llm_clf.config_loading import load_settings
from llm_clf.engine import classifier, fitting, scoring, training
from llm_clf.engine.fitting import TokenBudget, Work
from llm_clf.engine.label_words import LabelWords
from llm_clf.engine.tokens import TrainingExample
from llm_clf.engine.training import _backward_of
from llm_clf.errors import ConfigError
from llm_clf.files import partial_name
from llm_clf.models import bases
from llm_clf.models.adapters import new_adapter, trainable

CPU = torch.device("cpu")


class Card:
    """Counts the tokens of every forward, and has no room for more than `room`.

    What it computes depends a little on how many tokens are computed at once, as rounding does on a card.
    """

    def __init__(self) -> None:
        self.room: int | None = None
        self.forwards: list[int] = []

    def watch(self, model: Any) -> Any:
        def before(_module: Any, _arguments: Any, options: dict[str, Any]) -> None:
            self.forwards.append(options["input_ids"].numel())
            if self.room is not None and self.forwards[-1] > self.room:
                raise torch.OutOfMemoryError(f"CUDA out of memory. No room for {self.forwards[-1]} tokens.\nMore.")

        def after(_module: Any, _arguments: Any, options: dict[str, Any], output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state * (1 + 1e-4 * options["input_ids"].numel())
            return output

        model.model.register_forward_pre_hook(before, with_kwargs=True)
        model.model.register_forward_hook(after, with_kwargs=True)
        return model


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """Return a card on which every base is loaded."""
    found = Card()
    load = bases.load_model
    for place in (bases, classifier):
        monkeypatch.setattr(place, "load_model", lambda *a, **k: found.watch(load(*a, **k)))
    return found


def parts_of_sum(room: int, seen: list[Any]) -> Work[int, float]:
    """Return work on numbers, which are their own sizes: it draws a random number for each part and adds them up."""

    def plan(rows: Any, budget: int) -> list[list[int]]:
        return training.plan_packed(rows, budget)

    def do(rows: Any, budget: int) -> float:
        total = 0.0
        for part in plan(rows, budget):
            total += torch.rand(()).item()
            size = sum(rows[number] for number in part)
            seen.append(size)
            if size > room:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return total

    return Work(plan, sum, do, lambda: seen.append("undone"))


def test_the_budget_is_halved_until_the_largest_part_gets_smaller_and_stays_so() -> None:
    seen: list[Any] = []
    told: list[Any] = []
    budget = TokenBudget(1000, CPU, lambda tokens: told.append((tokens, torch.get_rng_state().clone())))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = budget.fit(parts_of_sum(20, seen), [9, 8, 9, 6])
    # All four are 32; the budgets from 500 to 62 would cut nothing, 31 leaves one over, and 15 is enough.
    assert seen == [32, "undone", 26, "undone", 9, 9, 14]
    assert [tokens for tokens, _ in told] == [31, 15] and budget.tokens == 15
    assert all(torch.equal(state, before) for _, state in told)
    torch.manual_seed(3)
    assert TokenBudget(15, CPU, told.append).fit(parts_of_sum(20, []), [9, 8, 9, 6]) == found
    assert len(told) == 2


def test_a_single_row_that_does_not_fit_is_an_error_that_names_what_to_change() -> None:
    told: list[int] = []
    with pytest.raises(ConfigError, match=r"single row of 30 tokens.*data\.max_length.*model\.quantization") as refusal:
        TokenBudget(64, CPU, told.append).fit(parts_of_sum(20, []), [9, 30])
    assert told == [32] and refusal.value.__cause__ is None


def test_only_running_out_of_memory_is_met() -> None:
    def fail(*_: Any) -> float:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        TokenBudget(64, CPU, lambda _: None).fit(Work(training.plan_packed, sum, fail, lambda: None), [1, 2])


def test_trying_the_largest_part_leaves_nothing_behind() -> None:
    seen: list[Any] = []
    state = torch.get_rng_state()
    budget = TokenBudget(40, CPU, lambda _: None)
    budget.try_largest(parts_of_sum(20, seen), [[1, 2], [9, 8, 7, 6], [12]])
    assert seen == [30, "undone", 17, "undone"] and budget.tokens == 20
    assert torch.equal(torch.get_rng_state(), state)


WORDS = LabelWords([[[17, 0]]])
EXAMPLES = [TrainingExample([201, 202, size, *range(size - 3)], [17, 0], 1.0) for size in (60, 50, 45)]


@pytest.mark.parametrize("speed", [SpeedSettings(), SpeedSettings(packing=False)], ids=["packed", "padded"])
def test_gradients_that_were_added_up_before_memory_ran_out_are_cleared(speed: SpeedSettings) -> None:
    def step(tokens: int, room: int | None) -> tuple[float, list[torch.Tensor], list[int]]:
        card = Card()
        card.room = room
        model = new_adapter(card.watch(tiny_model("glm")).requires_grad_(False), LoraSettings(dropout=0.4), seed=1)
        with torch.no_grad():
            for number, parameter in enumerate(trainable(model.train())):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
        work = _backward_of(model, WORDS, EXAMPLES, speed, 3, Accelerator(cpu=True))
        torch.manual_seed(8)
        loss = TokenBudget(tokens, CPU, lambda _: None).fit(work, EXAMPLES)
        return loss, [parameter.grad.clone() for parameter in trainable(model)], card.forwards

    loss, found, forwards = step(107, 80)
    # The longest row was through when the two others did not fit; then it was computed again.
    assert forwards.count(59 if speed.packing else 62) == 2 and max(forwards) > 80
    same_loss, expected, _ = step(53, None)
    assert loss == same_loss
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


FAST = ["train.learning_rate=0.004", "train.batch_size=8", "train.epochs=2", "data.max_length=96"]


def finetune(prompts: Path, base: Path, run: Path, *more: str, resume: bool = False) -> dict[str, torch.Tensor]:
    llm_clf.finetune(prompts, out=run, model=str(base), set=[*FAST, *more], resume=resume)
    return load_file(run / "adapter" / "adapter_model.safetensors")


def settings_of(run: Path) -> Any:
    return load_settings([run / "config.yaml"])


def test_a_training_that_runs_out_equals_one_whose_budget_was_small_from_the_beginning(
    prompts: Path, base: Path, tmp_path: Path, card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("model.dtype=fp32", "lora.dropout=0.2", "predict.batch_tokens=100")
    expected = finetune(prompts, base, tmp_path / "small", *more, "train.micro_batch_tokens=128")
    capsys.readouterr()
    card.room = 130
    found = finetune(prompts, base, tmp_path / "halved", *more, "train.micro_batch_tokens=1024")
    shown = capsys.readouterr().err
    assert shown.count("Memory ran out on ") == 2 and "of up to 256; going on with up to 128." in shown
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("small", "halved")]
    assert runs[0]["evaluations"] == runs[1]["evaluations"] and runs[0]["training"]["steps"] == 6
    assert settings_of(tmp_path / "halved") == settings_of(tmp_path / "small")


class Killed(BaseException):
    """Stands for a kill: nothing gets to clean up."""


@pytest.mark.parametrize("kill", [3, 4, 5])
def test_a_training_killed_after_it_ran_out_resumes_to_the_same_adapter(
    prompts: Path, base: Path, tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch, kill: int
) -> None:
    """Room gets short in the fourth step; with dropout another budget would make another adapter."""
    more = ("model.dtype=fp32", "lora.dropout=0.3", "train.micro_batch_tokens=1024", "train.eval_every=2")
    original, steps = training._rows_of_step, 0

    def run(name: str, *, until: int | None, short: int | None, resume: bool = False) -> dict[str, torch.Tensor]:
        def rows(step: int, *arguments: Any) -> list[int]:
            nonlocal steps
            steps += 1
            if step == until:
                raise Killed
            card.room = 130 if short is not None and step >= short else None
            return original(step, *arguments)

        monkeypatch.setattr(training, "_rows_of_step", rows)
        return finetune(prompts, base, tmp_path / name, *more, "predict.batch_tokens=100", resume=resume)

    whole = run("whole", until=None, short=3)
    with pytest.raises(Killed):
        run("broken", until=kill, short=3)
    steps = 0
    # Where it goes on from there is room again, and it does as it did without.
    resumed = run("broken", until=None, short=3 if kill == 3 else None, resume=True)
    assert steps == (6 if kill == 3 else 3)
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor)
    files = [(tmp_path / name / "predictions-valid.parquet").read_bytes() for name in ("whole", "broken")]
    assert files[0] == files[1] and settings_of(tmp_path / "broken") == settings_of(tmp_path / "whole")


def test_the_largest_micro_batch_is_tried_first_and_changes_nothing(
    prompts: Path, base: Path, tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("model.dtype=fp32", "lora.dropout=0.2", "train.micro_batch_tokens=256", "predict.batch_tokens=100")
    expected = finetune(prompts, base, tmp_path / "untried", *more)
    largest, untried = max(card.forwards), len(card.forwards)
    card.forwards.clear()
    monkeypatch.setattr(fitting, "TRIED", frozenset({"cpu"}))
    monkeypatch.setattr(training, "TRIED", frozenset({"cpu"}))
    found = finetune(prompts, base, tmp_path / "tried", *more)
    # The beginning, and the largest of all.
    assert card.forwards[1] == largest and len(card.forwards) == untried + 2
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_the_trial_finds_is_in_the_run_before_the_first_step(
    prompts: Path, base: Path, tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "TRIED", frozenset({"cpu"}))
    card.room = 130
    original = training._add_up
    first = settings_of

    def killed(*arguments: Any) -> float:
        if (partial_name(tmp_path / "run") / "config.yaml").is_file():
            found = first(partial_name(tmp_path / "run")).train.micro_batch_tokens
            if found <= 128:
                raise Killed
        return original(*arguments)

    monkeypatch.setattr(training, "_add_up", killed)
    more = ("model.dtype=fp32", "train.micro_batch_tokens=1024", "predict.batch_tokens=100")
    with pytest.raises(Killed):
        finetune(prompts, base, tmp_path / "run", *more)
    monkeypatch.setattr(training, "_add_up", original)
    card.forwards.clear()
    finetune(prompts, base, tmp_path / "run", *more, resume=True)
    assert settings_of(tmp_path / "run").train.micro_batch_tokens == 128 and max(card.forwards) <= 130


def test_one_row_too_long_stops_the_training_with_advice(prompts: Path, base: Path, tmp_path: Path, card: Card) -> None:
    card.room = 30
    with pytest.raises(ConfigError, match=r"single row of .* Free the card .* data\.max_length"):
        finetune(prompts, base, tmp_path / "run", "model.dtype=fp32")
    assert not (tmp_path / "run").exists() and not partial_name(tmp_path / "run").exists()


def test_no_room_for_the_base_is_explained(
    prompts: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    monkeypatch.setattr(bases, "load_model", load)
    with pytest.raises(ConfigError, match=r"Tried to allocate 2 GiB\. Free the card"):
        finetune(prompts, base, tmp_path / "run")


@pytest.fixture
def run(prompts: Path, base: Path, tmp_path: Path) -> Path:
    """Return a run."""
    finetune(prompts, base, tmp_path / "run", "model.dtype=fp32", "predict.batch_tokens=400")
    return tmp_path / "run"


def lines_of(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()]


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], None]]:
    """Return a function that says after how many forwards of a prediction it is killed."""
    original, scored, limit = scoring.LabelScorer.score, 0, None

    def counted(self: scoring.LabelScorer, prompts: Any) -> torch.Tensor:
        nonlocal scored
        scored += 1
        if limit is not None and scored > limit:
            raise Killed
        return original(self, prompts)

    def set_limit(number: int | None) -> None:
        nonlocal limit, scored
        limit, scored = number, 0

    monkeypatch.setattr(scoring.LabelScorer, "score", counted)
    return set_limit


@pytest.mark.parametrize(
    ("after", "decode"), [(1, "score"), (2, "score"), (4, "score"), (8, "score"), (1, "generate"), (6, "generate")]
)
def test_a_prediction_that_ran_out_resumes_to_the_same_bytes(
    run: Path,
    many_rows: Path,
    tmp_path: Path,
    card: Card,
    killing: Callable[[int | None], None],
    after: int,
    decode: str,
) -> None:
    def predict(out: Path, *, resume: bool = False) -> None:
        options = {"decode": decode, "set": ["predict.max_new_tokens=2"], "resume": resume}
        llm_clf.predict(run, many_rows, out=out, **options)

    whole, broken = tmp_path / "whole.csv", tmp_path / "broken.csv"
    killing(None)
    card.room = 250
    predict(whole)
    killing(after)
    with pytest.raises(Killed):
        predict(broken)
    left = lines_of(partial_name(broken))
    assert left[1] == {"fits": 200}
    killing(None)
    # Scores alone fit into that, and are the same wherever the job goes on.
    card.room = 250 if decode == "generate" else None
    predict(broken, resume=True)
    assert broken.read_bytes() == whole.read_bytes()
    card.room = None
    predict(tmp_path / "roomy.csv")
    assert (tmp_path / "roomy.csv").read_bytes() != whole.read_bytes()


def test_a_prediction_in_parts_is_said_once_and_gives_the_scores_of_the_parts(
    run: Path, many_rows: Path, tmp_path: Path, card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    card.room = 250
    capsys.readouterr()
    figures = llm_clf.predict(run, many_rows, out=tmp_path / "parts.csv")
    assert capsys.readouterr().err.count("Memory ran out on ") == 1 and figures["batch_tokens"] == 200
    assert sum(tokens > 250 for tokens in card.forwards) == 1


SHORT = ("model.dtype=fp32", "train.micro_batch_tokens=128", "train.eval_every=1", "predict.batch_tokens=200")


def test_a_validation_that_ran_out_is_what_predict_gives(prompts: Path, base: Path, tmp_path: Path, card: Card) -> None:
    card.room = 150
    finetune(prompts, base, tmp_path / "run", *SHORT)
    assert settings_of(tmp_path / "run").predict.batch_tokens == 100
    card.room = None
    llm_clf.predict(tmp_path / "run", prompts / "valid.jsonl", out=tmp_path / "again.parquet")
    expected = (tmp_path / "run" / "predictions-valid.parquet").read_bytes()
    assert (tmp_path / "again.parquet").read_bytes() == expected
    finetune(prompts, base, tmp_path / "small", *SHORT[:3], "predict.batch_tokens=100")
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "small")]
    assert runs[0]["evaluations"] == runs[1]["evaluations"]


def test_a_training_killed_after_a_validation_ran_out_goes_on_with_what_fits(
    prompts: Path, base: Path, tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = training._rows_of_step

    def killed(step: int, *arguments: Any) -> list[int]:
        if step == 4:
            raise Killed
        return original(step, *arguments)

    card.room = 150
    finetune(prompts, base, tmp_path / "whole", *SHORT)
    monkeypatch.setattr(training, "_rows_of_step", killed)
    with pytest.raises(Killed):
        finetune(prompts, base, tmp_path / "run", *SHORT)
    monkeypatch.setattr(training, "_rows_of_step", original)
    card.room = None
    finetune(prompts, base, tmp_path / "run", *SHORT, resume=True)
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "whole")]
    assert runs[0]["evaluations"] == runs[1]["evaluations"]


def test_a_validation_that_runs_out_only_at_the_end_is_scored_anew(
    prompts: Path, base: Path, tmp_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = validation.score_rows

    def short(*arguments: Any, **options: Any) -> Any:
        card.room = 150
        return original(*arguments, **options)

    monkeypatch.setattr(validation, "score_rows", short)
    finetune(prompts, base, tmp_path / "run", *SHORT)
    assert settings_of(tmp_path / "run").predict.batch_tokens == 100
    card.room = None
    llm_clf.predict(tmp_path / "run", prompts / "valid.jsonl", out=tmp_path / "again.parquet")
    expected = (tmp_path / "run" / "predictions-valid.parquet").read_bytes()
    assert (tmp_path / "again.parquet").read_bytes() == expected
