"""Attention of packed rows by FlexAttention against attention row by row.

Without a card the kernel is not built: the operation itself runs as plain products, forward and backward. What is shown
is the mask, the tables of blocks, the gradients of everything that goes in, and that no length is compiled anew.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as library

from llm_clf.config import LoraSettings, SpeedSettings
from llm_clf.engine import flex, packing
from llm_clf.engine.attention import RowPlan
from llm_clf.engine.label_words import AnswerTree, LabelWords
from llm_clf.engine.packing import NOTHING, AnswerShape, Beginning, Row, packed_logits, read_beginning
from llm_clf.engine.scoring import LabelScorer
from llm_clf.engine.tokens import TrainingExample
from llm_clf.engine.training import _backward_of
from llm_clf.models.adapters import new_adapter, trainable

CPU = torch.device("cpu")
NO_NODES = torch.zeros(0, 0, dtype=torch.bool)
# A node that hangs on the first comes behind others: places and ranks differ.
TREE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]).bool()
HEADS, GROUPS, WIDTH = 4, 2, 8

row_sizes = st.lists(st.tuples(st.integers(1, 200), st.booleans()), min_size=1, max_size=5)
beginnings = st.sampled_from([0, 1, 40, 128, 150])


@pytest.fixture(autouse=True, scope="module")
def plain_products() -> Iterator[None]:
    """Let the library compute without a kernel, and with gradients on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_validate_device", lambda *_: None)
        patch.setattr(library, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        patch.setattr(flex, "_compiled", lambda: library.flex_attention)
        yield


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose it on the CPU too."""
    monkeypatch.setattr(flex, "suits", lambda model: True)


def spans_of(sizes: Sequence[tuple[int, bool]], nodes: int) -> list[flex.Span]:
    spans, first = [], 0
    for size, has_nodes in sizes:
        middle = first + size
        spans.append((first, middle, middle + (nodes if has_nodes else 0)))
        first = spans[-1][2]
    return spans


def sees(query: int, key: int, spans: Sequence[flex.Span], before: int, tree: torch.Tensor) -> bool:
    """Whether a place sees a key, said as plainly as can be."""
    if key < before:
        return True
    key -= before
    first, middle, _ = next(span for span in spans if span[0] <= query < span[2])
    if query < middle:
        return first <= key <= query
    return first <= key < middle or (middle <= key < middle + len(tree) and bool(tree[query - middle, key - middle]))


@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=4), before=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_place_sees_the_beginning_its_row_and_its_ancestors(sizes: list[tuple[int, bool]], before: int) -> None:
    spans = spans_of(sizes, len(TREE))
    tokens = spans[-1][2]
    mask = flex.packed_blocks(spans, before, TREE, CPU).mask_mod
    found = mask(None, None, torch.arange(tokens)[:, None], torch.arange(before + tokens))
    expected = [[sees(query, key, spans, before, TREE) for key in range(before + tokens)] for query in range(tokens)]
    assert found.tolist() == expected


@given(sizes=row_sizes, before=beginnings)
@settings(max_examples=30, deadline=None)
def test_blocks_are_those_that_the_library_finds_in_the_mask(sizes: list[tuple[int, bool]], before: int) -> None:
    blocks = flex.packed_blocks(spans_of(sizes, len(TREE)), before, TREE, CPU)
    expected = library.create_block_mask(blocks.mask_mod, None, None, *blocks.seq_lengths, device="cpu")

    def listed(mask: Any, kind: str) -> list[set[int]]:
        counts, indices = getattr(mask, f"{kind}_num_blocks")[0, 0], getattr(mask, f"{kind}_indices")[0, 0]
        return [set(row[:count].tolist()) for count, row in zip(counts, indices, strict=True) if count]

    for kind in ("kv", "q"):
        full = [listed(mask, f"full_{kind}") for mask in (blocks, expected)]
        some = [listed(mask, kind) for mask in (blocks, expected)]
        assert full[0] == full[1]
        # A row's nodes may lie on both sides of an edge: then a block more is looked into, and found empty.
        assert len(some[0]) == len(some[1]) and all(theirs <= ours for ours, theirs in zip(*some, strict=True))
        if not any(has_nodes for _, has_nodes in sizes):
            assert some[0] == some[1]


def test_long_rows_leave_out_most_blocks_and_do_not_mask_most_of_the_rest() -> None:
    blocks = flex.packed_blocks([(n * 1024, (n + 1) * 1024, (n + 1) * 1024) for n in range(8)], 512, NO_NODES, CPU)
    partial, full = blocks.kv_num_blocks.sum().item(), blocks.full_kv_num_blocks.sum().item()
    assert (partial, full) == (8 * 8, 8 * (8 * 4 + 28)) and partial + full < 0.2 * 64 * 68


def attention(
    sizes: Sequence[tuple[int, bool]], before: int, tree: torch.Tensor, *, at_once: bool, heads: int = HEADS
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the attention of a random packed sequence as the model calls it, and its inputs."""
    spans = spans_of(sizes, len(tree))
    draw = torch.Generator().manual_seed(3)
    tokens = spans[-1][2]
    shapes = [(heads, tokens), (GROUPS, tokens), (GROUPS, tokens), (GROUPS, before), (GROUPS, before)]
    query, key, value, *shared = (torch.randn(1, *shape, WIDTH, generator=draw).requires_grad_() for shape in shapes)
    beginning = Beginning(before, [(shared[0][0].transpose(0, 1), shared[1][0].transpose(0, 1))]) if before else NOTHING
    masks = packing._Masks(SimpleNamespace(device=CPU, dtype=torch.float32), AnswerShape([0] * len(tree), tree))
    rows = [
        RowPlan(slice(first, end), masks.chunks(first, middle - first, end - middle)) for first, middle, end in spans
    ]
    blocks = flex.packed_blocks(spans, before, tree, CPU) if at_once else None
    layout = packing.Layout(beginning, rows, [], torch.tensor([]), blocks)
    module = SimpleNamespace(layer_idx=0, is_causal=True, training=False, num_key_value_groups=heads // GROUPS)
    found, _ = packing._attention(module, query, key, value, None, layout=layout, scaling=0.3, dropout=0.0)
    return found, [query, key, value, *(shared if before else [])]


@pytest.mark.parametrize("heads", [HEADS, GROUPS], ids=["keys shared by heads", "a key for each head"])
@pytest.mark.parametrize("tree", [NO_NODES, TREE], ids=["no answers", "answers"])
@given(sizes=row_sizes, before=beginnings)
@settings(max_examples=15, deadline=None)
def test_results_and_gradients_equal_those_row_by_row(
    tree: torch.Tensor, heads: int, sizes: list[tuple[int, bool]], before: int
) -> None:
    found, inputs = attention(sizes, before, tree, at_once=True, heads=heads)
    expected, same = attention(sizes, before, tree, at_once=False, heads=heads)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    pairs = zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), same),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_no_row_sees_another() -> None:
    sizes = [(100, True), (60, False), (130, True)]
    found, inputs = attention(sizes, 20, TREE, at_once=True)
    spans = spans_of(sizes, len(TREE))
    for first, _, end in spans:
        for gradient in torch.autograd.grad(found[:, first:end].square().sum(), inputs[:3], retain_graph=True):
            outside = torch.ones(gradient.shape[2], dtype=torch.bool)
            outside[first:end] = False
            assert gradient[:, :, first:end].abs().max() > 0
            assert not gradient[:, :, outside].any()


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("family", ["glm", "gpt2", "gpt_neox", "phi3"])
def test_label_scores_equal_those_row_by_row(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    packing.enable_packing(model)
    answers = [[[17, 40, 0], [50, 0]], [[17, 41, 42, 0]], [[17, 40, 41, 0]]]
    shared = [60, 61, 62]
    prompts = [[*shared, *range(100, 100 + size)] for size in (1, 30, 70)] + [[70, 71], [72, 73, 74]]
    scorer = LabelScorer(model, LabelWords(answers), pad_id=3, packed=True, shared=shared)
    calls = counted(monkeypatch)
    found = scorer.score(prompts)
    assert len(calls) == 2 * model.config.num_hidden_layers
    monkeypatch.setattr(flex, "suits", lambda model: False)
    expected = scorer.score(prompts)
    assert len(calls) == 2 * model.config.num_hidden_layers and expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one with every call."""
    calls: list[int] = []
    original = flex.attend

    def attend(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(flex, "attend", attend)
    return calls


WORDS = LabelWords([[[17, 40, 0]]])
EXAMPLES = [
    TrainingExample([201, 202, *range(30, 30 + size)], [17, 40 + size % 3, 0], 1.0 + size % 2)
    for size in (50, 90, 1, 33)
]


def step(*, checkpointing: bool = False) -> tuple[float, list[torch.Tensor]]:
    """Return loss and gradients of an optimiser step."""
    model = new_adapter(tiny_model("glm").requires_grad_(False), LoraSettings(dropout=0.0), seed=1).train()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    if checkpointing:
        model.activation_checkpointing_enable()
    loss = _backward_of(model, WORDS, EXAMPLES, SpeedSettings(), 3, Accelerator(cpu=True)).do(EXAMPLES, 100)
    return loss, [parameter.grad.clone() for parameter in trainable(model)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activations computed again"])
def test_a_training_step_equals_one_row_by_row(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, expected = step()
    monkeypatch.setattr(flex, "suits", lambda model: True)
    calls = counted(monkeypatch)
    fast, found = step(checkpointing=checkpointing)
    assert calls and fast == pytest.approx(loss, rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Compile as on CUDA, all but the kernel; return the count of what was compiled."""
    import torch._dynamo.testing

    # The compiler warns where it reads what it keeps quiet about outside of tests.
    warnings.simplefilter("ignore")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(library.flex_attention, backend=counter, dynamic=True, fullgraph=True)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    yield counter
    torch._dynamo.reset()


def test_no_length_is_compiled_anew(compiler: Any) -> None:
    def attend(sizes: Sequence[tuple[int, bool]], before: int, tree: torch.Tensor) -> None:
        found, inputs = attention(sizes, before, tree, at_once=True)
        torch.autograd.grad(found.sum(), inputs)

    attend([(300, False), (200, False)], 40, NO_NODES)
    assert compiler.frame_count == 1
    for sizes, before, tree in [
        ([(1, False), (1, False)], 0, NO_NODES),
        ([(100, False), (28, False)], 0, NO_NODES),
        ([(1000, True), (7, True), (90, True)], 129, TREE),
        ([(60, True), (9, True)], 0, TREE[:2, :2]),
    ]:
        attend(sizes, before, tree)
    assert compiler.frame_count == 1


@pytest.mark.usefixtures("everywhere")
def test_a_training_with_validation_compiles_a_handful(compiler: Any) -> None:
    """Fewer than the eight at which torch gives up: with and without gradients, a first layer without some."""
    expected = step()[1]
    for checkpointing in (False, True):
        for one, other in zip(step(checkpointing=checkpointing)[1], expected, strict=True):
            torch.testing.assert_close(one, other)
    model = tiny_model("glm")
    packing.enable_packing(model)
    scorer = LabelScorer(model, LabelWords([[[17, 0]], [[18, 19, 0]]]), pad_id=3, packed=True, shared=[201, 202])
    for size in (5, 300):
        scorer.score([[201, 202, *range(5, 5 + size % 250)], [201, 202, 9], [1, 2], [3]])
    assert compiler.frame_count <= 4


def on_a_card(model: Any) -> Any:
    return SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16, config=model.config, training=model.training
    )


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Return a function that says what is found wrong with the kernel."""
    flex._proves_right.cache_clear()
    yield lambda text: monkeypatch.setattr(flex, "fault", lambda *_: text)
    flex._proves_right.cache_clear()


def test_chosen_on_cuda_where_the_kernel_proves_right(
    fault: Callable[[str | None], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fault(None)
    model = tiny_model("glm")
    assert flex.suits(on_a_card(model)) and not flex.suits(model)
    gpt2 = tiny_model("gpt2")
    assert gpt2.config.attn_pdrop > 0
    # The kernel has no dropout, so a base that wants some in training is computed row by row there.
    assert flex.suits(on_a_card(gpt2.eval())) and not flex.suits(on_a_card(gpt2.train()))
    assert capsys.readouterr().err == ""


def test_where_it_does_not_it_is_said_once_and_rows_go_one_by_one(
    fault: Callable[[str | None], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fault("TritonMissing: no compiler")
    card = on_a_card(tiny_model("glm"))
    assert not flex.suits(card) and not flex.suits(card)
    shown = capsys.readouterr().err
    assert shown.count("row by row") == 1 and "(TritonMissing: no compiler)" in shown


@pytest.mark.parametrize("dtype", list(flex.BOUNDS))
@pytest.mark.parametrize("shape", [(4, 2, 16), (3, 1, 80), (2, 2, 64)])
def test_a_right_kernel_proves_right(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    with torch.inference_mode():
        assert flex.fault(CPU, dtype, *shape) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: result * torch.where(torch.arange(result.shape[2]) == 250, 0.5, 1.0)[:, None], "errs by"),
        (lambda result: result.masked_fill(result > 1e9, 0) + torch.nan, "errs by nan"),
        (lambda result: result + 0.3 * (result - result.detach()), "errs by"),
    ],
    ids=["one place", "no numbers", "gradients"],
)
def test_a_wrong_kernel_is_found(
    change: Callable[[torch.Tensor], torch.Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "_compiled", lambda: lambda *a, **k: change(library.flex_attention(*a, **k)))
    found = flex.fault(CPU, torch.bfloat16, 4, 2, 16)
    assert found is not None and message in found


def test_a_kernel_that_cannot_be_built_is_a_fault_and_no_memory_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Callable[..., torch.Tensor]:
        def compiled(*_: Any, **__: Any) -> torch.Tensor:
            raise error

        return compiled

    monkeypatch.setattr(flex, "_compiled", lambda: fail(RuntimeError("out of resource:\nshared memory")))
    assert flex.fault(CPU, torch.float32, 4, 2, 16) == "RuntimeError: out of resource: shared memory"
    monkeypatch.setattr(flex, "_compiled", lambda: fail(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        flex.fault(CPU, torch.float32, 4, 2, 16)


def test_the_order_of_an_answer_tree_puts_what_hangs_on_a_node_behind_it() -> None:
    shape = AnswerTree.build([[[1, 2, 3, 0]], [[4, 5, 0]], [[1, 2, 6, 0], [1, 7, 0]]]).shape()
    order, below = flex._depth_first(shape.seen)
    assert sorted(order.tolist()) == list(range(len(order)))
    for node, sees_whom in enumerate(shape.seen.tolist()):
        for other, sees_it in enumerate(sees_whom):
            assert sees_it == (order[other] <= order[node] <= order[other] + below[other])


def test_one_row_alone_is_left_to_the_kernels_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "suits", lambda model: pytest.fail("asked for one row"))
    model = tiny_model("glm")
    packing.enable_packing(model)
    with torch.no_grad():
        shape = AnswerShape([0], torch.ones(1, 1, dtype=torch.bool))
        packed_logits(model, [Row([5, 6, 7], [17])], read_beginning(model, [8, 9]), [[2, 3]], shape)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("dtype", list(flex.BOUNDS))
@pytest.mark.parametrize("shape", [(12, 2, 64), (32, 2, 128), (9, 3, 64), (32, 32, 80), (16, 8, 96)])
def test_the_kernel_proves_right_on_a_card(
    dtype: torch.dtype, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    flex._compiled.cache_clear()
    monkeypatch.setattr(library, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    assert flex.fault(torch.device("cuda"), dtype, *shape) is None
