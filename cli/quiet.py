"""Hides messages of other libraries that users cannot act on."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# Loggers, and the beginning of the lines to hide.
LINES = {
    "lightning.pytorch.utilities.rank_zero": "💡 Tip",  # advertises another product
    "huggingface_hub.repocard": "Repo card metadata block was not found",
    "transformers.configuration_utils": "You passed `num_labels=",  # which was intended
}
# Warnings of one library about another, or about something that this library handles.
WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "LightningCLI's args parameter is intended",
    "Experiment logs directory .* is not empty",
    "Checkpoint directory .* exists and is not empty",
    r"Image size \(\d+ pixels\) exceeds limit",  # such images are refused
)
# Hides the memory profiler's start and stop messages; torch reads this variable at import.
PROFILER_LOG_LEVEL = {"KINETO_LOG_LEVEL": "99"}


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the messages in ``LINES`` and ``WARNINGS``, and the profiler's, in a ``with`` block."""
    with ExitStack() as undo:
        for name, beginning in LINES.items():
            logger, kept = logging.getLogger(name), _Without(beginning)
            logger.addFilter(kept)
            undo.callback(logger.removeFilter, kept)
        undo.enter_context(warnings.catch_warnings())
        for message in WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for name, value in PROFILER_LOG_LEVEL.items():
            if name not in os.environ:
                os.environ[name] = value
                undo.callback(os.environ.pop, name, None)
        yield


class _Without(logging.Filter):
    """Drops the log records that begin with a text."""

    def __init__(self, beginning: str):
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)
