"""A linear head on the states: equal to transformers with PEFT, packed or padded; its runs through every command."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from conftest import byte_tokenizer, tiny_config
from safetensors.torch import load_file, save_file

import llm_clf
from llm_clf import cli
from llm_clf.config import LoraSettings, ModelSettings, SpeedSettings
from llm_clf.config_loading import load_settings
from llm_clf.engine.decoder import INTERLEAVED, ends_short
from llm_clf.engine.linear_head import POOLINGS, LinearHead
from llm_clf.engine.packing import FAMILIES
from llm_clf.engine.scoring import LabelScorer
from llm_clf.engine.speed import speed_up
from llm_clf.engine.tokens import PromptTokenizer, TrainingExample
from llm_clf.engine.training import _backward_of
from llm_clf.errors import ArtifactError, ConfigError
from llm_clf.files import partial_name
from llm_clf.models.adapters import new_adapter, trainable
from llm_clf.models.bases import load_model, load_tokenizer
from llm_clf.models.heads import prepare_head
from llm_clf.prompting.tasks import load_task

MakeBase = Callable[..., Path]
CPU = torch.device("cpu")
PLAIN = SpeedSettings(packing=False, fast_lora=False)
LABELS = ("c", "a", "b")
EXAMPLES = [
    TrainingExample([201, 202, 9, 8, 7, 6, 5], [2], 1.0),
    TrainingExample([201, 202, 33], [0], 2.0),
    TrainingExample([201, 202, *range(60, 200)], [1], 0.5),
    TrainingExample([201, 202, 70, 71], [0], 1.0),
]


def classifier(family: str, *, dtype: torch.dtype = torch.float32, fresh: bool = False) -> Any:
    """Return a random model for three labels with an adapter and, unless it is fresh, a head that change much."""
    from transformers import AutoModelForSequenceClassification

    config = tiny_config(family)
    config.num_labels = len(LABELS)
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    prepare_head(base, family, fresh=True)
    model = new_adapter(base.requires_grad_(False), LoraSettings(dropout=0.0), seed=1)
    if not fresh:
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in trainable(model):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def reference(model: Any, ids: Sequence[int], pooling: str) -> torch.Tensor:
    """Return the logits of one row: by transformers' and PEFT's own forward, or of the mean of its states."""
    row = torch.tensor([list(ids)])
    if pooling == "last":
        return model(input_ids=row).logits[0].float()
    base = model.get_base_model()
    return base.score(base.base_model(input_ids=row).last_hidden_state[0].float().mean(dim=0))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", [*sorted(FAMILIES), "bloom", "mistral-window"])
def test_scores_equal_transformers_and_peft_one_row_at_a_time(family: str, pooling: str) -> None:
    plain, model, head = classifier(family), classifier(family), LinearHead(pooling)
    packed = speed_up(model, SpeedSettings(), every_state=head.reads_every_state)
    assert packed == (family in FAMILIES)
    assert ends_short(model) == (family in INTERLEAVED and pooling == "last" and packed)
    # Some prompts do not begin with what is shared.
    prompts = [example.ids for example in EXAMPLES] + [[5, 6, 7], [201]]
    with torch.no_grad():
        expected = torch.stack([reference(plain, ids, pooling).log_softmax(dim=-1) for ids in prompts])
    assert expected.std() > 0.1
    for shared in ([], [201, 202]):
        scorer = LabelScorer(model, head, pad_id=3, packed=packed, shared=shared)
        torch.testing.assert_close(scorer.score(prompts), expected, atol=1e-5, rtol=1e-5)
    padded = LabelScorer(classifier(family), head, pad_id=3, packed=False)
    torch.testing.assert_close(padded.score(prompts), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("speed", [SpeedSettings(), SpeedSettings(shared_prefix=False), PLAIN], ids=["all", "-", "no"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", ["glm", "qwen3", "gpt2"])
def test_loss_and_gradients_of_adapter_and_head_equal_transformers_and_peft(
    family: str, pooling: str, speed: SpeedSettings
) -> None:
    plain, model = classifier(family).train(), classifier(family).train()
    if family == "gpt2":
        # Its own dropout would draw otherwise.
        for part in [*plain.modules(), *model.modules()]:
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
    losses = [
        example.weight * -reference(plain, example.ids, pooling).log_softmax(dim=-1)[example.answer[0]]
        for example in EXAMPLES
    ]
    expected = torch.stack(losses).sum() / sum(example.weight for example in EXAMPLES)
    expected.backward()
    # Micro-batches of 64 tokens: the longest row stands alone.
    loss = _backward_of(model, LinearHead(pooling), EXAMPLES, speed, 3, Accelerator(cpu=True)).do(EXAMPLES, 64)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    pairs = [(p.grad, q.grad) for p, q in zip(trainable(plain), trainable(model), strict=True)]
    assert all(theirs.abs().max() > 0 for theirs, _ in pairs)
    for theirs, ours in pairs:
        torch.testing.assert_close(ours, theirs, atol=2e-5 * theirs.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_checkpointing_computes_the_same_gradients(pooling: str) -> None:
    found = []
    for again in (False, True):
        model = classifier("glm").train()
        if again:
            model.activation_checkpointing_enable()
        _backward_of(model, LinearHead(pooling), EXAMPLES, SpeedSettings(), 3, Accelerator(cpu=True)).do(EXAMPLES, 64)
        found.append([parameter.grad for parameter in trainable(model)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6 * one.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_label_is_as_probable_before_training(pooling: str) -> None:
    model, head = classifier("glm", fresh=True), LinearHead(pooling)
    loss = head.padded_loss(model, EXAMPLES, 3).item()
    assert loss == pytest.approx(sum(example.weight for example in EXAMPLES) * math.log(3), rel=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_head_and_logits_are_fp32_in_a_base_of_bf16(pooling: str) -> None:
    exact, model = classifier("glm"), classifier("glm", dtype=torch.bfloat16)
    head = LinearHead(pooling)
    packed = speed_up(model, SpeedSettings(), every_state=head.reads_every_state)
    score = model.get_base_model().score
    assert {parameter.dtype for parameter in score.parameters()} == {torch.float32}
    loss = head.packed_loss(model, EXAMPLES, head.read_beginning(model, [201, 202]))
    loss.backward()
    assert loss.dtype == torch.float32
    scores = LabelScorer(model, head, pad_id=3, packed=packed, shared=[201, 202]).score([e.ids for e in EXAMPLES])
    with torch.no_grad():
        near = torch.stack([reference(exact, e.ids, pooling).softmax(dim=-1) for e in EXAMPLES])
    np.testing.assert_allclose(scores.softmax(dim=-1), near, atol=0.1)


# Runs

TASK = """\
instruction: "Which one?"
input: "{title}:{abstract}"
id_column: uuid
label_column: label
cut: abstract
labels: ["c", "a", "b"]
"""
WORDS = {"c": ["heart", "lung"], "a": ["steel", "star"], "b": ["court", "law"]}
FAST = ["train.epochs=6", "train.batch_size=8", "train.learning_rate=0.004", "model.dtype=fp32", "lora.dropout=0"]
LINEAR = "model.head=linear"
MEAN = "model.pooling=mean"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a prompts folder of three labels, which do not stand in the order of the alphabet."""
    folder = tmp_path_factory.mktemp("prompts")
    with open(folder / "rows.csv", "w", encoding="utf-8") as lines:
        lines.write("uuid,title,abstract,label\n")
        for number in range(72):
            label = "cab"[number % 3]
            word = WORDS[label][number // 3 % 2]
            lines.write(f"r{number},{word},{(word + ' ') * (number % 9 + 1)}{number},{label}\n")
    (folder / "task.yaml").write_text(TASK, encoding="utf-8")
    llm_clf.build_prompts([folder / "rows.csv"], task=folder / "task.yaml", out=folder / "prompts", split="0.6,0.3,0.1")
    return folder / "prompts"


@pytest.fixture(scope="module")
def train(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains a run with a linear head; the same one for the same words."""
    made: dict[tuple[str, ...], Path] = {}

    def trained(base: Path, *more: str) -> Path:
        key = (str(base), *more)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("trained") / "run"
            llm_clf.finetune(prompts, out=made[key], model=str(base), set=[*FAST, LINEAR, *more])
        return made[key]

    return trained


@pytest.fixture(scope="module")
def run(train: Callable[..., Path], base: Path) -> Path:
    return train(base)


def probabilities(file: Path) -> np.ndarray:
    return np.stack([pq.read_table(file)[f"prob_{label}"].to_numpy() for label in LABELS], axis=1)


def tokens_of(base: Path, prompts: Path) -> list[list[int]]:
    """Return the validation rows' tokens, put together by hand."""
    tokenizer = load_tokenizer(ModelSettings(name=str(base)))
    rows = [json.loads(line) for line in (prompts / "valid.jsonl").read_text().splitlines()]
    return [tokenizer.encode(f"{row['instruction']}\n{row['input']}\n", add_special_tokens=False) for row in rows]


def in_plain_peft(base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        return PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("more", [[], [MEAN]], ids=["last", "mean"])
@pytest.mark.parametrize("kind", ["glm", "bloom"])
def test_predict_gives_the_stored_file_exactly_and_plain_peft_the_same_numbers(
    kind: str, more: list[str], train: Callable[..., Path], make_base: MakeBase, prompts: Path, tmp_path: Path
) -> None:
    base = make_base(kind)
    run = train(base, *more)
    stored = run / "predictions-valid.parquet"
    llm_clf.predict(run, prompts / "valid.jsonl", out=tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == stored.read_bytes()
    model = in_plain_peft(base, run / "adapter")
    with torch.no_grad():
        logits = [reference(model, ids, "mean" if more else "last") for ids in tokens_of(base, prompts)]
    np.testing.assert_allclose(probabilities(stored), torch.stack(logits).softmax(dim=-1), atol=1e-5)


def test_a_learnable_task_is_learned_and_the_run_says_how(run: Path) -> None:
    assert json.loads((run / "metrics.json").read_text())["accuracy"] > 0.9
    facts, config = (
        json.loads((run / "run.json").read_text()),
        json.loads((run / "adapter/adapter_config.json").read_text()),
    )
    assert facts["kind"] == "lora" and facts["task"]["labels"] == list(LABELS)
    assert config["task_type"] == "SEQ_CLS" and "score" in config["modules_to_save"]
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    head = weights["base_model.model.score.weight"]
    assert head.shape == (3, 32) and head.dtype == torch.float32
    assert facts["adapter"]["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert load_settings([run / "config.yaml"]).model.head == "linear"


def test_interrupted_training_resumes_to_the_same_bytes(
    run: Path, prompts: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_clf.engine import training

    class Killed(BaseException):
        """Stands for a kill."""

    steps, original = 0, training._add_up

    def counted(*args: Any) -> float:
        nonlocal steps
        steps += 1
        if steps > 9:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(training, "CHECKPOINT_SECONDS", 0.0)
        patched.setattr(training, "_add_up", counted)
        llm_clf.finetune(prompts, out=tmp_path / "run", model=str(base), set=[*FAST, LINEAR])
    assert partial_name(tmp_path / "run").is_dir()
    llm_clf.finetune(prompts, out=tmp_path / "run", model=str(base), set=[*FAST, LINEAR], resume=True)
    for name in ("adapter/adapter_model.safetensors", "predictions-valid.parquet", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes(), name


@pytest.mark.parametrize("more", [[], [MEAN]], ids=["last", "mean"])
def test_a_bare_adapter_predicts_as_its_run(
    more: list[str], train: Callable[..., Path], base: Path, prompts: Path, tmp_path: Path
) -> None:
    run, rows = train(base, *more), prompts / "valid.jsonl"
    told: dict[str, Any] = {"task": run / "task.yaml", "model": str(base), "set": ["model.dtype=fp32", *more]}
    llm_clf.predict(run / "adapter", rows, out=tmp_path / "bare.parquet", **told)
    llm_clf.predict(run, rows, out=tmp_path / "beside.parquet", set=["predict.merge=false"])
    assert (tmp_path / "bare.parquet").read_bytes() == (tmp_path / "beside.parquet").read_bytes()
    with pytest.raises(ArtifactError, match=r"task_type SEQ_CLS, so .* Set model.head to linear"):
        wrong = told | {"set": ["model.head=label-words"]}
        llm_clf.predict(run / "adapter", rows, out=tmp_path / "wrong.parquet", **wrong)


def test_a_head_of_other_labels_is_refused(
    run: Path, base: Path, short_task: Path, rows_file: Path, prompts: Path, tmp_path: Path
) -> None:
    told: dict[str, Any] = {"task": short_task, "model": str(base)}
    with pytest.raises(ArtifactError, match="tells 3 labels apart, and the task has 2"):
        llm_clf.predict(run / "adapter", rows_file, out=tmp_path / "out.csv", **told)
    bare = tmp_path / "headless"
    shutil.copytree(run / "adapter", bare)
    weights = load_file(bare / "adapter_model.safetensors")
    weights.pop("base_model.model.score.weight")
    save_file(weights, bare / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="holds no head"):
        told["task"] = run / "task.yaml"
        llm_clf.predict(bare, prompts / "valid.jsonl", out=tmp_path / "out.csv", **told)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merged_it_is_a_model_for_sequence_classification(
    dtype: str, train: Callable[..., Path], base: Path, prompts: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run, place = train(base, f"model.dtype={dtype}"), tmp_path / "model"
    facts = llm_clf.merge(run, out=place, data=prompts)
    assert facts["changes"]["labels_changed"] == 0
    assert facts["changes"]["largest_probability_change"] < (1e-5 if dtype == "fp32" else 0.05)
    model = AutoModelForSequenceClassification.from_pretrained(place).eval()
    assert model.config.id2label == dict(enumerate(LABELS)) and model.config.pad_token_id == 3
    # Padded, as other programs do.
    rows = tokens_of(base, prompts)
    batch = AutoTokenizer.from_pretrained(place).pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        probs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float().softmax(-1)
    stored = probabilities(place / "predictions-valid.parquet")
    np.testing.assert_allclose(stored, probs, atol=1e-5 if dtype == "fp32" else 0.05)


def test_of_the_mean_no_model_of_transformers_can_be_made(
    train: Callable[..., Path], base: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"reads the mean .* the last token's"):
        llm_clf.merge(train(base, MEAN), out=tmp_path / "model", data=prompts)
    assert not any(tmp_path.iterdir())


def test_chat_classifies_and_does_not_talk(
    run: Path, base: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm_clf.commands.chat import _load

    row = json.loads((prompts / "valid.jsonl").read_text().splitlines()[0])
    loaded = _load(run, None, None, ())
    _, found = loaded.classify(row["input"])
    assert [label for label, _ in found] == list(LABELS)
    expected = probabilities(run / "predictions-valid.parquet")[0]
    np.testing.assert_allclose([prob for _, prob in found], expected, atol=1e-5)
    with pytest.raises(ConfigError, match=r"writes no words\. Ask it with /classify TEXT"):
        loaded.answer([{"role": "user", "content": "Hello"}], lambda _: None)
    loaded.adapter_on = False
    with pytest.raises(ConfigError, match="the base alone knows no labels"):
        loaded.classify(row["input"])
    with pytest.raises(ConfigError, match="tell which: --task TASK"):
        llm_clf.chat(run / "adapter", model=str(base), once="Hello")
    with pytest.raises(ArtifactError, match="has no linear head"):
        llm_clf.chat(model=str(base), task=run / "task.yaml", set=[LINEAR], once="Hello")


def test_what_does_not_go_with_a_linear_head_is_refused(
    run: Path,
    train: Callable[..., Path],
    base: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["predict", run, prompts / "valid.jsonl", "--out", tmp_path / "out.csv", "--decode", "generate"]
    monkeypatch.setattr("sys.argv", ["llm-clf", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and "reads labels by a linear head. Leave it out." in capsys.readouterr().err
    for change, told in (("model.head=label-words", "model.head label-words"), (MEAN, "model.pooling mean")):
        with pytest.raises(ConfigError, match=f"{told}: .* was trained with (linear|last)"):
            llm_clf.predict(run, prompts / "valid.jsonl", out=tmp_path / "out.csv", set=[change])
    with pytest.raises(ConfigError, match=r"model.pooling: found 'mean'; label words have no states to pool"):
        llm_clf.finetune(prompts, out=tmp_path / "run", model=str(base), set=[MEAN])
    assert not any(tmp_path.iterdir())


def test_a_base_without_such_a_head_is_refused_before_its_weights_are_read(prompts: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    for kind, told in (("bert", "a bert has another head"), ("cohere", "no sequence classification for a cohere")):
        base = tmp_path / kind
        AutoConfig.for_model(kind, vocab_size=261, pad_token_id=3, bos_token_id=None, eos_token_id=0).save_pretrained(
            base
        )
        byte_tokenizer(base)
        with pytest.raises(ArtifactError, match=told):
            llm_clf.finetune(prompts, out=tmp_path / "run", model=str(base), set=[LINEAR])


@pytest.mark.parametrize("more", [[], [MEAN]], ids=["last", "mean"])
@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
def test_an_original_chatglm_can_have_one(
    family: str, more: list[str], train: Callable[..., Path], make_chatglm: MakeBase, prompts: Path, tmp_path: Path
) -> None:
    base = make_chatglm(family)
    run = train(base, "train.epochs=1", *more)
    llm_clf.predict(run, prompts / "valid.jsonl", out=tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == (run / "predictions-valid.parquet").read_bytes()
    native = tmp_path / "native"
    llm_clf.import_chatglm(base, native)
    settings = load_settings([run / "config.yaml"]).model
    task = load_task(run / "task.yaml")
    tokens = PromptTokenizer(load_tokenizer(settings), task, max_length=512, words=False)
    model, pooling = in_plain_peft(native, run / "adapter"), settings.pooling
    from llm_clf.prompting.prompts import read_split

    with torch.no_grad():
        rows = tokens.encode(read_split(prompts, "valid", task))
        logits = [reference(model, row.ids, pooling) for row in rows]
    expected = torch.stack(logits).softmax(dim=-1)
    np.testing.assert_allclose(probabilities(run / "predictions-valid.parquet"), expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["8bit", "4bit"])
def test_the_head_of_a_quantised_base_is_neither_quantised_nor_rounded(
    mode: str, train: Callable[..., Path], wide: Path, prompts: Path, tmp_path: Path
) -> None:
    settings = ModelSettings(name=str(wide), head="linear", quantization=mode)
    model = load_model(settings, dtype="bf16", device=CPU, labels=LABELS)
    assert type(model.score) is torch.nn.Linear and model.score.weight.dtype == torch.float32
    assert type(model.model.layers[0].mlp.down_proj) is not torch.nn.Linear
    run = train(wide, f"model.quantization={mode}", "train.epochs=1")
    head = load_file(run / "adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert head.dtype == torch.float32 and head.abs().max() > 0
    llm_clf.predict(run, prompts / "valid.jsonl", out=tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == (run / "predictions-valid.parquet").read_bytes()


def test_the_estimate_has_no_logits_over_a_vocabulary(base: Path, prompts: Path) -> None:
    words, linear, mean = (
        llm_clf.doctor(model=str(base), data=prompts, set=more)["estimate"] for more in ([], [LINEAR], [LINEAR, MEAN])
    )
    assert linear["adapter_parameters"] == words["adapter_parameters"] + 3 * 32
    assert linear["parameters"] == words["parameters"] - 261 * 32 + 3 * 32
    for mode, sizes in linear["modes"].items():
        assert sizes["workspace_bytes"] <= words["modes"][mode]["workspace_bytes"]
        # The last layer is computed everywhere.
        if not sizes["gradient_checkpointing"]:
            assert sizes["activations_bytes"] < mean["modes"][mode]["activations_bytes"]
