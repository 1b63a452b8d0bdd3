"""``mctf completion``: a script that lets a shell complete commands and options."""

import argparse
import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress

from .commands import COMMANDS, FINETUNING
from .main import main as run

SCRIPT = """\
_mctf() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} options=
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W '{commands}' -- "$word"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{options}
    esac
    case $word in
        -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
    esac
}}
complete -o default -F _mctf mctf
"""


def main(args: Sequence[str]) -> None:
    """Print a shell script that completes commands and their options."""
    parser = argparse.ArgumentParser(
        prog="mctf completion",
        description="Print a script that completes commands, their options and files. The options "
        "are those of what is installed.",
    )
    parser.add_argument("shell", choices=["bash", "zsh"])
    shell = parser.parse_args(args).shell
    if shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    others = [command for command in COMMANDS if command != "completion"]
    lines = [f"        {command}) options='{' '.join(_options(command))}' ;;" for command in others]
    print(SCRIPT.format(commands=" ".join(COMMANDS), options="\n".join(lines)), end="")


def _options(command: str) -> list[str]:
    """The options of a command; none if a package that it needs is not installed."""
    everything = "--help_all" if command in FINETUNING else "--help"
    shown = io.StringIO()
    with redirect_stdout(shown), redirect_stderr(io.StringIO()), suppress(SystemExit):
        run([command, everything])
    return sorted(set(re.findall(r"(?:^ +|, )(--\w[\w.-]*)", shown.getvalue(), re.MULTILINE)))
