"""Metrics of predicted labels and probabilities against gold labels, through scikit-learn."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

NO_LABEL = ""
HEADLINES = ("accuracy", "precision", "recall", "f1", "macro_f1", "weighted_f1", "roc_auc", "log_loss")


def compute_metrics(
    gold: Sequence[str],
    predicted: Sequence[str],
    probs: np.ndarray | None,
    labels: Sequence[str],
    status: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the metrics of the rows that have a gold label.

    A row without a predicted label counts as wrong. `precision`, `recall` and `f1` at the top are those of the
    second label where there are two, else the mean over labels.

    Args:
        gold: Labels, empty text where a row has none.
        predicted: Labels, empty text where none was given.
        probs: Shape `(rows, labels)`, or None.
        labels: In the task's order.
        status: Of every row, counted over all rows.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    known = [row for row, label in enumerate(gold) if label != NO_LABEL]
    y_true, y_pred = [gold[row] for row in known], [predicted[row] for row in known]
    metrics: dict[str, Any] = {"rows": len(gold), "rows_with_gold": len(known), "labels": list(labels)}
    if status is not None:
        metrics["status"] = dict(sorted(Counter(status).items()))
    if not known:
        return metrics

    def averaged(average: str | None, only: Sequence[str]) -> tuple[Any, ...]:
        result: tuple[Any, ...] = precision_recall_fscore_support(
            y_true, y_pred, labels=list(only), average=average, zero_division=0.0
        )
        return result

    per_label = averaged(None, labels)
    macro, weighted = averaged("macro", labels), averaged("weighted", labels)
    headline = averaged("macro", labels[1:]) if len(labels) == 2 else macro
    metrics |= {
        "accuracy": float(accuracy_score(y_true, y_pred)),
        "precision": float(headline[0]),
        "recall": float(headline[1]),
        "f1": float(headline[2]),
        "macro_f1": float(macro[2]),
        "weighted_f1": float(weighted[2]),
        **(_probability_metrics(y_true, probs[known], labels) if probs is not None else {}),
        "per_label": {
            label: {
                "precision": float(precision),
                "recall": float(recall),
                "f1": float(f1),
                "support": int(support),
            }
            for label, precision, recall, f1, support in zip(labels, *per_label, strict=True)
        },
        "confusion_matrix": _confusion(y_true, y_pred, labels),
    }
    return metrics


def _probability_metrics(y_true: Sequence[str], probs: np.ndarray, labels: Sequence[str]) -> dict[str, float | None]:
    """Return ROC-AUC (None where only one label occurs) and log-loss in nats.

    With more than two labels the ROC-AUC is the mean of one label against the rest, over the labels that occur.
    """
    from sklearn.metrics import roc_auc_score

    index = {label: number for number, label in enumerate(labels)}
    truth = np.array([index[label] for label in y_true])
    if len(labels) == 2:
        areas = [roc_auc_score(truth, probs[:, 1])] if len(set(y_true)) == 2 else []
    else:
        occur = [number for number in range(len(labels)) if 0 < (truth == number).sum() < len(truth)]
        areas = [roc_auc_score(truth == number, probs[:, number]) for number in occur]
    return {
        "roc_auc": float(np.mean(areas)) if areas else None,
        "log_loss": float(own_losses(truth, probs).mean()),
    }


def own_losses(truth: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return the negative log-probability in nats of each row's own label, shape `(rows,)`.

    Args:
        truth: Index of the gold label of each row.
        probs: Shape `(rows, labels)`.
    """
    # The smallest fp32 number keeps a confident mistake finite.
    own = np.maximum(probs[np.arange(len(truth)), truth].astype(np.float64), np.finfo(np.float32).tiny)
    losses: np.ndarray = -np.log(own)
    return losses


def _confusion(y_true: Sequence[str], y_pred: Sequence[str], labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return counts as gold label to predicted label, with a last column for rows without a label where any are."""
    columns = [*labels, *([NO_LABEL] if NO_LABEL in y_pred else [])]
    counts = Counter(zip(y_true, y_pred, strict=True))
    return {label: {name or "(none)": counts[label, name] for name in columns} for label in labels}
