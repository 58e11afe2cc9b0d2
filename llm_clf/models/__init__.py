"""Bases, tokenizers and adapters: finding, loading, identifying them."""
