"""Warnings that only one of several processes shows."""

import warnings

from torch import distributed


def warn_once(message: str) -> None:
    """Warn in process 0, or in the only process."""
    together = distributed.is_available() and distributed.is_initialized()
    if not together or distributed.get_rank() == 0:
        warnings.warn(message, stacklevel=3)
