"""Fused decoder layers and their kernels against transformers' and PEFT's own code, one row at a time."""

from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from llm_clf.config import LoraSettings, SpeedSettings
from llm_clf.engine import attention, decoder, kernels
from llm_clf.engine.attention import Chunk, RowPlan, attend
from llm_clf.engine.decoder import INTERLEAVED, enable_fused_layers, ends_short
from llm_clf.engine.lora import adapted_linears, enable_fast_lora
from llm_clf.engine.packing import AnswerShape, Row, packed_logits, read_beginning
from llm_clf.engine.speed import speed_up
from llm_clf.models.adapters import new_adapter, trainable

SHARED = [30, 31, 32, 33, 34]
NODES = [17, 40, 41, 50]
TREE = AnswerShape([0, 1, 1, 0], torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).bool())
PATHS = [[17], [17, 40], [17, 41], [50]]
OFF = SpeedSettings(packing=False, shared_prefix=False, fast_lora=False)
rows_of_tokens = st.lists(st.lists(st.integers(5, 260), min_size=1, max_size=20), min_size=1, max_size=5)


def adapted(family: str, speed: SpeedSettings, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny base with an adapter that changes much."""
    base = tiny_model(family).to(dtype).requires_grad_(False)
    model = new_adapter(base, LoraSettings(dropout=dropout), seed=1).train()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    speed_up(model, speed)
    return model


def one_by_one(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0]


def gradients_apart(plain: Any, model: Any) -> float:
    """Return the largest difference of any gradient, relative to the largest entry of its tensor."""
    pairs = [(p.grad, q.grad) for p, q in zip(trainable(plain), trainable(model), strict=True)]
    assert all(expected.abs().max() > 0 for expected, _ in pairs)
    return max(float((found - expected).abs().max() / expected.abs().max()) for expected, found in pairs)


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("family", sorted(INTERLEAVED))
def test_logits_and_gradients_equal_one_row_at_a_time(family: str, short: bool) -> None:
    plain, model = adapted(family, OFF), adapted(family, SpeedSettings(short_last_layer=short))
    assert ends_short(model) == short
    rows = [[60, 61, 62], [70], list(range(80, 240))]
    made = read_beginning(model, SHARED)
    leaves = made.leaves()
    wanted = [range(max(0, len(row) - 2), len(row)) for row in rows]
    found = packed_logits(model, [Row(row) for row in rows], leaves, wanted)
    expected = torch.cat(
        [one_by_one(plain, [*SHARED, *row])[-len(some) :] for row, some in zip(rows, wanted, strict=True)]
    )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    expected.sin().sum().backward()
    found.sin().sum().backward()
    made.backward(leaves)
    assert gradients_apart(plain, model) <= 2e-5


@given(rows=rows_of_tokens, family=st.sampled_from(sorted(INTERLEAVED)))
@settings(max_examples=25, deadline=None)
def test_answer_trees_of_any_rows_equal_one_at_a_time(rows: list[list[int]], family: str) -> None:
    plain, model = tiny_model(family), tiny_model(family)
    speed_up(model, SpeedSettings())
    wanted = [range(len(row) - 1, len(row) + len(NODES)) for row in rows]
    with torch.no_grad():
        found = packed_logits(model, [Row(row, NODES) for row in rows], read_beginning(model, SHARED), wanted, TREE)
        expected = [one_by_one(plain, [*SHARED, *row, *path])[-1] for row in rows for path in ([], *PATHS)]
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-5, rtol=1e-5)


def test_no_row_sees_another_and_none_sees_what_follows() -> None:
    model = tiny_model("glm")
    speed_up(model, SpeedSettings(short_last_layer=False))
    beginning, rows = read_beginning(model, SHARED), [[60, 61, 62], [70, 71], list(range(80, 230))]

    def logits(rows: list[list[int]]) -> list[torch.Tensor]:
        sizes = [len(row) for row in rows]
        with torch.no_grad():
            whole = packed_logits(model, [Row(row) for row in rows], beginning, [range(size) for size in sizes])
        return list(whole.split(sizes))

    before = logits(rows)
    for changed in range(3):
        others = [row if number != changed else [*row[:-1], row[-1] + 9] for number, row in enumerate(rows)]
        for number, (old, new) in enumerate(zip(before, logits(others), strict=True)):
            assert torch.equal(old[:-1], new[:-1])
            assert torch.equal(old[-1], new[-1]) == (number != changed)


def test_bf16_stays_near_fp32_as_the_plain_path_does() -> None:
    rows = [[60, 61, 62], list(range(80, 230))]

    def probs(speed: SpeedSettings, dtype: torch.dtype) -> torch.Tensor:
        model = adapted("glm", speed, dtype=dtype)
        with torch.no_grad():
            if speed.packing:
                wanted = [[len(row) - 1] for row in rows]
                found = packed_logits(model, [Row(row) for row in rows], read_beginning(model, SHARED), wanted)
            else:
                found = torch.stack([one_by_one(model, [*SHARED, *row])[-1] for row in rows])
        return found.float().softmax(dim=-1)

    exact = probs(OFF, torch.float32)
    plain = (probs(OFF, torch.bfloat16) - exact).abs().max()
    fused = (probs(SpeedSettings(), torch.bfloat16) - exact).abs().max()
    assert fused <= max(2 * plain, 0.02)


def test_a_layer_is_its_own_where_nothing_is_packed() -> None:
    plain, model = tiny_model("qwen3"), tiny_model("qwen3")
    speed_up(model, SpeedSettings())
    ids = torch.tensor([[3, 3, 60, 61], [70, 71, 72, 73]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        expected, found = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (plain, model))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", sorted(INTERLEAVED))
def test_checkpointing_computes_layers_again_and_the_same_gradients(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, again = (adapted(family, SpeedSettings()) for _ in range(2))
    again.activation_checkpointing_enable()
    read: list[int] = []
    once = decoder._forward
    monkeypatch.setattr(decoder, "_forward", lambda *given: (read.append(given[1].shape[1]), once(*given))[1])
    for model, times in ((kept, 1), (again, 2)):
        read.clear()
        packed_logits(model, [Row([60, 61, 62])], read_beginning(model, SHARED), [[2]]).square().sum().backward()
        # Both the beginning and the row, in every layer.
        assert sorted(read) == sorted([3, 5] * model.config.num_hidden_layers * times)
    assert gradients_apart(kept, again) <= 1e-6


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_checkpointing_also_serves_packed_layers_that_are_not_fused(family: str) -> None:
    kept, again = (adapted(family, SpeedSettings()) for _ in range(2))
    again.activation_checkpointing_enable()
    rows, sizes = [Row(list(range(60, 90)))], []
    for model in (kept, again):
        saved: list[int] = []
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        with saved_tensors_hooks(lambda x, saved=saved: (saved.append(x.nbytes), x)[1], lambda x: x):
            loss = packed_logits(model, rows, read_beginning(model, SHARED), [[2]]).square().sum()
        loss.backward()
        sizes.append(sum(saved))
    assert sizes[1] < sizes[0] / 2
    assert gradients_apart(kept, again) <= 1e-6


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "gelu"), ("attention_dropout", 0.1)])
def test_layers_that_compute_otherwise_keep_their_own_forward(key: str, value: object) -> None:
    model = tiny_model("llama")
    setattr(model.config, key, value)
    assert not enable_fused_layers(model, short=True) and not ends_short(model)
    assert not enable_fused_layers(tiny_model("gpt2"), short=True)


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_norm_equals_transformers(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 1024)
    norm = tiny_model("glm").model.norm.requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(rows, 32, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    found, expected = kernels.rms_norm(x, norm.weight, norm.variance_epsilon), norm(other)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, atol=1e-5, rtol=1e-5)


def test_gates_equal_their_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 64)
    both = torch.randn(37, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernels.silu_gate_joined, both)
    gate, up = (half.detach().clone().requires_grad_() for half in both.chunk(2, dim=1))
    assert torch.autograd.gradcheck(kernels.silu_gate, (gate, up))
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(kernels.silu_gate(gate, up), expected)
    torch.testing.assert_close(kernels.silu_gate_joined(both), expected)


@pytest.mark.parametrize("family", ["glm", "llama"])
def test_rotation_equals_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.glm import modeling_glm
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(kernels, "BLOCK", 256)
    code = {"glm": modeling_glm, "llama": modeling_llama}[family]
    x, angle = torch.randn(40, 4, 8, requires_grad=True), torch.randn(40, 2 if family == "glm" else 4)
    other = x.detach().clone().requires_grad_()
    cos, sin = (torch.cat([part, part], dim=1)[None] for part in (angle.cos(), angle.sin()))
    expected = code.apply_rotary_pos_emb(other[None].transpose(1, 2), other[None].transpose(1, 2), cos, sin)[0]
    found = kernels.rotate(x, torch.polar(torch.ones_like(angle), angle), interleaved=INTERLEAVED[family])
    torch.testing.assert_close(found, expected[0].transpose(0, 1), atol=1e-6, rtol=1e-5)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, atol=1e-5, rtol=1e-5)


def test_attention_has_the_gradients_of_its_definition() -> None:
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(7, heads, 4, generator=draw).double().requires_grad_() for heads in (4, 2, 2))
    before = tuple(torch.randn(3, 2, 4, generator=draw).double().requires_grad_() for _ in range(2))
    mask = torch.full((4, 4), float("-inf"), dtype=torch.float64).triu(1)
    plan = [
        RowPlan(slice(0, 4), [Chunk(slice(0, 2), 2, mask[:2, :2]), Chunk(slice(2, 4), 4, mask[:2, :2])]),
        RowPlan(slice(4, 7), [Chunk(slice(4, 7), 3, mask[:3, :3])]),
    ]

    def attended(*inputs: torch.Tensor) -> torch.Tensor:
        return attend(*inputs[:3], inputs[3:], plan, 0.5)

    expected = torch.empty(7, 4, 4, dtype=torch.float64)
    for first, end in ((0, 4), (4, 7)):
        for head in range(4):
            keys, values = (
                torch.cat([b, x[first:end]])[:, head // 2] for b, x in zip(before, (key, value), strict=True)
            )
            scores = 0.5 * query[first:end, head] @ keys.T
            scores[:, 3:] += mask[: end - first, : end - first]
            expected[first:end, head] = scores.softmax(dim=-1) @ values
    torch.testing.assert_close(attended(query, key, value, *before), expected.flatten(1))
    # Sums over rows are made in fp32.
    assert torch.autograd.gradcheck(attended, (query, key, value, *before), atol=1e-4)


def test_dropout_of_the_base_s_attention_has_its_gradients_and_its_mean() -> None:
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(5, heads, 4, generator=draw).double().requires_grad_() for heads in (4, 2, 2)]
    plan = [RowPlan(slice(0, 5), [Chunk(slice(0, 5), 5, torch.zeros(5, 5).double())])]

    def dropped(*given: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return attend(*given, None, plan, 0.5, 0.4)

    assert torch.autograd.gradcheck(dropped, inputs, atol=1e-4)
    whole = attend(*inputs, None, plan, 0.5)
    assert not torch.allclose(dropped(*inputs), whole)
    several = torch.stack([attend(*inputs, None, plan, 0.5, 0.4) for _ in range(4000)]).mean(dim=0)
    torch.testing.assert_close(several, whole, atol=0.1, rtol=0)


def test_chunks_of_a_row_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [list(range(60, 130)), [9]]

    def logits() -> torch.Tensor:
        model = tiny_model("glm")
        speed_up(model, SpeedSettings())
        with torch.no_grad():
            return packed_logits(model, [Row(row) for row in rows], read_beginning(model, SHARED), [[69, 3], [0]])

    whole = logits()
    monkeypatch.setattr("llm_clf.engine.packing.CHUNK", 16)
    torch.testing.assert_close(logits(), whole, atol=1e-5, rtol=1e-5)
    assert attention.CHUNK > 16


@pytest.mark.parametrize("alike", [True, False], ids=["all adapted", "one without adapter"])
def test_layers_that_share_their_input_equal_peft(alike: bool) -> None:
    def three() -> list[Any]:
        model = adapted("qwen2", OFF)
        attention = model.get_base_model().model.layers[0].self_attn
        return [attention.q_proj, attention.k_proj if alike else attention.k_proj.base_layer, attention.v_proj]

    theirs, ours = three(), three()
    for module in ours:
        enable_fast_lora(module)
    x = torch.randn(9, 32, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    found, expected = adapted_linears(ours, x), [module(other) for module in theirs]
    for mine, theirs_result in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs_result, atol=1e-5, rtol=1e-5)
    sum(part.sin().sum() for part in found).backward()
    sum(part.sin().sum() for part in expected).backward()
    torch.testing.assert_close(x.grad, other.grad, atol=1e-5, rtol=1e-5)
    for mine, theirs_module in zip(ours, theirs, strict=True):
        for p, q in zip(mine.parameters(), theirs_module.parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)


def test_dropout_is_one_mask_for_all_that_share_an_input_and_none_in_evaluation() -> None:
    model = adapted("glm", SpeedSettings(), dropout=0.5)
    attention = model.get_base_model().model.layers[0].self_attn
    modules = [attention.q_proj, attention.k_proj]
    x = torch.randn(50, 32)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    found = adapted_linears(modules, x)
    for module, result in zip(modules, found, strict=True):
        first, second = module.lora_A["default"].weight, module.lora_B["default"].weight
        expected = module.base_layer(x) + dropped @ first.T @ second.T * module.scaling["default"]
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    model.eval()
    assert torch.equal(*(adapted_linears(modules, x)[0] for _ in range(2)))


def test_an_adapter_that_is_switched_off_adds_nothing() -> None:
    model = adapted("glm", SpeedSettings())
    module = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert not torch.allclose(module(x), module.base_layer(x))
        with model.disable_adapter():
            assert torch.equal(module(x), module.base_layer(x))
            assert torch.equal(adapted_linears([module], x)[0], module.base_layer(x))


def test_every_family_of_the_fused_layers_is_a_packed_one() -> None:
    from llm_clf.engine.packing import FAMILIES, allows_packing

    assert set(INTERLEAVED) <= FAMILIES
    assert all(allows_packing(tiny_config(family)) for family in INTERLEAVED)
