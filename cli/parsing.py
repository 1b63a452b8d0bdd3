"""The parser of commands, by jsonargparse, with short error messages."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jsonargparse

from .argparse_private import option_strings
from .commands import MISUSED, nearest
from .yaml_texts import check_words, guard

guard()


class BriefErrors:
    """Mixin for a parser: errors show the problem and the closest valid word, not the usage."""

    def parse_args(self: Any, args: Any = None, *rest: Any, **options: Any) -> Any:
        try:
            check_words(sys.argv[1:] if args is None else args)
        except ValueError as error:
            self.error(str(error), error)
        return super().parse_args(args, *rest, **options)  # type: ignore[misc]

    def error(self: Any, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error or os.environ.get("MCTF_DEBUG"):
            raise argparse.ArgumentError(None, message) from ex
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        print(f"{command}: error: {brief(message, option_strings(parser))}", file=sys.stderr)
        print(f"({command} {getattr(parser, 'whole_help', '--help')} shows all)", file=sys.stderr)
        sys.exit(MISUSED)


def brief(message: str, known: Sequence[str]) -> str:
    """Shorten an error of jsonargparse to one line.

    Args:
        known: existing options; the one closest to an unknown option is suggested.
    """
    unknown = re.match(r"unrecognized arguments: (-\S+)|.* does not accept option '(.+)'$", message)
    if unknown:
        option = (unknown[1] or f"--{unknown[2]}").partition("=")[0]
        near = nearest(option, known)
        return f"there is no option {option}" + (f": did you mean {near}?" if near else "")
    setting = re.match(r'Parser key "(.+?)":', message)
    value = re.search(r"(?:Given|Got) value: (.*)", message)
    if not setting or not value:
        return " ".join(message.split())
    causes = re.findall(r"Problem with given class_path '(.+)':\n\s+(.*)", message)
    if causes:
        return f"{setting[1]}: " + "; ".join(f"{name}: {cause}" for name, cause in causes)
    kinds = re.findall(r"Expected an? (?!path but)(.+?)(?:\. Got value.*|: .*)?$", message, re.M)
    named = [re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", kind) for kind in kinds]
    allowed = " or ".join(named).replace("NoneType", "null")
    return f"{setting[1]}={value[1]} is not allowed: it must be {allowed}"


class ArgumentParser(BriefErrors, jsonargparse.ArgumentParser):
    """The parser of a command."""
