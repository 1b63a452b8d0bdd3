"""Which function answers a request, by method and path."""

import re
from collections.abc import Callable
from urllib.parse import unquote

from tests.local_hub.state import Refusal

REPO = "/api/models/(?P<name>[^/]+/[^/]+)"
AT = "/(?P<revision>[^/]+)"
COMMIT = f"{REPO}/commit{AT}"
Endpoint = Callable[..., None]
ROUTES: list[tuple[list[str], re.Pattern[str], Endpoint]] = []


def route(methods: str, pattern: str) -> Callable[[Endpoint], Endpoint]:
    """Let a function answer; it is called with the request and the named parts of the path."""

    def register(function: Endpoint) -> Endpoint:
        ROUTES.append((methods.split(), re.compile(pattern), function))
        return function

    return register


def find(method: str, address: str) -> tuple[Endpoint, dict[str, str]]:
    """The function for a request, and the named parts of its path."""
    for methods, pattern, function in ROUTES:
        match = pattern.fullmatch(address)
        if match and method in methods:
            parts = match.groupdict().items()
            return function, {name: unquote(part or "") for name, part in parts}
    raise Refusal(404, f"{method} {address} is not served here")
