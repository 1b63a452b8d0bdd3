"""Random flips and crops of single images, before the model's own image processor."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

Crop = Literal["none", "padded", "resized"]


@dataclass(frozen=True)
class FlipAndCrop:
    """Crops and flips one image at random. The random numbers come from the given generator.

    Args:
        size: (height, width) of the cropped image in pixels.
        crop: ``"none"`` does not crop or resize; ``"padded"`` resizes, pads every side with black
            by an eighth and cuts out a random window, as is common for small images; ``"resized"``
            cuts out 8 to 100% of the area at an aspect ratio of 3/4 to 4/3 and resizes this window
            (Inception crop, arXiv 1409.4842), as is common for ImageNet.
        flip: whether to mirror the image with probability 1/2.
        resample: PIL filter for resizing.
    """

    size: tuple[int, int]
    crop: Crop = "none"
    flip: bool = False
    resample: int = Image.Resampling.BICUBIC

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        height, width = self.size
        resample = Image.Resampling(self.resample)
        if self.crop == "resized":
            box = _random_box(image.width, image.height, generator)
            image = image.resize((width, height), resample, box=box)
        elif self.crop == "padded":
            image = image.resize((width, height), resample)
            pad_x, pad_y = width // 8, height // 8
            image = ImageOps.expand(image, (pad_x, pad_y))
            left = int(generator.integers(2 * pad_x + 1))
            top = int(generator.integers(2 * pad_y + 1))
            image = image.crop((left, top, left + width, top + height))
        if self.flip and generator.random() < 0.5:
            image = ImageOps.mirror(image)
        return image


def _random_box(
    width: int, height: int, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """Random window of an image: (left, top, right, bottom) in pixels.

    If none of ten random windows fits, use the largest central one with an allowed aspect ratio.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = width * height * generator.uniform(0.08, 1)
        ratio = math.exp(generator.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.integers(width - w + 1))
            top = int(generator.integers(height - h + 1))
            return left, top, left + w, top + h
    widest, highest = min(width, height * 4 / 3), min(height, width * 4 / 3)
    return (
        (width - widest) / 2,
        (height - highest) / 2,
        (width + widest) / 2,
        (height + highest) / 2,
    )
