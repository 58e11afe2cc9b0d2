"""Runs a task in a process and an environment of its own; a tool that fails is a result too."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from comparison.tasks import OURS, environment_of
from comparison.work import Work

SCRIPTS = Path(__file__).resolve().parent.parent
ROOT = SCRIPTS.parent
# How often the memory of a process with its children is looked at: rarely enough to cost no speed. The peak of the
# process itself is the system's own count.
LOOK_SECONDS = 0.25
SHOWN = 4000


@dataclass(frozen=True, slots=True)
class Tools:
    """The interpreters of the environments."""

    pythons: dict[str, str]
    """By environment; one without an interpreter is not compared."""
    limit: float
    """Most seconds of a task."""

    def has(self, task: str) -> bool:
        """Whether there is an environment for a task."""
        return environment_of(task) in self.pythons

    def run(self, task: str, work: Work) -> dict[str, Any]:
        """Return what a task measured, or `error`, the end of what it said."""
        result = work.folder / "result.json"
        result.unlink(missing_ok=True)
        environment = environment_of(task)
        words = [self.pythons[environment], "-m", "comparison.worker", task, str(work.folder)]
        said = work.folder / "said.txt"
        with said.open("wb") as out:
            try:
                process = subprocess.Popen(
                    words, stdout=out, stderr=subprocess.STDOUT, env=_variables(work, environment), cwd=work.folder
                )
            except OSError as error:
                return {"error": str(error)}
            peak, ended = _watch(process, self.limit)
        if process.returncode or not result.is_file():
            reason = f"ended with {process.returncode}" if ended else f"was stopped after {self.limit:.0f} seconds"
            return {"error": f"{said.read_text(errors='replace')[-SHOWN:].strip()}\n{reason}".strip()}
        figures: dict[str, Any] = json.loads(result.read_text())
        return {**figures, "peak_bytes": max(peak, figures["peak_bytes"])}


def _variables(work: Work, environment: str) -> dict[str, str]:
    """Return the variables of a tool's process: it imports what it should, keeps its files here and asks no hub."""
    places = [SCRIPTS, ROOT] if environment == OURS else [SCRIPTS]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work.folder / "cache"),
        "WANDB_DISABLED": "true",
        # The Trainer of some tools would split its batches over all cards.
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
    }


def _watch(process: "subprocess.Popen[bytes]", limit: float) -> tuple[int, bool]:
    """Wait for a process; return the peak resident memory of it with its children, and whether it ended by itself."""
    peak, looks = 0, 0
    try:
        while True:
            try:
                process.wait(LOOK_SECONDS)
                return peak, True
            except subprocess.TimeoutExpired:
                looks += 1
                peak = max(peak, _resident(process.pid))
                if looks * LOOK_SECONDS >= limit:
                    return peak, False
    finally:
        _end(process)


def _resident(number: int) -> int:
    total = 0
    for process in _family(number):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def _family(number: int) -> list[Any]:
    try:
        parent = psutil.Process(number)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process that still runs, with its children."""
    if process.poll() is None:
        for member in _family(process.pid):
            try:
                member.kill()
            except psutil.Error:
                continue
        process.wait()


def last_line(error: str) -> str:
    """Return the line of an error that names it: the last but the process's own end."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return (lines[-2] if len(lines) > 1 else lines[-1])[:200]


def command(words: list[str]) -> dict[str, Any]:
    """Run a command of llm-clf in a process of its own; return nothing, or `error`."""
    done = subprocess.run(
        [sys.executable, "-m", "llm_clf", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return {"error": f"{done.stdout[-SHOWN:].strip()}\nended with {done.returncode}"} if done.returncode else {}
