"""`python -m llm_clf` is `llm-clf`."""

from llm_clf.cli import main

main()
