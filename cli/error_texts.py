"""Error messages of the command line."""

import re
import shlex
from collections.abc import Sequence

# Errors that a user can fix, such as a wrong setting or file: only their message is shown. Those of
# other libraries are listed by name, so that the libraries need not be imported.
EXPECTED = (ValueError, OSError, RuntimeError, FloatingPointError, ImportError)
EXPECTED_NAMES = {
    "DatasetsError",
    "DecompressionBombError",
    "MisconfigurationException",
    "StrictDataclassError",
    "YAMLError",
}


def error_text(error: BaseException, words: Sequence[str]) -> str:
    """Text of an error: its message and, if it is unexpected, its type and the command line."""
    message = _message(error)
    if _is_expected(error) and message:
        return f"mctf: error: {message}\n(MCTF_DEBUG=1 shows where)"
    if isinstance(error, MemoryError):
        message = f"the memory is full. {message}".strip()
    return (
        f"mctf: error: {named(error, message)}\n"
        f"(not foreseen, in: {shlex.join(['mctf', *words])}; MCTF_DEBUG=1 shows where)"
    )


def _is_expected(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, EXPECTED) or not names.isdisjoint(EXPECTED_NAMES)


def named(error: BaseException, message: str | None = None) -> str:
    """An error's type and message."""
    message = str(error) if message is None else message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _message(error: BaseException) -> str:
    """An error's message, without the traceback that another process puts before it."""
    text = str(error).strip()
    if text.startswith("DataLoader worker"):
        return (
            f"a process that loads images has died ({text}), usually because the memory was "
            "full: use fewer num_workers, or a smaller batch_size or shuffle_buffer; checkpoints "
            "saved so far are untouched"
        )
    _, traceback, rest = text.rpartition("Traceback (most recent call last):")
    if not traceback:
        return text
    own = [line for line in rest.splitlines() if line.strip() and not line.startswith("  ")]
    return re.sub(r"^[\w.]+: ", "", "\n".join(own))
