"""Rows to prompts: reading tables, tasks and their templates, duplicates, splits."""
