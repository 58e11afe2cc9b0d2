"""llm-clf beside other tools: what `scripts/benchmark.py` runs."""
