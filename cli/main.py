"""The console command ``mctf``: one command line for everything the library does."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from jsonargparse import auto_cli

from cli.demo import demo
from cli.finetuning import finetuning

# Commands beside those of Lightning: each is a function whose arguments are its options.
COMMANDS: dict[str, Callable[..., Any]] = {"demo": demo}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``mctf`` with the given words, or those of the command line.

    What a user can mend (a setting, a file, a dataset) is reported by its message alone, with exit
    status 1; ``MCTF_DEBUG=1`` shows where it was raised.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        if words and words[0] in COMMANDS:
            auto_cli(COMMANDS[words[0]], args=words[1:], prog=f"mctf {words[0]}")
        else:
            finetuning(args)
    except (ValueError, OSError, FloatingPointError, StrictDataclassError) as error:
        if os.environ.get("MCTF_DEBUG"):
            raise
        print(f"mctf: error: {_message(error)}", file=sys.stderr)
        sys.exit(1)


def _message(error: BaseException) -> str:
    """The error's own words, without the traceback that a data loading worker adds."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught "):
        return lines[-1].partition(": ")[2]
    return str(error)


if __name__ == "__main__":
    main()
