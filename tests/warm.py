"""Processes that import once what takes seconds, and then run each piece of code in a fork.

The code begins as in a process of its own, with its own folder, arguments, output and exit status;
only the environment is that of the first process.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.helpers import REPOSITORY

SERVER = """
import json
import os
import sys
import traceback

exec(sys.argv[1])
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for number, file in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
            os.chdir(job["folder"])
            sys.argv = ["-c", *job["arguments"]]
            exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as stopped:
            status = stopped.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
OF_COMMANDS = "import cli.benchmark, cli.push, cli.visualize, lightning_modules"
COMMAND = "import sys; from cli.main import main; main(sys.argv[1:])"


class Warm:
    """Such a process, from its first use to the end of its ``with`` block.

    Args:
        imports: code that it begins with.
        environment: all of its environment.
    """

    def __init__(self, imports: str, environment: dict[str, str]):
        self.imports, self.environment = imports, environment
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Warm":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.process is not None:
            self.process.communicate()

    def run(self, code: str, *arguments: Any) -> subprocess.CompletedProcess:
        """Run code in the working folder of the caller, and say what it told."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, self.imports],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self.environment,
                text=True,
            )
        with tempfile.TemporaryDirectory() as told:
            job = {
                "code": code,
                "arguments": [str(argument) for argument in arguments],
                "folder": os.getcwd(),
                "stdout": f"{told}/stdout",
                "stderr": f"{told}/stderr",
            }
            self.process.stdin.write(f"{json.dumps(job)}\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
            texts = [Path(job[name]).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess([code, *arguments], status, *texts)


def warm_commands(environment: dict[str, str]) -> Warm:
    """One for :data:`COMMAND`, whose arguments are the words behind ``mctf``."""
    own = {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"}
    return Warm(OF_COMMANDS, {**environment, **own})
