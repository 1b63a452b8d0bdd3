"""Class names of models and datasets, and their comparison."""

import re
import warnings
from collections.abc import Sequence
from typing import Any

SHOWN = 4  # names in a message
_NO_NAME = re.compile(r"LABEL_\d+|n\d{8}")  # placeholders of transformers, WordNet numbers


def names_of(config: Any) -> list[str]:
    """Names of a configuration's classes, in the order of the outputs.

    Raises:
        ValueError: if a class has no name.
    """
    named = config.id2label
    if missing := [i for i in range(config.num_labels) if i not in named]:
        raise ValueError(
            f"id2label of the configuration names {config.num_labels} classes, but not "
            f"{missing[0]}: it is to name 0 to {config.num_labels - 1}"
        )
    return [named[i] for i in range(config.num_labels)]


def give_names(config: Any, names: Sequence[str]) -> None:
    """Set the names of a configuration's classes, in the order of the outputs."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def has_names(config: Any) -> bool:
    """Whether any class has a name that is not a placeholder or a WordNet number."""
    return any(map(_is_name, config.id2label.values()))


def differing(own: Sequence[str], names: Sequence[str]) -> list[int]:
    """Indices of classes with different names, ignoring case, punctuation and text after a comma.

    A placeholder such as ``LABEL_3`` matches every name.
    """
    pairs = enumerate(zip(own, names, strict=True))
    return [
        i for i, pair in pairs if all(map(_is_name, pair)) and _plain(pair[0]) != _plain(pair[1])
    ]


def check_classes(config: Any, names: Sequence[str], model: object, data: object) -> None:
    """Compare a model's classes with those of a dataset, by their names.

    Warns if fewer than half of the names differ and none of them belongs to another class.

    Args:
        names: names of the dataset's classes.
        model, data: names of the model and the dataset for messages.

    Raises:
        ValueError: if the number, the order or too many of the names of the classes differ.
    """
    own = names_of(config)
    new_head = f"set num_labels={len(names)} for a new head"
    if len(own) != len(names):
        raise ValueError(
            f"{data} has {len(names)} classes ({shown(names)}), and {model} has {len(own)} "
            f"({shown(own)}). To finetune it, {new_head}"
        )
    wrong = differing(own, names)
    if not wrong:
        return
    ours = [_plain(name) for name in own]
    elsewhere = [i for i in wrong if _plain(names[i]) in ours]
    called = f"{data} calls its classes {shown(names)}, and {model} {shown(own)}"
    if sorted(ours) == sorted(_plain(name) for name in names):
        raise ValueError(
            f"{called}: the same in another order. Reorder them (datasets' "
            f"align_labels_with_mapping), or, to finetune it, {new_head}"
        )
    compared = sum(map(_is_name, own))
    if elsewhere or 2 * len(wrong) >= compared:
        raise ValueError(
            f"{called}: {len(wrong)} of {len(own)} differ, class {wrong[0]} is {names[wrong[0]]!r} "
            f"here and {own[wrong[0]]!r} there. To finetune it, {new_head}; where the classes are "
            "the same and only called otherwise, change id2label in its config.json"
        )
    listed = ", ".join(f"{names[i]!r} for {own[i]!r}" for i in wrong[:SHOWN])
    warnings.warn(
        f"{data} calls {len(wrong)} of {len(own)} classes otherwise than {model}: {listed}",
        stacklevel=2,
    )


def shown(names: Sequence[str]) -> str:
    """A few names, for a message."""
    return ", ".join(map(repr, names[:SHOWN])) + (" …" if len(names) > SHOWN else "")


def _is_name(label: str) -> bool:
    return _NO_NAME.fullmatch(label) is None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.split(",")[0]).casefold().strip()
