"""Augmentation of whole batches: against Pillow, its range, what chance decides, label mixing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from transformers import DeiTImageProcessorPil, ViTImageProcessorPil

from lightning_modules.augmentation import FlipAndCrop
from lightning_modules.batch_augmentation import (
    BatchAugmentation,
    Mixing,
    Normalization,
    RandomErasing,
)
from lightning_modules.labelled_images import DRAWS
from lightning_modules.rand_augment import OPERATIONS, RandAugment, operate, strength
from tests.helpers import docs_script

POLICY = RandAugment.parse("rand-m9-mstd0.5-inc1")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A smooth picture of many colours, 37 x 41 pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (41, 37, 3)).astype(np.uint8)
    blurred = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))
    return ImageOps.autocontrast(blurred, cutoff=2)


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def affine(*matrix: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=(128,) * 3
    )


@pytest.mark.parametrize(
    ("name", "value", "pillow"),
    [
        ("autocontrast", 0, ImageOps.autocontrast),
        ("equalize", 0, ImageOps.equalize),
        ("invert", 0, ImageOps.invert),
        ("posterize", 1, lambda image: ImageOps.posterize(image, 1)),
        ("posterize", 4, lambda image: ImageOps.posterize(image, 4)),
        ("solarize", 26 / 255, lambda image: ImageOps.solarize(image, 26)),
        ("solarize", 256 / 255, lambda image: image),
        (
            "solarize_add",
            99 / 255,
            lambda image: image.point([min(255, i + 99) if i < 128 else i for i in range(256)] * 3),
        ),
        ("color", 1.81, lambda image: ImageEnhance.Color(image).enhance(1.81)),
        ("color", 0.19, lambda image: ImageEnhance.Color(image).enhance(0.19)),
        ("contrast", 1.81, lambda image: ImageEnhance.Contrast(image).enhance(1.81)),
        ("contrast", 0.19, lambda image: ImageEnhance.Contrast(image).enhance(0.19)),
        ("brightness", 1.81, lambda image: ImageEnhance.Brightness(image).enhance(1.81)),
        ("brightness", 0.19, lambda image: ImageEnhance.Brightness(image).enhance(0.19)),
        ("sharpness", 1.81, lambda image: ImageEnhance.Sharpness(image).enhance(1.81)),
        ("sharpness", 0.19, lambda image: ImageEnhance.Sharpness(image).enhance(0.19)),
        (
            "rotate",
            27,
            lambda image: image.rotate(27, Image.Resampling.BICUBIC, fillcolor=(128,) * 3),
        ),
        ("shear_x", -0.27, affine(1, -0.27, 0, 0, 1, 0)),
        ("shear_y", 0.27, affine(1, 0, 0, 0.27, 1, 0)),
        ("translate_x", 0.405, affine(1, 0, 0.405 * 37, 0, 1, 0)),
        ("translate_y", -0.405, affine(1, 0, 0, 0, 1, -0.405 * 41)),
    ],
)
def test_operations_do_what_pillow_does(
    name: str, value: float, pillow: Callable[[Image.Image], Image.Image], photo: Image.Image
) -> None:
    made = operate(name, as_tensor(photo), np.array([value]))
    off = (made - as_tensor(pillow(photo))).abs() * 255
    if name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        assert off.flatten().quantile(0.8) < 1.5  # borders are blended in another way
        assert (as_tensor(photo) - made).abs().mean() * 255 > 20
    else:
        assert off.max() < 1.5


def test_strengths_are_those_of_the_policy() -> None:
    def strengths(name: str, increasing: bool = True) -> list[float]:
        levels, signs = np.array([0.0, 0.9, 0.9, 1.0]), np.array([1.0, 1.0, -1.0, 1.0])
        return strength(name, levels, signs, increasing).round(3).tolist()

    assert strengths("rotate") == [0, 27, -27, 30]
    assert strengths("shear_x") == strengths("shear_y") == [0, 0.27, -0.27, 0.3]
    assert strengths("translate_x") == [0, 0.405, -0.405, 0.45]
    assert strengths("posterize") == [4, 1, 1, 0]
    assert strengths("posterize", increasing=False) == [0, 3, 3, 4]
    assert strengths("solarize") == [round(n / 255, 3) for n in (256, 26, 26, 0)]
    assert strengths("solarize", increasing=False) == [
        round(n / 255, 3) for n in (0, 230, 230, 256)
    ]
    assert strengths("solarize_add") == [round(n / 255, 3) for n in (0, 99, 99, 110)]
    for name in ("color", "contrast", "brightness", "sharpness"):
        assert strengths(name) == [1, 1.81, 0.19, 1.9]
        assert strengths(name, increasing=False) == [0.1, 1.72, 1.72, 1.9]


def test_an_image_is_changed_the_same_in_any_batch(photo: Image.Image) -> None:
    images = as_tensor(photo).repeat(40, 1, 1, 1) * torch.linspace(0.5, 1, 40)[:, None, None, None]
    draws = np.random.default_rng(1).random((40, POLICY.num_draws))
    whole = POLICY(images, draws)
    assert whole.min() >= 0 and whole.max() <= 1
    halves = [POLICY(images[part], draws[part]) for part in (slice(0, 7), slice(7, 40))]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=0, atol=1e-5)
    unchanged = (whole == images).flatten(1).all(1).float().mean()
    assert 0.05 < unchanged < 0.6  # a quarter, and what posterize or solarize leaves alone
    assert torch.equal(images[3], as_tensor(photo)[0] * torch.linspace(0.5, 1, 40)[3])


def test_each_operation_is_drawn_as_often_as_another() -> None:
    draws = np.random.default_rng(2).random((3000, POLICY.num_draws))
    chosen = np.floor(draws.reshape(-1, 4)[:, 0] * len(OPERATIONS)).astype(int)
    assert len(OPERATIONS) == 15
    assert (np.bincount(chosen, minlength=15) > 300).all()
    grey = torch.full((3000, 3, 2, 2), 0.25)
    inverted = np.zeros((3000, 1, 4))
    inverted[:, :, 0] = (OPERATIONS.index("invert") + 0.5) / 15
    inverted[:, 0, 1] = draws[:, 1]
    made = RandAugment(num_ops=1)(grey, inverted.reshape(3000, 4))
    assert 0.46 < (made[:, 0, 0, 0] == 0.75).float().mean() < 0.54


@pytest.mark.parametrize(
    "policy",
    ["rand-m9-mstd0.5-inc2", "rand-m11", "auto-m9", "rand-m9-x3", "rand-m9-m8", "rand-n1.5", ""],
)
def test_policies_that_do_not_exist_are_refused(policy: str) -> None:
    with pytest.raises(ValueError, match=f"rand_augment='{policy}' is not allowed"):
        RandAugment.parse(policy)


def test_policies_are_read() -> None:
    assert RandAugment.parse("rand-m9-mstd0.5-inc1") == RandAugment(9, 0.5, True, 2, 0.5)
    assert RandAugment.parse("rand-n3-p1-m5") == RandAugment(5, 0.0, False, 3, 1.0)


def test_a_quarter_of_the_images_is_erased_by_normal_noise() -> None:
    erasing, count = RandomErasing(0.25), 2000
    draws = np.random.default_rng(3).random((count, erasing.num_draws))
    made = erasing(torch.full((count, 3, 24, 32), 7.0), draws)
    gone = (made != 7).all(1)
    erased = gone.flatten(1).any(1)
    assert 0.22 < erased.float().mean() < 0.28
    noise = made.movedim(1, -1)[gone]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert len(noise.flatten().unique()) > 0.99 * noise.numel()  # each pixel, channel and image
    parts = gone.flatten(1).float().mean(1)[erased]
    assert parts.min() > 0.01 and 0.30 < parts.max() < 0.36
    for image in gone[erased][:50]:
        rows, columns = image.any(1).sum(), image.any(0).sum()
        assert image.sum() == rows * columns  # one rectangle
        assert 0.25 < rows / columns < 4
    assert gone.any(0).all()  # anywhere
    assert torch.equal(made, erasing(torch.full((count, 3, 24, 32), 7.0), draws))


def test_mixup_blends_images_and_labels_alike() -> None:
    images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 4, 4)
    labels = torch.arange(6)
    mixed, shares = Mixing(mixup=0.8)(images, labels, 0.3, 6)
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    torch.testing.assert_close(shares @ torch.arange(6.0), mixed[:, 0, 0, 0])
    assert (shares > 0).sum(1).tolist() == [2] * 6
    found = [Mixing(mixup=0.8)(images, labels, i / 400, 6)[1][0, 0].item() for i in range(400)]
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)
    assert np.var(found) == pytest.approx(0.25 / (2 * 0.8 + 1), abs=0.015)  # of Beta(0.8, 0.8)


def test_cutmix_gives_each_label_the_area_of_its_image() -> None:
    images = torch.arange(1, 5.0)[:, None, None, None].expand(4, 3, 20, 30).contiguous()
    for draw in np.linspace(0, 0.99, 50):
        mixed, shares = Mixing(cutmix=1.0)(images, torch.arange(4), float(draw), 4)
        areas = torch.stack([(mixed[:, 0] == i).float().mean((1, 2)) for i in range(1, 5)], 1)
        torch.testing.assert_close(shares, areas)
    assert images[0].unique().tolist() == [1]


def test_both_ways_of_mixing_are_used_half_of_the_time() -> None:
    images = torch.arange(2.0)[:, None, None, None].expand(2, 3, 8, 8)
    both, cuts = Mixing(mixup=0.8, cutmix=1.0), 0
    for i in range(400):
        mixed, _ = both(images, torch.arange(2), i / 400, 2)
        cuts += int(len(mixed[0].unique()) > 1 or mixed[0].max() in (0, 1))
    assert 150 < cuts < 250


def test_without_augmentation_a_batch_is_what_the_image_processor_makes(photo: Image.Image) -> None:
    size = {"height": 16, "width": 16}
    for processor in (
        ViTImageProcessorPil(size=size),
        DeiTImageProcessorPil(size=size, crop_size=12, image_mean=[0.1, 0.2, 0.3]),
        ViTImageProcessorPil(size=size, do_normalize=False),
        ViTImageProcessorPil(size=size, do_rescale=False, do_normalize=False),
    ):
        raw = processor(photo, return_tensors="pt", do_rescale=False, do_normalize=False)
        made, labels = BatchAugmentation(Normalization.of(processor), 10)(
            raw["pixel_values"], torch.tensor([3])
        )
        expected = processor(photo, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(made, expected.float(), rtol=1e-5, atol=1e-5)
        assert labels.tolist() == [3]


def test_a_seed_determines_a_batch() -> None:
    augment = BatchAugmentation(
        Normalization(mean=(0.5,) * 3, std=(0.5,) * 3),
        10,
        POLICY,
        RandomErasing(0.25),
        Mixing(mixup=0.8, cutmix=1.0),
    )
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(16) % 10

    def made(seed: int) -> tuple[Tensor, Tensor]:
        draws = np.random.default_rng(seed).integers(DRAWS, size=(16, augment.num_draws))
        return augment(images, labels, draws)

    first = made(0)
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, made(0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, made(1), strict=True))
    assert first[0].dtype == torch.float32 and first[0].isfinite().all()


def test_the_contact_sheet_shows_every_augmentation() -> None:
    script = docs_script("make_augmentations")
    rows = {row.name: row for row in script.augmented_rows(*script.coloured_digits())}
    assert rows.keys() >= {*OPERATIONS, "random erasing", "mixup 0.8", "cutmix 1.0"}
    for name, row in rows.items():
        assert row.images.min() >= 0 and row.images.max() <= 1, name
        different = {image.numpy().tobytes() for image in row.images}
        assert len(different) >= min(3, len(row.images)), name
    script.main("sheet.png")
    assert Image.open("sheet.png").height > 64 * len(rows)
    assert Path("sheet.png").stat().st_size > 50_000


def test_crops_come_from_their_generator_alone() -> None:
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    crop = FlipAndCrop((24, 24), "resized", flip=True)
    first = crop(image, np.random.default_rng([1, 2, 3]))
    np.random.seed(0)
    again = crop(image, np.random.default_rng([1, 2, 3, 0]))  # trailing zeros change no seed
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != crop(image, np.random.default_rng([1, 2, 3, 1])).tobytes()
