"""The releases of transformers that models of this library run on, whatever else they import."""

import re

import transformers

OLDEST = "5.10.1"


def _numbers(version: str) -> list[int]:
    """5.10.1 of ``5.10.1rc1`` or ``5.10.1.dev0``."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


if _numbers(transformers.__version__) < _numbers(OLDEST):
    raise ImportError(
        f"this model needs transformers {OLDEST} or newer, and {transformers.__version__} is "
        "installed: pip install --upgrade transformers"
    )
