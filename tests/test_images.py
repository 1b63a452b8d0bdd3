"""Images of every kind, through every command that takes images: seen alike, or refused alike."""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTConfig, ViTForImageClassification

from cli.main import main
from cli.paths import open_images
from lightning_modules.image_task import ImageTask
from mctf_hf.hub import load_image_processor, save
from mctf_hf.images import ImageReader
from tests.helpers import TINY, fails, predict_words, tiny_model
from tests.image_sets import JPEG, PNG, data_module, encoded, write_dataset


@pytest.fixture(scope="module")
def keeps_ratio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose processor makes the shorter edge 256 pixels and crops then."""
    folder = tmp_path_factory.mktemp("ratio") / "vit"
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**{**TINY, "num_labels": 10})).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 256}, crop_size=32).save_pretrained(folder)
    return folder


def test_an_image_that_would_fill_the_memory_is_refused_before(
    keeps_ratio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    long = tmp_path / "photos" / "long.png"
    Image.new("L", (1, 60_000)).save(long)
    assert long.stat().st_size < 400
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = "60000 x 1 pixels, of which the image processor would make 15,360,000 x 256"
    assert f"{long} has {told}" in fails(predict_words(keeps_ratio, tmp_path / "photos"), capsys)
    words = ["visualize", f"{keeps_ratio},r=4", "--images", str(long), "--output", "x.png"]
    assert told in fails(words, capsys)
    Image.new("L", (40, 60)).save(tmp_path / "photos" / "small.png")
    words = ["--data.on_bad_image", "skip", "--predictions.path", "p.jsonl"]
    with pytest.warns(UserWarning, match=f"{told}: .*: skipped"):
        main(predict_words(keeps_ratio, tmp_path / "photos", *words))
    rows = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert [bool(row["error"]) for row in rows] == [True, False]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500 * 1024  # of KiB


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_would_fill_the_memory_is_named_and_can_be_skipped(
    streaming: bool, keeps_ratio: Path, tmp_path: Path
) -> None:
    long = encoded(Image.new("L", (1, 60_000)))
    folder = write_dataset(tmp_path / "set", [(PNG, 0), (long, 1), (PNG, 1)])
    for choice in ("error", "skip"):
        data = data_module(folder, val_split="train", streaming=streaming, on_bad_image=choice)
        task = ImageTask(load_image_processor(str(keeps_ratio)), num_labels=2)
        data.trainer.lightning_module.task = task
        data.trainer.current_epoch = 0
        data.setup("validate")
        if choice == "error":
            with pytest.raises(ValueError, match="row 1 .*has 60000 x 1 pixels, of which"):
                list(data.val_dataloader())
        else:
            with pytest.warns(UserWarning, match="60000 x 1 pixels"):
                (batch,) = data.val_dataloader()
            assert batch["skipped"].tolist() == [0, 1, 0]


BOMBS = {"beyond Pillow's limit": (20_000, 10_000), "where Pillow warns": (10_000, 9_500)}


@pytest.mark.parametrize("size", BOMBS.values(), ids=BOMBS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_named_by_every_command(
    size: tuple[int, int], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    bomb = tmp_path / "set" / "a" / "bomb.png"
    Image.new("1", size).save(bomb)
    model = f"{tiny_folder},r=4"
    commands = [
        ["visualize", model, "--images", str(bomb), "--output", "x.png"],
        ["visualize", model, "--images", str(tmp_path / "set"), "--output", "x.png"],
        ["benchmark", model, "--images", str(bomb), "--batch_sizes", "[1]"],
        ["export", model, "--images", str(tmp_path / "set"), "--output", "x.pt2"],
        ["sweep", str(tiny_folder), "--images", str(tmp_path / "set")],
        ["push", model, "org/x", "--license", "mit", "--picture", str(bomb), "--dry-run", "d"],
        predict_words(tiny_folder, tmp_path / "set"),
    ]
    for words in commands:
        line = fails(words, capsys)
        assert "bomb.png" in line and "pixels" in line, line


def test_a_truncated_image_is_named_by_its_file(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.jpg").write_bytes(JPEG[: len(JPEG) // 2])
    words = ["visualize", f"{tiny_folder},r=4", "--images", str(tmp_path / "cut.jpg")]
    assert "cut.jpg holds no readable image: image file is truncated" in fails(
        [*words, "--output", "x.png"], capsys
    )


def test_a_folder_and_a_file_show_the_same_pixels(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    file = tmp_path / "photos" / "one.png"
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(file)
    for source in (file, tmp_path / "photos"):
        (image,) = open_images(str(source), 1).values()
        assert (np.asarray(image) == np.arange(256).reshape(16, 16, 1)).all()
    orientation = Image.Exif()
    orientation[0x0112] = 6
    file.unlink()
    Image.new("RGB", (40, 20)).save(tmp_path / "photos" / "one.jpg", exif=orientation)
    (image,) = open_images(str(tmp_path / "photos"), 1).values()
    assert image.size == (20, 40)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_an_end_are_refused_in_a_folder_too(
    mode: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.tiff").write_bytes(encoded(Image.new(mode, (8, 8), 3), "tiff"))
    words = ["visualize", f"{tiny_folder},r=4", "--images", str(tmp_path / "photos")]
    line = fails([*words, "--output", "x.png"], capsys)
    assert "a.tiff" in line and f"mode {mode} does not define what is white" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size={'height': 0, 'width': 0} of the image processor is not allowed"),
        ({"size": {"height": 10**6, "width": 9}}, "edges have 1 to 2560 pixels"),
        ({"size": "large"}, "can't be made: Could not convert size input to size dict: large"),
        ({"do_center_crop": True, "crop_size": None}, "do_center_crop=True, and no crop_size"),
        ({"image_mean": {}}, "image_mean={} of the image processor is not allowed"),
        ({"image_std": [0, 1, 1]}, "image_std=(0, 1, 1) of the image processor is not allowed"),
    ],
)
def test_settings_of_a_processor_by_which_nothing_can_be_seen(
    settings: dict[str, Any], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    stored = json.loads((tiny_folder / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored | settings))
    with pytest.raises(ValueError) as refused:
        load_image_processor(str(tmp_path))
    assert message in str(refused.value)


def shades(folder: Path) -> Path:
    """Two classes of grey images."""
    for name, level in (("dark", 60), ("light", 200)):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            Image.new("L", (20, 20), level + i).save(folder / name / f"{i}.png")
    return folder


def scratch(num_channels: int) -> list[str]:
    """Words of a training from scratch."""
    config = {
        "image_size": 16, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 2, "num_labels": 2, "min_tokens": 2,
        "num_channels": num_channels,
    }  # fmt: skip
    return [
        "fit", "--model.config", json.dumps(config), "--model.r", "3", "--data.num_workers", "0",
        "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.logger", "false",
        "--trainer.enable_progress_bar", "false", "--summary.enabled", "false",
    ]  # fmt: skip


def test_grey_models_are_trained_and_used(tmp_path: Path) -> None:
    folder = shades(tmp_path / "set")
    main([
        *scratch(1), "--data.dataset", str(folder), "--data.batch_size", "4",
        "--data.crop", "padded", "--data.rand_augment", "rand-m9-mstd0.5-n9-p1",
        "--data.random_erasing", "0.5", "--data.mixup", "0.8", "--picture.every_n_epochs", "1",
        "--export.folder", "model",
    ])  # fmt: skip
    settings = json.loads(Path("model", "preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.5]
    main([*predict_words("model", folder), "--predictions.path", "p.jsonl"])
    rows = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and {row["label"] for row in rows} <= {"dark", "light"}
    words = ["visualize", "model", "--images", str(folder), "--count", "1", "--scale", "1"]
    main([*words, "--output", "x.png"])
    pixels = np.asarray(Image.open("x.png"))
    assert ((pixels == 60).all(-1)).sum() >= 16 * 16  # the original, at least
    words = ["push", "model", "org/x", "--license", "mit", "--rounds", "1", "--dry-run", "draft"]
    main([*words, "--dataset", str(folder), "--split", "train", "--picture", str(folder)])
    assert 'Image.open("photo.jpg").convert("L")' in Path("draft", "README.md").read_text()


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_a_split_without_readable_images_is_named(
    command: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shades(tmp_path / "set" / "train")
    for name in ("val/dark", "val/light", "test/dark", "test/light"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "0.png").write_text("no image")
    words = [*scratch(3), "--data.dataset", str(tmp_path / "set"), "--data.on_bad_image", "skip"]
    if command != "fit":
        save(tiny_model(num_labels=2), load_image_processor(str(tiny_folder)), "model")
        rest = words[words.index("--data.num_workers") :]
        unused = rest.index("--summary.enabled")
        words = [command, "--model.pretrained", "model", *rest[:unused], *rest[unused + 2 :]]
    stage = "test" if command == "test" else "val"
    with pytest.warns(UserWarning, match="skipped"):
        assert f"{stage}: none of the images can be read" in fails(words, capsys)


@pytest.mark.parametrize("num_channels", [4, 10])
def test_images_of_other_channels_are_an_error_at_the_start(
    num_channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*scratch(num_channels), "--data.dataset", str(shades(tmp_path / "set"))]
    assert f"num_channels={num_channels} is not allowed where image files are read" in fails(
        words, capsys
    )


def test_a_processor_of_other_channels_than_the_models_is_an_error(
    tiny_folder: Path,
) -> None:
    processor = load_image_processor(str(tiny_folder))
    with pytest.raises(ValueError, match="image_mean=.* not allowed: the model has num_channels=1"):
        ImageReader(processor, 1)
    processor.resample = 99
    with pytest.raises(ValueError, match="ViTImageProcessorPil can't be used: Unknown resampling"):
        ImageReader(processor)
    processor.image_mean, processor.image_std, processor.do_convert_rgb = 0.5, 0.5, True
    with pytest.raises(ValueError, match="do_convert_rgb=True of the image processor"):
        ImageReader(processor, 1)
