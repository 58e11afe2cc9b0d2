"""The loss and its gradients, micro-batches, weights, the order of rows."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import Bigrams, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_clf.config import LoraSettings, SpeedSettings, TrainSettings
from llm_clf.config_loading import load_settings
from llm_clf.engine.course import evaluation_steps, require_finite
from llm_clf.engine.label_words import LabelWords
from llm_clf.engine.lora import enable_fast_lora
from llm_clf.engine.sampling import balanced_order
from llm_clf.engine.tokens import TrainingExample
from llm_clf.engine.training import _backward_of, _rows_of_step, row_weights
from llm_clf.errors import ConfigError, TrainingError
from llm_clf.models.adapters import adapter_state, new_adapter, trainable

END = 0
WORDS = LabelWords([[[17, END]], [[50, END]]])
EXAMPLES = [
    TrainingExample([9, 8, 7, 6, 5], [17, 40, END], 1.0),
    TrainingExample([33, 34], [50, END], 1.0),
    TrainingExample([60, 61, 62, 63, 64, 65, 66, 67], [17, 41, 40, END], 2.0),
]


def adapted(dropout: float = 0.0) -> torch.nn.Module:
    """Return a tiny base with an adapter whose B is not zero, so that every weight gets a gradient."""
    model = new_adapter(tiny_model("glm").requires_grad_(False), LoraSettings(dropout=dropout), seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def reference_loss(model: torch.nn.Module) -> torch.Tensor:
    """Return the loss by its definition: one row at a time, no padding, log-softmax over everything."""
    total = torch.zeros(())
    for example in EXAMPLES:
        log_probs = model(input_ids=torch.tensor([[*example.ids, *example.answer]])).logits[0].log_softmax(dim=-1)
        for place, token in enumerate(example.answer):
            total = total - example.weight * log_probs[len(example.ids) - 1 + place, token]
    return total


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in trainable(model)]


def test_loss_and_gradients_equal_the_definition() -> None:
    model = adapted()
    expected = reference_loss(model)
    batched = WORDS.padded_loss(model, EXAMPLES, 3)
    torch.testing.assert_close(batched, expected, atol=1e-4, rtol=1e-5)
    pairs = zip(gradients(model, batched), gradients(model, reference_loss(model)), strict=True)
    for ours, theirs in pairs:
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-4)


def test_only_the_answer_counts() -> None:
    """A model that is right in the answer and wrong everywhere else has nothing to learn; the reverse has."""
    sure = {6: {17: 1.0}, 17: {END: 1.0}}
    right = Bigrams(sure)
    assert WORDS.padded_loss(right, [TrainingExample([9, 5, 6], [17, END], 1.0)], 3).item() < 1e-4
    wrong = Bigrams({9: {5: 1.0}, 5: {6: 1.0}, 6: {18: 1.0}, 17: {18: 1.0}})
    assert WORDS.padded_loss(wrong, [TrainingExample([9, 5, 6], [17, END], 1.0)], 3).item() > 30


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(3)), st.integers(0, 3))
def test_cutting_a_step_into_micro_batches_changes_nothing(order: list[int], cut: int) -> None:
    model = adapted()
    whole = WORDS.padded_loss(model, EXAMPLES, 3)
    parts = [[EXAMPLES[i] for i in order[:cut]], [EXAMPLES[i] for i in order[cut:]]]
    summed = sum(WORDS.padded_loss(model, part, 3) for part in parts if part)
    for ours, theirs in zip(gradients(model, summed), gradients(model, whole), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-4)


def test_fresh_adapter_changes_nothing_and_depends_on_the_seed() -> None:
    base, ids = tiny_model("glm").requires_grad_(False), torch.tensor([[5, 6, 7]])
    before = base(input_ids=ids).logits
    model = new_adapter(base, LoraSettings(), seed=1).eval()
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    again, other = (new_adapter(tiny_model("glm"), LoraSettings(), seed=seed) for seed in (1, 2))
    first = adapter_state(model)
    assert all(torch.equal(tensor, first[name]) for name, tensor in adapter_state(again).items())
    assert not all(torch.equal(tensor, first[name]) for name, tensor in adapter_state(other).items())


def test_adapter_goes_on_all_linear_layers_but_the_head() -> None:
    names = {name.split(".")[-3] for name in adapter_state(new_adapter(tiny_model("glm"), LoraSettings(), seed=1))}
    names |= {name.split(".")[-2] for name in adapter_state(new_adapter(tiny_model("glm"), LoraSettings(), seed=1))}
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"} <= names
    assert "lm_head" not in names


def test_unknown_target_modules_are_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"linear layers are .*gate_up_proj.*q_proj"):
        new_adapter(tiny_model("glm"), LoraSettings(target_modules=["c_attn"]), seed=1)


def test_row_weights() -> None:
    labels = ["0", "0", "0", "1"]
    assert row_weights(labels, None) == [1.0] * 4
    assert row_weights(labels, "balanced") == pytest.approx([4 / 6] * 3 + [2.0])
    assert row_weights(labels, {"1": 3.0}) == [1.0, 1.0, 1.0, 3.0]


def test_balanced_epochs_have_the_same_number_of_each_label() -> None:
    settings, labels = TrainSettings(batch_size=4, seed=7, sampling="balanced"), (0,) * 8 + (1,) * 2
    epochs = [
        [row for step in range(3) for row in _rows_of_step(epoch * 3 + step, 10, settings, labels)]
        for epoch in range(4)
    ]
    for epoch in epochs:
        rare = sorted(row for row in epoch if labels[row] == 1)
        common = [row for row in epoch if labels[row] == 0]
        assert len(rare) == len(common) == 5 and {rare.count(8), rare.count(9)} == {2, 3}
        assert len(set(common)) == 5
    # What an epoch leaves out comes in another one; a resumed training asks for the same step again.
    assert {row for epoch in epochs for row in epoch} == set(range(10))
    assert _rows_of_step(5, 10, settings, labels) == epochs[1][8:]


def test_balanced_epochs_share_out_what_is_left_over_in_turn() -> None:
    labels = [0, 0, 0, 0, 0, 1, 1, 2]
    counts = [Counter(labels[row] for row in balanced_order(labels, seed)) for seed in range(30)]
    assert all(sum(found.values()) == 8 and set(found.values()) <= {2, 3} for found in counts)
    assert all(min(found[label] for found in counts) == 2 for label in range(3))


def test_balanced_sampling_and_class_weights_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="rare labels would count twice"):
        load_settings(overrides=["train.sampling=balanced", "train.class_weights=balanced"])


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own() -> None:
    settings = TrainSettings(batch_size=4, seed=7)
    epochs = [[row for step in range(3) for row in _rows_of_step(epoch * 3 + step, 10, settings)] for epoch in range(2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert _rows_of_step(0, 10, settings) != _rows_of_step(0, 10, TrainSettings(batch_size=4, seed=8))


def test_evaluations_fall_at_epochs_and_at_the_end() -> None:
    assert evaluation_steps(10, 30, 1.0) == {10, 20, 30}
    assert evaluation_steps(10, 30, 0.5) == {5, 10, 15, 20, 25, 30}
    assert evaluation_steps(10, 30, 2.0) == {20, 30}
    assert evaluation_steps(1, 3, 0.1) == {1, 2, 3}


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))])
def test_loss_that_is_no_number_stops_with_advice(loss: float, norm: float) -> None:
    with pytest.raises(TrainingError, match=r"Step 4: .* Lower train.learning_rate \(now 0.0002\)"):
        require_finite(loss, norm, 3, TrainSettings(), scaled=False)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activations computed again"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shared", [0, 2])
def test_packed_step_equals_the_definition(shared: int, dropout: float, checkpointing: bool) -> None:
    """Dropout is on behind the shared tokens only, and in the checkpointed layers the same mask is drawn again."""
    examples = [TrainingExample([201, 202, *e.ids], e.answer, e.weight) for e in EXAMPLES]

    def step(speed: SpeedSettings, budget: int) -> tuple[float, list[torch.Tensor]]:
        model = adapted(dropout).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        gradients = _backward_of(model, WORDS, examples, speed, 3, Accelerator(cpu=True))
        torch.manual_seed(11)
        loss = gradients.do(examples, budget)
        return loss, [parameter.grad.clone() for parameter in trainable(model)]

    loss, found = step(SpeedSettings(shared_prefix=shared > 0, fast_lora=False), 4096)
    if dropout:
        assert math.isfinite(loss) and all(gradient.isfinite().all() for gradient in found)
        return
    plain_loss, expected = step(SpeedSettings(packing=False, fast_lora=False), 4096)
    for packed_loss, gradients in ((loss, found), step(SpeedSettings(shared_prefix=shared > 0), 12)):
        assert packed_loss == pytest.approx(plain_loss, rel=1e-5)
        for one, other in zip(gradients, expected, strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("targets", [["q_proj"], ["down_proj"], ["embed_tokens", "v_proj"], "all-linear"])
def test_shared_tokens_with_adapters_on_some_layers_only(targets: Any) -> None:
    def step(speed: SpeedSettings) -> list[torch.Tensor]:
        settings = LoraSettings(dropout=0.0, target_modules=targets)
        model = new_adapter(tiny_model("glm").requires_grad_(False), settings, seed=1)
        with torch.no_grad():
            for number, parameter in enumerate(trainable(model)):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
        rows = [TrainingExample([201, 202, *e.ids], e.answer, e.weight) for e in EXAMPLES]
        _backward_of(model, WORDS, rows, speed, 3, Accelerator(cpu=True)).do(rows, 64)
        return [parameter.grad.clone() for parameter in trainable(model)]

    for one, other in zip(step(SpeedSettings()), step(SpeedSettings(packing=False, fast_lora=False)), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_fast_lora_in_bf16_stays_near_pefts() -> None:
    def logits(fast: bool) -> torch.Tensor:
        model = adapted().eval().bfloat16()
        for parameter in trainable(model):
            parameter.data = parameter.data.float()
        if fast:
            enable_fast_lora(model)
        with torch.no_grad():
            return model(input_ids=torch.tensor([EXAMPLES[2].ids])).logits.float()

    near, far = logits(True), logits(False)
    assert near.std() > 0.3 and (near - far).abs().max() < 0.1 * far.std()


def test_fast_lora_leaves_other_layers_to_peft() -> None:
    model = new_adapter(tiny_model("glm").requires_grad_(False), LoraSettings(use_dora=True), seed=1)
    enable_fast_lora(model)
    assert not any("forward" in vars(module) for module in model.modules())
    plain = adapted()
    enable_fast_lora(plain)
    ids = torch.tensor([[9, 8, 7]])
    with torch.no_grad(), plain.disable_adapter():
        assert torch.equal(plain(input_ids=ids).logits, tiny_model("glm")(input_ids=ids).logits)
