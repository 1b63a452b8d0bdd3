"""A method of reduction that somebody registered travels with the weights that use it.

Strangers load a model's classes from the modules that its ``auto_map`` names. For a model with a
reducer of its own this is a module that imports the reducer's first, which registers it.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports

from .reducers import Reducer

# What a stranger's copy of these modules is imported by.
_FROM_LIBRARY = re.compile(r"^(\s*from )mctf_hf(\.\w+ import )", re.MULTILINE)
_LIBRARY = re.compile(r"^\s*(?:import|from) mctf_hf\b.*", re.MULTILINE)


def own_code(
    reducer: type[Reducer] | None, classes: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Files that a model needs beside this library's, and the ``auto_map`` with which it loads.

    Args:
        reducer: of the model.
        classes: the model's ``auto_map`` with the modules of this library.

    Returns:
        Contents by file name, none for a reducer of this library; the ``auto_map``.

    Raises:
        ValueError: for a reducer whose module does not work as a file beside this library's.
    """
    if reducer is None or reducer.__module__ == Reducer.__module__:
        return {}, dict(classes)
    file = getattr(sys.modules[reducer.__module__], "__file__", None)
    if reducer.__module__ == "__main__" or file is None:
        raise ValueError(
            f"{reducer.__qualname__} is defined in {reducer.__module__}, which cannot go with the "
            "weights: put it into a module of its own and import that"
        )
    source = Path(file)
    library = {path.stem for path in Path(__file__).parent.glob("*.py")}
    text = _FROM_LIBRARY.sub(r"\1\2", source.read_text(encoding="utf-8"))
    imported = set(get_relative_imports(source)) - library
    taken = source.stem in library and source.parent != Path(__file__).parent
    whole = _LIBRARY.search(text)
    if imported or taken or whole:
        reason = (
            f"{whole[0].strip()!r} has to name a module, as in from mctf_hf.fusion import Reduction"
            if whole
            else "a module of this library has that name"
            if taken
            else f"it imports {', '.join(sorted(imported))}, where all has to be in one file"
        )
        raise ValueError(f"{source.name}, which defines {reducer.__qualname__}: {reason}")
    entry = f"model_with_{source.stem}"
    lines = [f"from .{source.stem} import {reducer.__qualname__}"]
    lines += [f"from .{module} import {name}" for module, name in map(_split, classes.values())]
    lines = ['"""The classes of this model, after its own method is registered."""', "", *lines, ""]
    files = {source.name: text, f"{entry}.py": "\n".join(lines)}
    return files, {auto: f"{entry}.{_split(name)[1]}" for auto, name in classes.items()}


def _split(reference: str) -> tuple[str, str]:
    module, _, name = reference.partition(".")
    return module, name
