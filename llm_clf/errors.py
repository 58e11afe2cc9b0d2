"""Errors that a person can mend. The command line prints them and exits with 2; anything else is a bug.

LlmClfError
├── ConfigError     a setting or an argument is wrong
│   └── MemoryLimitError    these settings need more memory than there is
├── DataError       rows, prompts or a predictions file are wrong
├── TemplateError   a task file is wrong
├── LabelError      a label is not one of the task's
├── ArtifactError   a run folder, an adapter or a base is missing or does not fit
└── TrainingError   training cannot go on (the loss is not a number)

A message says where, what was found, what is allowed and what to do.
"""


class LlmClfError(Exception):
    """Base of all errors that are the input's fault."""


class ConfigError(LlmClfError):
    """A setting or an argument is wrong."""


class MemoryLimitError(ConfigError):
    """These settings need more memory than there is."""


class DataError(LlmClfError):
    """Rows, prompts or a predictions file are wrong."""


class TemplateError(LlmClfError):
    """A task file is wrong."""


class LabelError(LlmClfError):
    """A label is not one of the task's."""


class ArtifactError(LlmClfError):
    """A run folder, an adapter or a base is missing or does not fit."""


class TrainingError(LlmClfError):
    """Training cannot go on."""
