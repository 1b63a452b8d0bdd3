"""Finetuning with Lightning: the training logic, the data and what surrounds them.

Its names are those of :mod:`.public`. Lightning is imported with the first of them, so that what
only reads images does without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mctf_hf.extras import needed_by

if TYPE_CHECKING:
    from .public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needed_by(__name__):
        return getattr(import_module(".public", __name__), name)
