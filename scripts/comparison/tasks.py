"""What is compared: a name for each tool and kind of work, and the function that does it in the tool's environment."""

TRAIN, PREDICT = "train", "predict"
OURS = "ours"
TASKS = {
    "ours: train": "comparison.ours:train",
    "TRL: train": "comparison.with_trl:train",
    "LLaMA-Factory: train": "comparison.with_llamafactory:train",
    "ours: predict": "comparison.ours:predict",
    "LLaMA-Factory: predict": "comparison.with_llamafactory:predict",
    "generate, one row: predict": "comparison.with_generate:one_row",
    "generate, 16 rows: predict": "comparison.with_generate:batched",
}
MATMUL = "matmul"
FUNCTIONS = {**TASKS, MATMUL: "comparison.ours:multiply"}
# Environments by the module of a function; all others run in the script's own.
ENVIRONMENTS = {"comparison.with_trl": "trl", "comparison.with_llamafactory": "llamafactory"}


def kind_of(task: str) -> str:
    """Return whether a task trains or predicts."""
    return task.rpartition(": ")[2]


def environment_of(task: str) -> str:
    """Return whose interpreter runs a task: `ours`, `trl` or `llamafactory`."""
    return ENVIRONMENTS.get(FUNCTIONS[task].partition(":")[0], OURS)
