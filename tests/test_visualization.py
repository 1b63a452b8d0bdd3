"""Pictures of fused tokens, and ``mctf visualize`` that draws them side by side."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from cli.models import load
from cli.paths import open_images
from cli.visualize import main
from mctf_hf.visualization import (
    BORDER_COLOURS,
    DISPLAY_SIZE,
    GAP,
    contact_sheet,
    draw_groups,
    enlarge,
    fused_tokens,
)
from tests.helpers import DIGITS, SHARED, needs_shared, tiny_model

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
CHECKPOINT = "checkpoints/deit-tiny-cifar10"


@pytest.fixture
def photos() -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def test_mean_colours_and_borders_of_an_assignment_made_by_hand() -> None:
    image = np.zeros((4, 8, 3), np.uint8)  # patches of 2 x 2 pixels
    image[..., 2] = 10
    image[:2, :2, 0], image[:2, 2:4, 0], image[2:, :2, 0], image[:2, 6:, 0] = 20, 40, 60, 83
    image[0, 4:6, 1], image[1, 4:6, 1], image[2:, 4:6, 1] = 100, 200, 203
    image[2:, 2:4] = (9, 12, 15)
    image[2:, 6:] = (200, 220, 210)
    groups = np.array([[7, 7, 2, 7], [7, 5, 2, 5]])
    groups[1, 3] = 9
    picture = np.asarray(draw_groups(Image.fromarray(image), groups, scale=10))

    expected = np.zeros((40, 80, 3), np.uint8)  # a patch is 20 x 20 pixels, a border 2
    for colour, mean, corners in (
        (BORDER_COLOURS[0], (51, 0, 10), [(0, 0, 20, 40), (0, 0, 40, 20), (0, 60, 20, 80)]),
        (BORDER_COLOURS[1], (0, 176, 10), [(0, 40, 40, 60)]),  # 176.5, to the even one
    ):
        for top, left, bottom, right in corners:
            expected[top:bottom, left:right] = colour
        for top, left, bottom, right in corners:
            expected[top + 2 : bottom - 2, left + 2 : right - 2] = mean
    expected[20:40, 20:40] = ((2 * 9 + 255) / 3, (2 * 12 + 255) / 3, (2 * 15 + 255) / 3)
    expected[21:39, 21:39] = (9, 12, 15)
    expected[20:40, 60:80] = np.round([2 * 200 / 3, 2 * 220 / 3, 2 * 210 / 3])
    expected[21:39, 61:79] = (200, 220, 210)
    assert np.array_equal(picture, expected)


def test_the_scale_that_fits_the_display() -> None:
    for width, height, scale in ((32, 32, 14), (224, 224, 2), (128, 64, 3), (512, 512, 1)):
        image = Image.new("RGB", (width, height))
        assert draw_groups(image, np.zeros((4, 4), int)).size == (width * scale, height * scale)
        assert enlarge(image).size == (width * scale, height * scale)
    enlarged = np.asarray(enlarge(Image.fromarray(np.array([[0, 200]], np.uint8)), 3))
    assert enlarged.tolist() == [[0, 0, 0, 200, 200, 200]] * 3


def test_no_two_border_colours_are_alike() -> None:
    colours = BORDER_COLOURS.astype(int)
    distances = np.abs(colours[:, None] - colours).sum(-1) + 1000 * np.eye(len(colours), dtype=int)
    assert distances.min() > 60


@pytest.mark.parametrize(
    "settings", [{"r": 8}, {"r": 0.3, "fusion_layers": [2, 3]}, {"r": 9, "reduction": "tome"}]
)
def test_a_real_run_is_filled_with_the_means_of_its_groups(settings: dict[str, Any]) -> None:
    model = tiny_model(**settings)
    digits = [*open_images(DIGITS, 3).values()]
    for image, seen in zip(digits, fused_tokens(model, PROCESSOR, digits), strict=True):
        with torch.no_grad():
            output = model(**PROCESSOR(image, return_tensors="pt"), output_fusion=True)
        assert (seen.num_tokens, seen.tokens_left) == (65, output.token_sizes.shape[1])
        assert output.assignment[0, 0] not in seen.groups  # the class token is not drawn
        assert len(np.unique(seen.groups)) == seen.tokens_left - 1

        pixels = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), float)
        assert np.array_equal(np.asarray(seen.view), pixels)
        picture = np.asarray(seen.picture(scale=10))
        of_patch = output.assignment[0, 1:].tolist()
        for patch, group in enumerate(of_patch):
            members = [other for other, its in enumerate(of_patch) if its == group]
            cut = [pixels[m // 8 * 4 :][:4, m % 8 * 4 :][:, :4] for m in members]
            centre = picture[patch // 8 * 40 + 20, patch % 8 * 40 + 20]
            assert np.abs(np.mean(cut, axis=(0, 1, 2)) - centre).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fusion_layers": [0, 2, 4]},
        {"one_step_ahead": "past"},
        {"reduction": "tome"},
    ],
)
def test_after_a_layer_is_as_if_no_later_one_fused(
    settings: dict[str, Any], photos: list[Image.Image]
) -> None:
    model = tiny_model(r=7, **settings)
    counts = model.config.tokens_fused(65)
    for layer in range(5):
        until = [*counts[: layer + 1], *[0] * (4 - layer)]
        shorter = tiny_model(**{**settings, "r": until})
        for seen, other in zip(
            fused_tokens(model, PROCESSOR, photos[:2], layer),
            fused_tokens(shorter, PROCESSOR, photos[:2]),
            strict=True,
        ):
            assert seen.tokens_left == 65 - sum(until)
            assert np.array_equal(seen.groups, other.groups)
            assert seen.picture(3).tobytes() == other.picture(3).tobytes()

    pixel_values = PROCESSOR(photos[:1], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assignment = model(pixel_values, output_fusion=True).assignment
    for layer in (None, 4):
        last = fused_tokens(model.vit, PROCESSOR, photos[:1], layer)[0]
        assert last.groups.ravel().tolist() == assignment[0, 1:].tolist()
    assert model.config.r == 7


def test_a_plain_model_leaves_all_patches_alone(photos: list[Image.Image]) -> None:
    seen = fused_tokens(tiny_model(reduction="none"), PROCESSOR, photos, layer=3)[0]
    assert (seen.num_tokens, seen.tokens_left) == (65, 65)
    assert len(np.unique(seen.groups)) == 64


def test_images_of_other_sizes(photos: list[Image.Image]) -> None:
    processor = ViTImageProcessorPil(size={"shortest_edge": 35})
    wide = photos[0].resize((70, 49), Image.Resampling.BICUBIC)
    seen, square = fused_tokens(tiny_model(r=8), processor, [wide, photos[1].convert("L")])
    assert (seen.groups.shape, seen.view.size, seen.num_tokens) == ((8, 12), (48, 32), 97)
    resized = wide.resize((50, 35), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(seen.view), np.asarray(resized)[:32, :48])
    assert (square.groups.shape, square.view.size) == ((8, 8), (32, 32))


def test_images_and_patches_that_are_not_square(photos: list[Image.Image]) -> None:
    model = tiny_model(image_size=[16, 32], patch_size=[2, 8], r=6)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 32})
    seen = fused_tokens(model, processor, photos)[0]
    assert (seen.groups.shape, seen.view.size) == ((8, 4), (32, 16))
    assert seen.picture(10).size == (320, 160)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
        {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
    ],
)
def test_the_view_undoes_the_processors_scaling(
    settings: dict[str, Any], photos: list[Image.Image]
) -> None:
    size = 40 if "crop_size" in settings else 32
    processor = ViTImageProcessorPil(size={"height": size, "width": size}, **settings)
    view = fused_tokens(tiny_model(), processor, photos[:1])[0].view
    resized = np.asarray(photos[0].resize((size, size), Image.Resampling.BILINEAR))
    edge = (size - 32) // 2
    assert np.array_equal(np.asarray(view), resized[edge : edge + 32, edge : edge + 32])


def test_a_contact_sheet_has_each_picture_in_its_place() -> None:
    reds = [Image.new("RGB", (60, 40), (250, shade, 0)) for shade in (10, 20, 30, 40)]
    reds[3] = Image.new("RGB", (80, 50), (250, 40, 0))
    sheet = np.asarray(contact_sheet(["a", "b\nof two lines"], [reds[:2], reds[2:]]))
    width = sheet.shape[1] - 3 * GAP - 60
    assert width >= 80
    bottom, right = sheet.shape[0] - GAP, GAP + 60 + GAP
    for picture, top, left in zip(
        reds,
        [bottom - 50 - GAP - 40] * 2 + [bottom - 50] * 2,
        [GAP, right] * 2,
        strict=True,
    ):
        cell = sheet[top : top + picture.height, left : left + picture.width]
        assert np.array_equal(cell, np.asarray(picture))
    is_red = (sheet == [250, 10, 0]).all(-1) | (sheet[..., 0] == 250) & (sheet[..., 2] == 0)
    assert is_red.sum() == 3 * 60 * 40 + 80 * 50
    captions = sheet[: bottom - 50 - GAP - 40 - GAP]
    assert (captions[:, :right] < 100).any() and (captions[:, right:] < 100).any()
    assert (sheet[:GAP] == 255).all() and (sheet[:, -GAP:] == 255).all()


def test_a_long_caption_widens_its_column() -> None:
    picture = Image.new("RGB", (32, 32))
    narrow, wide = contact_sheet(["a"], [[picture]]), contact_sheet(["a" * 40], [[picture]])
    assert narrow.width == 32 + 2 * GAP
    assert wide.width > 200
    assert (np.asarray(wide)[:, -GAP:] == 255).all()


def test_a_folder_of_images_side_by_side(
    tiny_folder: Path, photos: list[Image.Image], capsys: pytest.CaptureFixture
) -> None:
    Path("photos").mkdir()
    for number, photo in enumerate(photos):
        photo.save(f"photos/{number}.png")
    models = [f"{tiny_folder},r=6", f"{tiny_folder},r=12,reduction=tome"]
    main([*models, "--images", "photos", "--count", "3", "--output", "o.png", "--scale", "9"])

    rows = [[enlarge(photo, 9)] for photo in photos]
    for words in models:
        model, processor = load(words)
        for row, seen in zip(rows, fused_tokens(model, processor, photos), strict=True):
            row.append(seen.picture(9))
    captions = ["r=6: 65 -> 41 tokens", "r=12,reduction=tome: 65 -> 10 tokens"]
    sheet = contact_sheet(["original", *(text.replace(": ", "\n") for text in captions)], rows)
    with Image.open("o.png") as written:
        assert written.width == 3 * 9 * 32 + 4 * GAP
        assert written.format == "PNG" and written.size == sheet.size
        assert np.array_equal(np.asarray(written), np.asarray(sheet))
    assert capsys.readouterr().out.splitlines() == [
        *captions,
        "shown: photos/0.png; photos/1.png; photos/2.png",
        "wrote o.png",
    ]
    assert {path.name for path in Path().iterdir()} == {"o.png", "photos"}


def test_the_images_of_a_sorted_folder_are_of_all_its_classes() -> None:
    for label in "abcd":
        Path("set", label).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8)).save(f"set/{label}/{number}.png")
    assert [Path(name).parts[-2:] for name in open_images("set", 4)] == [
        (label, "0.png") for label in "abcd"
    ]
    assert list(open_images(DIGITS, 2)) == [
        f"row {row} of {DIGITS}, split test" for row in (0, 250)
    ]


def test_a_dataset_after_a_layer(tiny_folder: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--images", DIGITS, "--output", "o.png", "--count", "2", "--layer", "2"]
    main([f"{tiny_folder},r=6", str(tiny_folder), *options])
    with Image.open("o.png") as written:
        assert written.width >= 3 * DISPLAY_SIZE + 4 * GAP
        assert written.height - 2 * DISPLAY_SIZE in range(4 * GAP, 100)
    assert capsys.readouterr().out.splitlines()[:2] == [
        "r=6: 65 -> 53 tokens after layer 2",
        "tiny-vit: 65 -> 65 tokens after layer 2",
    ]


def test_one_image_file_and_models_of_two_names(
    tiny_folder: Path, photos: list[Image.Image], capsys: pytest.CaptureFixture
) -> None:
    photos[0].save("a.png")
    tiny_model(r=4).save_pretrained("saved")
    PROCESSOR.save_pretrained("saved")
    main(["saved", f"{tiny_folder},r=6", "--images", "a.png", "--output", "o.png"])
    assert capsys.readouterr().out.splitlines() == [
        "saved: 65 -> 49 tokens",
        f"{tiny_folder},r=6: 65 -> 41 tokens",
        "shown: a.png",
        "wrote o.png",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "5"], "layer=5 is not allowed: the model has the layers 0 to 4"),
        (["--layer", "-1"], "layer=-1 is not allowed: the model has the layers 0 to 4"),
        (["--count", "0"], "count=0 is not allowed: it must be at least 1"),
        (["--count", "9999"], "has 500 images, not the 9999 that are needed"),
        (["--scale", "0"], "scale=0 is not allowed: it must be at least 1"),
        (["--output", "o.jpg"], "o.jpg is not allowed: the file's name ends in .png"),
        (["--output", "no/o.png"], "no/o.png cannot be written: its folder does not exist"),
        (["--images", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_mistakes_are_told(tiny_folder: Path, options: list[str], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message) as error:
        main([f"{tiny_folder},r=6", "--images", DIGITS, "--output", "o.png", *options])
    assert "\n" not in str(error.value)
    assert not list(Path().iterdir())


def test_mistakes_of_models_are_told(tiny_folder: Path) -> None:
    tiny_model(image_size=64).save_pretrained("larger")
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained("larger")
    for words, message in (
        ([f"{tiny_folder},speed=9"], "setting 'speed' of '.*' is not known: it must be one of"),
        ([f"{tiny_folder},reduction=none,r=8"], "r=8 has no effect with reduction='none'"),
        (
            [f"{tiny_folder},r=8", "larger"],
            "larger sees an image as 64 x 64 pixels, .*,r=8 as 32 x 32: all models of a",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            main([*words, "--images", DIGITS, "--output", "o.png"])
    assert not Path("o.png").exists()


def test_mistakes_of_drawing_are_told(photos: list[Image.Image]) -> None:
    for groups in (np.zeros((5, 8), int), np.zeros((8, 5), int), np.zeros(64, int)):
        with pytest.raises(ValueError, match="groups of shape .* 32 x 32 pixels"):
            draw_groups(photos[0], groups)
    with pytest.raises(ValueError, match="scale=0 is not allowed"):
        draw_groups(photos[0], np.zeros((8, 8), int), scale=0)
    for rows in ([], [photos[:2], photos]):
        with pytest.raises(ValueError, match="are not allowed for 2 captions"):
            contact_sheet(["a", "b"], rows)


@needs_shared(CHECKPOINT)
@needs_shared("data/cifar10")
def test_groups_of_a_trained_model_follow_the_image() -> None:
    model, processor = load(f"{SHARED / CHECKPOINT},r=3")
    random = np.random.default_rng(0)
    for seen in fused_tokens(
        model, processor, open_images(str(SHARED / "data/cifar10"), 8).values()
    ):
        colours = np.asarray(seen.view, float).reshape(8, 4, 8, 4, 3).mean((1, 3)).reshape(64, 3)
        errors = []
        for groups in (seen.groups.ravel(), random.permutation(seen.groups.ravel())):
            members = [colours[groups == group] for group in np.unique(groups)]
            errors.append(sum(((its - its.mean(0)) ** 2).sum() for its in members))
        assert errors[0] < 0.4 * errors[1]
