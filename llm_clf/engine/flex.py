"""Attention of packed rows in one kernel for each layer, for CUDA: FlexAttention over the whole sequence.

Row by row, a layer launches kernels for every row. Here one kernel goes over all of them, and tables of blocks of 128
places tell it which it may leave out. It is compiled once for all lengths, which are symbols to the compiler. The
tables always have one size: of a dimension that is one, or by chance as large as another, the compiler would make a
constant.

Who sees whom is one comparison. Each place has a rank, in which a node of the answer tree is followed by all that hang
on it, so that each key is seen by the queries of one interval of ranks: a token of the beginning by all, a row's token
by those behind it in its row, a node by those that hang on it. What fills up the last block is a row of its own.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import pad

from llm_clf.console import say
from llm_clf.engine.transfer import to_device

BLOCK = 128
# Blocks of a side of a table; one that needs more has a multiple of them.
SIDE = 256
ALL = 2**31 - 1
# Largest error of a result or a gradient, by its largest value, for which the kernel is taken to be right.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}

Span = tuple[int, int, int]
"""Of a row: its first place, that of its first node, and the one behind its last."""


def packed_blocks(spans: Sequence[Span], before: int, seen: torch.Tensor, device: torch.device) -> Any:
    """Return who sees whom in a packed sequence, as a BlockMask.

    Args:
        spans: The rows, one behind another from place 0.
        before: Tokens of the beginning, which stand before all rows' keys.
        seen: Which node sees which, shape `(nodes, nodes)`: each itself and those between it and the root. A row
            has all of the nodes, or none.
        device: Where the attention is computed.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rank, first, last = (to_device(part, device) for part in _intervals(spans, before, seen))

    def sees(_batch: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (first[key] <= rank[query]) & (rank[query] <= last[key])

    low, high = rank.view(-1, BLOCK).aminmax(dim=1)
    earliest, latest = first.view(-1, BLOCK).aminmax(dim=1)
    shortest, longest = last.view(-1, BLOCK).aminmax(dim=1)
    side = -(-max(len(low), len(earliest)) // SIDE) * SIDE
    # Neighbouring keys' intervals touch, so that those of a block make one, from the earliest to the longest.
    some = (earliest <= high[:, None]) & (low[:, None] <= longest)
    every = (latest <= low[:, None]) & (high[:, None] <= shortest)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every, side),
        *_listed(every, side),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(len(rank), len(first)),
    )


def attend(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    blocks: Any,
    scaling: float | None,
) -> torch.Tensor:
    """Return the attention of a packed sequence, shape `(1, heads, tokens, head width)`.

    Args:
        query: Shape `(1, heads, tokens, head width)`.
        keys: The beginning's, where there is one, and the rows', each `(1, key-value heads, its tokens, head width)`.
        values: As `keys`.
        blocks: Of `packed_blocks`.
        scaling: Of the scores; None: one by the root of the head width.
    """
    queries, seen = blocks.seq_lengths
    _, heads, tokens, width = query.shape
    if scaling is not None and not math.isclose(scaling, width**-0.5):
        # To the compiler a number is a constant: one for each layer would be compiled for each.
        query = query * (scaling * width**0.5)
    whole: torch.Tensor = _compiled()(
        _filled([query], queries),
        _filled(keys, seen),
        _filled(values, seen),
        block_mask=blocks,
        enable_gqa=heads != keys[0].shape[1],
    )
    return whole[:, :, :tokens]


def suits(model: Any) -> bool:
    """Whether a model's packed attention is computed here: on CUDA, without dropout, where the kernel proves right."""
    if model.device.type != "cuda":
        return False
    config = model.config.get_text_config()
    dropout = getattr(config, "attention_dropout", None) or getattr(config, "attn_pdrop", None)
    if model.training and dropout:
        return False
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return _proves_right(model.device, model.dtype, heads, groups, width)


@lru_cache
def _proves_right(device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int) -> bool:
    found = fault(device, dtype, heads, groups, width)
    if found is not None:
        say(f"Attention is computed row by row, which is slower: FlexAttention cannot be used here ({found}).")
    return found is None


def fault(device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int) -> str | None:
    """Return what is wrong with the kernel for such heads on a device, None where it is right.

    Whether it can be built depends on the card, its driver, Triton and a C compiler, and a head may be too wide for a
    card's shared memory. So two small sequences of different length are computed, forward and backward, and compared
    with plain matrix products in fp32.
    """
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool()
    cases = [(140, [(0, 200, 203), (203, 273, 276), (276, 406, 409)]), (0, [(0, 90, 90), (90, 123, 123)])]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for before, spans in cases:
                blocks = packed_blocks(spans, before, tree, device)
                error = _error(blocks, before, spans[-1][2], device, dtype, heads, groups, width)
                # A NaN compares as false.
                if not error <= BOUNDS[dtype]:
                    return f"it errs by {error:.1e}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # A compiler that is absent or a card that is too small fails in its own ways.
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _error(
    blocks: Any, before: int, tokens: int, device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int
) -> float:
    """Return the largest error of the result and of the gradients, each by its largest value."""
    draw = torch.Generator().manual_seed(0)

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, width, generator=draw).to(device, dtype).requires_grad_()

    query, key, value = random(heads, tokens), random(groups, before + tokens), random(groups, before + tokens)
    weights = torch.randn(1, heads, tokens, width, generator=draw).to(device)
    places = torch.arange(tokens, device=device)[:, None], torch.arange(before + tokens, device=device)
    mask = blocks.mask_mod(None, None, *places)
    plain = torch.nn.functional.scaled_dot_product_attention(
        query.float(),
        key.float().repeat_interleave(heads // groups, dim=1),
        value.float().repeat_interleave(heads // groups, dim=1),
        attn_mask=torch.zeros(mask.shape, device=device).masked_fill(~mask, -torch.inf),
    )
    fast = attend(query, [key], [value], blocks, None)
    errors = []
    inputs = (query, key, value)
    pairs = zip(
        (fast, *torch.autograd.grad((fast * weights).sum(), inputs)),
        (plain, *torch.autograd.grad((plain * weights).sum(), inputs)),
        strict=True,
    )
    for found, expected in pairs:
        errors.append((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    return torch.stack(errors).max().item()


@lru_cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Not compiled, or compiled in part, it would hold the scores of all places with all others.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _intervals(
    spans: Sequence[Span], before: int, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the rank of each query, and the first and last rank that sees each key, filled up to whole blocks."""
    tokens = spans[-1][2]
    rank = torch.arange(_whole(tokens), dtype=torch.int32)
    first_seen = (torch.arange(_whole(before + tokens), dtype=torch.int32) - before).clamp_(min=0)
    last_seen = torch.full_like(first_seen, ALL)
    order, below = _depth_first(seen)
    for first, middle, end in spans:
        last_seen[before + first : before + middle] = end - 1
        if end > middle:
            rank[middle:end] = middle + order
            first_seen[before + middle : before + end] = rank[middle:end]
            last_seen[before + middle : before + end] = rank[middle:end] + below
    return rank, first_seen, last_seen


def _depth_first(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of each node in an order where all that hang on it follow it, and how many those are."""
    above = [[node for node, sees in enumerate(row) if sees] for row in seen.tolist()]
    paths = [sorted(nodes, key=lambda node: len(above[node])) for nodes in above]
    order = torch.empty(len(paths), dtype=torch.int32)
    order[sorted(range(len(paths)), key=paths.__getitem__)] = torch.arange(len(paths), dtype=torch.int32)
    return order, (seen.sum(dim=0) - 1).to(torch.int32)


def _whole(tokens: int) -> int:
    """Return the tokens of as many whole blocks as are needed."""
    return -(-tokens // BLOCK) * BLOCK


def _listed(table: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return of each row of a table how many columns are true, and all columns, those first; the table made square."""
    table = pad(table, (0, side - table.shape[1], 0, side - table.shape[0]))
    counts = table.sum(dim=1, dtype=torch.int32)
    columns = table.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None], columns[None, None]


def _filled(parts: Sequence[torch.Tensor], tokens: int) -> torch.Tensor:
    """Return parts one behind another and zeros behind them, always as a new tensor, so that strides never differ."""
    first = parts[0]
    missing = tokens - sum(part.shape[2] for part in parts)
    return torch.cat([*parts, first.new_zeros(1, first.shape[1], missing, first.shape[3])], dim=2)
