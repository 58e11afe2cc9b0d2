from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from llm_clf.config import EncoderSettings, Settings, known_keys, settings_to_dict
from llm_clf.config_loading import load_settings, load_tree
from llm_clf.errors import ConfigError
from llm_clf.prompting.tasks import load_task
from llm_clf.sweeping.space import load_sweep

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path, text: str, name: str = "settings.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def refusal(files: list[Path] | None = None, overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(files or [], overrides or [])
    return str(caught.value)


def yaml_files(folder: str) -> list[Path]:
    return sorted(file for ending in ("yaml", "yml") for file in (ROOT / folder).rglob(f"*.{ending}"))


def test_defaults_are_those_that_are_documented() -> None:
    settings = load_settings()
    assert settings == Settings()
    assert (settings.lora.r, settings.lora.alpha, settings.lora.dropout) == (8, 32, 0.1)
    assert settings.lora.target_modules == "all-linear"
    assert (settings.train.epochs, settings.train.batch_size, settings.train.schedule) == (3, 16, "cosine")
    assert (settings.train.metric, settings.train.patience, settings.train.seed) == ("f1", 0, 42)
    assert (settings.model.name, settings.model.dtype) == ("glm-nano", "auto")
    assert settings.data.cut is None


def test_every_setting_has_a_documented_default() -> None:
    keys = known_keys()
    assert len(keys) == len(set(keys)) > 20
    tree = settings_to_dict(Settings())
    assert sorted(keys) == sorted(f"{section}.{key}" for section, values in tree.items() for key in values)


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    settings = load_settings([write(tmp_path, "train:\n  epochs: 7\n  metric: log_loss\nlora:\n  r: 4\n")])
    changed = {"train": {"epochs": 7, "metric": "log_loss"}, "lora": {"r": 4}}
    expected = settings_to_dict(Settings())
    for section, values in changed.items():
        expected[section] |= values
    assert settings_to_dict(settings) == expected


def test_later_files_win_and_overrides_win_over_all(tmp_path: Path) -> None:
    recipe = write(tmp_path, "train: {epochs: 1, batch_size: 1, patience: 1}\n", "recipe.yaml")
    config = write(tmp_path, "train: {epochs: 2, batch_size: 2}\n", "config.yaml")
    settings = load_settings([recipe, config], ["train.epochs=3"])
    assert (settings.train.epochs, settings.train.batch_size, settings.train.patience) == (3, 2, 1)
    assert load_settings([config, recipe]).train.epochs == 1


def test_of_two_overrides_the_later_wins() -> None:
    settings = load_settings(overrides=["lora.r=4", "train.epochs=2", "lora.r=16"])
    assert (settings.lora.r, settings.train.epochs) == (16, 2)


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "train:\nlora: {}\n", "---\n"])
def test_what_is_empty_means_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_settings([write(tmp_path, text)]) == Settings()


def test_an_empty_section_leaves_what_an_earlier_file_set(tmp_path: Path) -> None:
    recipe = write(tmp_path, "train: {epochs: 7}\n", "recipe.yaml")
    config = write(tmp_path, "train:\n  # epochs: 9\nlora: {r: 4}\n", "config.yaml")
    settings = load_settings([recipe, config])
    assert (settings.train.epochs, settings.lora.r) == (7, 4)


def test_an_override_fills_an_empty_section(tmp_path: Path) -> None:
    assert load_settings([write(tmp_path, "train:\n")], ["train.epochs=5"]).train.epochs == 5


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("5e-05", 5e-5), ("2.0e-3", 2e-3), ("0.001", 0.001), ("1", 1.0)]
)
def test_numbers_may_be_written_with_an_exponent(tmp_path: Path, text: str, value: float) -> None:
    file = write(tmp_path, f"train:\n  learning_rate: {text}\n")
    assert load_settings([file]).train.learning_rate == value
    assert load_settings(overrides=[f"train.learning_rate={text}"]).train.learning_rate == value


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("lora.target_modules=[q_proj, v_proj]", "lora", "target_modules", ["q_proj", "v_proj"]),
        ("lora.target_modules=.*proj", "lora", "target_modules", ".*proj"),
        ("lora.use_dora=true", "lora", "use_dora", True),
        ("data.cut=abstract", "data", "cut", "abstract"),
        ("data.cut=null", "data", "cut", None),
        ("data.cut=", "data", "cut", None),
        ("model.name=models/a=b", "model", "name", "models/a=b"),
        (" train.epochs = 5", "train", "epochs", 5),
        ("train.class_weights=balanced", "train", "class_weights", "balanced"),
        ("train.class_weights={yes it is: 2, other: 1}", "train", "class_weights", {"yes it is": 2.0, "other": 1.0}),
        ('train.class_weights={"0": 1, "1": 5.5}', "train", "class_weights", {"0": 1.0, "1": 5.5}),
        ("train.class_weights={0: 1, 1: 5.5}", "train", "class_weights", {"0": 1.0, "1": 5.5}),
    ],
)
def test_an_override_is_read_as_yaml(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load_settings(overrides=[override]), section), key) == value


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.epoch", "train.epochs"),
        ("lora.rank_alpha", "lora.alpha"),
        ("train.lerning_rate", "train.learning_rate"),
        ("trian.epochs", "train"),
        ("train.batchsize", "train.batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest_known(key: str, near: str) -> None:
    message = refusal(overrides=[f"{key}=3"])
    assert "there is no such setting; did you mean" in message
    assert f"did you mean {near}" in message
    assert "--set" in message


def test_a_key_far_from_all_lists_those_that_are_known(tmp_path: Path) -> None:
    file = write(tmp_path, "zzzzzz: 1\n")
    message = refusal([file])
    assert f"({file})" in message and "zzzzzz: there is no such setting" in message
    assert all(key in message for key in known_keys())


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "train: {epochs: 0, metric: f2, colour: red}\nlora: {r: many, dropout: 1.5}\n")
    message = refusal([file], ["data.max_length=2"])
    lines = message.splitlines()
    assert lines[0] == f"Settings ({file}, --set) are wrong:"
    assert sorted(line.split(":")[0].strip() for line in lines[1:]) == [
        "data.max_length",
        "lora.dropout",
        "lora.r",
        "train.colour",
        "train.epochs",
        "train.metric",
    ]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.epochs=0", ["train.epochs: found 0", "greater than or equal to 1"]),
        ("train.epochs=2.5", ["train.epochs: found 2.5", "integer"]),
        ("train.epochs=three", ["train.epochs: found 'three'", "integer"]),
        ("train.epochs=", ["train.epochs: found None"]),
        ("train.epochs=[3]", ["train.epochs: found [3]"]),
        ("train.learning_rate=0", ["train.learning_rate: found 0", "greater than 0"]),
        ("train.learning_rate=-1e-4", ["train.learning_rate: found", "greater than 0"]),
        ("train.learning_rate=.nan", ["train.learning_rate: found nan"]),
        ("train.learning_rate=.inf", ["train.learning_rate: found inf"]),
        ("train.learning_rate=1e-4x", ["train.learning_rate: found '1e-4x'", "number"]),
        ("train.schedule=cosin", ["train.schedule: found 'cosin'", "'cosine'", "'linear'", "'constant'"]),
        ("train.metric=F1", ["train.metric: found 'F1'", "'macro_f1'", "'log_loss'"]),
        ("train.seed=-1", ["train.seed: found -1"]),
        ("train.patience=-1", ["train.patience: found -1"]),
        ("train.class_weights=even", ["train.class_weights: found 'even'", "'balanced'"]),
        ("train.class_weights={a: 0}", ["train.class_weights: found {'a': 0}", "greater than 0"]),
        ("train.gradient_checkpointing=maybe", ["train.gradient_checkpointing: found 'maybe'"]),
        ("lora.dropout=1", ["lora.dropout: found 1", "less than 1"]),
        ("lora.r=0", ["lora.r: found 0"]),
        ("lora.alpha=0", ["lora.alpha: found 0"]),
        ("lora.target_modules=3", ["lora.target_modules: found 3"]),
        ("data.max_length=15", ["data.max_length: found 15", "16"]),
        ("model.dtype=float16", ["model.dtype: found 'float16'", "'bf16'", "'fp16'", "'fp32'"]),
        ("model.name=", ["model.name: found None"]),
        ("model.name=''", ["model.name: found ''"]),
        ("predict.batch_tokens=0", ["predict.batch_tokens: found 0"]),
        ("predict.merge=2", ["predict.merge: found 2"]),
    ],
)
def test_a_wrong_value_says_what_was_found_and_what_is_allowed(override: str, told: list[str]) -> None:
    message = refusal(overrides=[override])
    for part in told:
        assert part in message


def test_a_fault_with_several_allowed_types_is_one_line() -> None:
    assert len(refusal(overrides=["lora.target_modules=3"]).splitlines()) == 2


@pytest.mark.parametrize(
    "override",
    ["", "lora.r", "lora=3", "r=3", "=3", ".r=3", "lora.=3", "lora.r:16", "."],
)
def test_a_malformed_override_shows_the_form(override: str) -> None:
    message = refusal(overrides=[override])
    assert f"--set {override!r}: expected SECTION.KEY=VALUE, such as lora.r=16" in message


@pytest.mark.parametrize("value", ["[1, 2", "{a: ", "'open", "2024-13-45"])
def test_an_override_that_is_no_yaml_is_refused(value: str) -> None:
    message = refusal(overrides=[f"lora.r={value}"])
    assert message.startswith(f"--set {f'lora.r={value}'!r}: ") and "is not YAML" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"train: {epochs: [}\n", "is not YAML"),
        (b"train:\n  epochs: 3\n lora: 2\n", "is not YAML"),
        (b"a: b: c\n", "is not YAML"),
        (b"data: {cut: 2024-13-45}\n", "is not YAML"),
        (b"- train\n- lora\n", "found list"),
        (b"train.epochs=3\n", "found str"),
        (b"3\n", "found int"),
        (b"data: {cut: \xe9}\n", "cannot be read"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes(content)
    message = refusal([file])
    assert message.startswith(f"{file}: ") and told in message


@pytest.mark.parametrize("text", ["train: 3\n", "train: [epochs]\n", "train: epochs\n"])
def test_a_section_that_holds_no_keys_is_refused(tmp_path: Path, text: str) -> None:
    assert "  train: found " in refusal([write(tmp_path, text)])


@pytest.mark.parametrize("text", ["1: 2\n", "train: {1: 2}\n", "on: {r: 1}\n"])
def test_keys_that_are_no_text_are_refused(tmp_path: Path, text: str) -> None:
    assert "are wrong" in refusal([write(tmp_path, text)])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "missing.yaml: settings cannot be read" in refusal([tmp_path / "missing.yaml"])
    assert "settings cannot be read" in refusal([tmp_path])


def test_settings_do_not_change_once_they_are_loaded() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.train.epochs = 5  # type: ignore[misc]
    with pytest.raises(ValidationError):
        settings.train = settings.train  # type: ignore[misc]


def test_written_settings_load_as_they_were(tmp_path: Path) -> None:
    settings = load_settings(
        overrides=[
            "train.learning_rate=1e-5",
            'train.class_weights={"0": 1, "no": 2, 心: 3}',
            "lora.target_modules=[a, b]",
        ]
    )
    file = write(tmp_path, yaml.safe_dump(settings_to_dict(settings), allow_unicode=True))
    assert load_settings([file]) == settings


SWEEPS = yaml_files("configs/sweeps")


@pytest.mark.parametrize(
    "file",
    [file for file in yaml_files("configs") if file not in SWEEPS],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_every_config_that_ships_loads(file: Path) -> None:
    kind = EncoderSettings if file.name.startswith("encoder-") else Settings
    assert load_tree(kind, [file]) != kind()


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_sweep_that_ships_loads(file: Path) -> None:
    assert load_sweep(file, Settings()).settings


@pytest.mark.parametrize("file", yaml_files("prompts"), ids=lambda file: str(file.relative_to(ROOT)))
def test_every_task_that_ships_loads(file: Path) -> None:
    assert len(load_task(file).labels) >= 2


def test_the_configs_and_tasks_that_ship_were_found() -> None:
    assert ROOT / "configs" / "glm-nano.yaml" in yaml_files("configs")
    assert ROOT / "configs" / "sweeps" / "example.yaml" in SWEEPS
    assert ROOT / "prompts" / "medical_paper.yaml" in yaml_files("prompts")
