"""A prompts folder to a run without a language model: TF-IDF and a linear model, in seconds on a CPU."""

import csv
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llm_clf.commands.parity import check_against_training, scored_with
from llm_clf.commands.validation import decide_validation, score_all
from llm_clf.config import DecideSettings, Settings, settings_to_dict
from llm_clf.config_loading import load_settings, require_keys
from llm_clf.console import say, table
from llm_clf.decisions.decide import probabilities
from llm_clf.decisions.fitting import require_decidable
from llm_clf.engine.scores import Scored
from llm_clf.errors import ConfigError, DataError
from llm_clf.files import (
    file_hash,
    locked,
    partial_name,
    path_of,
    replace_folder,
    replacing,
    require_apart,
    writing,
)
from llm_clf.prompting.training_data import TrainingData, read_training_data
from llm_clf.runs import (
    CHECKPOINTS,
    KINDS,
    TFIDF,
    commit,
    cpu_hardware,
    is_finished,
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
from llm_clf.sources import TfidfSource

if TYPE_CHECKING:
    from llm_clf.baselines.tfidf import Fitted, TellingFeature

FEATURES = "features.csv"
HEEDED = ("train.seed", *(f"decide.{key}" for key in DecideSettings.model_fields))
PACKAGES = ("llm-clf", "scikit-learn", "scipy", "numpy", "skops")
# N-grams of each label that stand in the file, of words and of characters each; and that are shown.
KEPT, SHOWN = 50, 8


def baseline_tfidf(
    data: str | Path,
    *,
    out: str | Path,
    set: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train TF-IDF with a linear model on a prompts folder and write the run folder `out`; return its metrics.

    Logistic regression and a linear SVM, each with three strengths of regularisation, are compared by cross-validation
    on the training rows, and the best by F1 is fitted on all of them, with calibrated probabilities. Of a row it reads
    the input as the prompts file holds it, so the columns that the task's input names, and no other.

    Args:
        data: A folder that `build_prompts` made.
        out: The run folder; until it is complete it stands beside its place as `out.partial`.
        set: Settings as `section.key=value`: `train.seed`, of the folds, and those of the section `decide`.
        resume: Change nothing where the run is finished; else start anew, which takes seconds.
        overwrite: Replace `out`.

    Raises:
        LlmClfError: Settings or prompts are wrong.
    """
    place, folder = path_of(out), path_of(data)
    if resume and is_finished(place, TFIDF):
        say(f"{place} is finished; nothing to do.")
        return run_metrics(place)
    require_run_place(place, overwrite=overwrite)
    require_keys(set, HEEDED, "a TF-IDF baseline")
    settings = load_settings(overrides=set)
    require_apart(place, [folder])
    rows = read_training_data(folder)
    require_decidable(settings.decide, rows.task.names, [prompt.label for prompt in rows.valid])
    _check_texts(folder, rows)
    with locked(place):
        unfinished = partial_name(place)
        if (unfinished.exists() and not (resume or overwrite)) or ((unfinished / CHECKPOINTS).exists() and resume):
            raise ConfigError(f"{unfinished}: an interrupted command left this. --overwrite starts anew.")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            with writing(unfinished):
                _make_run(rows, settings, unfinished)
                replace_folder(unfinished, place)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    say(f"The run is in {place}.")
    return run_metrics(place)


def _check_texts(folder: Path, data: TrainingData) -> None:
    """Refuse texts from which nothing can be learned, and tell of labels that cannot be learned well.

    Raises:
        DataError: All texts are the same, as where all are empty.
    """
    file = folder / "train.jsonl"
    if len({prompt.input for prompt in data.train}) < 2:
        raise DataError(
            f"{file}: all {len(data.train):,} labelled rows have the text {data.train[0].input[:80]!r}, so nothing "
            f"tells their labels apart. Look at the columns of the task's input: {', '.join(data.task.columns)}."
        )
    counts = Counter(prompt.label for prompt in data.train)
    for found, meaning in (
        (0, "it will never be predicted"),
        (1, "the linear SVM is not tried, and probabilities are not calibrated"),
    ):
        labels = [name for name in data.task.names if counts[name] == found]
        if labels:
            say(f"Note: {file} has {found or 'no'} row of {', '.join(map(repr, labels))}: {meaning}.")


def _make_run(data: TrainingData, settings: Settings, folder: Path) -> None:
    """Fit, and fill the unfinished run folder; its run.json comes last."""
    from llm_clf.baselines.tfidf import fit, telling_features
    from llm_clf.baselines.tfidf_model import save_pipeline

    started, clock = datetime.now(UTC), time.monotonic()
    say(
        f"{len(data.train):,} training rows ({data.unlabelled:,} without a label left out), "
        f"{len(data.valid):,} validation rows."
    )
    texts, labels = [prompt.input for prompt in data.train], [prompt.label or "" for prompt in data.train]
    fitted = fit(texts, labels, data.task.names, seed=settings.train.seed)
    seconds = time.monotonic() - clock
    _show_search(fitted)
    features = telling_features(fitted.pipeline, data.task.names, KEPT)
    _show_features(features)

    folder.mkdir(parents=True)
    model = folder / KINDS[TFIDF].learned
    decide = settings_to_dict(settings)["decide"]
    save_inputs(folder, data.task, {"train": {"seed": settings.train.seed}, "decide": decide})
    save_pipeline(model, fitted.pipeline)
    save_trained_rows(folder, data.train)
    _write_features(folder / FEATURES, features)
    scored = score_all(TfidfSource(model, data.task), data.valid).scored if data.valid else None
    decided = decide_validation(settings, data.task, data.valid, scored, folder, counts=data.counts)
    facts = {
        "kind": TFIDF,
        "name": folder.name.removesuffix(".partial"),
        "model": {"hash": file_hash(model), **_choice(fitted)},
        "task": task_facts(data.task),
        "rows": {
            "train": len(data.train),
            "train_unlabelled": data.unlabelled,
            "valid": len(data.valid),
            "labels": data.counts,
        },
        "decisions": decided,
        "training": {"seconds": round(seconds, 2), "rows_per_second": round(len(data.train) / max(seconds, 1e-9), 2)},
        "search": [
            {"model": one.candidate.model, "C": one.candidate.c, "accuracy": one.accuracy, "f1": one.f1}
            for one in fitted.tried
        ],
        "verified": check_against_training(folder, _measure(fitted, data)),
        "prompts": data.hashes,
        "data": prompts_place(data.folder, folder),
        "scored_with": scored_with(folder, None, None),
        "seed": settings.train.seed,
        "versions": package_versions(PACKAGES),
        "commit": commit(),
        "hardware": cpu_hardware(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 2),
        "peak_memory": {"resident_bytes": resident_peak()},
    }
    save_facts(folder, facts)


def _measure(fitted: "Fitted", data: TrainingData) -> NDArray[np.float32] | None:
    """Return the probabilities of the first validation rows by the model in memory; None where there are none."""
    from llm_clf.baselines.tfidf_model import BATCH_ROWS, TfidfScorer

    batches: list[Scored] = []
    TfidfScorer(fitted.pipeline, data.task.names).score(data.valid[:BATCH_ROWS], batches.append)
    return probabilities(batches[0].scores) if batches else None


def _choice(fitted: "Fitted") -> dict[str, Any]:
    """Return what run.json says of the chosen model."""
    blocks = fitted.pipeline.named_steps["features"].transformer_list
    return {
        "model": fitted.chosen.model,
        "C": fitted.chosen.c,
        "calibrated": fitted.calibrated,
        "n_grams": {name: len(block.named_steps["counts"].vocabulary_) for name, block in blocks},
    }


def _show_search(fitted: "Fitted") -> None:
    chosen = f"{fitted.chosen.model}, C {fitted.chosen.c:g}"
    if not fitted.tried:
        say(f"Too few rows of a second label for a cross-validation: {chosen} is taken.")
        return
    rows = [
        [f"{one.candidate.model}, C {one.candidate.c:g}", f"{one.accuracy:.4f}", f"{one.f1:.4f}"]
        for one in fitted.tried
    ]
    say("Cross-validation on the training rows:\n" + table(["model", "accuracy", "f1"], rows))
    say(f"{chosen} is taken, and fitted on all training rows.")


def _show_features(features: Sequence["TellingFeature"]) -> None:
    """Print the first n-grams of each label: words, which are easier to read, where there are any."""
    say(f"What speaks most for each label ({FEATURES} in the run has more):")
    for label in dict.fromkeys(one.label for one in features):
        own = [one for one in features if one.label == label]
        shown = [one.feature for one in own if one.kind == own[0].kind][:SHOWN]
        say(f"  {label}: {', '.join(shown)}")


def _write_features(file: Path, features: Sequence["TellingFeature"]) -> None:
    """Write a CSV file; all text is quoted, as spaces at its ends belong to an n-gram of characters."""
    with replacing(file) as temporary, open(temporary, "w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(["label", "kind", "n_gram", "weight"])
        writer.writerows([one.label, one.kind, one.feature, round(one.weight, 4)] for one in features)
