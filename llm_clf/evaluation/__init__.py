"""Metrics of decisions against gold labels."""
