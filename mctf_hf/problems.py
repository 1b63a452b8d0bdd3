"""Meaning of a head's logits, by the ``problem_type`` of its configuration."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .classes import names_of

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


def problem_type(config: Any) -> str:
    """The problem type of a configuration; if unset, the one that transformers' losses assume.

    They assume regression for one output, and one label per image for more. They also consider
    whether labels are integers, which only :func:`settle_problem_type` can do.
    """
    return config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE)


def settle_problem_type(config: Any, labels: Tensor) -> str:
    """The problem type of a configuration; if unset, it is set here from the labels.

    As in transformers' losses, labels that are not integers mean several labels per image, if the
    head has more than one output.
    """
    if config.problem_type is None:
        several = config.num_labels > 1 and labels.dtype not in (torch.long, torch.int)
        config.problem_type = MULTI if several else problem_type(config)
    return config.problem_type


def scores(logits: Tensor, config: Any) -> Tensor:
    """Scores from logits, (b, num_labels) -> the same shape in float32.

    With one label per image, probabilities that sum to 1; with several, one probability per label
    (as in transformers' ``pipeline``); in regression, the values themselves.
    """
    logits, problem = logits.float(), problem_type(config)
    if problem == REGRESSION:
        return logits
    return logits.sigmoid() if problem == MULTI else logits.softmax(-1)


def ranked(logits: Tensor, config: Any, top_k: int = 1) -> list[list[tuple[str, float]]]:
    """Names and scores of each image's labels, from logits (b, num_labels).

    The ``top_k`` highest scores, highest first; in regression all values, in label order.
    """
    found, names = scores(logits, config), names_of(config)
    if problem_type(config) == REGRESSION:
        return [[(names[i], value) for i, value in enumerate(row)] for row in found.tolist()]
    best, indices = found.topk(min(top_k, found.shape[-1]))
    return [
        [(names[i], score) for i, score in zip(*row, strict=True)]
        for row in zip(indices.tolist(), best.tolist(), strict=True)
    ]


class Quality(NamedTuple):
    """A metric of a head's outputs.

    Attributes:
        name: name in files.
        title: name in tables.
        long_title: name in texts.
        of: function that returns one number per image: logits (b, c), labels -> (b,), float64.
        of_error: whether it is an error in units of the labels; else it is a fraction of images.
    """

    name: str
    title: str
    long_title: str
    of: Callable[[Tensor, Tensor], Tensor]
    of_error: bool = False

    def text(self, value: float, digits: int = 2) -> str:
        """A value as text: in per cent, or unchanged for an error."""
        return f"{value:.4g}" if self.of_error else f"{100 * value:.{digits}f}%"


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).double()


def _all_right(logits: Tensor, labels: Tensor) -> Tensor:
    return ((logits > 0) == (labels > 0.5)).all(1).double()


def _error(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.double() - labels.view_as(logits)).abs().mean(1)


# With several labels per image, all have to be right, at a probability threshold of one half.
_BY_PROBLEM = {
    SINGLE: Quality("accuracy", "top-1", "Top-1 accuracy", _right),
    MULTI: Quality(
        "exact_match", "exact match", "Images of which all labels are right", _all_right
    ),
    REGRESSION: Quality("mae", "mean error", "Mean absolute error", _error, of_error=True),
}
QUALITIES = {judged.name: judged for judged in _BY_PROBLEM.values()}


def quality(config: Any) -> Quality:
    """The metric for the problem type of a configuration."""
    return _BY_PROBLEM[problem_type(config)]
