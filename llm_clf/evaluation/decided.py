"""What decisions are worth: the metrics of the validation rows, cross-fitted where anything was fitted on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_clf.config import DecideSettings
from llm_clf.decisions.decide import probabilities
from llm_clf.decisions.decisions import Decided, Decisions
from llm_clf.decisions.fitting import cross_fit
from llm_clf.decisions.folds import FOLDS
from llm_clf.decisions.predictions import ABSTAINED, OK, PredictionTable
from llm_clf.evaluation.intervals import measure
from llm_clf.evaluation.metrics import NO_LABEL
from llm_clf.evaluation.reliability import BINS, probability_figures, risk_coverage
from llm_clf.evaluation.tables import calibration_text, metrics_text


def measure_decisions(
    decisions: Decisions,
    scores: np.ndarray,
    gold: Sequence[str | None],
    settings: DecideSettings,
    *,
    seed: int,
    trained: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Return the metrics of validation rows, whether probabilities hold, and the risk-coverage curve.

    Where nothing was fitted they are those of the predictions as they are; `measured_on` says which.

    Args:
        decisions: What `fit_decisions` gave for the other arguments, which are as there.
        scores: As there.
        gold: As there.
        settings: As there.
        seed: As there.
        trained: As there.
    """
    if decisions.fitted:
        decided, calibrated = cross_fit(decisions, scores, gold, settings, seed=seed, trained=trained)
        rows = f"validation rows, cross-fitted in {FOLDS} folds"
    else:
        decided, calibrated = decisions.apply(scores), decisions.calibrated(scores)
        rows = "validation rows"
    found = measure(_table(decisions.labels, decided, gold)) | {"measured_on": rows}
    return found | _trust(decisions, scores, gold, decided, calibrated)


def _table(labels: Sequence[str], decided: Decided, gold: Sequence[str | None]) -> PredictionTable:
    """Return decided rows as they are read from a Parquet file of predictions."""
    choices = zip(decided.choices, decided.answered, strict=True)
    return PredictionTable(
        labels=list(labels),
        ids=[str(row) for row in range(len(gold))],
        predicted=[labels[choice] if answered else NO_LABEL for choice, answered in choices],
        status=[OK if answered else ABSTAINED for answered in decided.answered],
        gold=[label or NO_LABEL for label in gold],
        # As they are read from the run's predictions.
        probs=decided.probs.astype(np.float64),
        sets=[[label for label, within in zip(labels, row, strict=True) if within] for row in decided.sets]
        if decided.sets is not None
        else None,
    )


def _trust(
    decisions: Decisions, scores: np.ndarray, gold: Sequence[str | None], decided: Decided, calibrated: np.ndarray
) -> dict[str, Any]:
    """Return whether probabilities hold, and the risk-coverage curve, of the rows with a label."""
    rows = [row for row, label in enumerate(gold) if label is not None]
    if not rows:
        return {}
    truth = np.array([decisions.labels.index(gold[row] or "") for row in rows])
    method = decisions.calibration.method
    return {
        "calibration": {
            "method": method,
            "reason": decisions.calibration.reason,
            "bins": BINS,
            "before": probability_figures(truth, probabilities(scores[rows].astype(np.float32))),
            "after_cross_fitted": probability_figures(truth, calibrated[rows]) if method != "none" else None,
        },
        "risk_coverage": risk_coverage(decided.confidence[rows], decided.choices[rows] == truth),
    }


def decisions_text(decisions: Decisions, metrics: dict[str, Any]) -> str:
    """Return what was chosen on validation rows, and what it is worth there."""
    parts = [decisions.text()]
    if "calibration" in metrics:
        parts.append(calibration_text(metrics["calibration"]))
    how = "scored with the saved model"
    if decisions.fitted:
        how += f", cross-fitted in {FOLDS} folds: each is decided by what was fitted without it"
    parts.append(f"Validation rows, {how}:\n" + metrics_text(metrics))
    if decisions.shift is not None:
        parts.append(
            "Note: these rows have other shares of labels than decide.priors, and the figures are those of these."
        )
    return "\n".join(parts)
