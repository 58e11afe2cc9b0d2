"""Stratified splits that depend on the texts and the seed alone: not on the order of rows, machine or library."""

import hashlib
from collections.abc import Mapping, Sequence

from llm_clf.errors import ConfigError
from llm_clf.prompting.prompts import SPLITS


def parse_shares(text: str) -> tuple[float, ...]:
    """Return the shares of train, valid and test.

    Raises:
        ConfigError: There are not three numbers from 0 to 1 that add up to 1.
    """
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if len(shares) != len(SPLITS) or not all(0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(
            f"--split {text!r}: expected three shares that add up to 1, such as 0.8,0.1,0.1 (0 is allowed)."
        )
    return shares


def split_keys(strata: Mapping[str | None, Sequence[bytes]], shares: Sequence[float], seed: int) -> dict[bytes, int]:
    """Return the split (0 train, 1 valid, 2 test) of every text key.

    Args:
        strata: Keys by label. Each stratum is cut by the shares; what rounding takes from a split in one stratum
            it gives back in the next, so that many small labels still fill every split.
        shares: Of train, valid and test.
        seed: Of the order within a stratum: keys are sorted by a hash of seed and key.
    """
    assigned: dict[bytes, int] = {}
    owed = [0.0] * len(shares)
    for label in sorted(strata, key=lambda name: (name is None, name or "")):
        ordered = sorted(strata[label], key=lambda key: hashlib.blake2b(key, salt=_salt(seed), digest_size=16).digest())
        owed = [debt + share * len(ordered) for debt, share in zip(owed, shares, strict=True)]
        counts = _round_to(len(ordered), owed)
        owed = [debt - count for debt, count in zip(owed, counts, strict=True)]
        first = 0
        for split, count in enumerate(counts):
            for key in ordered[first : first + count]:
                assigned[key] = split
            first += count
    return assigned


def _salt(seed: int) -> bytes:
    return (seed % 2**64).to_bytes(16, "little")


def _round_to(total: int, wanted: Sequence[float]) -> list[int]:
    """Return whole numbers near `wanted` that add up to `total`: the largest remainders are rounded up."""
    counts = [max(0, int(want + 1e-9)) for want in wanted]
    for _ in range(total - sum(counts)):
        most = max(range(len(wanted)), key=lambda split: (wanted[split] - counts[split], -split))
        counts[most] += 1
    while sum(counts) > total:
        least = min(
            (split for split in range(len(wanted)) if counts[split]), key=lambda split: wanted[split] - counts[split]
        )
        counts[least] -= 1
    return counts
