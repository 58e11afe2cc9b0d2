"""Several runs to one run that combines what they say, with weights chosen on validation rows."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from llm_clf.baselines.ensemble import (
    FOLDS,
    METHODS,
    Chosen,
    Method,
    WeightedMean,
    choose,
    combination_of,
    equal_weights,
)
from llm_clf.commands.parity import scored_with
from llm_clf.commands.predict import write_scored
from llm_clf.commands.scoring import score_members, survey_rows
from llm_clf.console import say, table
from llm_clf.decisions.decide import decide, probabilities
from llm_clf.decisions.predictions import OK, PredictionTable, read_predictions
from llm_clf.decisions.stored import save_scores
from llm_clf.engine.scores import AllScored
from llm_clf.errors import ConfigError, DataError
from llm_clf.evaluation.comparison import LOWER_IS_BETTER, compare_tables, comparison_facts, verdict
from llm_clf.evaluation.intervals import measure
from llm_clf.evaluation.tables import figure_text
from llm_clf.files import (
    file_hash,
    locked,
    partial_name,
    path_of,
    read_json,
    replace_folder,
    require_apart,
    write_json,
    writing,
)
from llm_clf.prompting.prompts import Prompt, read_split
from llm_clf.prompting.tasks import Task, load_task
from llm_clf.runs import (
    CHECKPOINTS,
    ENSEMBLE,
    KINDS,
    METRICS,
    VALID_PREDICTIONS,
    VALID_SCORES,
    Run,
    commit,
    count_trained_rows,
    cpu_hardware,
    is_finished,
    load_run,
    package_versions,
    prompts_place,
    require_run_place,
    resident_peak,
    run_metrics,
    save_facts,
    save_inputs,
    save_trained_rows,
    task_facts,
)
from llm_clf.sources import ensemble_members, member_source

PACKAGES = ("llm-clf", "scikit-learn", "scipy", "numpy")
WAYS = {
    "mean": "The mean of probabilities, weights",
    "log-odds": "The mean of log-odds, weights",
    "stacking": "Logistic regression on the members' scores,",
}
# What is shown, and in what the gain is tested: runs are chosen by F1 as a rule, and the weights by log-loss.
SHOWN, TESTED = ("f1", "accuracy", "log_loss"), ("f1", "log_loss")


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What an ensemble is made of."""

    members: list[Run]
    task: Task
    data: Path
    """Where the validation rows are."""
    valid: list[Prompt]
    valid_hash: str

    @property
    def labelled(self) -> list[int]:
        """Return the numbers of the validation rows that have a label."""
        return [number for number, prompt in enumerate(self.valid) if prompt.label is not None]


def ensemble(
    runs: Sequence[str | Path],
    *,
    data: str | Path,
    out: str | Path,
    method: Method = "log-odds",
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Combine runs into the run folder `out`, with weights chosen on validation rows; return its metrics.

    Args:
        runs: Two or more finished runs of one task, none of them an ensemble. They stay where they are.
        data: A folder that `build_prompts` made; its validation rows are used, and no others.
        out: The run folder; until it is complete it stands beside its place as `out.partial`.
        method: The mean of probabilities or of log-odds, or logistic regression on the members' scores.
        resume: Go on with what an interrupted command left.
        overwrite: Replace `out`.

    Raises:
        ArtifactError: A run is missing or damaged.
        ConfigError: Runs are too few, do not fit each other or the prompts, or saw the validation rows in training.
        DataError: The prompts are wrong.
    """
    if method not in METHODS:
        raise ConfigError(f"--method {method!r}: allowed are {', '.join(METHODS)}.")
    place, folder = path_of(out), path_of(data)
    if resume and is_finished(place, ENSEMBLE):
        say(f"{place} is finished; nothing to do.")
        return run_metrics(place)
    require_run_place(place, overwrite=overwrite)
    inputs = _read_inputs([path_of(run) for run in runs], folder)
    require_apart(place, [folder, *(run.folder for run in inputs.members)])
    with locked(place):
        unfinished = partial_name(place)
        if unfinished.exists() and (not (resume or overwrite) or (resume and _left_by_another(unfinished))):
            raise ConfigError(
                f"{unfinished}: an interrupted command left this. --resume goes on with what `llm-clf ensemble` left, "
                "--overwrite starts anew."
            )
        if not resume:
            shutil.rmtree(unfinished, ignore_errors=True)
        try:
            with writing(unfinished):
                _make_run(inputs, method, unfinished, place, resume=resume)
                shutil.rmtree(unfinished / CHECKPOINTS, ignore_errors=True)
                replace_folder(unfinished, place)
        except BaseException:
            if not (unfinished / CHECKPOINTS).exists():
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
    say(f"The run is in {place}.")
    return run_metrics(place)


def _left_by_another(unfinished: Path) -> bool:
    """Whether an unfinished run has checkpoints of a training in it."""
    checkpoints = unfinished / CHECKPOINTS
    return checkpoints.is_dir() and any(not file.name.startswith("member-") for file in checkpoints.iterdir())


def _read_inputs(folders: Sequence[Path], data: Path) -> _Inputs:
    """Return runs, task and validation rows, all of which fit each other."""
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        given = ", ".join(map(str, folders)) or "none"
        raise ConfigError(f"RUN...: an ensemble needs two different runs or more, each given once; found {given}.")
    if not (data / "task.yaml").is_file():
        raise DataError(f"{data}: has no task.yaml. Give --data a folder that `llm-clf build-prompts` made.")
    task = load_task(data / "task.yaml")
    members = [load_run(folder) for folder in folders]
    valid = read_split(data, "valid", task)
    for run in members:
        _require_fit(run, task, data)
        _require_unseen(run, valid, data)
    return _Inputs(members, task, data, valid, file_hash(data / "valid.jsonl"))


def _require_fit(run: Run, task: Task, data: Path) -> None:
    """Refuse a run that cannot be a member: an ensemble, or one that answers another task."""
    if run.kind == ENSEMBLE:
        raise ConfigError(f"{run.folder}: is an ensemble itself. Give the runs that it was made of in its place.")
    if run.task.names != task.names:
        raise ConfigError(
            f"{run.folder}: its labels are {', '.join(run.task.names)}; those of {data} are {', '.join(task.names)}. "
            "Members of an ensemble have the same labels in the same order."
        )
    if run.task.input != task.input:
        raise ConfigError(
            f"{run.folder}: was trained on inputs of the form {run.task.input!r}; those of {data} are {task.input!r}. "
            "Give runs that read the same text."
        )
    if KINDS[run.kind].reads_instruction and run.task.instruction != task.instruction:
        raise ConfigError(
            f"{run.folder}: was trained on the instruction {run.task.instruction!r}; that of {data} is "
            f"{task.instruction!r}. Give a run that was asked the same."
        )


def _require_unseen(run: Run, valid: Sequence[Prompt], data: Path) -> None:
    """Refuse a run that learned from validation rows: its scores there say nothing of how good it is."""
    seen = count_trained_rows(run.folder, valid)
    if seen is None:
        say(
            f"Note: {run.folder} does not tell which rows it was trained on, as runs of older versions do not. Take "
            f"care that none of them are in {data / 'valid.jsonl'}."
        )
    elif seen:
        raise ConfigError(
            f"{run.folder}: was trained on {seen:,} of the {len(valid):,} validation rows of {data}, so it looks "
            "better there than it is, and weights cannot be chosen. Give runs trained on this folder, or the folder "
            "that they were trained on."
        )


def _make_run(inputs: _Inputs, method: Method, folder: Path, place: Path, *, resume: bool) -> None:
    """Fill the unfinished run folder; its run.json comes last."""
    started, clock = datetime.now(UTC), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    scores = np.empty((len(inputs.members), 0, len(inputs.task.names)), dtype=np.float32)
    cut = np.empty(0, dtype=bool)
    if inputs.valid:
        members = [(run.folder, member_source(run)) for run in inputs.members]
        survey = survey_rows(inputs.valid)
        parts = score_members(members, inputs.valid, survey, journal=folder / CHECKPOINTS, resume=resume)
        scores = np.stack([part.scored.scores for part in parts])
        cut = np.any([part.scored.cut for part in parts], axis=0)
    chosen = _choose(inputs, method, scores)
    in_sample = chosen is not None and chosen.too_few is None

    learned = folder / KINDS[ENSEMBLE].learned
    combination = chosen.combination if chosen is not None else equal_weights(method, len(inputs.members))
    stored = ensemble_members(place, inputs.members)
    save_inputs(folder, inputs.task, {})
    write_json(learned, {"members": stored, **combination.facts()})
    # As predict will read it.
    combination = combination_of(read_json(learned), len(inputs.members), len(inputs.task.names))
    save_trained_rows(folder, [inputs.valid[row] for row in inputs.labelled] if in_sample else [])
    if inputs.valid:
        scored = AllScored(combination.combine(scores).astype(np.float32), cut, {})
        write_scored(folder / VALID_PREDICTIONS, inputs.valid, scored, inputs.task)
        save_scores(folder / VALID_SCORES, _unseen_scores(inputs, chosen, scored.scores))
        _measure(inputs, scores, chosen, folder)
    else:
        say("No validation rows: all members weigh the same, and nothing is measured.")
    training = sum(run.facts.get("training", {}).get("seconds", 0) for run in inputs.members)
    seconds = round(time.monotonic() - clock, 2)
    facts = {
        "kind": ENSEMBLE,
        "name": place.name,
        "ensemble": {"method": combination.facts()["method"], "members": stored, "hash": file_hash(learned)},
        "task": task_facts(inputs.task),
        "rows": {"train": len(inputs.labelled) if in_sample else 0, "valid": len(inputs.valid)},
        # With that of the members.
        "training": {"seconds": round(training + seconds, 2)},
        "prompts": {"valid": inputs.valid_hash},
        "data": prompts_place(inputs.data, place),
        "scored_with": scored_with(folder, None, None),
        "versions": package_versions(PACKAGES),
        "commit": commit(),
        "hardware": cpu_hardware(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": seconds,
        "peak_memory": {"resident_bytes": resident_peak()},
    }
    save_facts(folder, facts)


def _choose(inputs: _Inputs, method: Method, scores: np.ndarray) -> Chosen | None:
    """Return how the members are combined, None where no row has a label to choose by; say what was done."""
    labelled = inputs.labelled
    if not labelled:
        return None
    truth = np.array([inputs.task.names.index(inputs.valid[row].label or "") for row in labelled])
    chosen = choose(method, scores[:, labelled], truth)
    if chosen.too_few is not None:
        say(f"All members weigh the same: {chosen.too_few}.")
        return chosen
    say(
        f"{WAYS[method]} chosen by log-loss on {len(labelled):,} validation rows. The ensemble's figures below are "
        f"cross-fitted in {FOLDS} folds: each row is scored by what was chosen without it."
    )
    return chosen


def _unseen_scores(inputs: _Inputs, chosen: Chosen | None, scores: np.ndarray) -> np.ndarray:
    """Return scores by which decisions can be fitted: each labelled row's by weights that were chosen without it."""
    found = scores.copy()
    if chosen is not None:
        found[inputs.labelled] = chosen.held_out
    return found


def _measure(inputs: _Inputs, scores: np.ndarray, chosen: Chosen | None, folder: Path) -> None:
    """Write metrics.json and show members, ensemble and gain.

    Its figures at the top are those of the stored predictions, so in-sample where weights were chosen on the same rows.
    """
    metrics = measure(read_predictions(folder / VALID_PREDICTIONS))
    if chosen is None:
        write_json(folder / METRICS, metrics | {"in_sample": False})
        say("No validation row has a label: all members weigh the same, and nothing is measured.")
        return
    whole = _table(inputs, chosen.held_out.astype(np.float32))
    members = [_table(inputs, part[inputs.labelled]) for part in scores]
    measured, together = [measure(one) for one in members], measure(whole)
    gain = {}
    for metric in TESTED:
        best = _best(measured, metric)
        compared = compare_tables(members[best], whole, ("the member", "the ensemble"))
        facts = comparison_facts(compared, metric)
        name = str(inputs.members[best].folder)
        gain[metric] = {"a": name, "b": "ensemble", **facts, "verdict": verdict(compared, metric, (name, "ensemble"))}
    names = [str(run.folder) for run in inputs.members]
    metrics |= {"in_sample": chosen.too_few is None, "cross_fitted": together}
    metrics |= {"members": dict(zip(names, measured, strict=True)), "gain": gain}
    write_json(folder / METRICS, metrics)
    _show(inputs, chosen, measured, together)
    for found in gain.values():
        say(found["verdict"])


def _table(inputs: _Inputs, scores: np.ndarray) -> PredictionTable:
    """Return the predictions of the labelled validation rows from their scores."""
    probs, names = probabilities(scores), inputs.task.names
    prompts = [inputs.valid[row] for row in inputs.labelled]
    return PredictionTable(
        labels=list(names),
        ids=[prompt.id for prompt in prompts],
        predicted=[names[choice] for choice in decide(probs)],
        status=[OK] * len(prompts),
        gold=[prompt.label or "" for prompt in prompts],
        probs=probs,
    )


def _best(measured: Sequence[dict[str, Any]], metric: str) -> int:
    """Return the number of the member that is best in a metric, the first of several."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return max(range(len(measured)), key=lambda number: sign * measured[number][metric])


def _show(inputs: _Inputs, chosen: Chosen, measured: Sequence[dict[str, Any]], together: dict[str, Any]) -> None:
    combination = chosen.combination
    weights = [f"{weight:.3f}" for weight in combination.weights] if isinstance(combination, WeightedMean) else []
    rows = [
        [str(run.folder), run.kind, weights[number] if weights else "-", *(figure_text(found, name) for name in SHOWN)]
        for number, (run, found) in enumerate(zip(inputs.members, measured, strict=True))
    ]
    rows.append(["ensemble", combination.facts()["method"], "", *(figure_text(together, name) for name in SHOWN)])
    say(table(["validation rows", "kind", "weight", *SHOWN], rows))
    flattered = [str(run.folder) for run in inputs.members if KINDS[run.kind].chooses_by_validation]
    if flattered:
        say(f"{', '.join(flattered)}: kept what was best on these rows, which flatters it here and not on test rows.")
