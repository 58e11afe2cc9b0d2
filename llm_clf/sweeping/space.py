"""The file of a sweep: which settings are tried, and within which bounds."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError

from llm_clf.config import Section, Settings, known_keys
from llm_clf.config_loading import read_settings_file, setting, unknown_key, with_changes
from llm_clf.errors import ConfigError

OF_THE_BASE = "belongs to the base, which is the same in all trials. Give it with --set, and sweep each base apart"
ROUNDING = "changes no result but for rounding, so no trial can show which value is best"
OF_DECISIONS = "is fitted when a training is over, and changes none"
FIXED = {
    "model.name": OF_THE_BASE,
    "model.family": OF_THE_BASE,
    "model.rope_ratio": OF_THE_BASE,
    "model.dtype": ROUNDING,
    "data.token_cache": ROUNDING,
    "train.seed": "would choose the seed that is luckiest on the validation rows and no better on others",
    "train.metric": "is what trials are compared by",
    "train.eval_every": "must be the same in all trials, which are compared at the same evaluations",
    "train.micro_batch_tokens": ROUNDING,
    "train.gradient_checkpointing": ROUNDING,
    **{key: ROUNDING for key in known_keys() if key.startswith(("predict.", "speed."))},
    **{key: OF_DECISIONS for key in known_keys() if key.startswith("decide.")},
}
"""Settings that no sweep may change, and why."""


class Range(Section):
    """Numbers between two bounds, both included."""

    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    log: bool = False
    """Draw evenly on a logarithmic scale, as suits a learning rate."""
    step: Annotated[float, Field(gt=0)] | None = None
    """Distance between neighbouring values, from `low` on; none: any number, or any whole number."""

    def values(self, *, whole: bool) -> float:
        """Return how many values there are, which may be infinitely many."""
        step = self.step or (1 if whole else None)
        return math.inf if step is None else int((_exact(self.high) - _exact(self.low)) // _exact(step)) + 1

    def top(self) -> float:
        """Return the largest value that steps from `low` reach."""
        if self.step is None:
            return self.high
        low, step = _exact(self.low), _exact(self.step)
        return float(low + (_exact(self.high) - low) // step * step)


def _exact(number: float) -> Decimal:
    """Return a number as it is written: 0.3 is three steps of 0.1."""
    return Decimal(repr(number))


def _form(value: Any) -> str | None:
    if isinstance(value, list):
        return "choices"
    return "range" if isinstance(value, Mapping | Range) else None


Choices = Annotated[list[Any], Field(min_length=1)]
Space = Annotated[
    Annotated[Choices, Tag("choices")] | Annotated[Range, Tag("range")],
    Discriminator(
        _form,
        custom_error_type="space",
        custom_error_message="expected a list of choices, or a range such as {low: 1e-4, high: 1e-2, log: true}",
    ),
]
_SPACE: TypeAdapter[list[Any] | Range] = TypeAdapter(Space)


class Sweep(Section):
    """What a sweep tries."""

    trials: Annotated[int, Field(ge=1)] = 20
    """How many settings are tried."""
    seed: Annotated[int, Field(ge=0, le=10**9)] = 42
    """Seed of what is drawn. The trainings have their own, `train.seed`, which is the same in all trials."""
    startup_trials: Annotated[int, Field(ge=1)] = 5
    """So many trials are drawn blindly, and as many are trained to the end before any is broken off."""
    warmup_evaluations: Annotated[int, Field(ge=0)] = 1
    """So many evaluations of each trial break nothing off: early in a training, a metric tells little."""
    settings: Annotated[dict[str, Space], Field(min_length=1)]
    """What is tried of each setting: a list of choices, or a range."""


def load_sweep(file: Path, settings: Settings) -> Sweep:
    """Return what a file says, each choice as the settings hold it.

    Args:
        file: YAML.
        settings: Those of the trials; the file changes some of them.

    Raises:
        ConfigError: A key or a value is wrong; all faults at once.
    """
    tree = read_settings_file(file, "--sweep", "`settings:` with what is to be tried")
    spaces = tree.get("settings")
    faults = [
        fault
        for key, space in (spaces.items() if isinstance(spaces, dict) else ())
        for fault in _space_faults(str(key), space, settings)
    ]
    try:
        sweep = Sweep.model_validate(tree)
    except ValidationError as error:
        faults = [*_form_faults(error, Sweep.model_fields), *faults]
    if not faults:
        canonical = {key: _canonical(key, space, settings) for key, space in sweep.settings.items()}
        sweep = sweep.model_copy(update={"settings": canonical})
        faults = [*_too_few(sweep)]
    if faults:
        lines = "\n".join(f"  {line}" for fault in faults for line in fault.splitlines())
        raise ConfigError(f"The sweep ({file}) is wrong:\n{lines}")
    return sweep


def ends(sweep: Sweep, settings: Settings) -> Iterator[Settings]:
    """Yield the settings with each choice and each bound of the sweep, one changed at a time."""
    for key, space in sweep.settings.items():
        for value in (space.low, space.high) if isinstance(space, Range) else space:
            yield with_changes(settings, {key: value})


def is_whole(key: str) -> bool:
    """Whether a setting is a whole number."""
    return _type_of(key) is int


def _type_of(key: str) -> Any:
    section, _, name = key.partition(".")
    group: Any = Settings.model_fields[section].annotation
    return group.model_fields[name].annotation


def _form_faults(error: ValidationError, known: Iterable[str], key: str | None = None) -> Iterator[str]:
    """Yield one line a fault in the form of the file, or of the space of one setting.

    Of the file, those inside of `settings` are left out: they are told setting by setting.
    """
    for fault in error.errors():
        if key is None and fault["loc"][0] == "settings" and len(fault["loc"]) > 1:
            continue
        # Which form a space was taken for is no part of the file.
        parts = [part for part in (key, *fault["loc"]) if part not in (None, "choices", "range")]
        where = ".".join(map(str, parts))
        if fault["type"] == "extra_forbidden":
            yield unknown_key(where, list(known))
        elif fault["type"] == "missing":
            yield f"{where}: is missing."
        else:
            yield f"{where}: found {fault['input']!r}; {fault['msg'][0].lower()}{fault['msg'][1:]}."


def _space_faults(key: str, raw: Any, settings: Settings) -> Iterator[str]:
    """Yield what is wrong with what is to be tried of one setting."""
    if key not in known_keys():
        yield unknown_key(key, known_keys())
        return
    if key in FIXED:
        yield f"{key}: {FIXED[key]}."
        return
    try:
        space = _SPACE.validate_python(raw)
    except ValidationError as error:
        yield from _form_faults(error, [f"{key}.{name}" for name in Range.model_fields], key)
        return
    if isinstance(space, Range):
        faults = list(_range_faults(key, space))
        yield from (f"{key}: {fault}" for fault in faults)
        values: list[Any] = [] if faults else [space.low, space.high]
    else:
        values = space
    sound = []
    for value in values:
        try:
            sound.append(json.dumps(setting(with_changes(settings, {key: value}), key)))
        except ConfigError as error:
            yield str(error)
    if not isinstance(space, Range) and len(set(sound)) < len(sound):
        yield f"{key}: found {space!r}; name each choice once."


def _range_faults(key: str, space: Range) -> Iterator[str]:
    """Yield what is wrong with a range, whatever the setting allows."""
    if _type_of(key) not in (int, float):
        yield "is no number, so it takes no range; give a list of choices."
        return
    if space.low >= space.high:
        yield f"found low {space.low:g} and high {space.high:g}; low must be below high."
    if space.log and space.low <= 0:
        yield f"found low {space.low:g}; a range with log begins above 0."
    if space.log and space.step is not None:
        yield "found log and step; a range has one of them."
    if space.step is not None and space.step > space.high - space.low:
        yield f"found step {space.step:g}, larger than the range."
    if is_whole(key):
        for name in ("low", "high", "step"):
            value = getattr(space, name)
            if value is not None and not value.is_integer():
                yield f"found {name} {value:g}; the setting is a whole number."


def _canonical(key: str, space: Any, settings: Settings) -> Any:
    """Return choices as the settings hold them (`1e-4` is text in YAML), and a range as it is."""
    if isinstance(space, Range):
        return space
    return [setting(with_changes(settings, {key: value}), key) for value in space]


def _too_few(sweep: Sweep) -> Iterator[str]:
    """Yield a fault where there are more trials than settings to try."""
    combinations = math.prod(
        space.values(whole=is_whole(key)) if isinstance(space, Range) else len(space)
        for key, space in sweep.settings.items()
    )
    if combinations < sweep.trials:
        yield (
            f"trials: found {sweep.trials}, and the settings have {combinations} combinations; no two trials are alike"
            f", so give {combinations} at most."
        )
