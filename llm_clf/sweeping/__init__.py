"""Sweeps: which settings are tried, and the trials that try them."""
