import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "llm_clf"
ROOMS = (
    "prompting",
    "models",
    "engine",
    "decisions",
    "evaluation",
    "baselines",
    "sweeping",
    "sources",
    "conversation",
    "commands",
    "cli",
)
SHARED = ("config", "config_loading", "errors", "files", "console", "runs")
FOR_PROMPTING = ("config", "errors", "files", "console")
BETWEEN_SHARED = {
    "errors": (),
    "console": (),
    "files": ("errors",),
    "config": (),
    "config_loading": ("errors", "config"),
    "runs": ("errors", "files", "config", "config_loading", "console", "prompting"),
}
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "optuna")

RUN_LIGHT_COMMANDS = """
import sys
from llm_clf.cli import app

def run(*words):
    app(list(words), standalone_mode=False)

with open("rows.csv", "w", encoding="utf-8") as rows:
    rows.write("uuid,title,abstract,label\\n")
    rows.writelines(f"{n},title {n},text,{n % 2}\\n" for n in range(20))
with open("predictions.csv", "w", encoding="utf-8") as rows:
    rows.write("id,label,prob_0,prob_1,status,cut,gold\\n")
    rows.writelines(f"{n},{n % 2},{1 - n % 2},{n % 2},ok,false,{n % 2}\\n" for n in range(20))
run("build-prompts", "rows.csv", "--task", "medical_paper", "--out", "prompts")
run("evaluate", "predictions.csv", "--out", "report")
run("compare", "predictions.csv", "predictions.csv", "--out", "comparison")
print("loaded:", *sorted(set(sys.modules) & set(sys.argv[1:])))
"""


def modules() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file.name not in ("__main__.py",)]


def room_of(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(source: str) -> set[str]:
    """The rooms that a module imports, wherever in it the import stands."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from llm_clf import runs` names the room after the import.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("llm_clf.")}
    return rooms


def allowed_rooms(room: str) -> set[str]:
    if room in SHARED:
        return {room, *BETWEEN_SHARED[room]}
    earlier = ROOMS[: ROOMS.index(room) + 1]
    return {*earlier, *(FOR_PROMPTING if room == "prompting" else SHARED)}


def in_fresh_python(code: str, folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=folder, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_command_line_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, llm_clf, llm_clf.cli; print('loaded:', *sorted(set(sys.modules) & set(sys.argv[1:])))"
    assert in_fresh_python(code, tmp_path, *HEAVY, "numpy", "sklearn", "pyarrow", "pydantic") == "loaded:\n"


def test_build_prompts_evaluate_and_compare_load_no_torch(tmp_path: Path) -> None:
    shown = in_fresh_python(RUN_LIGHT_COMMANDS, tmp_path, *HEAVY)
    assert shown.splitlines()[-1] == "loaded:"
    assert (tmp_path / "prompts" / "train.jsonl").is_file() and (tmp_path / "report" / "metrics.json").is_file()


def test_the_functions_of_the_package_load_no_torch_by_being_named(tmp_path: Path) -> None:
    code = (
        "import sys, llm_clf\n"
        "for name in llm_clf.__all__: assert callable(getattr(llm_clf, name)), name\n"
        "print('loaded:', *sorted(set(sys.modules) & set(sys.argv[1:])))"
    )
    assert in_fresh_python(code, tmp_path, *HEAVY) == "loaded:\n"


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import llm_clf

    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = llm_clf.no_such_name


def test_help_answers_in_half_a_second() -> None:
    script = Path(sys.executable).with_name("llm-clf")
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60, check=False)
        times.append(time.perf_counter() - started)
        assert done.returncode == 0
        assert all(command in done.stdout for command in ("build-prompts", "finetune", "predict", "evaluate"))
    assert min(times) < 0.5


def test_every_module_is_in_a_known_room() -> None:
    assert {room_of(file) for file in modules()} <= {*ROOMS, *SHARED, "__init__"}
    assert {*ROOMS, *SHARED} <= {room_of(file) for file in modules()}


@pytest.mark.parametrize(
    "file",
    [file for file in modules() if room_of(file) != "__init__"],
    ids=lambda file: str(file.relative_to(PACKAGE)),
)
def test_a_room_imports_no_later_one(file: Path) -> None:
    assert imported_rooms(file.read_text(encoding="utf-8")) <= allowed_rooms(room_of(file))


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("from llm_clf.engine.tokens import encode", {"engine"}),
        ("import llm_clf.models.bases as bases", {"models"}),
        ("from llm_clf import runs, files", {"runs", "files"}),
        ("def f():\n    from llm_clf.commands import predict", {"commands"}),
        ("import torch\nfrom typing import Any", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, rooms: set[str]) -> None:
    assert imported_rooms(source) == rooms
