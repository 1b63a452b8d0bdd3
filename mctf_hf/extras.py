"""Packages that the library alone does not need, and the extras that bring them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

DISTRIBUTION = "mctf-hf"
_NOT_FOR_USERS = ("dev",)
_DISTRIBUTIONS = {"yaml": "pyyaml"}  # of packages that are called otherwise


@contextmanager
def needed_by(user: str) -> Iterator[None]:
    """Tell which extra brings a package that turns out to be missing in the block.

    Args:
        user: what needs it, as the message has it.

    Raises:
        ModuleNotFoundError: in one line, with what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = extra_of(package)
        if extra is None or _is_installed(package):
            raise
        raise ModuleNotFoundError(
            f"{user} needs {package}, which is not installed: "
            f"pip install '{DISTRIBUTION}[{extra}]'",
            name=error.name,
        ) from error


def extra_of(package: str) -> str | None:
    """The extra of this library that brings a package; None if no one does."""
    wanted = _normalized(_DISTRIBUTIONS.get(package, package))
    try:
        requirements = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return None
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"""extra == ['"]([\w.-]+)['"]""", requirement)
        if name and extra and _normalized(name[0]) == wanted and extra[1] not in _NOT_FOR_USERS:
            return extra[1]
    return None


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False
