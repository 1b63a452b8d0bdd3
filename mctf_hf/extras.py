"""Optional packages, and the extras of this library that install them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

DISTRIBUTION = "mctf-hf"
_NOT_FOR_USERS = ("dev",)
_DISTRIBUTIONS = {"yaml": "pyyaml"}  # distributions with another name than their package


@contextmanager
def needed_by(user: str) -> Iterator[None]:
    """Name the extra to install if a package is missing in the block.

    Args:
        user: name of what needs the package, for the message.

    Raises:
        ModuleNotFoundError: if a package is missing; the message contains the install command.
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
    """The extra of this library that installs a package; ``None`` if there is none."""
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
