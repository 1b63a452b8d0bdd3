"""Saving the module of a custom reducer with the weights that use it.

Without this library, a model's classes are loaded from the modules in its ``auto_map``. For a model
with a custom reducer this is a module that first imports the reducer's module, which registers it.
"""

import ast
import functools
import importlib.util
import keyword
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

from .reducers import REDUCERS, Reducer

_LIBRARY = "mctf_hf"
_HERE = Path(__file__).parent
# Program that loads the module in a process without this library.
_LOAD = f"""
import importlib, sys, types
for name in ({_LIBRARY!r}, "lightning_modules", "cli", "mctf_cli"):
    sys.modules[name] = None
package = sys.modules["model"] = types.ModuleType("model")
*package.__path__, module, reduction = sys.argv[1:]
importlib.import_module(f"model.{{module}}")
if reduction not in importlib.import_module("model.reducers").REDUCERS:
    sys.exit(f"it registers no {{reduction!r}}")
"""
_SECONDS = 300.0  # time limit of that process, which imports torch


def own_code(
    reducer: type[Reducer] | None, classes: Mapping[str, str], modules: Collection[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Files that a model needs besides this library's modules, and the ``auto_map`` that loads it.

    As a test, a separate process without this library loads the reducer's module.

    Args:
        reducer: reducer class of the model.
        classes: the model's ``auto_map`` with the modules of this library.
        modules: names of the modules of this library that are saved with the weights.

    Returns:
        File contents by name, empty for a reducer of this library; and the ``auto_map``.

    Raises:
        ValueError: for a reducer whose module does not work as a file beside these modules.
    """
    if reducer is None or reducer.__module__ == Reducer.__module__:
        return {}, dict(classes)
    source = Path(getattr(sys.modules.get(reducer.__module__), "__file__", None) or "")
    if reducer.__module__ == "__main__" or source.suffix != ".py":
        raise ValueError(
            f"{reducer.__qualname__} is defined in {reducer.__module__}, which cannot go with the "
            "weights: put it into a module of its own, a .py file, and import that"
        )
    module = _module_name(reducer.__module__.rpartition(".")[2] or source.stem)
    try:
        text = source.read_text(encoding="utf-8-sig")
        reason = _hindrance(reducer, source, text, module, modules)
        text = text if reason else _beside_the_library(text)
        (name,) = [name for name, known in REDUCERS.items() if known is reducer][:1] or [""]
        reason = reason or _stranger(text, module, name)
    except (SyntaxError, UnicodeDecodeError) as error:
        reason = f"it is no Python in UTF-8 ({error})"
    if reason:
        raise ValueError(f"{source.name}, which defines {reducer.__qualname__}: {reason}")
    entry = f"model_with_{module}"
    lines = ["from .dependencies import OLDEST", f"from .{module} import {reducer.__qualname__}"]
    lines += [f"from .{module} import {name}" for module, name in map(_split, classes.values())]
    lines = ['"""The classes of this model, after its own method is registered."""', "", *lines, ""]
    files = {f"{module}.py": text, f"{entry}.py": "\n".join(lines)}
    return files, {auto: f"{entry}.{_split(name)[1]}" for auto, name in classes.items()}


def _module_name(name: str) -> str:
    """A name that a module can be imported by: ``by-norm`` becomes ``by_norm``."""
    name = re.sub(r"\W", "_", name)
    return f"_{name}" if keyword.iskeyword(name) or not name.isidentifier() else name


def _hindrance(
    reducer: type[Reducer], source: Path, text: str, module: str, modules: Collection[str]
) -> str | None:
    """Reason why a module cannot be saved with the weights; ``None`` if it can."""
    if "." in reducer.__qualname__:
        return "the class is to stand at the module's top level"
    travelled = source.parent == _HERE
    if not travelled and {module, source.stem} & set(modules):
        return "a module of this library has that name"
    for line, package, inner in _imports(text):
        if package == _LIBRARY and inner not in modules:
            return (
                f"{line!r} names no module that goes with the weights: these are "
                f"{', '.join(sorted(modules))}, as in from mctf_hf.fusion import Reduction"
            )
        if package == "" and not (travelled and inner in modules):
            return f"{line!r}, where all has to be in one file"
        if package == reducer.__module__.partition(".")[0] or _is_neighbour(package, source):
            return f"{line!r} is a file beside it, where all has to be in one file"
    return None


def _imports(text: str) -> Iterator[tuple[str, str, str]]:
    """Each import: its source text, its package (empty for relative imports) and its module."""
    for node in ast.walk(ast.parse(text)):
        line = ast.unparse(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ""
        if isinstance(node, ast.Import):
            for name in node.names:
                package, _, module = name.name.partition(".")
                # import mctf_hf.fusion binds mctf_hf, which others may not have
                bound = package == _LIBRARY and name.asname is None
                yield line, package, "" if bound else module
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield line, "", "." * (node.level - 1) + (node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.module == _LIBRARY:
            yield from ((line, _LIBRARY, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package, _, module = str(node.module).partition(".")
            yield line, package, module


def _is_neighbour(package: str, source: Path) -> bool:
    """Whether a package is a file of the user and not an installed package."""
    if not package or package == _LIBRARY or package in sys.stdlib_module_names:
        return False
    found = importlib.util.find_spec(package)
    if found is None:
        return False
    folder = Path(found.origin).parent if found.origin else None
    beside = folder in (source.parent, source.parent / package)
    return beside or package not in packages_distributions()


def _beside_the_library(text: str) -> str:
    """Source text in which imports from this library are relative; the rest is unchanged."""
    lines = text.encode().splitlines(keepends=True)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        new = _relative(node)
        if new is not None:
            first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
            before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
            lines[first : last + 1] = [before + new.encode() + after]
    return b"".join(lines).decode()


def _relative(node: ast.stmt) -> str | None:
    """Relative form of an import from this library; ``None`` for any other statement."""
    if isinstance(node, ast.ImportFrom) and not node.level:
        package, _, module = str(node.module).partition(".")
        if package == _LIBRARY:
            return ast.unparse(ast.ImportFrom(module or None, node.names, level=1))
    elif isinstance(node, ast.Import):
        split = [(name.name.partition("."), name) for name in node.names]
        if any(package == _LIBRARY for (package, _, _), _ in split):
            return "; ".join(
                f"from . import {module} as {name.asname}"
                if package == _LIBRARY
                else ast.unparse(ast.Import([name]))
                for (package, _, module), name in split
            )
    return None


@functools.cache
def _stranger(text: str, module: str, reduction: str) -> str | None:
    """Reason why a process without this library cannot load the module; ``None`` if it can."""
    with tempfile.TemporaryDirectory(prefix="mctf-") as folder:
        place = Path(folder, "model")
        place.mkdir()
        (place / f"{module}.py").write_text(text, encoding="utf-8")
        words = [str(place), str(_HERE), module, reduction]
        try:
            done = subprocess.run(
                [sys.executable, "-c", _LOAD, *words],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"importing it takes more than {_SECONDS:.0f} seconds"
    if not done.returncode:
        return None
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return f"where this library is not installed, it cannot be loaded ({said[-1]})"


def _split(reference: str) -> tuple[str, str]:
    module, _, name = reference.partition(".")
    return module, name
