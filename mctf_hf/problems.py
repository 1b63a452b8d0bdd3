"""What the logits of a head mean, by the ``problem_type`` of its configuration."""

from typing import Any

import torch
from torch import Tensor

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


def problem_of(config: Any, labels: Tensor) -> str:
    """What training with these labels is; where a configuration does not say, it is told.

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
    found, names = scores(logits, config), config.id2label
    if problem_type(config) == REGRESSION:
        return [[(names[i], value) for i, value in enumerate(row)] for row in found.tolist()]
    best, indices = found.topk(min(top_k, found.shape[-1]))
    return [
        [(names[i], score) for i, score in zip(*row, strict=True)]
        for row in zip(indices.tolist(), best.tolist(), strict=True)
    ]
