"""First embeddings from counts: tokens that stand near the same others begin near each other.

The logarithm of how much more often two tokens meet than chance would have it, factored, is what word2vec learns
(https://papers.nips.cc/paper/5477). It takes a minute for a whole corpus, and spares a small model a large share of the
text it would need to find the same.
"""

import numpy as np
import scipy.sparse as sparse
import torch
from sklearn.utils.extmath import randomized_svd

from pretraining.rows import Rows

# How far apart two tokens meet, and how many negative samples their count is compared with.
REACH = 10
SHIFT = 1.0
MOST_TOKENS = 12_000_000


def count_embeddings(rows: Rows, vocabulary: int, width: int, scale: float, seed: int) -> torch.Tensor:
    """Return embeddings of shape `(vocabulary, width)` in fp32, with `scale` as their standard deviation."""
    together = _meetings(rows.ids[:MOST_TOKENS].astype(np.int64), rows.starts, vocabulary)
    often = np.asarray(together.sum(axis=1)).ravel()
    # Rare neighbours count less than chance would have it (the exponent of word2vec's negative samples).
    chance = often**0.75 / (often**0.75).sum()
    pairs = together.tocoo()
    excess = np.log(pairs.data / (often[pairs.row] * chance[pairs.col])) - np.log(SHIFT)
    kept = excess > 0
    matrix = sparse.csr_matrix((excess[kept].astype(np.float32), (pairs.row[kept], pairs.col[kept])), together.shape)
    left, strengths, _ = randomized_svd(matrix, width, n_oversamples=16, n_iter=2, random_state=seed)
    vectors = left * np.sqrt(strengths)
    rng = np.random.default_rng(seed)
    # Each dimension gets a share of every factor, so that none stands for the strongest alone.
    turned = vectors @ np.linalg.qr(rng.standard_normal((width, width)))[0]
    norms = np.linalg.norm(turned, axis=1, keepdims=True)
    unit = np.where(norms > 1e-6, turned / np.maximum(norms, 1e-6), rng.standard_normal(turned.shape) / width**0.5)
    return torch.from_numpy(unit * scale * width**0.5).float()


def _meetings(ids: np.ndarray, starts: np.ndarray, vocabulary: int) -> sparse.csr_matrix:
    """Return how often two tokens meet within a document, nearer ones weighing more."""
    documents = np.searchsorted(starts, np.arange(len(ids)), side="right")
    total = sparse.csr_matrix((vocabulary, vocabulary), dtype=np.float32)
    for distance in range(1, REACH + 1):
        same = documents[distance:] == documents[:-distance]
        first, second = ids[:-distance][same], ids[distance:][same]
        values = np.full(len(first), 1 / distance, dtype=np.float32)
        once = sparse.coo_matrix((values, (first, second)), shape=(vocabulary, vocabulary)).tocsr()
        total = total + once + once.T.tocsr()
    return total.tocsr()
