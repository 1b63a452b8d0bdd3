"""A request: it is read, handed to its endpoint, and answered."""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tests.local_hub.routing import COMMIT, find
from tests.local_hub.state import Refusal, Repo

if TYPE_CHECKING:
    from tests.local_hub.server import Server


class Request(BaseHTTPRequestHandler):
    """What endpoints are called with.

    Attributes:
        hub: whose request it is.
        address: the path without what stands behind a question mark; that is in ``query``.
        body: what was sent.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is two writes, its headers and its body
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def serve(self) -> None:
        self.hub = self.server.hub
        self.address, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        self.hub.requests.append((self.command, self.address))
        try:
            if self.hub.is_open and self.read_body():
                endpoint, parts = find(self.command, self.address)
                endpoint(self, **parts)
            else:
                self.close_connection = True
        except Refusal as refusal:
            self.reply({"error": refusal.message}, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def read_body(self) -> bool:
        """Read what was sent, so that the next request finds its start; False if it was cut."""
        length = int(self.headers.get("Content-Length") or 0)
        fault = None
        if self.command == "PUT":
            fault = self.hub.take_fault("cut upload")
        elif self.command == "POST" and re.fullmatch(COMMIT, self.address):
            fault = self.hub.take_fault("cut commit")
        if fault is not None:
            part = length // 2 if fault.after_bytes is None else fault.after_bytes
            self.rfile.read(min(part, length))
            return False
        self.body = self.rfile.read(length)
        return len(self.body) == length

    def reply(
        self, payload: Any = b"", status: int = 200, headers: Any = (), sent: int | None = None
    ) -> None:
        """Answer with bytes or JSON, of which only the first ``sent`` bytes go out."""
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        kind = "application/octet-stream" if data is payload else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, **dict(headers)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])

    def token(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if scheme == "Bearer" else None

    def check_writing(self) -> None:
        if self.token() is None:
            # The client takes any 401 of a repository for this code, but at https addresses only.
            code = "" if self.address.startswith("/api/repos/") else "RepoNotFound"
            raise Refusal(401, "Invalid username or password.", code)
        if self.token() not in self.hub.tokens:
            raise Refusal(403, "You don't have the rights to write with this token")

    def repo(self, name: str, writing: bool = False) -> Repo:
        """The repository of that name, if this request may read it, or write to it."""
        known = self.token() in self.hub.tokens
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not known):
            raise Refusal(404 if known else 401, "Repository not found", "RepoNotFound")
        if writing:
            self.check_writing()
        return repo
