"""RandAugment of whole batches on any device (arXiv 1909.13719), in the variant that DeiT uses.

Images are (b, 3, height, width) with values from 0 to 1. Operations and strengths are those of
timm's policy, but on floats: nothing is rounded to bytes between two operations.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import kornia.enhance
import numpy as np
import torch
from kornia.geometry.transform import warp_affine
from numpy.typing import NDArray
from torch import Tensor

GREY = (0.5, 0.5, 0.5)
HIGHEST = 10.0


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Changes each image by random operations, which may repeat.

    Args:
        magnitude: strength of the operations, from 0 to 10.
        std: standard deviation of the magnitude, which is drawn for each operation.
        increasing: whether a higher magnitude makes every operation stronger.
        num_ops: number of operations per image.
        probability: probability of applying a chosen operation.
    """

    magnitude: float = 9
    std: float = 0.0
    increasing: bool = False
    num_ops: int = 2
    probability: float = 0.5

    @classmethod
    def parse(cls, policy: str) -> "RandAugment":
        """Read a policy such as ``rand-m9-mstd0.5-inc1``; the defaults include ``n2`` and ``p0.5``.

        Raises:
            ValueError: for text of any other form.
        """
        first, *parts = policy.split("-")
        found = [re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", part) for part in parts]
        given = {match[1]: float(match[2]) for match in found if match}
        settings = {"m": 9.0, "mstd": 0.0, "inc": 0.0, "n": 2.0, "p": 0.5, **given}
        fine = (
            first == "rand"
            and len(given) == len(parts)
            and settings["m"] <= HIGHEST
            and settings["inc"] in (0, 1)
            and settings["n"] >= 1
            and settings["n"].is_integer()
            and settings["p"] <= 1
        )
        if not fine:
            raise ValueError(
                f"rand_augment={policy!r} is not allowed: it must be 'rand' and what differs from "
                "-m9 (magnitude, 0 to 10), -mstd0 (its standard deviation), -inc0 (1: every "
                "operation gets stronger with it), -n2 (operations) and -p0.5 (their probability), "
                "such as rand-m9-mstd0.5-inc1"
            )
        return cls(
            magnitude=settings["m"],
            std=settings["mstd"],
            increasing=settings["inc"] == 1,
            num_ops=int(settings["n"]),
            probability=settings["p"],
        )

    @property
    def num_draws(self) -> int:
        """Number of random numbers per image: choice, application, magnitude, sign."""
        return 4 * self.num_ops

    def __call__(
        self, images: Tensor, draws: NDArray[np.float64], fill: Sequence[float] = GREY
    ) -> Tensor:
        """Augment a batch.

        Args:
            images: (b, 3, height, width) in [0, 1].
            draws: (b, ``num_draws``), uniform in [0, 1), the only source of randomness.
            fill: colour of the area outside the image.
        """
        images = images.clone()
        for choice, apply, normal, sign in draws.T.reshape(self.num_ops, 4, len(images)):
            chosen = (choice * len(OPERATIONS)).astype(int)
            spread = torch.special.ndtri(torch.from_numpy(normal.clip(2.0**-53))).numpy()
            levels = np.clip(self.magnitude + self.std * spread, 0, HIGHEST) / HIGHEST
            signs = np.where(sign < 0.5, -1.0, 1.0)
            for number, name in enumerate(OPERATIONS):
                (where,) = np.nonzero((chosen == number) & (apply < self.probability))
                if len(where):
                    strengths = strength(name, levels[where], signs[where], self.increasing)
                    index = on_device(where, images.device)
                    images[index] = operate(name, images[index], strengths, fill)
        return images


def on_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy numbers to a tensor on the device, without waiting for the device."""
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def strength(
    name: str, levels: NDArray[np.float64], signs: NDArray[np.float64], increasing: bool
) -> NDArray[np.float64]:
    """Arguments of an operation (degrees, factors, …) for magnitudes in [0, 1] with signs."""
    if name == "rotate":
        return 30 * levels * signs
    if name.startswith("shear"):
        return 0.3 * levels * signs
    if name.startswith("translate"):
        return 0.45 * levels * signs
    if name == "posterize":
        bits = np.floor(4 * levels)
        return 4 - bits if increasing else bits
    if name == "solarize":
        threshold = np.floor(256 * levels)
        return (256 - threshold if increasing else threshold) / 255
    if name == "solarize_add":
        return np.floor(110 * levels) / 255
    if name in ("color", "contrast", "brightness", "sharpness"):
        return np.maximum(0.1, 1 + 0.9 * levels * signs) if increasing else 1.8 * levels + 0.1
    return levels  # of autocontrast, equalize and invert, which do not use it


def operate(
    name: str, images: Tensor, strengths: NDArray[np.float64], fill: Sequence[float] = GREY
) -> Tensor:
    """Apply one operation to a batch, each image with its own strength."""
    values = on_device(strengths, images.device, images.dtype)
    if name in AFFINE:
        height, width = images.shape[-2:]
        matrices = [AFFINE[name](value, height, width) for value in strengths.tolist()]
        return _warp(images, np.array(matrices), fill)
    return PIXELWISE[name](images, values).clamp(0, 1)


def _warp(images: Tensor, matrices: NDArray[np.float64], fill: Sequence[float]) -> Tensor:
    """Warp by matrices (b, 2, 3), which map output pixels to input pixels.

    The coordinates of a pixel are those of its centre, which is 0.5 for the first pixel.
    """
    corners = matrices.copy()
    corners[:, :, 2] += matrices[:, :, :2].sum(2) / 2 - 0.5  # now centres are at integers
    last = np.broadcast_to([[[0.0, 0.0, 1.0]]], (len(corners), 1, 3))
    forward = np.linalg.inv(np.concatenate([corners, last], 1))[:, :2]
    return warp_affine(
        images,
        on_device(forward, images.device, images.dtype),
        (images.shape[-2], images.shape[-1]),
        mode="bicubic",
        padding_mode="fill",
        fill_value=on_device(fill, images.device, images.dtype),
    ).clamp(0, 1)


def _rotation(degrees: float, height: int, width: int) -> list[list[float]]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]]


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low), images)


def _solarize_add(images: Tensor, additions: Tensor) -> Tensor:
    return torch.where(images < 128 / 255, images + additions[:, None, None, None], images)


# [[a, b, c], [d, e, f]]: output pixel (x, y) is the input pixel (ax + by + c, dx + ey + f).
AFFINE: dict[str, Callable[[float, int, int], list[list[float]]]] = {
    "rotate": _rotation,
    "shear_x": lambda factor, height, width: [[1, factor, 0], [0, 1, 0]],
    "shear_y": lambda factor, height, width: [[1, 0, 0], [factor, 1, 0]],
    "translate_x": lambda part, height, width: [[1, 0, part * width], [0, 1, 0]],
    "translate_y": lambda part, height, width: [[1, 0, 0], [0, 1, part * height]],
}

PIXELWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": _autocontrast,
    "equalize": lambda images, _: kornia.enhance.equalize(images),
    "invert": lambda images, _: 1 - images,
    "posterize": lambda images, bits: kornia.enhance.posterize(images, bits.long()),
    "solarize": kornia.enhance.solarize,
    "solarize_add": _solarize_add,
    "color": kornia.enhance.adjust_saturation_with_gray_subtraction,
    "contrast": kornia.enhance.adjust_contrast_with_mean_subtraction,
    "brightness": kornia.enhance.adjust_brightness_accumulative,
    "sharpness": kornia.enhance.sharpness,
}

OPERATIONS = (*PIXELWISE, *AFFINE)
