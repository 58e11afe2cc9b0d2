"""Two predictions files of the same rows: whether one is really better, and the rows that flip."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_clf.config import METRICS
from llm_clf.console import say
from llm_clf.decisions.predictions import read_predictions
from llm_clf.errors import ConfigError
from llm_clf.evaluation.comparison import Flip, compare_tables, comparison_facts
from llm_clf.evaluation.intervals import LEVEL, RESAMPLES, SEED
from llm_clf.files import path_of, replacing, write_json
from llm_clf.runs import VALID_PREDICTIONS, is_run, require_no_run

COMPARISON, FLIPS = "comparison.json", "flips.csv"


def compare(a: str | Path, b: str | Path, *, metric: str = "f1", out: str | Path | None = None) -> dict[str, Any]:
    """Return how two predictions of the same labelled rows differ, and whether one is really better.

    Args:
        a: A file that `predict` wrote from labelled rows.
        b: Another one of the same rows; they may stand in another order.
        metric: The one of the verdict.
        out: Folder for `comparison.json` and `flips.csv`, the rows to which both give different labels.

    Raises:
        ConfigError: There is no such metric, it needs probabilities that a file lacks, or `out` is a file or a run.
        DataError: A file holds no predictions, or rows, gold labels or labels differ.
    """
    require_metric(metric)
    folder = path_of(out) if out is not None else None
    if folder is not None:
        require_no_run(folder, COMPARISON)
    compared = compare_tables(read_predictions(path_of(a)), read_predictions(path_of(b)), (str(a), str(b)))
    for file in map(path_of, (a, b)):
        if file.name == VALID_PREDICTIONS and is_run(file.parent):
            say(
                f"Note: {file}: a run chooses by its validation rows (checkpoint, calibration, thresholds), which "
                "flatters it on them. Test rows say more."
            )
    facts = {"a": str(a), "b": str(b), "level": LEVEL, "resamples": RESAMPLES, "seed": SEED}
    facts |= comparison_facts(compared, metric)
    if folder is not None:
        write_json(folder / COMPARISON, facts)
        _write_flips(folder / FLIPS, compared.flips)
    return facts


def require_metric(metric: str) -> None:
    """Refuse the name of a metric that there is not.

    Raises:
        ConfigError: There is none of this name.
    """
    if metric not in METRICS:
        raise ConfigError(f"--metric {metric!r}: there is no such metric; there are {', '.join(METRICS)}.")


def _write_flips(file: Path, flips: Sequence[Flip]) -> None:
    with replacing(file) as temporary, open(temporary, "w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(["id", "gold", "label_a", "label_b", "right"])
        writer.writerows([flip.id, flip.gold, flip.a, flip.b, flip.right or ""] for flip in flips)
