"""Augmentation and normalisation of whole batches of training images on the model's device.

Workers decode, crop and flip the images. They output bytes, (b, channels, height, width) uint8,
and random integers for each image (``draws``). The result depends only on these, not on the process
that computes it or on earlier batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .labelled_images import DRAWS
from .rand_augment import GREY, RandAugment, on_device


@dataclass(frozen=True)
class Normalization:
    """Normalisation of an image processor: scale pixels, subtract a mean, divide by a deviation.

    Mean and deviation contain one number per channel, or one number for all channels.
    """

    scale: float = 1 / 255
    mean: Sequence[float] = (0.0, 0.0, 0.0)
    std: Sequence[float] = (1.0, 1.0, 1.0)

    @classmethod
    def of(cls, processor: Any) -> "Normalization":
        """Normalisation of an image processor of transformers."""
        scale = processor.rescale_factor if processor.do_rescale else 1.0
        if not processor.do_normalize:
            return cls(scale)
        mean, std = (
            tuple(value) if isinstance(value, Sequence) else (value,)  # one for all channels
            for value in (processor.image_mean, processor.image_std)
        )
        return cls(scale, mean, std)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images (b, channels, height, width) with values in [0, 1]."""
        mean, std = (
            on_device(values, images.device, images.dtype)[:, None, None]
            for values in (self.mean, self.std)
        )
        return (images * (255 * self.scale) - mean) / std


@dataclass(frozen=True)
class RandomErasing:
    """Replaces a rectangle by normal noise (mean 0, deviation 1) for each pixel and channel.

    arXiv 1708.04896. The rectangle covers 2% to a third of the image at an aspect ratio of 0.3 to
    1/0.3. If none of ten random rectangles fits into the image, the image is not changed.

    Args:
        probability: probability of changing an image.
    """

    probability: float

    TRIES = 10
    num_draws = 4 + 2 * TRIES

    def boxes(
        self, draws: NDArray[np.float64], height: int, width: int
    ) -> list[tuple[int, int, int, int] | None]:
        """Top, left, height and width of the erased rectangle of each image, or None.

        Args:
            draws: (b, ``num_draws``) random numbers, uniform in [0, 1).
        """
        apply, top, left, _ = draws.T[:4]
        area, aspect = draws[:, 4:].reshape(len(draws), 2, self.TRIES).swapaxes(0, 1)
        pixels = (0.02 + (1 / 3 - 0.02) * area) * height * width
        ratio = np.exp((2 * aspect - 1) * np.log(1 / 0.3))
        heights, widths = np.rint(np.sqrt(pixels * ratio)), np.rint(np.sqrt(pixels / ratio))
        fits = (heights < height) & (widths < width)
        found: list[tuple[int, int, int, int] | None] = []
        for i in range(len(draws)):
            if apply[i] >= self.probability or not fits[i].any():
                found.append(None)
                continue
            h, w = int(heights[i, fits[i].argmax()]), int(widths[i, fits[i].argmax()])
            found.append((int(top[i] * (height - h + 1)), int(left[i] * (width - w + 1)), h, w))
        return found

    def __call__(self, images: Tensor, draws: NDArray[np.float64]) -> Tensor:
        """Erase rectangles of normalised images (b, channels, height, width) in place."""
        generator = torch.Generator(images.device)
        for i, box in enumerate(self.boxes(draws, *images.shape[-2:])):
            if box is not None:
                top, left, h, w = box
                generator.manual_seed(int(draws[i, 3] * DRAWS))
                images[i, :, top : top + h, left : left + w].normal_(generator=generator)
        return images


@dataclass(frozen=True)
class Mixing:
    """Mixes each image and its label with those at the mirrored position of the batch.

    Mixup (arXiv 1710.09412) blends two images. Cutmix (arXiv 1905.04899) copies a rectangle of the
    other image. If both are on, each batch uses one of them at random. The share of the image
    itself is drawn from Beta(alpha, alpha), once per batch.

    Args:
        mixup: alpha of mixup; 0 turns it off.
        cutmix: alpha of cutmix; 0 turns it off.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    num_draws = 1

    def __call__(
        self, images: Tensor, labels: Tensor, draw: float, num_labels: int
    ) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: (b, channels, height, width).
            labels: (b,) int64, or (b, num_labels) floats.
            draw: random number in [0, 1), the only source of randomness.
            num_labels: number of classes.

        Returns:
            Mixed images and labels (b, num_labels). Integer labels become probabilities.
        """
        generator = np.random.default_rng(int(draw * DRAWS))
        cut = generator.random() < 0.5 if self.mixup and self.cutmix else self.cutmix > 0
        alpha = self.cutmix if cut else self.mixup
        share = float(generator.beta(alpha, alpha))
        others = images.flip(0)
        if cut:
            height, width = images.shape[-2:]
            top, bottom = _window(height, (1 - share) ** 0.5, generator)
            left, right = _window(width, (1 - share) ** 0.5, generator)
            images = images.clone()
            images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            images = share * images + (1 - share) * others
        one_hot = labels
        if not labels.is_floating_point():
            one_hot = F.one_hot(labels, num_labels).to(images.dtype)
        return images, share * one_hot + (1 - share) * one_hot.flip(0)


def _window(length: int, part: float, generator: np.random.Generator) -> tuple[int, int]:
    """Start and end of a window around a random centre, clipped at the borders."""
    size, centre = int(length * part), int(generator.integers(length))
    return max(0, centre - size // 2), min(length, centre + size // 2)


@dataclass(frozen=True)
class BatchAugmentation:
    """Applies RandAugment, normalisation, random erasing and mixing, in this order.

    Args:
        normalization: normalisation of the model's image processor.
        num_labels: number of the model's classes.
    """

    normalization: Normalization
    num_labels: int
    rand_augment: RandAugment | None = None
    random_erasing: RandomErasing | None = None
    mixing: Mixing | None = None

    @property
    def num_draws(self) -> int:
        """Number of random integers below ``DRAWS`` for each image."""
        parts = (self.mixing, self.random_erasing, self.rand_augment)
        return sum(part.num_draws for part in parts if part is not None)

    @torch.no_grad()
    def __call__(
        self, images: Tensor, labels: Tensor, draws: NDArray[np.int64] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Augment and normalise a batch.

        Args:
            images: (b, channels, height, width) uint8.
            labels: (b,) int64, or (b, num_labels) floats.
            draws: (b, ``num_draws``) random integers, or None if ``num_draws`` is 0.

        Returns:
            Images as float32, and labels; with mixing, as :class:`Mixing` returns them.
        """
        images = images.float() / 255
        chance = np.zeros((len(images), 0)) if draws is None else draws / DRAWS
        mixing, erasing, changing = np.split(chance, self._ends(), axis=1)
        if self.rand_augment is not None:
            mean = self.normalization.mean
            fill = mean if any(mean) else GREY[: images.shape[1]]
            images = self.rand_augment(images, changing, fill)
        images = self.normalization(images)
        if self.random_erasing is not None:
            images = self.random_erasing(images, erasing)
        if self.mixing is not None:
            return self.mixing(images, labels, mixing[0, 0], self.num_labels)
        return images, labels

    def _ends(self) -> list[int]:
        mixing = 0 if self.mixing is None else self.mixing.num_draws
        erasing = 0 if self.random_erasing is None else self.random_erasing.num_draws
        return [mixing, mixing + erasing]
