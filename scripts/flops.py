"""How fast a machine multiplies, and how many operations training and prediction need: for the other scripts."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llm_clf.models.devices import DTYPES
from llm_clf.models.memory import BaseShape

PRODUCTS = 20


def matmul_rate(device: torch.device, dtype: str) -> dict[str, Any]:
    """Return the operations a second of a large matrix product in a type of DTYPES; a multiply-add counts as two.

    It is the median of several products, each timed by itself: what else the machine does for a moment does not count.
    """
    size = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))

    def multiply() -> None:
        torch.mm(one, other)

    multiply()
    seconds = statistics.median(seconds_of(multiply, device) for _ in range(PRODUCTS))
    return {"dtype": dtype, "size": size, "flops_per_second": 2 * size**3 / seconds}


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """Return the time that some work takes, waiting for the card."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def useful_flops(base: BaseShape, lengths: Sequence[int], *, places: int, backward: bool, shared: int = 0) -> int:
    """Return the operations that rows of these lengths need; what is computed again or for padding does not count.

    Two for each frozen weight and token, two for each weight of the output embedding at the places whose logits are
    needed, and attention under its causal mask: four for each pair of a token and one that it sees, and each number of
    a layer's queries. The backward of a frozen weight costs the same once more, the gradient of its input; that of
    attention twice. The adapter is left out.

    Args:
        base: Its shape.
        lengths: Tokens that are read of each row, the shared ones included.
        places: Places a row whose logits are needed.
        backward: Whether a backward follows the forward.
        shared: Tokens that all of these rows begin with. They are read once.
    """
    weights = sum(inputs * outputs for inputs, outputs in base.linears)
    own = [length - shared for length in lengths]
    dense = 2 * weights * (shared + sum(own)) + 2 * base.vocabulary * base.hidden * places * len(lengths)
    seen = _causal(shared) + sum(_causal(length) + length * shared for length in own)
    attention = 4 * base.layers * base.attention * seen
    return dense * (2 if backward else 1) + attention * (3 if backward else 1)


def _causal(tokens: int) -> int:
    """Return how many pairs of tokens see each other under a causal mask, each itself included."""
    return tokens * (tokens + 1) // 2
