"""The wheel: what it carries, and that it works outside the checkout. The base that ships."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llm_clf.config import ModelSettings
from llm_clf.errors import ArtifactError
from llm_clf.models.bases import SHIPPED, base_identity, find_base, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_wheel_carries_tasks_settings_and_the_base(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    for name in (
        "prompts/medical_paper.yaml",
        "configs/glm-nano.yaml",
        "models/glm-nano/model.safetensors",
        "evaluation/report.css",
        "evaluation/report.js",
        "py.typed",
    ):
        assert f"llm_clf/{name}" in names
    assert not any(name.startswith(("tests/", "data/", "output/")) for name in names)


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path)
    program = (
        "from llm_clf.prompting.tasks import load_task, shipped_tasks; from llm_clf.commands.training_settings import "
        "resolve_settings; from llm_clf.config import Settings; import llm_clf; print(llm_clf.__file__, sorted(shipped_tasks())); resolve_settings(Settings, None, None, [])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert str(tmp_path) in done.stdout and "medical_paper" in done.stdout


def test_the_base_that_ships_is_small_and_documented() -> None:
    size = sum(file.stat().st_size for file in SHIPPED.iterdir())
    assert size <= 30_000_000
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    config = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "glm" and "CC0" in card and "CC-BY" in card and "loss" in card
    assert find_base("glm-nano") == str(SHIPPED) and len(base_identity("glm-nano")["hash"]) == 64


def test_a_base_on_a_hub_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        return f"/cache/models--org--name/snapshots/0123abc/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert base_identity("org/name") == {"name": "org/name", "hash": "0123abc"}
    assert asked == [("org/name", "config.json")]


def test_a_base_that_cannot_be_reached_is_refused_by_name() -> None:
    with pytest.raises(ArtifactError, match="org/absent: the config cannot be loaded"):
        base_identity("org/absent")


def test_the_base_that_ships_takes_any_text() -> None:
    tokenizer = load_tokenizer(ModelSettings(name="glm-nano"))
    for text in ("Plain words, 1 and 0.", "中文 и русский", "emoji 🙂 \x00 \ud7ff", "<|endoftext|>"):
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.eos_token_id not in ids


@pytest.mark.slow
def test_the_main_job_on_the_rows_that_ship(tmp_path: Path) -> None:
    """The commands of scripts/quickstart, with fewer epochs."""
    for words in (
        ["build-prompts", ROOT / "data" / "papers.csv", "--task", "medical_paper", "--out", "prompts"],
        ["finetune", "prompts", "--out", "run", "--set", "train.epochs=1"],
        ["predict", "run", ROOT / "data" / "papers-new.csv", "--out", "new.csv"],
        ["predict", "run", "prompts/test.jsonl", "--out", "test.parquet"],
        ["evaluate", "test.parquet", "--out", "scores"],
    ):
        subprocess.run(
            [sys.executable, "-m", "llm_clf", *map(str, words)], cwd=tmp_path, check=True, capture_output=True
        )
    assert len((tmp_path / "new.csv").read_text(encoding="utf-8").splitlines()) == 21
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert metrics["rows"] == 16 and metrics["status"] == {"ok": 16}


def test_a_library_s_own_error_over_ctrl_c_is_an_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm_clf import cli

    def broken_by_ctrl_c() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("half a module") from error

    monkeypatch.setattr(cli, "app", broken_by_ctrl_c)
    monkeypatch.setattr("sys.argv", ["llm-clf", "finetune"])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 130
    assert capsys.readouterr().err == "Interrupted; the same command with --resume goes on.\n"

    def broken() -> None:
        raise ImportError("half a module")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ImportError):
        cli.main()
