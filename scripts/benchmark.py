"""llm-clf beside other tools on this machine: speed and memory, and whether it learns the same.

python scripts/benchmark.py --trl PYTHON --llamafactory PYTHON [--rows FILE.csv] [--guideline 0,1500]
python scripts/benchmark.py --learning --trl PYTHON --count 80      losses and log-loss beside TRL's
python scripts/benchmark.py --grow --count 64                       how cost grows: rows, their length, labels, prompt
python scripts/benchmark.py --dropout --rows FILE.csv --seeds 5     dropout with and without a shared beginning

PYTHON is the interpreter of an environment of its own (`pip install trl peft accelerate datasets transformers`;
`pip install llamafactory jieba nltk rouge-chinese`); without one that tool is left out.

Every tool gets the same base, the same rows as the same tokens in the same steps of 16, LoRA r 8 and alpha 32 on all
linear layers without dropout, and the same number type; it runs in a process of its own, in turn with the others,
`--repeats` times. The time of training is that from the end of the first step to the end of the last, the time of
prediction that of all rows after a warm-up; loading is left out. Predictions use the base alone, which costs what a
base with a merged adapter costs. The device is the CUDA card where there is one. A tool that fails says so in its row.

Without --rows, speed is measured on words drawn at random, as many as titles with abstracts have, and learning on
data/papers.csv. Rows of a CSV file need the columns title, abstract and label (0 or 1). Tables go to standard output;
--out has all runs, machine, settings and versions, and is written after every run.
"""

import argparse
import platform
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from comparison.dropout import Study, compare_dropout  # noqa: E402
from comparison.growth import compare_growth  # noqa: E402
from comparison.inputs import BASES, PAPERS, make_rows, make_texts, prepare_base, read_texts  # noqa: E402
from comparison.learning import compare_learning  # noqa: E402
from comparison.processes import Tools  # noqa: E402
from comparison.report import Report  # noqa: E402
from comparison.speed import Bench, compare_speed  # noqa: E402
from comparison.tasks import TASKS  # noqa: E402
from comparison.work import STEP_ROWS, Job, Work  # noqa: E402

import llm_clf  # noqa: E402
from llm_clf.config import DEFAULT_BASE  # noqa: E402
from llm_clf.models.bases import prepare_libraries  # noqa: E402
from llm_clf.runs import commit  # noqa: E402

# Small micro-batches stay in the processor's caches, and so small a base learns with a higher rate.
NANO = ("train.micro_batch_tokens=2048",)
NANO_RATE = 2e-3
PEERS = ("trl", "llamafactory")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--learning", action="store_true", help="compare what is learned, on glm-nano")
    parts.add_argument("--grow", action="store_true", help="measure how the cost of ours grows")
    parts.add_argument("--dropout", action="store_true", help="compare dropout on and off on the shared beginning")
    parser.add_argument("--rows", type=Path, metavar="FILE.csv")
    parser.add_argument("--count", type=int, default=256, help="rows; all but --dropout and validation take so many")
    parser.add_argument("--peer-count", type=int, help="rows for all tools but ours: the first so many of the same")
    parser.add_argument("--guideline", default="0", help="tokens of prompts with a guideline, such as 0,1500; 0: none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--base", choices=BASES, default="100m", help="a random base of a size, or glm-nano")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME", help="; ".join(TASKS))
    parser.add_argument("--set", action="append", default=[], help="a setting of ours, such as speed.packing=false")
    parser.add_argument("--seeds", type=int, default=3, help="of --learning and --dropout")
    parser.add_argument("--epochs", type=int, default=1, help="of --learning and --dropout")
    parser.add_argument(
        "--keep", type=Path, default=ROOT / "output" / "benchmark", help="where --dropout keeps its runs"
    )
    parser.add_argument("--limit", type=float, default=3600, help="most seconds of one run of a tool")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", metavar="PYTHON")
    given = parser.parse_args(words)
    given.guideline = [int(tokens) for tokens in given.guideline.split(",")]
    given.peer_count = min(given.peer_count or given.count, given.count)
    for name, value in (("--count", given.count), ("--peer-count", given.peer_count)):
        if value % STEP_ROWS or value < 2 * STEP_ROWS:
            parser.error(f"{name} {value}: must be a multiple of {STEP_ROWS}, of which there are two or more")
    return given


def main(words: Sequence[str] | None = None) -> None:
    """Compare."""
    given = parse(words)
    # Ended from outside, it still ends the tool that runs and removes its folder.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    prepare_libraries()
    report = Report(given.out, machine_facts(), {name: _plain(value) for name, value in vars(given).items()})
    if given.dropout:
        study = Study(given.rows or PAPERS, given.keep, given.seeds, given.epochs, tuple(given.set))
        compare_dropout(study, report)
        return
    with tempfile.TemporaryDirectory() as place:
        _compare(given, Work(Path(place)), report)


def _compare(given: argparse.Namespace, work: Work, report: Report) -> None:
    """Do what needs a base in a folder."""
    base = DEFAULT_BASE if given.learning else given.base
    overrides = (*(NANO if base == DEFAULT_BASE else ()), *given.set)
    pythons = {peer: getattr(given, peer) for peer in PEERS if getattr(given, peer)}
    bench = Bench(
        work,
        prepare_base(work, base, given.dtype),
        Tools({"ours": sys.executable, **pythons}, given.limit),
        Job([], given.dtype, overrides=overrides),
        given.repeats,
        report,
    )
    if given.grow:
        compare_growth(bench, given.count)
    elif given.learning:
        rows = make_rows(read_texts(given.rows or PAPERS), work.base, given.guideline[0])
        train, valid = rows[: given.count], rows[given.count : 2 * given.count]
        compare_learning(bench, train, valid, given.seeds, given.epochs, NANO_RATE)
    else:
        texts = read_texts(given.rows)[: given.count] if given.rows else make_texts(given.count)
        tasks = [task for task in given.only if bench.tools.has(task)]
        for guideline in given.guideline:
            rows = make_rows(texts, work.base, guideline)
            compare_speed(bench, rows, tasks, peer_count=given.peer_count, guideline=guideline)


def machine_facts() -> dict[str, Any]:
    """Return what doctor knows of the machine, and which commit is measured."""
    facts = llm_clf.doctor()
    kept = {name: facts[name] for name in ("platform", "cpu", "memory", "torch", "cuda")}
    return {**kept, "processor": platform.processor(), "commit": commit()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
