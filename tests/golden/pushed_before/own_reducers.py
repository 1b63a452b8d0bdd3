"""A method of reduction that somebody registered travels with the weights that use it.

Strangers load a model's classes from the modules that its ``auto_map`` names. For a model with a
reducer of its own this is a module that imports the reducer's first, which registers it.
"""

import ast
import importlib.util
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from .reducers import Reducer

# What a stranger's copy of these modules is imported by.
_FROM_LIBRARY = re.compile(r"^(\s*from )mctf_hf(\.\w+ import )", re.MULTILINE)


def own_code(
    reducer: type[Reducer] | None, classes: Mapping[str, str], modules: Collection[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Files that a model needs beside this library's, and the ``auto_map`` with which it loads.

    Args:
        reducer: of the model.
        classes: the model's ``auto_map`` with the modules of this library.
        modules: names of the modules of this library that go with the weights.

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
    text = source.read_text(encoding="utf-8")
    reason = _hindrance(reducer, source, text, modules)
    if reason:
        raise ValueError(f"{source.name}, which defines {reducer.__qualname__}: {reason}")
    entry = f"model_with_{source.stem}"
    lines = [f"from .{source.stem} import {reducer.__qualname__}"]
    lines += [f"from .{module} import {name}" for module, name in map(_split, classes.values())]
    lines = ['"""The classes of this model, after its own method is registered."""', "", *lines, ""]
    files = {source.name: _FROM_LIBRARY.sub(r"\1\2", text), f"{entry}.py": "\n".join(lines)}
    return files, {auto: f"{entry}.{_split(name)[1]}" for auto, name in classes.items()}


def _hindrance(
    reducer: type[Reducer], source: Path, text: str, modules: Collection[str]
) -> str | None:
    """Why a module cannot go with the weights; ``None`` if it can."""
    if "." in reducer.__qualname__:
        return "the class is to stand at the module's top level"
    if source.stem in modules and source.parent != Path(__file__).parent:
        return "a module of this library has that name"
    for line, package, module in _imports(text):
        if package == "mctf_hf" and module not in modules:
            return (
                f"{line!r} names no module that goes with the weights: these are "
                f"{', '.join(sorted(modules))}, as in from mctf_hf.fusion import Reduction"
            )
        if package == "" and module not in modules:
            return f"{line!r}, where all has to be in one file"
        if package and _is_neighbour(package, source):
            return f"{line!r} is a file beside it, where all has to be in one file"
    return None


def _imports(text: str) -> Iterator[tuple[str, str, str]]:
    """Each import as it is written, its package (empty for relative ones) and module within."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                package, _, module = name.name.partition(".")
                # import mctf_hf.fusion binds mctf_hf, which a stranger lacks
                yield ast.unparse(node), package, "" if package == "mctf_hf" else module
        elif isinstance(node, ast.ImportFrom):
            whole = node.module or ""
            package, _, module = ("", "", whole) if node.level else whole.partition(".")
            yield ast.unparse(node), package, module


def _is_neighbour(package: str, source: Path) -> bool:
    if package in sys.stdlib_module_names:
        return False
    found = importlib.util.find_spec(package)
    origin = None if found is None else found.origin
    return origin is not None and Path(origin).parent in (source.parent, source.parent / package)


def _split(reference: str) -> tuple[str, str]:
    module, _, name = reference.partition(".")
    return module, name
