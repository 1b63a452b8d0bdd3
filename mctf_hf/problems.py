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
