"""Turn a causal language model into a text classifier with LoRA."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_clf.commands.baseline_encoder import baseline_encoder
    from llm_clf.commands.baseline_tfidf import baseline_tfidf
    from llm_clf.commands.build_prompts import build_prompts
    from llm_clf.commands.chat import chat
    from llm_clf.commands.compare import compare
    from llm_clf.commands.doctor import doctor
    from llm_clf.commands.ensemble import ensemble
    from llm_clf.commands.evaluate import evaluate
    from llm_clf.commands.finetune import finetune
    from llm_clf.commands.import_adapter import import_adapter
    from llm_clf.commands.import_chatglm import import_chatglm
    from llm_clf.commands.leaderboard import leaderboard
    from llm_clf.commands.merge import merge
    from llm_clf.commands.predict import predict
    from llm_clf.commands.verify import verify
    from llm_clf.errors import LlmClfError

__all__ = [
    "LlmClfError",
    "baseline_encoder",
    "baseline_tfidf",
    "build_prompts",
    "chat",
    "compare",
    "doctor",
    "ensemble",
    "evaluate",
    "finetune",
    "import_adapter",
    "import_chatglm",
    "leaderboard",
    "merge",
    "predict",
    "verify",
]
__version__ = "0.1.0"

_HOMES = {"LlmClfError": "llm_clf.errors"}


def __getattr__(name: str) -> Any:
    """Import a command when it is first asked for: none costs anything before."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, f"llm_clf.commands.{name}")), name)
