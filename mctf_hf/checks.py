"""Checks that numbers are finite or within limits: settings, weights, image processors, scores."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

SHOWN = 3  # names in a message
LARGEST_EDGE = 2560  # pixels of an image processor's output; limits the number of tokens


def check_range(least: float, most: float = math.inf, /, **settings: float | None) -> None:
    """Check that settings are finite, at least ``least`` and at most ``most``.

    ``None`` means that a setting is not set, and is allowed.

    Raises:
        ValueError: for the first setting that is not allowed.
    """
    for name, value in settings.items():
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            limit = f" and at most {most}" if math.isfinite(most) else ""
            limit += "" if math.isfinite(value) else ", and finite"
            raise ValueError(f"{name}={value!r} is not allowed: it must be at least {least}{limit}")


def check_weights(weights: nn.Module | Mapping[str, Tensor], owner: object) -> None:
    """Check that all weights are finite.

    Args:
        weights: a model, or weights by name.
        owner: file, folder or id of the weights, for the message.

    Raises:
        ValueError: if weights are infinite or NaN; the message names them.
    """
    named = weights.state_dict() if isinstance(weights, nn.Module) else weights
    wrong = [name for name, tensor in named.items() if not _is_finite(tensor)]
    if wrong:
        more = len(wrong) - SHOWN
        others = f" and {more} more" if more > 0 else ""
        raise ValueError(
            f"{owner} is not used: weights are infinite or no numbers in "
            f"{', '.join(wrong[:SHOWN])}{others}"
        )


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_meta or not tensor.is_floating_point() or bool(tensor.isfinite().all())


def check_scores(scores: Tensor, owner: object) -> Tensor:
    """Return the scores of images, (b, …), if all are finite.

    Args:
        owner: name of the model or images, for the message.

    Raises:
        ValueError: if scores are infinite or NaN.
    """
    finite = scores.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(
            f"{owner}: the scores of {int((~finite).sum())} of {len(finite)} images are infinite "
            "or no numbers. Are the weights, the precision and the images right?"
        )
    return scores


def check_processor(processor: Any, owner: object) -> Any:
    """Return the image processor, if its settings turn pixels into finite numbers.

    Args:
        owner: folder or id of the image processor, for the message.

    Raises:
        ValueError: if a number is not finite, a standard deviation or the rescale factor is not
            above 0, a size is missing, or an edge is not 1 to ``LARGEST_EDGE`` pixels.
    """
    for name, step in (("size", "do_resize"), ("crop_size", "do_center_crop"), ("pad_size", None)):
        size = getattr(processor, name, None)
        if size is None and step and getattr(processor, step, None):
            raise ValueError(f"{owner}: the image processor has {step}=True, and no {name}")
        edges = {} if size is None else dict(size)
        if not all(isinstance(edge, int) and 1 <= edge <= LARGEST_EDGE for edge in edges.values()):
            raise ValueError(
                f"{owner}: {name}={edges!r} of the image processor is not allowed: edges have 1 to "
                f"{LARGEST_EDGE} pixels"
            )
    for name in ("image_mean", "image_std", "rescale_factor"):
        value = getattr(processor, name, None)
        divides = name != "image_mean"
        for number in value if isinstance(value, (list, tuple)) else [value]:
            known = isinstance(number, (int, float)) and abs(number) < math.inf
            if number is not None and (not known or (divides and number <= 0)):
                raise ValueError(
                    f"{owner}: {name}={value!r} of the image processor is not allowed: it has "
                    f"finite numbers{' above 0' if divides else ''}"
                )
    return processor
