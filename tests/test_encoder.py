"""The encoder baseline: head, padding, tokens, training, and a run like any other."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SHORT_TASK
from safetensors.torch import load_file, save_file

import llm_clf
from llm_clf.baselines import encoder
from llm_clf.baselines.encoder import steps_of_epoch, weighted_loss
from llm_clf.baselines.encoder_model import (
    EncoderScorer,
    FusionClassifier,
    FusionHead,
    log_probabilities,
    losses,
    new_classifier,
    row_tokenizer,
)
from llm_clf.baselines.encoder_tokens import RowTokenizer
from llm_clf.config import EncoderHeadSettings, EncoderSettings
from llm_clf.config_loading import load_tree
from llm_clf.engine.scores import Scored
from llm_clf.errors import ArtifactError, ConfigError, DataError, LabelError, LlmClfError, TrainingError
from llm_clf.files import file_hash, partial_name
from llm_clf.models.bases import prepare_libraries
from llm_clf.models.encoders import load_encoder_tokenizer, load_trunk, longest_input
from llm_clf.prompting.prompts import Prompt
from llm_clf.prompting.tasks import Task, load_task

CPU = torch.device("cpu")
FP32 = ["model.dtype=fp32"]
FAST = [*FP32, "train.learning_rate=0.003", "train.batch_size=8", "data.max_length=96"]
SIZES = {
    "bert": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
}
SIZES["roberta"] = SIZES["electra"] = SIZES["bert"]


def encoder_tokenizer(folder: Path) -> None:
    """Save a tokenizer of bytes that puts `<s>` before a text and `</s>` behind it, and gives no token types."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    vocab = {token: number for number, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad": "<pad>", "cls": "<s>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def make_encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes an encoder folder of random weights; the same one for the same family."""
    from transformers import AutoConfig, AutoModel

    prepare_libraries()
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = made[family] = tmp_path_factory.mktemp(f"encoder-{family}")
            torch.manual_seed(3)
            sizes = SIZES[family] | {"vocab_size": 261, "max_position_embeddings": 130, "pad_token_id": 0}
            model = AutoModel.from_config(AutoConfig.for_model(family, **sizes))
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.ndim == 2:
                        weight.mul_(4.0)
            model.save_pretrained(folder)
            encoder_tokenizer(folder)
        return made[family]

    return make


@pytest.fixture
def bert(make_encoder: Callable[[str], Path], tmp_path: Path) -> Path:
    """Return a copy of an encoder folder that a test may change."""
    return Path(shutil.copytree(make_encoder("bert"), tmp_path / "bert"))


@pytest.fixture
def task(tmp_path: Path) -> Task:
    (tmp_path / "task-of-tokens.yaml").write_text(SHORT_TASK)
    return load_task(tmp_path / "task-of-tokens.yaml")


def settings_of(*overrides: str) -> EncoderSettings:
    return load_tree(EncoderSettings, overrides=[*FP32, *overrides])


def classifier(name: Path | str, *overrides: str, labels: int = 2) -> FusionClassifier:
    return new_classifier(settings_of(f"model.name={name}", *overrides), labels, CPU).eval()


# --- the head ---------------------------------------------------------------------------------------------------------


def hand_made_head(loss: str = "cross-entropy") -> FusionHead:
    """Return a head of width 1: mean @ (1, 2) + 1, pooled @ (3, 0) - 1, then logits 2x and -x + 0.5."""
    head = FusionHead(2, EncoderHeadSettings(width=1, dropout=0.3, loss=loss), 2).eval()
    with torch.no_grad():
        head.mean.weight.copy_(torch.tensor([[1.0, 2.0]]))
        head.mean.bias.fill_(1.0)
        head.pooled.weight.copy_(torch.tensor([[3.0, 0.0]]))
        head.pooled.bias.fill_(-1.0)
        if loss == "cross-entropy":
            head.labels.weight.copy_(torch.tensor([[2.0], [-1.0]]))
            head.labels.bias.copy_(torch.tensor([0.0, 0.5]))
    return head


def test_the_head_gives_what_a_hand_computes() -> None:
    states = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [5.0, 4.0]]])
    pooled = torch.tensor([[2.0, 9.0]])
    # Mean (3, 2): 3 + 4 + 1 = 8; pooled 6 - 1 = 5; half their sum 6.5.
    logits = hand_made_head()(states, pooled, torch.ones(1, 3, dtype=torch.long))
    torch.testing.assert_close(logits, torch.tensor([[13.0, -6.0]]))
    # Without the last token: mean (2, 1), so 5, and half of 5 + 5.
    logits = hand_made_head()(states, pooled, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(logits, torch.tensor([[10.0, -4.5]]))


def test_what_stands_on_padding_does_not_enter_the_mean() -> None:
    head, mask = hand_made_head(), torch.tensor([[1, 1, 0]])
    states = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(1))
    other = states.clone()
    other[0, 2] = 1e6
    pooled = torch.zeros(1, 2)
    assert torch.equal(head(states, pooled, mask), head(other, pooled, mask))
    assert not torch.equal(head(states, pooled, torch.ones(1, 3)), head(other, pooled, torch.ones(1, 3)))


def test_the_original_sizes_are_the_defaults() -> None:
    head = FusionHead(768, EncoderHeadSettings(), 2)
    assert head.mean.weight.shape == head.pooled.weight.shape == (128, 768)
    assert head.dropout.p == 0.3 and head.labels.weight.shape == (2, 128)
    assert FusionHead(768, EncoderHeadSettings(loss="bce"), 2).labels.weight.shape == (1, 128)


def test_both_losses_are_the_negative_log_probability_of_the_label() -> None:
    targets = torch.tensor([1, 0])
    logits = torch.tensor([[0.2, 1.5], [2.0, -1.0]])
    chosen = log_probabilities(logits)[torch.arange(2), targets]
    torch.testing.assert_close(losses(logits, targets), -chosen)
    one = torch.tensor([[1.3], [3.0]])
    torch.testing.assert_close(losses(one, targets), -log_probabilities(one)[torch.arange(2), targets])
    # One logit is the difference of two.
    both = torch.cat([torch.zeros(2, 1), one], dim=1)
    torch.testing.assert_close(log_probabilities(one), log_probabilities(both))
    torch.testing.assert_close(losses(one, targets), losses(both, targets))


# --- the pooled token -------------------------------------------------------------------------------------------------

ROWS = [[1, 40, 50, 60, 2], [1, 70, 2], [1, *range(80, 110), 2]]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_padding_does_not_move_probabilities(make_encoder: Callable[[str], Path], family: str) -> None:
    model = classifier(make_encoder(family))
    with torch.inference_mode():
        together = log_probabilities(model(ROWS))
        alone = torch.cat([log_probabilities(model([row])) for row in ROWS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def pooled_state(model: FusionClassifier) -> torch.Tensor:
    """Return what the head got as pooled state for ROWS."""
    seen = []
    handle = model.head.pooled.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.inference_mode():
        model(ROWS)
    handle.remove()
    return seen[0]


def test_a_pooler_is_used_where_there_is_one(make_encoder: Callable[[str], Path]) -> None:
    model = classifier(make_encoder("bert"))
    assert model.pooled_from == "pooler"
    with torch.inference_mode():
        alone = [model.trunk(input_ids=torch.tensor([row])).pooler_output[0] for row in ROWS]
    torch.testing.assert_close(pooled_state(model), torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_the_first_token_is_used_where_there_is_no_pooler(make_encoder: Callable[[str], Path]) -> None:
    model = classifier(make_encoder("distilbert"))
    assert model.pooled_from == "first token"
    with torch.inference_mode():
        alone = [model.trunk(input_ids=torch.tensor([row])).last_hidden_state[0, 0] for row in ROWS]
    torch.testing.assert_close(pooled_state(model), torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_the_last_real_token_is_used_in_the_causal_trunk_that_ships() -> None:
    model = classifier("glm-nano")
    assert model.pooled_from == "last token" and type(model.trunk).__name__ == "GlmModel"
    with torch.inference_mode():
        alone = [model.trunk(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ROWS]
        together = log_probabilities(model(ROWS))
        apart = torch.cat([log_probabilities(model([row])) for row in ROWS])
    torch.testing.assert_close(pooled_state(model), torch.stack(alone), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_a_pooler_that_the_files_lack_is_drawn_from_the_seed(bert: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("pooler.")}
    save_file(kept, bert / "model.safetensors", metadata={"format": "pt"})
    one, same, other = (load_trunk(str(bert), seed=seed).pooler.dense.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    del kept["encoder.layer.1.output.dense.weight"]
    save_file(kept, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lack or mis-shape 1 weights, first encoder.layer.1.output.dense.weight"):
        load_trunk(str(bert))


# --- tokens -----------------------------------------------------------------------------------------------------------


def row_tokens(folder: Path | str, task: Task, max_length: int = 512) -> tuple[RowTokenizer, object]:
    model = classifier(folder)
    tokenizer = load_encoder_tokenizer(str(folder), model.trunk)
    return row_tokenizer(tokenizer, model, task, settings_of(f"data.max_length={max_length}").data), tokenizer


def test_a_row_stands_between_the_special_tokens_and_nothing_in_it_becomes_one(
    make_encoder: Callable[[str], Path], task: Task
) -> None:
    tokens, tokenizer = row_tokens(make_encoder("bert"), task)
    plain, odd = tokens.encode(["heart:dose", "a</s>b<s><pad><mask>:x"])
    assert [plain.ids[0], plain.ids[-1]] == [1, 2] and tokenizer.decode(plain.ids[1:-1]) == "heart:dose"
    assert not {0, 1, 2, 4} & set(odd.ids[1:-1])
    assert tokenizer.decode(odd.ids[1:-1]) == "a</s>b<s><pad><mask>:x"
    assert "token_type_ids" not in tokenizer("text")


def test_a_special_token_that_is_a_piece_of_the_vocabulary_is_not_found_in_a_text(task: Task) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    inner = Tokenizer(models.Unigram([*pieces, *((letter, -5.0) for letter in "abcs</>")], unk_id=3))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    assert tokenizer("a</s>b", split_special_tokens=True)["input_ids"].count(2) == 2, "the trap is there"
    ids = RowTokenizer(tokenizer, task, pad_id=1, max_length=32).encode(["a</s>b"])[0].ids
    assert [ids[0], ids[-1]] == [0, 2] and not {0, 1, 2} & set(ids[1:-1])


@pytest.mark.parametrize(
    ("title", "abstract", "kept"),
    [
        # 32 tokens: two special ones, the template's ":" and 29 letters.
        ("t" * 10, "a" * 100, (10, 19)),
        ("t" * 100, "a" * 10, (19, 10)),
        ("t" * 100, "a" * 50, (14, 14)),
        ("t" * 10, "a" * 19, (10, 19)),
        ("t" * 100_000, "a" * 300_000, (14, 14)),
    ],
    ids=["abstract", "title", "both", "none", "very long"],
)
def test_the_longest_columns_give_way(
    make_encoder: Callable[[str], Path], task: Task, title: str, abstract: str, kept: tuple[int, int]
) -> None:
    tokens, tokenizer = row_tokens(make_encoder("bert"), task, max_length=32)
    found = tokens.encode([f"{title}:{abstract}"])[0]
    assert tokenizer.decode(found.ids[1:-1]) == f"{'t' * kept[0]}:{'a' * kept[1]}"
    assert found.cut == (len(title) + len(abstract) > 29) and len(found.ids) <= 32


def test_a_text_that_does_not_follow_the_template_is_cut_from_its_end(
    make_encoder: Callable[[str], Path], task: Task
) -> None:
    tokens, tokenizer = row_tokens(make_encoder("bert"), task, max_length=16)
    found = tokens.encode(["abcdefghijklmnopqrstuvwxyz"])[0]
    assert tokenizer.decode(found.ids) == "<s>abcdefghijklmn</s>" and found.cut


def test_a_row_without_any_token_is_read(task: Task) -> None:
    tokens, _ = row_tokens("glm-nano", task)
    assert len(tokens.encode([""])[0].ids) == 1
    with torch.inference_mode():
        assert classifier("glm-nano")([tokens.encode([""])[0].ids]).isfinite().all()


@pytest.mark.parametrize(("family", "limit"), [("bert", 130), ("distilbert", 130), ("roberta", 129)])
def test_the_longest_row_that_an_encoder_reads_is_found_and_read(
    make_encoder: Callable[[str], Path], task: Task, family: str, limit: int
) -> None:
    """RoBERTa's positions begin behind its padding token's number, here 0."""
    model = classifier(make_encoder(family))
    tokens, tokenizer = row_tokens(make_encoder(family), task)
    assert longest_input(model.trunk, tokenizer) == tokens.max_length == limit
    ids = tokens.encode(["x:" + "y" * 500])[0].ids
    with torch.inference_mode():
        assert len(ids) == limit and model([ids]).isfinite().all()
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model([[*ids, 5]])


# --- the plan of steps ------------------------------------------------------------------------------------------------


def test_every_epoch_has_every_row_once_in_steps_of_like_lengths() -> None:
    lengths = torch.randint(10, 500, (1003,), generator=torch.Generator().manual_seed(1)).tolist()
    epochs = [steps_of_epoch(lengths, 8, seed) for seed in (1, 2)]
    for steps in epochs:
        assert sorted(row for step in steps for row in step) == list(range(1003))
        assert len(steps) == 126 and sorted(map(len, steps)) == [3] + [8] * 125
        padded = sum(len(step) * max(lengths[row] for row in step) for step in steps)
        assert padded < 1.06 * sum(lengths)
    assert epochs[0] != epochs[1] and epochs[0] == steps_of_epoch(lengths, 8, 1)
    means = [sum(lengths[row] for row in step) / len(step) for step in epochs[0]]
    assert means != sorted(means), "long and short steps alternate by chance"


# --- a run ------------------------------------------------------------------------------------------------------------

WORDS = {"1": ["heart", "lung", "fever", "dose"], "0": ["steel", "star", "court", "bridge"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, make_encoder: Callable[[str], Path]) -> Path:
    """Return a folder with rows, prompts and a run that learned them."""
    folder = tmp_path_factory.mktemp("trained")
    with open(folder / "rows.csv", "w", encoding="utf-8") as lines:
        lines.write("uuid,title,abstract,label\n")
        for number in range(80):
            word = WORDS[str(number % 2)][number // 2 % 4]
            lines.write(f'r{number},{word},"{(word + " ") * (number % 9 + 1)}, {number}",{number % 2}\n')
    (folder / "task.yaml").write_text(SHORT_TASK, encoding="utf-8")
    shutil.copytree(make_encoder("bert"), folder / "bert")
    llm_clf.build_prompts([folder / "rows.csv"], task=folder / "task.yaml", out=folder / "prompts", split="0.6,0.2,0.2")
    train_run(folder, "run", "train.epochs=8")
    return folder


def train_run(folder: Path, run: str, *overrides: str, **more: object) -> dict[str, object]:
    """Train on the folder's prompts and encoder."""
    model = str(more.pop("model", folder / "bert"))
    found = llm_clf.baseline_encoder(folder / "prompts", out=folder / run, model=model, set=[*FAST, *overrides], **more)
    return dict(found)


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "place"))


def facts_of(run: Path) -> dict[str, object]:
    return dict(json.loads((run / "run.json").read_text()))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(run / "encoder" / "model.safetensors"))


def test_a_learnable_task_is_learned(trained: Path, tmp_path: Path) -> None:
    llm_clf.predict(trained / "run", trained / "prompts" / "test.jsonl", out=tmp_path / "test.csv")
    metrics = llm_clf.evaluate(tmp_path / "test.csv")
    assert metrics["accuracy"] >= 0.9 and metrics["log_loss"] < 0.5


def test_the_run_folder_holds_what_a_run_holds(trained: Path) -> None:
    run = trained / "run"
    assert {entry.name for entry in run.iterdir()} == {
        "encoder",
        "task.yaml",
        "config.yaml",
        "run.json",
        "metrics.json",
        "predictions-valid.parquet",
        "decisions.json",
        "scores-valid.npy",
        "trained-rows.npy",
        "log",
    }
    facts = facts_of(run)
    assert facts["kind"] == "encoder" and facts["base"]["name"] == str(trained / "bert")
    assert len(facts["base"]["hash"]) == 64 and facts["seed"] == 42
    assert facts["encoder"]["hash"] == file_hash(run / "encoder" / "model.safetensors")
    assert facts["encoder"]["pooled"] == "pooler" and facts["encoder"]["max_length"] == 96
    assert facts["training"]["rows_per_second"] > 0 and facts["peak_memory"]["resident_bytes"] > 10**7
    assert [one["epoch"] for one in facts["evaluations"]] == list(range(1, 9))
    assert {"accuracy", "f1", "recall", "log_loss"} <= facts["evaluations"][0].keys()
    best = max(facts["evaluations"], key=lambda one: (one["f1"], -one["log_loss"], -one["step"]))
    assert facts["training"]["best_step"] == best["step"]
    assert json.loads((run / "metrics.json").read_text())["log_loss"] == pytest.approx(best["log_loss"], abs=1e-6)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["train"]["epochs"] == 8 and config["model"]["dtype"] == "fp32" and config["head"]["width"] == 128
    assert any((run / "log").glob("events.out.tfevents.*")) and not partial_name(run).exists()


def test_metrics_of_each_evaluation_are_in_tensorboard(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "run" / "log"))
    events.Reload()
    for name in ("accuracy", "f1", "recall"):
        logged = [event.value for event in events.Scalars(f"valid/{name}")]
        assert logged == pytest.approx([one[name] for one in facts_of(trained / "run")["evaluations"]])
    assert len(events.Scalars("train/loss")) == facts_of(trained / "run")["training"]["steps"]


def test_predict_repeats_the_validation_file_without_the_encoder_that_it_came_from(place: Path) -> None:
    shutil.rmtree(place / "bert")
    out = place / "again.parquet"
    llm_clf.predict(place / "run", place / "prompts" / "valid.jsonl", out=out)
    assert out.read_bytes() == (place / "run" / "predictions-valid.parquet").read_bytes()
    found, stored = llm_clf.evaluate(out), json.loads((place / "run" / "metrics.json").read_text())
    assert found == {name: stored[name] for name in found}


def test_the_table_and_the_prompts_file_give_the_same_predictions(trained: Path, tmp_path: Path) -> None:
    ids = {json.loads(line)["id"] for line in (trained / "prompts" / "test.jsonl").read_text().splitlines()}
    head, *rows = (trained / "rows.csv").read_text().splitlines()
    (tmp_path / "rows.csv").write_text("\n".join([head, *(row for row in rows if row.split(",")[0] in ids)]))
    for name, source in (("a", tmp_path / "rows.csv"), ("b", trained / "prompts" / "test.jsonl")):
        llm_clf.predict(trained / "run", source, out=tmp_path / f"{name}.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_plain_transformers_loads_the_encoder_of_a_run(trained: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, report = AutoModel.from_pretrained(trained / "run" / "encoder", output_loading_info=True)
    assert not report["missing_keys"] and all(key.startswith("fusion_head.") for key in report["unexpected_keys"])
    tokenizer = AutoTokenizer.from_pretrained(trained / "run" / "encoder")
    assert model(**tokenizer("heart", return_tensors="pt")).last_hidden_state.shape == (1, 7, 32)


def test_probabilities_are_those_of_a_forward_by_hand(trained: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = trained / "run" / "encoder"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    head = {name: weight for name, weight in load_file(folder / "model.safetensors").items() if "fusion" in name}

    def linear(name: str, states: torch.Tensor) -> torch.Tensor:
        return states @ head[f"fusion_head.{name}.weight"].T + head[f"fusion_head.{name}.bias"]

    stored = scores_of(trained / "run", trained / "prompts" / "valid.jsonl")
    for line in (trained / "prompts" / "valid.jsonl").read_text().splitlines():
        row = json.loads(line)
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([tokenizer(row["input"])["input_ids"]]))
            fused = (linear("mean", output.last_hidden_state.mean(dim=1)) + linear("pooled", output.pooler_output)) / 2
            probs = linear("labels", fused).softmax(dim=1)[0]
        np.testing.assert_allclose(stored[row["id"]], probs.numpy(), atol=1e-5)


def scores_of(run: Path, rows: Path, *overrides: str) -> dict[str, list[float]]:
    out = run.parent / "scores.jsonl"
    llm_clf.predict(run, rows, out=out, set=overrides, overwrite=True)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    return {row["id"]: [row["prob_0"], row["prob_1"]] for row in found}


def test_the_size_of_batches_does_not_move_probabilities(place: Path) -> None:
    whole, cut = (
        scores_of(place / "run", place / "prompts" / "train.jsonl", f"predict.batch_tokens={size}")
        for size in (8192, 64)
    )
    for name, probs in whole.items():
        np.testing.assert_allclose(cut[name], probs, atol=1e-5)


def test_training_changes_all_weights_and_leaves_the_encoder_alone(place: Path) -> None:
    before, learned = load_file(place / "bert" / "model.safetensors"), weights_of(place / "run")
    assert not {name for name, weight in before.items() if torch.equal(weight, learned[name])}
    content = (place / "bert" / "model.safetensors").read_bytes()
    train_run(place, "new", "train.epochs=1")
    assert (place / "bert" / "model.safetensors").read_bytes() == content


def test_the_same_seed_gives_the_same_run_and_another_another(place: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_run(place, name, "train.epochs=1", f"train.seed={seed}")
    one, same, other = (weights_of(place / name) for name in "abc")
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["fusion_head.mean.weight"], other["fusion_head.mean.weight"])


def test_micro_batches_do_not_change_the_result(place: Path) -> None:
    quiet = ["train.epochs=1", "head.dropout=0"]
    config = json.loads((place / "bert" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (place / "bert" / "config.json").write_text(json.dumps(config))
    for name, tokens in (("whole", 10_000), ("cut", 64)):
        train_run(place, name, *quiet, "train.class_weights={0: 1, 1: 3}", f"train.micro_batch_tokens={tokens}")
    whole, cut = weights_of(place / "whole"), weights_of(place / "cut")
    for name, weight in whole.items():
        torch.testing.assert_close(cut[name], weight, atol=1e-3, rtol=1e-3)


def test_class_weights_weigh_the_loss(trained: Path) -> None:
    model = classifier(trained / "bert")
    light, heavy = (
        [encoder.LabelledRow(ROWS[0], 0, 1.0), encoder.LabelledRow(ROWS[1], 1, weight)] for weight in (1.0, 5.0)
    )
    own = weighted_loss(model, heavy[1:]) / 5
    torch.testing.assert_close(weighted_loss(model, heavy) - weighted_loss(model, light), 4 * own)


def test_one_logit_learns_too(place: Path) -> None:
    metrics = train_run(place, "bce", "train.epochs=6", "head.loss=bce")
    assert weights_of(place / "bce")["fusion_head.labels.weight"].shape == (1, 128) and metrics["f1"] >= 0.9
    llm_clf.predict(place / "bce", place / "prompts" / "valid.jsonl", out=place / "v.parquet")
    assert (place / "v.parquet").read_bytes() == (place / "bce" / "predictions-valid.parquet").read_bytes()


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_encoders_and_number_types_repeat_their_validation(
    place: Path, make_encoder: Callable[[str], Path], family: str, dtype: str
) -> None:
    train_run(place, "other", "train.epochs=1", f"model.dtype={dtype}", model=make_encoder(family))
    llm_clf.predict(place / "other", place / "prompts" / "valid.jsonl", out=place / "v.parquet")
    assert (place / "v.parquet").read_bytes() == (place / "other" / "predictions-valid.parquet").read_bytes()
    assert all(weight.dtype == torch.float32 for weight in weights_of(place / "other").values())


def test_without_a_model_the_base_that_ships_is_trained_with_its_own_settings(place: Path) -> None:
    llm_clf.baseline_encoder(place / "prompts", out=place / "nano", set=["train.epochs=1", *FP32])
    facts, config = facts_of(place / "nano"), yaml.safe_load((place / "nano" / "config.yaml").read_text())
    assert facts["base"]["name"] == "glm-nano" and facts["encoder"]["pooled"] == "last token"
    recipe = yaml.safe_load((Path(__file__).parent.parent / "configs" / "encoder-glm-nano.yaml").read_text())
    assert config["train"]["learning_rate"] == recipe["train"]["learning_rate"] > 1e-4
    llm_clf.predict(place / "nano", place / "prompts" / "valid.jsonl", out=place / "v.parquet")
    assert (place / "v.parquet").read_bytes() == (place / "nano" / "predictions-valid.parquet").read_bytes()


def test_three_labels_and_labels_without_rows_are_predicted(place: Path, tmp_path: Path) -> None:
    (place / "task.yaml").write_text(SHORT_TASK.replace('["0", "1"]', '["0", "1", "2"]'))
    llm_clf.build_prompts([place / "rows.csv"], task=place / "task.yaml", out=place / "prompts", overwrite=True)
    train_run(place, "three", "train.epochs=1")
    llm_clf.predict(place / "three", place / "rows.csv", out=tmp_path / "p.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert all(row["prob_0"] + row["prob_1"] + row["prob_2"] == pytest.approx(1, abs=1e-5) for row in rows)


def test_patience_stops_and_the_best_is_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter([0.6, 0.9, 0.8, 0.7, 1.0, 1.0])
    weights: list[torch.Tensor] = []

    def measure(scorer: EncoderScorer, *_: object) -> dict[str, float]:
        weights.append(scorer._model.head.mean.weight.detach().clone())
        return dict.fromkeys(("accuracy", "precision", "recall", "log_loss"), 0.5) | {"f1": next(found)}

    monkeypatch.setattr("llm_clf.commands.baseline_encoder.measure", measure)
    train_run(place, "new", "train.epochs=6", "train.patience=2")
    facts = facts_of(place / "new")
    assert facts["training"]["stopped_early"] and len(facts["evaluations"]) == 4
    assert facts["training"]["best_step"] == facts["evaluations"][1]["step"]
    assert torch.equal(weights_of(place / "new")["fusion_head.mean.weight"], weights[1])
    assert "Stopped early: 2 evaluations without a better f1." in capsys.readouterr().err


def test_without_validation_rows_the_last_step_is_kept_and_nothing_is_measured(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "prompts" / "valid.jsonl").write_text("")
    assert train_run(place, "new", "train.epochs=1") == {}
    assert "No validation rows: the last step's weights are kept" in capsys.readouterr().err
    assert not (place / "new" / "metrics.json").exists() and facts_of(place / "new")["training"]["best_step"] is None
    llm_clf.predict(place / "new", place / "rows.csv", out=place / "p.csv")


# --- killed and resumed -----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill between two steps: nothing gets to clean up."""


@pytest.mark.parametrize("step", [1, 7, 17])
def test_an_interrupted_training_resumes_to_the_same_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    train_run(place, "whole", "train.epochs=3")
    original, steps = encoder.weighted_loss, []

    def counted(*given: object) -> torch.Tensor:
        steps.append(1)
        if len(steps) > step:
            raise Killed
        return original(*given)

    monkeypatch.setattr("llm_clf.baselines.encoder_checkpoints.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("llm_clf.baselines.encoder_checkpoints.SHARE", 1e9)
    monkeypatch.setattr(encoder, "weighted_loss", counted)
    with pytest.raises(Killed):
        train_run(place, "broken", "train.epochs=3")
    monkeypatch.setattr(encoder, "weighted_loss", original)
    assert not (place / "broken").exists() and partial_name(place / "broken").is_dir()
    with pytest.raises(ConfigError, match="--resume goes on"):
        train_run(place, "broken", "train.epochs=3")
    with pytest.raises(ConfigError, match=r"train.epochs \(then 3, now 2\)"):
        train_run(place, "broken", "train.epochs=2", resume=True)
    train_run(place, "broken", "train.epochs=3", resume=True)
    whole, resumed = weights_of(place / "whole"), weights_of(place / "broken")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    for name in ("predictions-valid.parquet", "metrics.json"):
        assert (place / "broken" / name).read_bytes() == (place / "whole" / name).read_bytes()
    assert facts_of(place / "broken")["evaluations"] == facts_of(place / "whole")["evaluations"]


def test_a_damaged_checkpoint_is_told_of(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_clf.commands.baseline_encoder._score_validation", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_run(place, "new", "train.epochs=1")
    weights = partial_name(place / "new") / "checkpoints" / "last" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"the checkpoint is damaged: .* Give --overwrite"):
        train_run(place, "new", "train.epochs=1", resume=True)


def test_a_training_that_was_scored_when_it_was_killed_only_takes_its_name(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("llm_clf.commands.training_run.replace_folder", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_run(place, "new", "train.epochs=1")
    monkeypatch.setattr("llm_clf.commands.baseline_encoder._train_run", lambda *_: 1 / 0)
    assert train_run(place, "new", "train.epochs=1", resume=True)["rows"] == 16
    assert train_run(place, "new", "train.epochs=1", resume=True)["rows"] == 16, "nothing to do"


def test_memory_that_runs_out_halves_the_micro_batches(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = encoder.weighted_loss

    def limited(model: FusionClassifier, batch: list[encoder.LabelledRow]) -> torch.Tensor:
        if len(batch) * max(len(row.ids) for row in batch) > 300:
            raise torch.OutOfMemoryError("full")
        return original(model, batch)

    monkeypatch.setattr(encoder, "weighted_loss", limited)
    train_run(place, "new", "train.epochs=1", "train.micro_batch_tokens=1000")
    assert yaml.safe_load((place / "new" / "config.yaml").read_text())["train"]["micro_batch_tokens"] <= 500


def test_a_killed_prediction_goes_on_and_ends_with_the_same_bytes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["predict.batch_tokens=256"]
    llm_clf.predict(place / "run", place / "rows.csv", out=place / "whole.csv", set=small)
    original, calls = EncoderScorer._scores, []

    def dies(self: EncoderScorer, rows: list[list[int]], budget: int) -> np.ndarray:
        calls.append(len(rows))
        if len(calls) == 4:
            raise Killed
        return original(self, rows, budget)

    monkeypatch.setattr(EncoderScorer, "_scores", dies)
    with pytest.raises(Killed):
        llm_clf.predict(place / "run", place / "rows.csv", out=place / "broken.csv", set=small)
    llm_clf.predict(place / "run", place / "rows.csv", out=place / "broken.csv", set=small, resume=True)
    assert (place / "broken.csv").read_bytes() == (place / "whole.csv").read_bytes()
    assert sum(calls) == 80 + calls[3], "finished batches are not scored again"


def test_a_loss_that_is_no_number_stops_the_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = encoder.weighted_loss
    monkeypatch.setattr(encoder, "weighted_loss", lambda *given: original(*given) * float("nan"))
    with pytest.raises(TrainingError, match=r"Step 1: the loss is not a number.*Lower train.learning_rate"):
        train_run(place, "new", "train.epochs=1")
    assert not partial_name(place / "new").exists(), "nothing was learned, and nothing is left"


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(place: Path) -> None:
    words = [sys.executable, "-m", "llm_clf", "baseline", "encoder", "prompts", "--out", "new", "--model", "bert"]
    words += [word for setting in [*FAST, "train.epochs=60"] for word in ("--set", setting)]
    options = {"cwd": place, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, **options, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    progress = partial_name(place / "new") / "checkpoints" / "last" / "progress.json"
    while not progress.is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130 and "Interrupted; the same command with --resume goes on." in said
    done = subprocess.run([*words, "--resume"], **options, check=False)
    assert done.returncode == 0 and "Going on from step" in done.stderr and (place / "new" / "run.json").is_file()


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(folder: Path, *overrides: str, error: type[LlmClfError] = ConfigError, **more: object) -> str:
    """Return the message of a training that is refused and leaves nothing."""
    before = sorted(str(entry) for entry in folder.rglob("*"))
    with pytest.raises(error) as caught:
        train_run(folder, "new", *overrides, **more)
    assert sorted(str(entry) for entry in folder.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize("family", ["glm", "llama", "gpt2"])
def test_a_decoder_is_refused_with_what_takes_it(place: Path, make_base: Callable[..., Path], family: str) -> None:
    message = refusal(place, model=make_base(family), error=ArtifactError)
    assert f"is a decoder ({family})" in message and "llm-clf finetune" in message and "model.head=linear" in message


def test_an_original_chatglm_is_refused_as_a_decoder(place: Path, make_chatglm: Callable[..., Path]) -> None:
    assert "is a decoder (glm)" in refusal(place, model=make_chatglm(), error=ArtifactError)


def test_a_copy_of_the_base_that_ships_is_a_decoder_like_any_other(place: Path) -> None:
    from llm_clf.models.bases import SHIPPED

    assert "is a decoder (glm)" in refusal(place, model=SHIPPED, error=ArtifactError)


def test_an_encoder_that_was_made_a_decoder_is_refused(place: Path) -> None:
    config = json.loads((place / "bert" / "config.json").read_text())
    (place / "bert" / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    assert "is a decoder (bert)" in refusal(place, error=ArtifactError)


def test_an_encoder_decoder_is_refused(place: Path) -> None:
    (place / "t5").mkdir()
    (place / "t5" / "config.json").write_text('{"model_type": "t5"}')
    assert "is an encoder-decoder (t5)" in refusal(place, model=place / "t5", error=ArtifactError)


def test_an_encoder_without_safetensors_is_refused_with_what_to_do(place: Path) -> None:
    weights = load_file(place / "bert" / "model.safetensors")
    torch.save(weights, place / "bert" / "pytorch_model.bin")
    (place / "bert" / "model.safetensors").unlink()
    message = refusal(place, error=ArtifactError)
    assert "holds pytorch_model.bin and no model.safetensors" in message and ".save_pretrained('NEW')" in message
    (place / "bert" / "pytorch_model.bin").unlink()
    assert "holds no weights" in refusal(place, error=ArtifactError)


def test_an_encoder_that_is_damaged_or_not_there_is_refused(place: Path) -> None:
    weights = place / "bert" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "the model cannot be loaded" in refusal(place, error=ArtifactError)
    assert "there is no such model folder" in refusal(place, model="./nowhere", error=ArtifactError)
    (place / "bert" / "config.json").unlink()
    assert "has no config.json" in refusal(place, error=ArtifactError)


def test_an_encoder_without_its_tokenizer_is_refused(place: Path) -> None:
    for file in (place / "bert").glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refusal(place, error=ArtifactError)


def test_a_tokenizer_of_another_model_is_refused(place: Path, tmp_path: Path) -> None:
    weights = load_file(place / "bert" / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][:100].clone()
    save_file(weights, place / "bert" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "bert" / "config.json").read_text())
    (place / "bert" / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    assert "its tokenizer makes tokens up to 260, and the model knows 100" in refusal(place, error=ArtifactError)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["lora.r=3"], "lora: there is no such setting; known are model.name"),
        (["train.epoch=3"], "train.epoch: there is no such setting; did you mean train.epochs?"),
        (["head.loss=hinge"], "head.loss: found 'hinge'"),
        (["head.dropout=1"], "head.dropout: found 1"),
        (["model.dtype=int4", "train.epochs=0"], "train.epochs: found 0"),
        (["train.class_weights={2: 1}"], "train.class_weights: '2' is no label; the labels are 0, 1"),
        (["model.dtype=fp16"], "a CPU has no loss scaling"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_settings_are_refused(place: Path, overrides: list[str], told: str) -> None:
    assert told in refusal(place, *overrides)


def test_one_logit_for_three_labels_is_refused(place: Path) -> None:
    text = (place / "prompts" / "task.yaml").read_text()
    tree = yaml.safe_load(text)
    tree["labels"].append("2")
    (place / "prompts" / "task.yaml").write_text(yaml.safe_dump(tree))
    message = refusal(place, "head.loss=bce")
    assert "one logit stands for two labels, and the task has 3: 0, 1, 2" in message and "cross-entropy" in message


def test_a_prompts_folder_that_lacks_something_is_refused(place: Path) -> None:
    (place / "prompts" / "valid.jsonl").rename(place / "valid.jsonl")
    assert "has no valid.jsonl" in refusal(place, error=DataError)
    lines = (place / "valid.jsonl").read_text().replace('"output": "1"', '"output": "7"')
    (place / "prompts" / "valid.jsonl").write_text(lines)
    assert "'7' is no label" in refusal(place, error=LabelError)
    (place / "prompts" / "task.yaml").unlink()
    assert "has no task.yaml" in refusal(place, error=DataError)


def test_prompts_of_another_task_are_not_gone_on_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("llm_clf.commands.baseline_encoder._score_validation", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_run(place, "new", "train.epochs=1")
    # The rows are the same, and the labels stand in another order.
    task = (place / "task.yaml").read_text().replace('["0", "1"]', '["1", "0"]')
    (place / "task.yaml").write_text(task)
    llm_clf.build_prompts(
        [place / "rows.csv"], task=place / "task.yaml", out=place / "prompts", split="0.6,0.2,0.2", overwrite=True
    )
    with pytest.raises(ConfigError, match="cannot go on, these have changed since: prompts"):
        train_run(place, "new", "train.epochs=1", resume=True)
    other = SHORT_TASK.replace("Medical? 1 or 0", "Which?")
    (place / "task.yaml").write_text(other)
    llm_clf.build_prompts([place / "rows.csv"], task=place / "task.yaml", out=place / "prompts", overwrite=True)
    with pytest.raises(ConfigError, match="cannot go on, these have changed since: prompts"):
        train_run(place, "new", "train.epochs=1", resume=True)


def test_a_run_of_another_kind_is_not_taken_for_finished(place: Path) -> None:
    llm_clf.baseline_tfidf(place / "prompts", out=place / "tfidf")
    with pytest.raises(ConfigError, match="run of kind tfidf, and this command makes one of kind encoder"):
        train_run(place, "tfidf", resume=True)
    with pytest.raises(ConfigError, match="something is already there"):
        train_run(place, "tfidf")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"model": "bert"}, "leave out --model"),
        ({"set": ["predict.merge=true"]}, "heeds model.dtype and predict.batch_tokens only"),
        ({"set": ["head.width=3"]}, "heeds model.dtype and predict.batch_tokens only"),
        ({"task": "task.yaml"}, "has its own task"),
        ({"decode": "generate"}, "writes no answers: it is no language model"),
    ],
    ids=str,
)
def test_what_a_prediction_with_an_encoder_does_not_heed_is_refused(
    trained: Path, tmp_path: Path, given: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        llm_clf.predict(trained / "run", trained / "rows.csv", out=tmp_path / "p.csv", **given)


def vouched(run: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights of a run, and their hash in its run.json."""
    file = run / "encoder" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    facts = facts_of(run)
    facts["encoder"]["hash"] = file_hash(file)
    (run / "run.json").write_text(json.dumps(facts))


def test_a_run_whose_files_are_damaged_is_refused(place: Path) -> None:
    def predict(told: str) -> None:
        with pytest.raises(ArtifactError, match=told):
            llm_clf.predict(place / "run", place / "rows.csv", out=place / "p.csv")
        assert not (place / "p.csv").exists() and not partial_name(place / "p.csv").exists()

    file = place / "run" / "encoder" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    predict("has changed since the training")
    file.write_bytes(whole)
    vouched(place / "run", lambda weights: weights.pop("fusion_head.mean.weight"))
    predict("its head does not fit")
    vouched(place / "run", lambda weights: weights.pop("embeddings.word_embeddings.weight"))
    predict("lack or mis-shape 1 weights")
    file.unlink()
    predict("encoder/model.safetensors is missing")


def test_a_run_with_weights_that_are_no_numbers_says_so(place: Path) -> None:
    vouched(place / "run", lambda weights: weights["fusion_head.mean.bias"].fill_(float("nan")))
    with pytest.raises(ArtifactError, match="scores are not numbers"):
        llm_clf.predict(place / "run", place / "rows.csv", out=place / "p.csv")


def test_scores_come_by_row_whatever_the_batches(trained: Path) -> None:
    task = load_task(trained / "run" / "task.yaml")
    settings = load_tree(EncoderSettings, [trained / "run" / "config.yaml"], ["predict.batch_tokens=100"])
    scorer = EncoderScorer.from_folder(trained / "run" / "encoder", task, settings)
    texts = [f"{word}:{word} {number}" for number, word in enumerate(WORDS["0"] + WORDS["1"])]
    prompts = [Prompt(str(number), text, None, {}) for number, text in enumerate(texts)]
    batches: list[Scored] = []
    scorer.score(prompts, batches.append)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(8)) and len(batches) > 1
    scores = scorer.score_all(prompts)
    assert scores.argmax(axis=1).tolist() == [0] * 4 + [1] * 4
    np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, atol=1e-6)


def test_the_command_tells_in_one_line_what_is_wrong(place: Path, make_base: Callable[..., Path]) -> None:
    words = ["baseline", "encoder", "prompts", "--out", "new", "--model", str(make_base("llama"))]
    done = subprocess.run(
        [sys.executable, "-m", "llm_clf", *words], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "is a decoder (llama)" in done.stderr
