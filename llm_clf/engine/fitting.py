"""What is done where memory runs out: the same work again in smaller parts, from the same random state.

A budget of tokens says how large a part may be. It is halved until the largest part gets smaller, and stays so: the
result is the one that the smaller budget would have given from the beginning of that piece of work.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from llm_clf.console import say
from llm_clf.errors import MemoryLimitError

# Kinds of devices on which the largest part of a training is tried before the first step.
TRIED = frozenset({"cuda"})
ADVICE = (
    "Free the card of other work, or change what takes memory: a smaller data.max_length, model.quantization=8bit or "
    "4bit, train.gradient_checkpointing=true in training, or a smaller base."
)

Row = TypeVar("Row")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Work(Generic[Row, Result]):
    """What can be done with rows in parts, with the same result up to rounding."""

    plan: Callable[[Sequence[Row], int], list[list[int]]]
    """Groups the numbers of rows into parts that keep to a budget of tokens."""
    tokens: Callable[[Sequence[Row]], int]
    """Tokens of a part, as the plan counts them."""
    do: Callable[[Sequence[Row], int], Result]
    """Does it, in the parts of such a plan."""
    undo: Callable[[], None]
    """Clears away what it left when it broke off."""

    def largest(self, pieces: Iterable[Sequence[Row]], budget: int) -> list[Row]:
        """Return the rows of the largest part of all pieces of work."""
        parts = ([piece[number] for number in part] for piece in pieces for part in self.plan(piece, budget))
        return max(parts, key=self.tokens)


class TokenBudget:
    """Most tokens of a part, halved where memory runs out.

    Args:
        tokens: To begin with.
        device: Where the work is done.
        found: Is told each new budget before the work is done again with it; random state is then as at its beginning.
    """

    def __init__(self, tokens: int, device: torch.device, found: Callable[[int], None]) -> None:
        self.tokens = tokens
        self._device = device
        self._found = found

    def fit(self, work: Work[Row, Result], rows: Sequence[Row]) -> Result:
        """Do a piece of work, again with half the budget as often as memory runs out.

        Raises:
            MemoryLimitError: It runs out on a single row.
        """
        return self._retried(work, lambda: rows)

    def try_largest(self, work: Work[Row, Result], pieces: Sequence[Sequence[Row]]) -> None:
        """Find out whether the largest part of all pieces fits; nothing that it does stays, nor any random draw.

        Raises:
            MemoryLimitError: Memory runs out on a single row.
        """
        state = _random_state(self._device)
        self._retried(work, lambda: work.largest(pieces, self.tokens))
        work.undo()
        _put_back(state, self._device)

    def _retried(self, work: Work[Row, Result], rows_now: Callable[[], Sequence[Row]]) -> Result:
        from accelerate.utils.memory import clear_device_cache

        state = _random_state(self._device)
        while True:
            rows = rows_now()
            try:
                return work.do(rows, self.tokens)
            except torch.OutOfMemoryError:
                # As long as this clause lasts, the error holds on to the tensors of all its frames.
                pass
            work.undo()
            clear_device_cache(garbage_collection=True)
            _put_back(state, self._device)
            largest = work.largest([rows], self.tokens)
            self._halve(len(largest), work.tokens(largest))

    def _halve(self, rows: int, tokens: int) -> None:
        if rows == 1:
            raise MemoryLimitError(f"Memory ran out on a single row of {tokens:,} tokens. {ADVICE}")
        before = self.tokens
        while self.tokens >= tokens and self.tokens > 1:
            self.tokens //= 2
        say(f"Memory ran out on {tokens:,} tokens at once, of up to {before:,}; going on with up to {self.tokens:,}.")
        self._found(self.tokens)


@contextmanager
def memory_explained() -> Iterator[None]:
    """Turn what torch raises where memory runs out into an error that says what to do.

    Raises:
        MemoryLimitError: It ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryLimitError(f"Memory ran out: {str(error).splitlines()[0]} {ADVICE}") from error


def _random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _put_back(state: Sequence[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    for cuda in state[1:]:
        torch.cuda.set_rng_state(cuda, device)
