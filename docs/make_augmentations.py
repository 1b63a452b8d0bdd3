"""Draw the picture of all augmentations, applied to coloured handwritten digits.

``python docs/make_augmentations.py docs/augmentations.png`` draws it.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_modules.augmentation import FlipAndCrop
from lightning_modules.batch_augmentation import Mixing, Normalization, RandomErasing
from lightning_modules.labelled_images import DRAWS, as_bytes
from lightning_modules.rand_augment import OPERATIONS, RandAugment, operate, strength
from mctf_hf.files import replace

DIGITS = Path(__file__).parent.parent / "data" / "digits"
EDGE, GAP, LEFT, CAPTION = 64, 6, 140, 14
COLUMNS = 7
MAGNITUDES = (2, 4, 6, 8, 9, 10)
# The published recipe's policy with probability 1, so that every picture shows a change.
POLICY = "rand-m9-mstd0.5-inc1-p1"
NORMALIZATION = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Row:
    """Results of one augmentation: its name, images (n, 3, h, w) in [0, 1], a caption for each."""

    name: str
    images: Tensor
    captions: Sequence[str]


def coloured_digits() -> tuple[Tensor, Tensor]:
    """Digits 0, 1, … in warm colours on a background from blue to green.

    Returns:
        Images (COLUMNS, 3, EDGE, EDGE) uint8, and labels (COLUMNS,).
    """
    rows = load_dataset(str(DIGITS), split="test")
    labels = list(rows["label"])
    x, y = np.meshgrid(np.linspace(0, 1, EDGE), np.linspace(0, 1, EDGE))
    tiles = 25 * ((np.floor(8 * x) + np.floor(8 * y)) % 2)
    ground = tiles[..., None] + np.stack([60 + 40 * x, 70 + 100 * x, 160 - 90 * y], -1)
    ink = np.stack([250 - 40 * y, 210 - 120 * y, 110 - 40 * x], -1)
    images = []
    for digit in range(COLUMNS):
        picture = rows[labels.index(digit)]["image"].convert("L")
        share = np.asarray(picture.resize((EDGE, EDGE), Image.Resampling.BICUBIC))[..., None] / 255
        share = np.clip(3 * share - 1, 0, 1)  # edges on which sharpness has an effect
        mixed = np.clip(ground + (ink - ground) * share, 0, 255).astype(np.uint8)
        images.append(as_bytes(Image.fromarray(mixed)))
    return torch.stack(images), torch.arange(COLUMNS)


def augmented_rows(images: Tensor, labels: Tensor, seed: int = 0) -> Iterator[Row]:
    """Yield one row per augmentation of images (n, 3, h, w) uint8; ``seed`` sets the randomness."""
    count, edge = len(images), images.shape[-1]
    digit = images[3:4].float() / 255
    picture = Image.fromarray(images[3].permute(1, 2, 0).numpy())
    for crop in ("padded", "resized"):
        cropped = FlipAndCrop((edge, edge), crop, flip=True)
        crops = [as_bytes(cropped(picture, np.random.default_rng([seed, i]))) for i in range(count)]
        yield Row(f"{crop} crop, flip", torch.stack(crops).float() / 255, [""] * count)

    signs = np.resize([1.0, -1.0], len(MAGNITUDES))
    for name in OPERATIONS:
        strengths = strength(name, np.array(MAGNITUDES) / 10, signs, increasing=True)
        made = operate(name, digit.expand(len(strengths), -1, -1, -1), strengths)
        captions = [
            "original",
            *(f"m{m}: {s:.2f}" for m, s in zip(MAGNITUDES, strengths, strict=True)),
        ]
        if name in ("autocontrast", "equalize", "invert"):
            made, captions = made[:1], ["original", ""]
        yield Row(name, torch.cat([digit, made]), captions)

    generator = np.random.default_rng(seed)
    policy = RandAugment.parse(POLICY)
    made = policy(images.float() / 255, generator.random((count, policy.num_draws)))
    yield Row(POLICY, made, [""] * count)

    erasing = RandomErasing(probability=1.0)
    normalized = NORMALIZATION(images.float() / 255)
    erased = erasing(normalized.clone(), generator.random((count, erasing.num_draws)))
    yield Row("random erasing", _visible(erased), [""] * count)

    for name, mixing in (("mixup 0.8", Mixing(mixup=0.8)), ("cutmix 1.0", Mixing(cutmix=1.0))):
        draw = int(generator.integers(DRAWS)) / DRAWS
        mixed, shares = mixing(normalized, labels, draw, len(labels))
        yield Row(name, _visible(mixed), [_shares_text(row) for row in shares.tolist()])


def _visible(images: Tensor) -> Tensor:
    """Undo the normalisation of images and clip their values to [0, 1]."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (NORMALIZATION.mean, NORMALIZATION.std))
    return (images * std + mean).clamp(0, 1)


def _shares_text(shares: Sequence[float]) -> str:
    return " ".join(f"{label}:{share:.2f}" for label, share in enumerate(shares) if share > 0)


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """Draw the rows below each other, with names on the left and captions below the images."""
    line = EDGE + CAPTION + GAP
    size = (LEFT + COLUMNS * (EDGE + GAP) + GAP, GAP + len(rows) * line)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    small: Any = ImageFont.load_default(size=10)
    for number, row in enumerate(rows):
        top = GAP + number * line
        draw.multiline_text((GAP, top + EDGE // 3), row.name.replace("-inc", "\n-inc"), "black")
        for i, (image, caption) in enumerate(zip(row.images, row.captions, strict=True)):
            left = LEFT + i * (EDGE + GAP)
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels), (left, top))
            draw.text((left, top + EDGE + 1), caption, "black", font=small)
    return sheet


def main(file: str) -> None:
    """Write the contact sheet to a PNG file."""
    sheet = contact_sheet(list(augmented_rows(*coloured_digits())))
    replace(file, lambda path: sheet.save(path, optimize=True))


if __name__ == "__main__":
    main(sys.argv[1])
