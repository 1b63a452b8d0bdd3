"""The console command ``mctf``: one command line for everything the library does."""

import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from .commands import COMMANDS, FINETUNING, MISUSED, nearest
from .error_texts import error_text, named
from .quiet import quiet

USAGE = """\
usage: mctf [--import MODULE] COMMAND …
       mctf COMMAND --help
       mctf --version"""

INTERRUPTED = 128 + 2  # the exit status after SIGINT


def main(args: Sequence[str] | None = None) -> None:
    """Run ``mctf`` with the words of ``args``, or of the command line if ``None``.

    ``--import MODULE`` before the command imports a module first. An error prints one or two lines
    to stderr. The exit status is then 1, or 2 for wrong arguments. With ``MCTF_DEBUG=1``, the
    traceback is shown.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        _run(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        if os.environ.get("MCTF_DEBUG"):
            raise
        print("mctf: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(1)
        if os.environ.get("MCTF_DEBUG"):
            raise
        print(error_text(error, words), file=sys.stderr)
        sys.exit(1)


def _run(words: Sequence[str]) -> None:
    imports: list[str] = []
    while words[:1] == ["--import"]:
        _import(words[1] if len(words) > 1 else "")
        imports += words[:2]
        words = words[2:]
    command, *rest = words or [""]
    if command in ("-h", "--help"):
        print(_help())
    elif command == "--version":
        print(f"mctf {version('mctf-hf')}")
    elif command in FINETUNING or re.match("(-c|--config)(=|$)", command):
        with quiet(), _extras_told(command):
            from .fitting import finetuning

            finetuning(words, imports)
    elif command in COMMANDS:
        options = [re.sub(r"^--[\w-]+", _underscored, word) for word in rest]
        with quiet(), _extras_told(command):
            importlib.import_module(f".{command.replace('-', '_')}", __package__).main(options)
    else:
        print(_no_command(command), file=sys.stderr)
        sys.exit(MISUSED)


def _help() -> str:
    listed = "\n".join(f"  {name:<16}{does}" for name, does in COMMANDS.items())
    return f"""{USAGE}

Make Vision Transformers faster by fusing tokens (MCTF), and finetune them for it.

commands:
{listed}

options:
  --import MODULE a module of yours, or its file, to import before the command
  --version       the library's version

Every command has its own --help; fit, validate, test and predict have --help_all, too."""


def _no_command(word: str) -> str:
    if not word:
        return f"{USAGE}\nmctf: error: name a command: {', '.join(COMMANDS)}"
    near = nearest(word, (*COMMANDS, "--help", "--import", "--version"))
    hint = f": did you mean {near!r}?" if near else ""
    return f"mctf: error: there is no command {word!r}{hint}\nThe commands: {', '.join(COMMANDS)}"


def _import(name: str) -> None:
    """Import a module or a Python file of the user, such as one that registers a reducer."""
    if not name:
        raise ValueError("--import: name a module, or its file")
    file = Path(name)
    is_file = file.suffix == ".py" or len(file.parts) > 1
    if is_file and not file.is_file():
        raise FileNotFoundError(f"--import {name}: there is no such file")
    folder, module = (file.resolve().parent, file.stem) if is_file else (Path.cwd(), name)
    sys.path.insert(0, str(folder))
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--import {name}: {error}. It is looked for in {folder} and in PYTHONPATH"
        ) from error
    except Exception as error:
        raise ValueError(f"--import {name}: {named(error)}") from error
    finally:
        sys.path.remove(str(folder))
    if is_file and Path(getattr(imported, "__file__", None) or "").resolve() != file.resolve():
        raise ValueError(f"--import {name}: another module is called {module!r}: rename the file")


@contextmanager
def _extras_told(command: str) -> Iterator[None]:
    """If a package is not installed, add the extra that installs it to the error."""
    try:
        yield
    except ModuleNotFoundError as error:
        from mctf_hf.extras import needed_by

        with needed_by(f"mctf {command}"):
            raise error


def _underscored(option: re.Match) -> str:
    """Turn ``--dry-run`` into ``--dry_run``."""
    return "--" + option[0][2:].replace("-", "_")


def _nobody_reads() -> bool:
    """Whether the reader of stdout, such as ``head``, has closed it; then drop further output."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


if __name__ == "__main__":
    main()
