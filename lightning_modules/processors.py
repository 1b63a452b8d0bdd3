"""What an image processor does to images, as numbers."""

from typing import Any

import torch
from torch import Tensor


def output_size(processor: Any) -> tuple[int, int]:
    """Height and width of what an image processor returns, in pixels."""
    size = processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size
    edge = size.get("shortest_edge")
    return (edge, edge) if edge else (size["height"], size["width"])


def settle_size(config: Any, processor: Any) -> dict[str, Any]:
    """Settings of a model that takes images of any size, for those that a processor makes.

    Args:
        config: of a model of this library, which is told, too.
    """
    if not config.any_size or config.input_size is not None:
        return {}
    config.input_size = output_size(processor)
    return {"input_size": config.input_size}


def scaling(processor: Any) -> tuple[Tensor, Tensor]:
    """What is subtracted from pixels, and what they are divided by: each (channels, 1, 1)."""
    unit = 1 / processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = [0.0] * 3, [1.0] * 3
    if processor.do_normalize:
        mean, std = processor.image_mean, processor.image_std
    return unit * torch.tensor(mean)[:, None, None], unit * torch.tensor(std)[:, None, None]
