"""The process of a tool: `python -m comparison.worker TASK FOLDER` does one task and writes what it measured."""

import sys
from importlib import import_module
from pathlib import Path

from comparison.meter import process_facts
from comparison.tasks import FUNCTIONS
from comparison.work import Work

if __name__ == "__main__":
    module, _, function = FUNCTIONS[sys.argv[1]].partition(":")
    work = Work(Path(sys.argv[2]))
    figures = getattr(import_module(module), function)(work)
    work.answer({**figures, **process_facts()})
