"""Rows in folds, so that each can be judged by what was fitted without it."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDS = 5

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def folds_of(truth: Indices, seed: int, folds: int = FOLDS) -> Sequence[tuple[Indices, Indices]]:
    """Return the rows to fit on and those left out, fold by fold; labels are spread evenly.

    Args:
        truth: Index of the label of each row.
        seed: Of the order in which rows are dealt out.
        folds: How many.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    if np.bincount(truth).max() < folds:
        # So many labels that none can be spread over all folds.
        return list(KFold(folds, shuffle=True, random_state=seed).split(truth))
    with warnings.catch_warnings():
        # Where a label is rare, some folds go without it.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        found: list[tuple[Any, Any]] = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(truth, truth))
    return found
