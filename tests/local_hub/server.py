"""The server on loopback, with all endpoints."""

from __future__ import annotations

import sys
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from tests.local_hub import accounts, branches, commits, contents, listings
from tests.local_hub.request import Request

if TYPE_CHECKING:
    from tests.local_hub.hub import LocalHub

ENDPOINTS = (accounts, branches, commits, contents, listings)  # they register themselves


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: LocalHub):
        super().__init__(("127.0.0.1", 0), Request)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.bugs.append(error)
            super().handle_error(request, client_address)
