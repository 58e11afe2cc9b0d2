"""The settings of a training: what was given, over what suits the base that ships; and whether they fit the task."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from llm_clf.config import DEFAULT_BASE, EncoderSettings, EncoderTrainSettings, Settings, TrainSettings
from llm_clf.config_loading import load_tree
from llm_clf.errors import ConfigError
from llm_clf.files import path_of
from llm_clf.prompting.training_data import TrainingData

RECIPES = {Settings: f"{DEFAULT_BASE}.yaml", EncoderSettings: f"encoder-{DEFAULT_BASE}.yaml"}

AnySettings = TypeVar("AnySettings", Settings, EncoderSettings)


def resolve_settings(
    kind: type[AnySettings], model: str | None, config: str | Path | None, overrides: Sequence[str]
) -> AnySettings:
    """Return the settings: defaults, the recipe of the base that ships where it is used, the file, the overrides.

    Args:
        kind: Of training.
        model: The base, in place of the setting `model.name`.
        config: A YAML file of settings.
        overrides: Settings as `section.key=value`.

    Raises:
        ConfigError: The file or an override cannot be read, or a key or value is wrong.
    """
    if model is not None and (path_of(model) / "config.json").is_file():
        model = str(path_of(model).resolve())
    files: list[Path] = [Path(config)] if config is not None else []
    changes = [*overrides, *([f"model.name={json.dumps(model)}"] if model is not None else [])]
    settings = load_tree(kind, files, changes)
    if settings.model.name == DEFAULT_BASE:
        settings = load_tree(kind, [_recipes() / RECIPES[kind], *files], changes)
    return settings


def _recipes() -> Path:
    """Return the folder of the settings that suit the base that ships."""
    package = Path(__file__).resolve().parent.parent
    # The wheel carries configs/ inside the package; in a checkout it stands beside it.
    places = (package / "configs", package.parent / "configs")
    return next(place for place in places if place.is_dir())


def require_fitting(settings: TrainSettings | EncoderTrainSettings, data: TrainingData) -> None:
    """Refuse a metric that the validation rows cannot tell, and weights of labels that the task does not have.

    Raises:
        ConfigError: There are such.
    """
    validated = {prompt.label for prompt in data.valid if prompt.label is not None}
    if settings.metric == "roc_auc" and len(validated) == 1:
        raise ConfigError(
            f"train.metric roc_auc: all validation rows with a label have {validated.pop()!r}, and a ROC curve needs "
            "two labels. Choose another metric, or build the prompts with a larger share for validation."
        )
    if isinstance(settings.class_weights, dict):
        unknown = sorted(settings.class_weights.keys() - set(data.task.names))
        if unknown:
            raise ConfigError(
                f"train.class_weights: {unknown[0]!r} is no label; the labels are {', '.join(data.task.names)}."
            )
