"""The image and label columns of datasets, and the names of the classes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, IterableDataset
from datasets import Image as ImageFeature

from .labels import is_classes, is_integer, is_labels, is_text, names_in


class Columns(NamedTuple):
    """Image and label columns of a dataset.

    Attributes:
        image: name of the image column.
        label: name of the label column.
        label_names: names of the classes in order; None if the dataset does not define them.
        by_name: whether the labels are class names, without a defined order.
        feature: feature (type) of the label column.
    """

    image: str
    label: str
    label_names: list[str] | None
    by_name: bool
    feature: Any


def find_columns(
    rows: Dataset | IterableDataset,
    origin: str,
    image_column: str | None,
    label_column: str | None,
) -> Columns:
    """Find the image and label columns of a split, or check the given ones.

    Args:
        origin: name of the split in error messages.

    Raises:
        ValueError: if a column is missing, cannot be determined or has a wrong type.
    """
    image = find_image_column(rows, origin, image_column)
    label = label_column
    if label is None and not _of_kind(rows, ClassLabel):
        texts = [name for name, feature in rows.features.items() if is_text(feature)]
        several = [name for name, feature in rows.features.items() if is_classes(feature)]
        plain = rows.features.get("label")
        if len(several) == 1:
            label = several[0]
        elif is_text(plain) or is_integer(plain):
            label = "label"
        elif len(texts) == 1:
            label = texts[0]
    label = _column(rows, "label_column", label, ClassLabel, origin)
    feature = rows.features[label]
    if not is_labels(feature):
        raise ValueError(
            f"label_column={label_column!r} of {origin} holds {feature}: labels are integers, "
            "names or class labels (datasets' class_encode_column makes them), lists of class "
            "labels or of 1 and 0, or numbers"
        )
    return Columns(image, label, names_in(feature), is_text(feature), feature)


def find_image_column(
    rows: Dataset | IterableDataset, origin: str, image_column: str | None = None
) -> str:
    """The given image column, or the only one. Raises the errors of :func:`find_columns`."""
    if rows.features is None:
        raise ValueError(f"{origin} does not state its columns: its files can't be streamed")
    image = _column(rows, "image_column", image_column, ImageFeature, origin)
    if not isinstance(rows.features[image], ImageFeature):
        raise ValueError(
            f"image_column={image!r} of {origin} holds {rows.features[image]}: it is to hold images"
        )
    return image


def _column(
    rows: Dataset | IterableDataset, setting: str, column: str | None, kind: type, origin: str
) -> str:
    known = ", ".join(rows.features)
    if column is not None:
        if column not in rows.features:
            raise ValueError(f"{setting}={column!r}: {origin} has the columns {known}")
        return column
    fitting = _of_kind(rows, kind)
    if len(fitting) != 1:
        raise ValueError(
            f"{setting} is not set, and {origin} has {len(fitting)} columns of type "
            f"{kind.__name__} among {known}: name the one to use"
            + (" (a folder of images has a subfolder for each class)" if known == "image" else "")
        )
    return fitting[0]


def _of_kind(rows: Dataset | IterableDataset, kind: type) -> list[str]:
    return [name for name, feature in rows.features.items() if isinstance(feature, kind)]


def class_names(found: set[str], known: Sequence[str] | None, *, all_of_them: bool) -> list[str]:
    """Names of the classes in order, for a dataset whose labels are names.

    Args:
        found: names in the dataset.
        known: names of the model, if it has any.
        all_of_them: use the model's names only if all of them occur in the dataset.

    Returns:
        The model's names in its order, if they contain all names of the dataset; otherwise the
        dataset's names, sorted.
    """
    own = list(known or [])
    agree = found == set(own) if all_of_them else found <= set(own)
    return own if agree and len(set(own)) == len(own) else sorted(found)
