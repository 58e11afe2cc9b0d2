"""What makes the host wait for the device: numbers that are read back, and copies that are not queued."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from llm_clf.config import LoraSettings, SpeedSettings
from llm_clf.engine.label_words import LabelWords
from llm_clf.engine.packing import enable_packing, read_beginning
from llm_clf.engine.tokens import TrainingExample
from llm_clf.engine.training import _backward_of
from llm_clf.engine.transfer import to_device
from llm_clf.models.adapters import new_adapter

SHARED = [201, 202, 203]
WORDS = LabelWords([[[17, 40, 0]]])
EXAMPLES = [TrainingExample([*SHARED, size, *range(9, 9 + size)], [17, 40, 0], 1.0) for size in (20, 5, 9, 12)]


class Reads(TorchDispatchMode):
    """Counts the numbers that Python asks of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))


def adapted(device: str = "cpu") -> Any:
    model = new_adapter(tiny_model("glm").requires_grad_(False), LoraSettings(dropout=0.1), seed=1)
    return model.train().to(device)


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [([[1, 2], [3, 4]], torch.int64), ([0.5, 2.0], torch.float32), (torch.tensor([True, False]), torch.bool)],
)
def test_numbers_arrive_as_they_are(numbers: Any, dtype: torch.dtype) -> None:
    found = to_device(numbers, "cpu")
    assert found.dtype == dtype and found.tolist() == torch.as_tensor(numbers).tolist()


def test_for_a_card_they_are_pinned_and_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: calls.append((a, k)))
    to_device([1, 2], "cuda:1")
    assert calls == ["pinned", (("cuda:1",), {"non_blocking": True})]


def test_a_step_of_packed_rows_reads_its_loss_and_nothing_else() -> None:
    work = _backward_of(adapted(), WORDS, EXAMPLES, SpeedSettings(), 3, Accelerator(cpu=True))
    with Reads() as reads:
        work.do(EXAMPLES, 30)
    assert len(work.plan(EXAMPLES, 30)) > 1 and reads.count == 1


@pytest.fixture
def no_waiting() -> Iterator[Callable[[], None]]:
    """Return a function after which waiting for the card is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_nothing_waits_for_a_card_within_a_micro_batch(no_waiting: Callable[[], None]) -> None:
    model = adapted("cuda")
    enable_packing(model)

    def micro_batch() -> None:
        made = read_beginning(model, SHARED)
        leaves = made.leaves()
        WORDS.packed_loss(model, EXAMPLES, leaves).backward()
        made.backward(leaves)

    micro_batch()
    no_waiting()
    micro_batch()
