"""The Hub that a test sees: its state, its addresses, and the environment of its users."""

import os
import re
import threading
from pathlib import Path
from typing import Any

from tests.local_hub.faults import Fault, Faults
from tests.local_hub.server import Server
from tests.local_hub.state import Repo


class LocalHub(Faults):
    """The server, while its ``with`` block lasts.

    Attributes:
        url: the address that ``HF_ENDPOINT`` names; ``storage`` is that of the large files.
        tokens: those that may write, and read private repositories.
        repos: the state, by ``"org/name"``.
        objects: the large files that were uploaded, by the sha256 of their bytes.
        requests: method and path of every request, to the storage too.
        faults: those that have yet to happen.
        bugs: errors of this server itself, raised where the block ends.
    """

    def __init__(self, tokens: set[str]):
        super().__init__()
        self.tokens = tokens
        self.is_open = True
        self.begin()
        self.server = Server(self)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}"

    def begin(self) -> None:
        """Forget all but the address and the tokens."""
        self.faults: list[Fault] = []
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.bugs: list[BaseException] = []

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.is_open = False
        self.server.shutdown()
        self.server.server_close()
        if error is None:
            self.check()

    def check(self) -> None:
        """Raise the first error of this server itself."""
        if self.bugs:
            raise self.bugs[0]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a subprocess whose Hub this is, with a cache and token of its own."""
        foreign = re.compile("HF_|HUGGING|TRANSFORMERS_|.*_PROXY$", re.IGNORECASE)
        own = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        own |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return own if token is None else {**own, "HF_TOKEN": token}

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The bytes of every file of a repository, by its path."""
        return {path: it.data for path, it in self.repos[name].commit(revision).files.items()}
