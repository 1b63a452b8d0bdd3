"""Copies of named tuples."""

from typing import Any, NamedTuple, TypeVar

Record = TypeVar("Record", bound=NamedTuple)


def replace(record: Record, **changes: Any) -> Record:
    """A copy of a named tuple with other values in the named fields.

    It is ``_replace`` in a form that ``torch.compile`` of torch 2.7 can trace.

    Raises:
        TypeError: if the tuple has no such field.
    """
    kind: Any = type(record)
    return kind(**{**dict(zip(kind._fields, record, strict=True)), **changes})
