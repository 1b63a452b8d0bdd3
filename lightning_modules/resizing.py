"""Changing a model and its image processor to another image size."""

import copy
from typing import Any

import torch

from lightning_modules.processors import fit_shape, output_size
from mctf_hf.configuration_mctf import as_pair


def resize(model: Any, processor: Any, image_size: int | list[int]) -> Any:
    """Return the model for another image size, with interpolated positions; change the processor.

    A processor that crops keeps the ratio of its size before and after the crop.

    Args:
        image_size: height and width in pixels, or one number for both.

    Raises:
        ValueError: for a size that is no multiple of the patch size or that the model cannot take.
    """
    size = as_pair(image_size)
    patch = as_pair(model.config.patch_size)
    if len(size) != 2 or any(
        side < 1 or side % part for side, part in zip(size, patch, strict=True)
    ):
        raise ValueError(
            f"image_size={image_size!r} is not allowed: it must be height and width, or one number "
            f"for both, and a multiple of patch_size={model.config.patch_size!r}"
        )
    _resize_processor(processor, *size)
    config = copy.deepcopy(model.config)
    if config.any_size:
        model.config.input_size = list(size)
        return model
    square = isinstance(config.image_size, int)
    if square and size[0] != size[1] and not hasattr(model.base_model.embeddings, "grid"):
        raise ValueError(
            f"image_size={image_size!r} is not allowed: a {type(model).__name__} takes squares"
        )
    config.image_size = size[0] if size[0] == size[1] and square else list(size)
    resized = type(model)(config)
    weights = model.state_dict()
    for name, wanted in resized.state_dict().items():
        if wanted.shape != weights[name].shape:
            weights[name] = _positions(model, config, size).view_as(wanted)
    resized.load_state_dict(weights)
    return resized


@torch.no_grad()
def _positions(model: Any, config: Any, size: tuple[int, int]) -> torch.Tensor:
    """Interpolated position embeddings for an image size, (1, positions, d)."""
    embeddings = model.base_model.embeddings
    tokens = torch.empty(1, config.num_tokens(), config.hidden_size)
    return embeddings.interpolate_pos_encoding(tokens, *size)


def _resize_processor(processor: Any, height: int, width: int) -> None:
    fit_shape(processor)
    before = min(output_size(processor))
    whole = {"height": height, "width": width}
    if not getattr(processor, "do_center_crop", None):
        processor.size = whole
        return
    size = processor.size
    if edge := size.get("shortest_edge"):
        processor.size = {"shortest_edge": round(edge * max(height, width) / before)}
    else:
        processor.size = {name: round(size[name] * side / before) for name, side in whole.items()}
    processor.crop_size = whole
