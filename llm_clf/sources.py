"""What a prediction comes from: a run, a bare adapter or a base, and how each becomes something that scores prompts."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from llm_clf.config import EncoderSettings, Settings, settings_to_dict
from llm_clf.config_loading import load_settings, load_tree, require_keys, require_sections
from llm_clf.decisions.decisions import Decisions
from llm_clf.decisions.stored import refit, run_decisions
from llm_clf.engine.scores import Scorer
from llm_clf.errors import ArtifactError, ConfigError, LlmClfError
from llm_clf.files import file_hash, read_json
from llm_clf.prompting.tasks import Task, load_task
from llm_clf.runs import CONFIG, ENCODER, ENCODER_WEIGHTS, ENSEMBLE, LORA, TFIDF, Run, is_run, load_run

if TYPE_CHECKING:
    from llm_clf.baselines.ensemble import Combination


class Source(Protocol):
    """A model of any kind with the task that it answers."""

    @property
    def generates(self) -> bool:
        """Whether it can write answers."""

    @property
    def task(self) -> Task:
        """Return the task."""

    @property
    def batch_tokens(self) -> int | None:
        """Return the most tokens that are scored at once, None where the model has no such budget."""

    @property
    def decisions(self) -> Decisions | None:
        """Return how its scores become probabilities and labels; None: bare ones, and the most probable label."""

    def identity(self) -> list[object]:
        """Return all that the scores of a prompt depend on, as values fit for JSON."""

    def load(self, *, generate: bool = False) -> Scorer:
        """Load the model; with `generate` it also writes answers.

        Raises:
            LlmClfError: Something of it is missing, damaged or does not fit.
        """


@dataclass(frozen=True, slots=True)
class LoraSource:
    """A language model, as a rule with an adapter, read by label words or a linear head."""

    adapter: Path | None
    """None: the base alone answers."""
    task: Task
    settings: Settings
    run: Run | None
    """None where there is only an adapter, or a base. Its settings are those above."""
    decisions: Decisions | None = None

    @property
    def generates(self) -> bool:
        """Return whether it has words: a linear head takes their place."""
        return self.settings.model.head == "label-words"

    @property
    def batch_tokens(self) -> int:
        """Return the budget of the settings."""
        return self.settings.predict.batch_tokens

    def identity(self) -> list[object]:
        """Return hashes of adapter and base, the task and the settings."""
        from llm_clf.models.adapters import adapter_weights
        from llm_clf.models.bases import base_identity, prepare_libraries

        prepare_libraries()
        return [
            file_hash(adapter_weights(self.adapter)) if self.adapter is not None else None,
            base_identity(self.settings.model.name)["hash"],
            self.task.model_dump(mode="json"),
            _of_scores(settings_to_dict(self.settings)),
        ]

    def load(self, *, generate: bool = False) -> Scorer:
        """Load base and adapter; the base of a run must be the one that it was trained on."""
        from llm_clf.engine.classifier import Classifier, require_same_base
        from llm_clf.engine.fitting import memory_explained
        from llm_clf.models.bases import prepare_libraries

        prepare_libraries()
        if self.run is not None:
            require_same_base(self.run)
        with memory_explained():
            return Classifier.from_adapter(self.adapter, self.task, self.settings, generate=generate)


@dataclass(frozen=True, slots=True)
class TfidfSource:
    """TF-IDF with a linear model."""

    generates: ClassVar[bool] = False

    model: Path
    """The file of the pipeline."""
    task: Task
    decisions: Decisions | None = None
    batch_tokens: ClassVar[None] = None

    def identity(self) -> list[object]:
        """Return a hash of the model, and the task."""
        return [file_hash(self.model), self.task.model_dump(mode="json")]

    def load(self, *, generate: bool = False) -> Scorer:
        """Load the model, which writes no answers."""
        from llm_clf.baselines.tfidf_model import TfidfScorer, load_pipeline

        assert not generate
        return TfidfScorer(load_pipeline(self.model), self.task.names)


@dataclass(frozen=True, slots=True)
class EncoderSource:
    """An encoder under a head."""

    generates: ClassVar[bool] = False

    folder: Path
    """Holds weights, config and tokenizer; the base that it was made of is not needed."""
    task: Task
    settings: EncoderSettings
    decisions: Decisions | None = None

    @property
    def batch_tokens(self) -> int:
        """Return the budget of the settings."""
        return self.settings.predict.batch_tokens

    def identity(self) -> list[object]:
        """Return a hash of the weights, the task and the settings."""
        return [
            file_hash(self.folder / ENCODER_WEIGHTS),
            self.task.model_dump(mode="json"),
            _of_scores(settings_to_dict(self.settings)),
        ]

    def load(self, *, generate: bool = False) -> Scorer:
        """Load encoder and head, which write no answers."""
        from llm_clf.baselines.encoder_model import EncoderScorer
        from llm_clf.engine.fitting import memory_explained
        from llm_clf.models.bases import prepare_libraries

        assert not generate
        prepare_libraries()
        with memory_explained():
            return EncoderScorer.from_folder(self.folder, self.task, self.settings)


@dataclass(frozen=True, slots=True)
class EnsembleSource:
    """Several models of one task, and how their scores become one; each member scores all rows by itself."""

    generates: ClassVar[bool] = False

    members: tuple[tuple[Path, Source], ...]
    """Each with the folder of its run."""
    combination: "Combination"
    task: Task
    decisions: Decisions | None = None


AnySource = Source | EnsembleSource


def _of_scores(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of settings that scores depend on."""
    return {section: values for section, values in settings.items() if section != "decide"}


def find_source(folder: Path, task: str | Path | None, model: str | None, overrides: Sequence[str] = ()) -> AnySource:
    """Return what to predict with: a run of any kind, or a bare adapter with the task and the base given.

    Raises:
        ArtifactError: The folder is neither.
        ConfigError: A bare adapter lacks a task or a base, a run is given another one, or an override does not fit.
    """
    require_sections(overrides, ("model", "predict", "decide", "speed"), "a prediction")
    changes = [*overrides, *([f"model.name={json.dumps(model)}"] if model is not None else [])]
    if is_run(folder) or not (folder / "adapter_config.json").is_file():
        return _run_source(load_run(folder), task, changes)
    if any(map(_decides, changes)):
        raise ConfigError(
            f"{folder}: is a bare adapter, without validation rows to fit decisions on. Leave out --prior and "
            "--set decide.…, or give a run."
        )
    if task is None or model is None:
        raise ConfigError(f"{folder}: is a bare adapter; tell what it answers and its base: --task TASK --model BASE.")
    return LoraSource(folder, load_task(task), load_settings(overrides=[head_of_adapter(folder), *changes]), None)


def head_of_adapter(folder: Path) -> str:
    """Return as a setting which head a bare adapter was trained for."""
    config = read_json(folder / "adapter_config.json")
    linear = isinstance(config, dict) and config.get("task_type") == "SEQ_CLS"
    return f"model.head={'linear' if linear else 'label-words'}"


def _run_source(run: Run, task: str | Path | None, changes: Sequence[str]) -> AnySource:
    """Return what a run is to predict with, by its kind."""
    if task is not None:
        raise ConfigError(f"{run.folder}: is a run and has its own task; leave out --task.")
    deciding = [change for change in changes if _decides(change)]
    changes = [change for change in changes if not _decides(change)]
    if run.kind == LORA and changes:
        run = replace(run, settings=_changed(run, changes))
    elif run.kind == ENCODER:
        what = f"{run.folder}, an encoder that carries its weights (leave out --model),"
        require_keys(changes, ("model.dtype", "predict.batch_tokens"), what)
        run = replace(run, settings=load_tree(EncoderSettings, [run.folder / CONFIG], changes))
    elif changes:
        raise ConfigError(
            f"{run.folder}: is a run of kind {run.kind}, which has no base and no settings of a prediction; leave out "
            "--model and --set."
        )
    return with_decisions(run, refit(run, deciding).decisions) if deciding else run_source(run)


def _decides(change: str) -> bool:
    return change.partition(".")[0].strip() == "decide"


def run_settings(run: Run, model: str | None) -> Run:
    """Return a run with its base where it is now: `model`, if that is given, for a run that has a base."""
    if run.kind != LORA or model is None:
        return run
    return replace(run, settings=_changed(run, [f"model.name={json.dumps(model)}"]))


def run_source(run: Run) -> AnySource:
    """Return what a run predicts with, as it was made.

    Raises:
        ArtifactError: It is an ensemble, and a member is missing or another one now; or its decisions are missing.
    """
    return with_decisions(run, run_decisions(run))


def with_decisions(run: Run, decisions: Decisions | None) -> AnySource:
    """Return what a run predicts with, and how it decides."""
    source: Any = _ensemble_source(run) if run.kind == ENSEMBLE else member_source(run)
    found: AnySource = replace(source, decisions=decisions)
    return found


def member_source(run: Run) -> Source:
    """Return what a run of any kind but an ensemble scores labels with; its decisions are left to the caller."""
    if run.kind == LORA:
        return LoraSource(run.adapter, run.task, run.settings, run)
    if run.kind == ENCODER:
        return EncoderSource(run.learned.parent, run.task, run.settings)
    assert run.kind == TFIDF
    return TfidfSource(run.learned, run.task)


def ensemble_members(place: Path, members: Sequence[Run]) -> list[dict[str, str]]:
    """Return what the ensemble at `place` stores of its members: each by its path from there and by what it learned."""
    return [
        {"run": os.path.relpath(run.folder, place), "kind": run.kind, "learned": file_hash(run.learned)}
        for run in members
    ]


def _ensemble_source(run: Run) -> EnsembleSource:
    """Return the members that an ensemble was made of.

    Raises:
        ArtifactError: Its file is damaged, or a member was moved or is another one now.
    """
    from llm_clf.baselines.ensemble import combination_of

    facts = read_json(run.learned)
    try:
        combination = combination_of(facts, len(facts["members"]), len(run.task.names))
        stored = [(str(one["run"]), one["learned"]) for one in facts["members"]]
    except (LookupError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{run.learned}: is not what `llm-clf ensemble` wrote: {error}. Make the ensemble again."
        ) from error
    found = [_member(run.folder, path, learned) for path, learned in stored]
    return EnsembleSource(tuple((one.folder, member_source(one)) for one in found), combination, run.task)


def _member(ensemble: Path, path: str, learned: Any) -> Run:
    """Return a member, which must be what it was when the ensemble was made."""
    folder = Path(os.path.normpath(ensemble / path))
    made = f"{ensemble}: was made of the run {folder}"
    if not folder.exists():
        raise ArtifactError(
            f"{made}, and nothing is there. Move it back; an ensemble finds its members by their place beside it, so "
            "move all of them together. Or make the ensemble again."
        )
    try:
        run = load_run(folder)
    except LlmClfError as error:
        raise ArtifactError(f"{made}, which cannot be used: {error}") from error
    if file_hash(run.learned) != learned:
        raise ArtifactError(
            f"{made}, and what is there now has learned something else. Put the former run back, or make the ensemble "
            "again."
        )
    return run


def _changed(run: Run, changes: Sequence[str]) -> Settings:
    """Return a run's settings with changes.

    Where they leave `predict.merge` to the run, its adapter is merged as for its validation; not where the base is held
    otherwise now, since what was found of one number type says nothing of another.
    """
    then = run.settings
    settings = load_settings([run.folder / CONFIG], ["predict.merge=auto", *changes])
    for key in ("head", "pooling"):
        wanted, trained = getattr(settings.model, key), getattr(then.model, key)
        if wanted != trained:
            raise ConfigError(f"model.{key} {wanted}: {run.folder} was trained with {trained}; leave it out.")
    if settings.predict.merge != "auto":
        return settings
    held_so = settings.model == then.model.model_copy(update={"name": settings.model.name})
    return settings.merging(then.predict.merge is True and held_so)
