"""Parsers of commands, their given options, and errors for options without effect."""

import inspect
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .parsing import ArgumentParser


def parser_of(
    name: str, run: Callable[..., Any], skip: Collection[str] = (), **words: Mapping[str, Any]
) -> ArgumentParser:
    """Create the parser of a command whose options are the arguments of a function.

    Args:
        name: name of the command.
        run: the function; its docstring describes the command.
        skip: arguments of the function that are not options.
        words: positional arguments by name, with their settings for ``add_argument``.
    """
    described = inspect.cleandoc(run.__doc__ or "").partition("\n\nArgs:")[0]
    parser = ArgumentParser(prog=f"mctf {name}", description=described)
    for word, settings in words.items():
        parser.add_argument(word, **settings)
    parser.add_function_arguments(run, as_group=False, skip={*words, *skip})
    return parser


def read(parser: ArgumentParser, args: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """The settings of a command, and the names of those given on the command line."""
    settings = parser.parse_args(list(args)).as_dict()
    return settings, set(parser.parse_args(list(args), defaults=False).as_dict())


def refuse(given: Collection[str], options: Collection[str], reason: str) -> None:
    """Refuse options that contradict others or have no effect.

    Args:
        given: names of the settings given on the command line.
        options: names of the settings to refuse.
        reason: text after "is not allowed".

    Raises:
        ValueError: if a setting is in both.
    """
    found = sorted(set(given) & set(options))
    if found:
        raise ValueError(f"{', '.join(map(option, found))} is not allowed {reason}")


def option(name: str) -> str:
    """The option of a setting: ``--dry-run`` for ``dry_run``."""
    return f"--{name.replace('_', '-')}"


def command(*words: object, **options: object) -> str:
    """A command line of ``mctf`` to copy, quoted for a shell.

    Args:
        options: values of options by name; true is a switch, false and ``None`` are left out.
    """
    line = ["mctf", *map(str, words)]
    for name, value in options.items():
        if value is not None and value is not False:
            line += [option(name)] if value is True else [option(name), str(value)]
    return shlex.join(line)
