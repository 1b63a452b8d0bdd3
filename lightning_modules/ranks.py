"""What processes that train together tell but once."""

import warnings

from torch import distributed


def warn_once(message: str) -> None:
    """Warn in the first of the processes, or in the only one."""
    together = distributed.is_available() and distributed.is_initialized()
    if not together or distributed.get_rank() == 0:
        warnings.warn(message, stacklevel=3)
