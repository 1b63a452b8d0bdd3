"""Finetuning with Lightning: training logic, data and callbacks.

The public names come from :mod:`.public`. The first access to one of them imports Lightning, so
code that only reads images does not need Lightning.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mctf_hf.extras import needed_by

if TYPE_CHECKING:
    from .public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name.startswith("__") or find_spec(f".{name}", __name__):  # a module, not yet imported
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needed_by(__name__):
        return getattr(import_module(".public", __name__), name)
