"""What the logits of a head mean, by the ``problem_type`` of its configuration."""

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
    """What a configuration asks for; where it does not say, what transformers' losses take it for.

    That is regression with one output, and one label per image with more. Labels that are not
    integers, which losses see as well, are for ``problem_type`` itself to tell.
    """
    return config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE)


def settle_problem_type(config: Any, labels: Tensor) -> str:
    """The configuration's problem type; if unset, it is set here from the labels.

    As in transformers' losses: labels that are not integers are several per image, of a head with
    more than one output.
    """
    if config.problem_type is None:
        several = config.num_labels > 1 and labels.dtype not in (torch.long, torch.int)
        config.problem_type = MULTI if several else problem_type(config)
    return config.problem_type


def scores(logits: Tensor, config: Any) -> Tensor:
    """What the logits say, (b, num_labels) -> the same shape in float32.

    Probabilities that sum to 1 for one label per image, a probability of each for several labels
    (as transformers' ``pipeline`` has them), and the values themselves for regression.
    """
    logits, problem = logits.float(), problem_type(config)
    if problem == REGRESSION:
        return logits
    return logits.sigmoid() if problem == MULTI else logits.softmax(-1)


def ranked(logits: Tensor, config: Any, top_k: int = 1) -> list[list[tuple[str, float]]]:
    """Names and scores of the labels of images, of their logits (b, num_labels).

    The ``top_k`` highest scores, highest first; for regression all values, in their order.
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
    """What tells how good a head's outputs are.

    Attributes:
        name: in files.
        title: in tables.
        long_title: in texts.
        of: one number for each image: logits (b, c), labels -> (b,), float64.
        of_error: whether less is better, in units of the labels; else it is a fraction of images.
    """

    name: str
    title: str
    long_title: str
    of: Callable[[Tensor, Tensor], Tensor]
    of_error: bool = False

    def text(self, value: float, digits: int = 2) -> str:
        """In words: per cent, or an error as it is."""
        return f"{value:.4g}" if self.of_error else f"{100 * value:.{digits}f}%"


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).double()


def _all_right(logits: Tensor, labels: Tensor) -> Tensor:
    return ((logits > 0) == (labels > 0.5)).all(1).double()


def _error(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.double() - labels.view_as(logits)).abs().mean(1)


# Of several labels per image all are to be right, at a probability of one half.
_BY_PROBLEM = {
    SINGLE: Quality("accuracy", "top-1", "Top-1 accuracy", _right),
    MULTI: Quality(
        "exact_match", "exact match", "Images of which all labels are right", _all_right
    ),
    REGRESSION: Quality("mae", "mean error", "Mean absolute error", _error, of_error=True),
}
QUALITIES = {judged.name: judged for judged in _BY_PROBLEM.values()}


def quality(config: Any) -> Quality:
    """That of a configuration's problem."""
    return _BY_PROBLEM[problem_type(config)]
