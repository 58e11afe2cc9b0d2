"""Label scores to probabilities and labels."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def probabilities(scores: Floats) -> Floats:
    """Return the softmax over labels of log-probabilities, fp32, shape `(rows, labels)`."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted, dtype=np.float32)
    result: Floats = exponentials / exponentials.sum(axis=1, keepdims=True, dtype=np.float32)
    return result


def decide(probs: Floats) -> NDArray[np.int64]:
    """Return the index of the most probable label of each row; the first in the task's order where two are level."""
    choices: NDArray[np.int64] = probs.argmax(axis=1)
    return choices
