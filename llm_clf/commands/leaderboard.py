"""Runs measured on the same rows: one table of quality, speed and size."""

import csv
import hashlib
import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_clf.commands.compare import require_metric
from llm_clf.commands.predict import predict_prompts
from llm_clf.commands.scoring import job_key, survey_rows
from llm_clf.console import say, table
from llm_clf.decisions.predictions import PredictionTable, read_predictions
from llm_clf.errors import ConfigError, DataError, LlmClfError
from llm_clf.evaluation.comparison import LOWER_IS_BETTER, compare_tables
from llm_clf.evaluation.intervals import as_list, measure
from llm_clf.evaluation.metrics import HEADLINES
from llm_clf.evaluation.tables import figure_text
from llm_clf.files import partial_name, path_of, read_json, replacing, require_apart, write_json
from llm_clf.prompting.prompts import Prompt, read_split
from llm_clf.prompting.tasks import load_task
from llm_clf.runs import KINDS, Run, count_trained_rows, load_run, require_no_run
from llm_clf.sources import AnySource, EnsembleSource, LoraSource, run_source

SPLITS = ("test", "valid")
NAME, PREDICTIONS = "leaderboard", "predictions"
BEST, LEVEL_WITH, WORSE, UNKNOWN = "best", "no real difference", "worse", "not comparable"
SHOWN = ("f1", "accuracy", "log_loss")


@dataclass(frozen=True, slots=True)
class _Entrant:
    """A run that takes part."""

    run: Run
    source: AnySource
    prompts: list[Prompt]
    """The rows, as its task reads them."""


@dataclass(frozen=True, slots=True)
class _Measured:
    """What its predictions cost."""

    rows_per_second: float
    """Loading left out; of the time when the predictions were made."""
    size_bytes: int
    """On disk: the run with all that it needs, a base or members."""


def leaderboard(
    runs: Sequence[str | Path],
    *,
    data: str | Path,
    split: str = "test",
    metric: str = "f1",
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Predict the same rows with each run and return what they reach and cost, the best first.

    Args:
        runs: Finished runs with the same labels, of any kind.
        data: A folder that `build_prompts` made.
        split: Its rows: `test` or `valid`.
        metric: By which runs are sorted and tested against the best one.
        out: Folder for `leaderboard.csv`, `.json` and `.md`, and for the predictions; those that are there already are
            taken where neither run nor rows have changed.

    Raises:
        ArtifactError: A run is missing or damaged.
        ConfigError: An argument is wrong, or the runs have not the same labels.
        DataError: There are no such rows, or none with a label.
    """
    require_metric(metric)
    if split not in SPLITS:
        raise ConfigError(f"--split {split!r}: allowed are {' and '.join(SPLITS)}.")
    folder, place = path_of(data), path_of(out) if out is not None else None
    folders = [path_of(run) for run in runs]
    if place is not None:
        require_no_run(place, f"{NAME}.csv")
        require_apart(place, [folder, *folders])
    entrants = _read_entrants(folders, folder, split)
    with tempfile.TemporaryDirectory() if place is None else nullcontext(place / PREDICTIONS) as kept:
        predicted = [_predict(entrant, Path(kept), keep=place is not None) for entrant in entrants]
    ranked = _ranked(entrants, predicted, metric)
    rows = len(entrants[0].prompts)
    found = {"data": str(folder), "split": split, "rows": rows, "metric": metric, "runs": ranked}
    if place is not None:
        write_json(place / f"{NAME}.json", found)
        _write_csv(place / f"{NAME}.csv", ranked)
        with replacing(place / f"{NAME}.md") as temporary:
            temporary.write_text(_markdown(*_cells(found)), encoding="utf-8")
    return found


def _read_entrants(folders: Sequence[Path], data: Path, split: str) -> list[_Entrant]:
    """Return the runs with their rows, all of which fit each other."""
    if len({folder.resolve() for folder in folders}) < max(1, len(folders)):
        raise ConfigError(f"RUN...: give each run once; found {', '.join(map(str, folders)) or 'none'}.")
    if not (data / "task.yaml").is_file():
        raise DataError(f"{data}: has no task.yaml. Give --data a folder that `llm-clf build-prompts` made.")
    names = load_task(data / "task.yaml").names
    entrants = []
    for folder in folders:
        run = load_run(folder)
        if run.task.names != names:
            raise ConfigError(
                f"{folder}: its labels are {', '.join(run.task.names)}; those of {data} are {', '.join(names)}. Runs "
                "are compared that have the same labels in the same order."
            )
        try:
            prompts = read_split(data, split, run.task)
        except LlmClfError as error:
            raise type(error)(f"{folder} cannot take part: {error}") from error
        entrants.append(_Entrant(run, run_source(run), prompts))
    if not any(prompt.label is not None for prompt in entrants[0].prompts):
        raise DataError(
            f"{data / f'{split}.jsonl'}: has no row with a label, so nothing can be measured. Build the prompts with a "
            f"share for {split} (--split), or choose another split."
        )
    return entrants


def _predict(entrant: _Entrant, folder: Path, *, keep: bool) -> tuple[PredictionTable, _Measured]:
    """Return the predictions of a run: those that are there, where neither run nor rows have changed.

    The name of the file has a hash of all that they depend on.
    """
    run, key = entrant.run, _key(entrant)
    file = folder / f"{run.folder.resolve().name}-{key[:16]}.parquet"
    cost = file.with_suffix(".json")
    if file.is_file() and cost.is_file():
        say(f"{run.folder}: its predictions are in {file}.")
        return read_predictions(file), _Measured(**read_json(cost))
    say(f"{run.folder}:")
    journal = partial_name(file) if keep else None
    figures = predict_prompts(entrant.source, entrant.prompts, file, journal=journal, resume=True)
    measured = _Measured(figures["rows_per_second"], _size(entrant))
    if keep:
        write_json(cost, asdict(measured))
    return read_predictions(file), measured


def _key(entrant: _Entrant) -> str:
    """Return a hash of all that predictions depend on."""
    scores, decisions = job_key(entrant.source, survey_rows(entrant.prompts)), entrant.source.decisions
    if decisions is None:
        return scores
    return hashlib.sha256(json.dumps([scores, decisions.facts()]).encode()).hexdigest()


def _size(entrant: _Entrant) -> int:
    """Return the bytes on disk of a run with all that it needs; a base that several members share counts once."""
    sources = [(entrant.run.folder, entrant.source)]
    if isinstance(entrant.source, EnsembleSource):
        sources += entrant.source.members
    folders = {folder.resolve() for folder, _ in sources}
    folders |= {_base_folder(source) for _, source in sources if isinstance(source, LoraSource)}
    # Members may lie within the run.
    folders = {folder for folder in folders if folders.isdisjoint(folder.parents)}
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


def _base_folder(source: LoraSource) -> Path:
    """Return where a base lies; one of a hub, in the local cache."""
    from huggingface_hub import hf_hub_download

    from llm_clf.models.bases import find_base

    name = find_base(source.settings.model.name)
    return Path(name).resolve() if Path(name).is_dir() else Path(hf_hub_download(name, "config.json")).parent


def _ranked(
    entrants: Sequence[_Entrant], predicted: Sequence[tuple[PredictionTable, _Measured]], metric: str
) -> list[dict[str, Any]]:
    """Return what is known of each run, the best first."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    metrics = [measure(predictions) for predictions, _ in predicted]
    values = [found[metric] for found in metrics]
    order = sorted(range(len(entrants)), key=lambda n: (values[n] is None, -sign * (values[n] or 0)))
    best = predicted[order[0]][0]
    ranked = []
    for number in order:
        run, (predictions, measured) = entrants[number].run, predicted[number]
        decisions = entrants[number].source.decisions
        ranked.append(
            {
                "run": str(run.folder),
                "kind": run.kind,
                "trained": [one["kind"] for one in run.facts.get("ensemble", {}).get("members", [{"kind": run.kind}])],
                "against_best": _against(best, predictions, metric, is_best=number == order[0]),
                "metrics": metrics[number],
                "rows_per_second": measured.rows_per_second,
                "training_seconds": run.facts.get("training", {}).get("seconds"),
                "size_bytes": measured.size_bytes,
                "rows_seen_in_training": count_trained_rows(run.folder, entrants[number].prompts),
                "decisions_fitted": decisions is not None and decisions.fitted,
            }
        )
    return ranked


def _against(best: PredictionTable, other: PredictionTable, metric: str, *, is_best: bool) -> dict[str, Any]:
    """Return how a run stands to the best one, by the paired test of `compare`."""
    if is_best:
        return {"found": BEST, "difference": None, "interval": None, "mcnemar_p": None}
    compared = compare_tables(best, other, ("the best run", "another run"))
    difference = compared.differences[metric]
    found = UNKNOWN if difference.interval is None else WORSE if compared.better(metric) else LEVEL_WITH
    return {
        "found": found,
        "difference": difference.value,
        "interval": as_list(difference.interval),
        "mcnemar_p": compared.p,
    }


def leaderboard_text(found: dict[str, Any]) -> str:
    """Return what `leaderboard` shows, with notes on figures that flatter."""
    lines = [f"{found['rows']:,} {found['split']} rows of {found['data']}, sorted by {found['metric']}", ""]
    lines.append(table(*_cells(found)))
    for entry in found["runs"]:
        seen = entry["rows_seen_in_training"]
        if seen:
            lines.append(f"Note: {entry['run']} learned from {seen:,} of these rows, which flatters it.")
        if found["split"] == "valid" and any(KINDS[kind].chooses_by_validation for kind in entry["trained"]):
            lines.append(f"Note: {entry['run']} kept what was best on validation rows, which flatters it here.")
    fitted = [entry["run"] for entry in found["runs"] if entry["decisions_fitted"]]
    if found["split"] == "valid" and fitted:
        lines.append(
            f"Note: calibration or thresholds of {', '.join(fitted)} were fitted on validation rows: in-sample."
        )
    return "\n".join(lines)


def _cells(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table that a person reads."""
    shown = list(dict.fromkeys((found["metric"], *SHOWN)))
    rows = [
        [
            entry["run"],
            *(figure_text(entry["metrics"], name) for name in shown),
            entry["against_best"]["found"],
            f"{entry['rows_per_second']:,.0f}",
            _duration(entry["training_seconds"]),
            f"{entry['size_bytes'] / 1e6:,.1f} MB",
        ]
        for entry in found["runs"]
    ]
    return ["run", *shown, "against the best", "rows/s", "training", "size"], rows


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:,.1f} min"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _write_csv(file: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Write a line a run, every number in full."""
    names = [name for name in HEADLINES if name in runs[0]["metrics"]]
    head = ["run", "kind", *(part for name in names for part in (name, f"{name}_low", f"{name}_high"))]
    head += ["against_best", "difference", "difference_low", "difference_high", "mcnemar_p"]
    head += ["rows_per_second", "training_seconds", "size_bytes"]
    with replacing(file) as temporary, open(temporary, "w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(head)
        for entry in runs:
            intervals, against = entry["metrics"]["intervals"]["metrics"], entry["against_best"]
            figures = [
                value for name in names for value in (entry["metrics"][name], *(intervals[name] or (None, None)))
            ]
            tested = [against["found"], against["difference"], *(against["interval"] or (None, None))]
            costs = [entry["rows_per_second"], entry["training_seconds"], entry["size_bytes"]]
            writer.writerow([entry["run"], entry["kind"], *figures, *tested, against["mcnemar_p"], *costs])
