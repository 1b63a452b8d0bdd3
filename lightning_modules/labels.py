"""Conversion of dataset labels to numbers: one class per image, several classes, or values."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, LargeList, List, Value
from numpy.typing import NDArray
from torch import Tensor

from mctf_hf.problems import MULTI, REGRESSION, SINGLE

NOT_COUNTED = -100  # label of an image that is not counted, as in PyTorch's losses

Labels = NDArray[np.int64] | NDArray[np.float32]


def is_integer(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))


def is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def is_classes(feature: Any) -> bool:
    """Whether a column contains classes with names, one or several per image."""
    return isinstance(_inner(feature), ClassLabel)


def is_labels(feature: Any) -> bool:
    """Whether a column can be labels: names, classes, numbers, or lists of classes or numbers."""
    inner = _inner(feature)
    real = isinstance(inner, Value) and inner.dtype.startswith(("float", "bool"))
    return is_classes(feature) or is_integer(inner) or real or is_text(feature)


def names_in(feature: Any) -> list[str] | None:
    """Names of the classes in order; None if the column does not define them."""
    return list(_inner(feature).names) if is_classes(feature) else None


def encode(values: Sequence[Any], feature: Any, row_name: Callable[[int], str]) -> Labels:
    """Convert the labels of some rows to numbers.

    Args:
        values: labels as ``datasets`` returns them; class numbers instead of class names.
        feature: feature of the label column.
        row_name: returns the name of a row in error messages.

    Returns:
        (rows,) int64 for one class per image or integers. Otherwise float32: (rows, classes) of 1
        and 0 for several classes, (rows, 1) for floats, (rows, numbers) for lists of numbers.

    Raises:
        ValueError: for a row without label, a class that there is not, or lists of different
            lengths.
    """
    missing = next((i for i, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise ValueError(f"{row_name(missing)} has no label")
    if not isinstance(feature, (List, LargeList)):
        if isinstance(feature, Value) and feature.dtype.startswith("float"):
            return np.asarray(values, dtype=np.float32)[:, None]
        return np.asarray(values, dtype=np.int64)
    if is_classes(feature):
        labels = np.zeros((len(values), len(_inner(feature).names)), dtype=np.float32)
        for row, classes in enumerate(values):
            wrong = [one for one in classes if not 0 <= one < labels.shape[1]]
            if wrong:
                raise ValueError(
                    f"{row_name(row)} has the label {wrong[0]}: the classes are 0 to "
                    f"{labels.shape[1] - 1}"
                )
            labels[row, classes] = 1
        return labels
    for i, value in enumerate(values):
        if None in value or len(value) != len(values[0]):
            raise ValueError(
                f"{row_name(i)} has the labels {value}, where others have {len(values[0])} numbers"
            )
    return np.asarray(values, dtype=np.float32)


def settle(
    labels: Labels,
    problem: str,
    num_labels: int,
    *,
    named: bool,
    origin: str,
    row_name: Callable[[int], str],
) -> Labels:
    """Check labels of :func:`encode` and convert them to the format of the model's head.

    Args:
        problem: ``problem_type`` of the model.
        named: whether the labels are classes with names.
        origin: name of the split in error messages.

    Returns:
        (rows,) int64 for one label per image; (rows, num_labels) float32 for several or values.

    Raises:
        ValueError: for labels of another problem type, or labels that the model does not have.
    """
    whole, several = labels.dtype == np.int64, labels.ndim > 1 and labels.shape[1] > 1
    hot = several and bool(np.isin(labels, (0, 1)).all())
    fits = {SINGLE: whole, MULTI: hot, REGRESSION: not named}[problem]
    if not fits:
        held = "numbers" if not whole and not hot else "several" if several else "one"
        held += "" if held == "numbers" else " of the classes for each image"
        raise ValueError(
            f"labels of {origin} are {held}, but problem_type={problem}: set "
            f"problem_type to one of {SINGLE}, {MULTI} (lists of classes, or of 1 and 0) or "
            f"{REGRESSION} (numbers)"
            + (", and num_labels to the number of classes" if num_labels == 1 else "")
        )
    if problem == SINGLE:
        wrong = np.flatnonzero((labels < 0) | (labels >= num_labels))
        if len(wrong):
            raise ValueError(
                f"{row_name(wrong[0])} has the label {labels[wrong[0]]}: the model has the classes "
                f"0 to {num_labels - 1} (set num_labels for a new head)"
            )
        return labels
    labels = labels.astype(np.float32).reshape(len(labels), -1)
    if labels.shape[1] != num_labels:
        raise ValueError(
            f"labels of {origin} are {labels.shape[1]} numbers for each image, the model has "
            f"{num_labels}: set num_labels={labels.shape[1]} for a new head"
        )
    wrong = np.flatnonzero(~np.isfinite(labels).all(1))
    if len(wrong):
        raise ValueError(
            f"{row_name(wrong[0])} has the label {labels[wrong[0]]}: labels must be finite"
        )
    return labels


def not_counted(problem: str, num_labels: int) -> int | NDArray[np.float32]:
    """Label of an image that is not counted."""
    if problem == SINGLE:
        return NOT_COUNTED
    return np.full(num_labels, NOT_COUNTED, dtype=np.float32)


def _inner(feature: Any) -> Any:
    return feature.feature if isinstance(feature, (List, LargeList)) else feature


def are_counted(labels: Tensor) -> Tensor:
    """Whether each image is counted, by its label: (b,) or (b, c) -> (b,) bool."""
    return (labels != NOT_COUNTED).flatten(1).all(1) if labels.ndim > 1 else labels != NOT_COUNTED
