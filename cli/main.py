"""The console command ``mctf``: one command line for everything the library does."""

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence

from datasets.exceptions import DatasetsError
from huggingface_hub.errors import StrictDataclassError
from lightning.fabric.utilities.exceptions import MisconfigurationException

from cli import benchmark, benchmark_data, convert, demo, export, push, visualize
from cli.finetuning import finetuning

# Commands beside those of Lightning, which take the words that follow theirs.
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": demo.main,
    "benchmark": benchmark.main,
    "benchmark-data": benchmark_data.main,
    "convert": convert.main,
    "export": export.main,
    "push": push.main,
    "visualize": visualize.main,
}

# What a user can mend: a setting, a file, a dataset, the memory.
EXPECTED = (
    ValueError,
    OSError,
    RuntimeError,
    FloatingPointError,
    DatasetsError,
    MisconfigurationException,
    StrictDataclassError,
)


def main(args: Sequence[str] | None = None) -> None:
    """Run ``mctf`` with the given words, or those of the command line.

    ``--import MODULE`` before the command imports a module first.

    What a user can mend is reported by its message alone, with exit status 1; ``MCTF_DEBUG=1``
    shows where it was raised.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        while words[:1] == ["--import"]:
            _import(words[1:2])
            words = words[2:]
        if words and words[0] in COMMANDS:
            options = [re.sub(r"^--[\w-]+", _underscored, word) for word in words[1:]]
            COMMANDS[words[0]](options)
        else:
            finetuning(words)
    except EXPECTED as error:
        if os.environ.get("MCTF_DEBUG"):
            raise
        print(f"mctf: error: {_message(error)}\n(MCTF_DEBUG=1 shows where)", file=sys.stderr)
        sys.exit(1)


def _import(names: Sequence[str]) -> None:
    """Import a module of the user's, such as one that registers a reducer."""
    if not names:
        raise ValueError("--import: name a module")
    sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(names[0])
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--import {names[0]}: {error}. It is looked for here and in PYTHONPATH"
        ) from error
    finally:
        sys.path.remove(os.getcwd())


def _underscored(option: re.Match) -> str:
    """``--dry-run`` is ``--dry_run``."""
    return "--" + option[0][2:].replace("-", "_")


def _message(error: BaseException) -> str:
    """The error's own words, without the traceback that a data loading worker puts before them."""
    text = str(error)
    if text.startswith("DataLoader worker"):
        return (
            f"a process that loads images has died ({text.strip()}): mostly the memory was full, "
            "then take fewer num_workers, or a smaller batch_size or shuffle_buffer; checkpoints "
            "saved so far are untouched"
        )
    if not text.startswith("Caught "):
        return text
    raised = list(re.finditer(rf"^(\w+\.)*{type(error).__name__}: ", text, re.MULTILINE))
    return text[raised[-1].end() :].strip() if raised else text


if __name__ == "__main__":
    main()
