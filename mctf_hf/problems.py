"""What the logits of a head mean, by the ``problem_type`` of its configuration."""

from typing import Any

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


def scores(logits: Tensor, config: Any) -> Tensor:
    """What the logits say, (b, num_labels) -> the same shape in float32.

    Probabilities that sum to 1 for one label per image, a probability of each for several labels
    (as transformers' ``pipeline`` has them), and the values themselves for regression.
    """
    logits, problem = logits.float(), problem_type(config)
    if problem == REGRESSION:
        return logits
    return logits.sigmoid() if problem == MULTI else logits.softmax(-1)
