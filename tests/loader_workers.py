"""A worker of a loader and its parent, which import little."""

import multiprocessing
import subprocess
import sys
import time
from typing import Any

from lightning_modules.sampling import stop_with_parent_only


def work(ready: Any) -> None:
    stop_with_parent_only()
    ready.set()
    time.sleep(20)
    sys.exit("nobody stopped it")


def parent_of_a_worker(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    ready = context.Event()
    worker = context.Process(target=work, args=(ready,))
    worker.start()
    ready.wait()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # somebody else's
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join()
    assert worker.exitcode == 0
