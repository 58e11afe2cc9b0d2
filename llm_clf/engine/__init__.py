"""Tokens, batches, label scores and the training loop."""
