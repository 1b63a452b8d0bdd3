"""Pictures of fused tokens: groups of patches in their mean colours (arXiv 2403.10030, figure 2).

Sizes: ``rows`` x ``columns`` patches; images of ``height`` x ``width`` pixels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .configuration_mctf import as_pair
from .images import ImageReader, to_image

DISPLAY_SIZE = 448
GAP = 8

# Colours that differ from each other, and from the muted mean colours of patches.
_STRONG = np.array(
    [
        (230, 25, 75),
        (60, 180, 75),
        (255, 225, 25),
        (0, 110, 220),
        (245, 130, 48),
        (160, 40, 200),
        (70, 230, 240),
        (240, 50, 230),
        (190, 245, 60),
        (0, 150, 150),
    ]
)
BORDER_COLOURS = np.concatenate([_STRONG, (_STRONG[:7] + 255) // 2]).astype(np.uint8)


@dataclass(eq=False)
class FusedTokens:
    """The image that a model gets, and how the model fused its tokens.

    Attributes:
        view: image after the image processor, height x width pixels, in RGB.
        groups: (rows, columns) int64, index of the token that each patch is part of, -1 for dropped
            patches.
        num_tokens: number of tokens that entered the first layer, including prefix tokens.
        tokens_left: number of remaining tokens, including prefix tokens.
    """

    view: Image.Image
    groups: NDArray[np.int64]
    num_tokens: int
    tokens_left: int

    def picture(self, scale: int | None = None) -> Image.Image:
        """The picture of the groups, see :func:`draw_groups`."""
        return draw_groups(self.view, self.groups, scale)


def fused_tokens(
    model: Any,
    image_processor: Any,
    images: Iterable[Image.Image],
    layer: int | None = None,
) -> list[FusedTokens]:
    """Run a model on images and return which of their patches it fused.

    If the processor's output has another size than the configuration's, position embeddings are
    interpolated. Pixels beyond the last whole patch are ignored.

    Args:
        model: model of this library, in evaluation mode.
        image_processor: image processor of the model.
        images: images of any size and mode.
        layer: zero-based layer whose output tokens are shown; unset, the last.

    Raises:
        ValueError: for a layer that the model lacks, or an image or image processor that the model
            cannot use.
    """
    layers = model.config.num_hidden_layers
    if layer is not None and layer not in range(layers):
        raise ValueError(
            f"layer={layer!r} is not allowed: the model has the layers 0 to {layers - 1}"
        )
    reader = ImageReader(image_processor, model.config.num_channels)
    seen = []
    for number, image in enumerate(images):
        pixel_values = reader(reader.admit(image, f"image {number}"))[None]
        by_layer = fused_by_layer(model, image_processor, pixel_values)
        seen.append(by_layer[-1 if layer is None else layer])
    return seen


@torch.inference_mode()
def fused_by_layer(model: Any, image_processor: Any, pixel_values: Tensor) -> list[FusedTokens]:
    """The fused tokens of one image after each layer of a model; see :func:`fused_tokens`.

    Args:
        pixel_values: (1, channels, height, width), output of the image processor.
    """
    config = model.config
    height, width = pixel_values.shape[-2:]
    output = model(
        pixel_values.to(model.device),
        interpolate_pos_encoding=(height, width) != as_pair(config.image_size),
        output_fusion=True,
    )
    rows, columns = config.grid((height, width))
    patch_height, patch_width = as_pair(config.patch_size)
    view = to_image(
        image_processor, pixel_values[0, :, : rows * patch_height, : columns * patch_width]
    )
    return [
        FusedTokens(
            view=view,
            groups=assignment[0, config.num_prefix_tokens :].view(rows, columns).cpu().numpy(),
            num_tokens=assignment.shape[1],
            tokens_left=int(assignment.max()) + 1,
        )
        for assignment in output.assignments
    ]


def draw_groups(image: Image.Image, groups: ArrayLike, scale: int | None = None) -> Image.Image:
    """Fill each group of patches with its mean colour and outline it.

    All regions of a group of several patches have a border of the same colour. The largest groups
    get the first ``BORDER_COLOURS``, which repeat if there are more groups. A single patch has a
    thin border, darker or lighter than the patch. Borders are inside their group. Dropped patches
    are black.

    Args:
        image: height x width pixels, multiples of rows and columns.
        groups: (rows, columns) integers, equal for the patches of one group, -1 for dropped ones.
        scale: side of the square that a pixel becomes; unset, the largest for which the picture's
            longer side is within ``DISPLAY_SIZE``, and at least 1.

    Returns:
        A picture of (height * scale) x (width * scale) pixels.

    Raises:
        ValueError: for a scale below 1, or an image size that rows and columns do not divide.
    """
    scale = _scale(image, scale)
    found = np.asarray(groups)
    if found.ndim != 2 or image.height % found.shape[0] or image.width % found.shape[1]:
        raise ValueError(
            f"groups of shape {found.shape} are not allowed for an image of {image.height} x "
            f"{image.width} pixels: they are rows and columns of patches that divide it"
        )
    rows, columns = found.shape
    patch = (image.height // rows, image.width // columns)
    labels = np.unique(found, return_inverse=True)[1].reshape(found.shape)
    sizes = np.bincount(labels.ravel())
    means = _mean_colours(np.asarray(image.convert("RGB")), labels, patch)

    on_canvas = _enlarged(labels, patch[0] * scale, patch[1] * scale)  # [height, width] * scale
    canvas = means.round().astype(np.uint8)[on_canvas]
    thin = _border(on_canvas, 1) & (sizes == 1)[on_canvas]
    canvas[thin] = _shades(means)[on_canvas[thin]]
    thick = _border(on_canvas, max(1, min(patch) * scale // 10)) & (sizes > 1)[on_canvas]
    canvas[thick] = _border_colours(sizes)[on_canvas[thick]]
    canvas[_enlarged(found, patch[0] * scale, patch[1] * scale) < 0] = 0
    return Image.fromarray(canvas)


def enlarge(image: Image.Image, scale: int | None = None) -> Image.Image:
    """Make each pixel a square, with the same scale as :func:`draw_groups`.

    Raises:
        ValueError: for a scale below 1.
    """
    scale = _scale(image, scale)
    size = (image.width * scale, image.height * scale)
    return image.resize(size, Image.Resampling.NEAREST)


def contact_sheet(captions: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Put pictures side by side, in columns with a caption on top.

    Args:
        captions: one per column, each of one or more lines.
        rows: pictures, one per column in each row.

    Returns:
        A picture. Each column is as wide as its widest cell and each row as high as its highest,
        with ``GAP`` pixels between and around the cells.

    Raises:
        ValueError: if there is nothing to show, or a row has more or fewer pictures than captions.
    """
    if not captions or not rows or any(len(row) != len(captions) for row in rows):
        raise ValueError(
            f"rows of {[len(row) for row in rows]} pictures are not allowed for {len(captions)} "
            "captions: each row has one picture per caption"
        )
    font = ImageFont.load_default(size=max(12, max(rows[0][0].size) // 24))
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [pen.multiline_textbbox((0, 0), caption, font=font) for caption in captions]
    columns = zip(*rows, strict=True)
    widths = [
        max(int(box[2]) + 1, *(picture.width for picture in column))
        for box, column in zip(boxes, columns, strict=True)
    ]
    heights = [max(int(box[3]) + 1 for box in boxes)]
    heights += [max(picture.height for picture in row) for row in rows]
    lefts, tops = (np.cumsum([GAP, *(side + GAP for side in sides)]) for sides in (widths, heights))

    sheet = Image.new("RGB", (int(lefts[-1]), int(tops[-1])), "white")
    pen = ImageDraw.Draw(sheet)
    for left, caption in zip(lefts[:-1], captions, strict=True):
        pen.multiline_text((int(left), GAP), caption, fill="black", font=font)
    for top, row in zip(tops[1:-1], rows, strict=True):
        for left, picture in zip(lefts[:-1], row, strict=True):
            sheet.paste(picture, (int(left), int(top)))
    return sheet


def _scale(image: Image.Image, scale: int | None) -> int:
    if scale is None:
        return max(1, DISPLAY_SIZE // max(image.size))
    if scale < 1:
        raise ValueError(f"scale={scale!r} is not allowed: it must be a whole number of at least 1")
    return scale


def _mean_colours(
    pixels: NDArray[np.uint8], labels: NDArray[np.int64], patch: tuple[int, int]
) -> NDArray[np.float64]:
    """Mean of each label's pixels: (height, width, 3), (rows, columns) -> (groups, 3)."""
    flat = _enlarged(labels, *patch).ravel()
    sums = [np.bincount(flat, weights=channel) for channel in pixels.reshape(-1, 3).T]
    return np.stack(sums, axis=1) / np.bincount(flat)[:, None]


def _enlarged(labels: NDArray[np.int64], height: int, width: int) -> NDArray[np.int64]:
    """Each label as a block of pixels: (rows, columns) -> (rows * height, columns * width)."""
    return labels.repeat(height, axis=0).repeat(width, axis=1)


def _border(labels: NDArray[np.int64], width: int) -> NDArray[np.bool_]:
    """Whether another label or the picture's edge is within ``width`` pixels, for each pixel."""
    height, length = labels.shape
    around = np.pad(labels, width, constant_values=-1)
    steps = (0, width, 2 * width)  # no patch is narrower, so no label lies between
    shifted = (around[y : y + height, x : x + length] for y in steps for x in steps)
    return np.logical_or.reduce([neighbours != labels for neighbours in shifted])


def _border_colours(sizes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Border colour of each group, largest group first: (groups,) -> (groups, 3)."""
    rank = np.empty_like(sizes)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return BORDER_COLOURS[rank % len(BORDER_COLOURS)]


def _shades(colours: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Make light colours darker and dark ones lighter, by a third: (groups, 3) -> (groups, 3)."""
    towards = np.where(colours.mean(axis=1, keepdims=True) < 128, 255, 0)
    return ((2 * colours + towards) / 3).round().astype(np.uint8)
