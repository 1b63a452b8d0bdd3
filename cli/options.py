"""Options of a command line: what was given, and which of it has no effect."""

import inspect
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .parsing import ArgumentParser


def parser_of(
    name: str, run: Callable[..., Any], skip: Collection[str] = (), **words: Mapping[str, Any]
) -> ArgumentParser:
    """The parser of a command, whose options are the arguments of a function.

    Args:
        name: of the command.
        run: the function, whose docstring describes the command.
        skip: its arguments that are no options.
        words: its arguments that are words without an option's name: what ``add_argument`` takes.
    """
    described = inspect.cleandoc(run.__doc__ or "").partition("\n\nArgs:")[0]
    parser = ArgumentParser(prog=f"mctf {name}", description=described)
    for word, settings in words.items():
        parser.add_argument(word, **settings)
    parser.add_function_arguments(run, as_group=False, skip={*words, *skip})
    return parser


def read(parser: ArgumentParser, args: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """The settings of a command, and the names of those that the command line gives."""
    settings = parser.parse_args(list(args)).as_dict()
    return settings, set(parser.parse_args(list(args), defaults=False).as_dict())


def refuse(given: Collection[str], options: Collection[str], reason: str) -> None:
    """Refuse options that the command line gives.

    Args:
        given: names of the settings that it gives.
        options: names of those that contradict others, or would have no effect.
        reason: what follows "is not allowed".

    Raises:
        ValueError: for the options that are both.
    """
    found = sorted(set(given) & set(options))
    if found:
        raise ValueError(f"{', '.join(map(option, found))} is not allowed {reason}")


def option(name: str) -> str:
    """A setting as the command line has it: ``dry_run`` is ``--dry-run``."""
    return f"--{name.replace('_', '-')}"


def command(*words: object, **options: object) -> str:
    """A command line of ``mctf`` to copy: words and options, quoted for a shell.

    Args:
        options: by name; true is a switch, false and ``None`` are left out.
    """
    line = ["mctf", *map(str, words)]
    for name, value in options.items():
        if value is not None and value is not False:
            line += [option(name)] if value is True else [option(name), str(value)]
    return shlex.join(line)
