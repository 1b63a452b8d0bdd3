"""Images of real datasets and folders: what is read, what is refused, what chance decides."""

import io
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image
from sklearn.datasets import load_digits
from transformers import DeiTImageProcessorPil

from cli.main import main
from lightning_modules import HFImageDataModule, MCTFFinetuner
from lightning_modules.augmentation import FlipAndCrop
from lightning_modules.image_task import ImageTask
from lightning_modules.labels import NOT_COUNTED
from lightning_modules.sampling import ResumableSampler
from mctf_hf.images import decode, read_image
from tests.helpers import DIGITS
from tests.image_sets import BROKEN, PNG, PROCESSOR, data_module, encoded, write_dataset


def test_the_digits_are_those_of_scikit_learn() -> None:
    digits = load_digits()
    known = {
        image.tobytes(): label
        for image, label in zip(
            np.round(digits.images * 255 / 16).astype(np.uint8), digits.target, strict=True
        )
    }
    splits = load_dataset(DIGITS)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1297, "test": 500}
    for rows in splits.values():
        for row in rows:
            assert known[np.asarray(row["image"]).tobytes()] == row["label"]


def test_batches_of_a_dataset() -> None:
    data = data_module(batch_size=50, eval_batch_size=100)
    data.setup("fit")
    assert data.label_names == list("0123456789")
    train, val = data.train_dataloader().dataset, data.val_dataloader().dataset
    assert (len(train), len(val)) == (1167, 130)
    assert not set(train.indices) & set(val.indices)
    batches = list(data.train_dataloader())
    assert len(batches) == 23  # the last, incomplete one is left out
    assert batches[0]["pixel_values"].shape == (50, 3, 32, 32)
    assert batches[0]["labels"].dtype == torch.int64
    assert sum(len(batch["labels"]) for batch in data.val_dataloader()) == 130
    data.setup("test")
    assert sum(len(batch["labels"]) for batch in data.test_dataloader()) == 500


def test_evaluation_sees_what_the_image_processor_returns() -> None:
    data = data_module()
    data.setup("test")
    row = load_dataset(DIGITS, split="test")[17]
    expected = PROCESSOR(row["image"].convert("RGB"), return_tensors="pt")["pixel_values"][0]
    item = data.test_dataloader().dataset[17]
    assert torch.equal(item["pixel_values"], expected)
    assert item["labels"] == row["label"]


def test_images_of_any_mode_are_converted(tmp_path: Path) -> None:
    grey = Image.new("L", (20, 10), 77)
    palette = Image.new("RGB", (20, 10), (200, 100, 50)).convert("P")
    transparent = Image.new("RGBA", (20, 10), (200, 100, 50, 128))
    images = [grey, palette, transparent, Image.new("1", (20, 10)), Image.new("CMYK", (8, 8))]
    rows = [(encoded(image, "tiff" if image.mode == "CMYK" else "png"), 0) for image in images]
    data = data_module(write_dataset(tmp_path / "set", rows), val_split="train", batch_size=5)
    data.setup("fit")
    (batch,) = data.val_dataloader()
    assert batch["pixel_values"].shape == (5, 3, 32, 32)
    levels = (batch["pixel_values"].mean((2, 3)) * 0.5 + 0.5) * 255
    assert levels[0].tolist() == pytest.approx([77] * 3, abs=1)
    assert levels[2].tolist() == pytest.approx([200, 100, 50], abs=1)


def test_an_image_folder(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (40, 30)).save(tmp_path / "pets" / name / f"{i}.jpg")
    data = data_module(str(tmp_path / "pets"), num_labels=2, val_fraction=0.2)
    data.setup("fit")
    assert data.label_names == ["cats", "dogs"]
    assert (len(data.train_dataloader().dataset), len(data.val_dataloader().dataset)) == (16, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_by_its_row(workers: int, tmp_path: Path) -> None:
    jpeg = encoded(Image.effect_noise((64, 64), 50), "jpeg")
    rows = [(PNG, 0), (PNG, 1), (jpeg[: len(jpeg) // 2], 0), (PNG, 1)]
    folder = write_dataset(tmp_path / "set", rows)
    data = data_module(folder, val_split="train", num_workers=workers)
    data.setup("fit")
    with pytest.raises(ValueError, match=f"row 2 of {folder}, split train holds no readable image"):
        list(data.val_dataloader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_column": "img"}, "image_column='img': .* has the columns photo, kind, weight"),
        ({"label_column": "y"}, "label_column='y': .* has the columns photo, kind, weight"),
        ({"label_column": "photo"}, "label_column='photo' .* labels are integers"),
        (
            {"label_column": "weight"},
            "numbers, but problem_type=single_label_classification: set",
        ),
        ({"image_column": "kind"}, "image_column='kind' .* it is to hold images"),
        ({"train_split": "training"}, "has no split 'training': it has train"),
        ({"val_split": "dev"}, "has no split 'dev': it has train"),
        ({"num_labels": 1}, "row 1 of .* has the label 1: the model has the classes 0 to 0"),
    ],
)
def test_what_does_not_fit_is_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "set", [(PNG, 0), (PNG, 1)])
    with pytest.raises(ValueError, match=message):
        data_module(folder, **settings).setup("fit")


def test_columns_that_cannot_be_guessed_are_asked_for(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "set", [(PNG, 4), (PNG, 5)], label=Value("int64"))
    with pytest.raises(
        ValueError, match="label_column is not set, .* 0 columns of type ClassLabel"
    ):
        data_module(folder).setup("fit")
    data = data_module(folder, label_column="kind", val_split="train")
    data.setup("fit")
    assert data.label_names is None
    assert [item["labels"] for item in data.val_dataloader().dataset] == [4, 5]
    with pytest.raises(ValueError, match="row 0 of .* has the label 4"):
        data_module(folder, label_column="kind", num_labels=4).setup("fit")
    with pytest.raises(ValueError, match="dataset is not set"):
        data_module(None).setup("fit")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        data_module("/nowhere").setup("fit")


def test_prediction_takes_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "photos" / "more").mkdir(parents=True)
    Image.new("L", (40, 30)).save(tmp_path / "photos" / "b.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "photos" / "more" / "a.JPG", "jpeg")
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    data = data_module(None, predict_folder=str(tmp_path / "photos"))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert [Path(file).name for file in batch["files"]] == ["b.png", "a.JPG"]
    (tmp_path / "photos" / "c.png").write_bytes(PNG[:50])  # its head is whole
    data.setup("predict")
    with pytest.raises(ValueError, match="c.png holds no readable image"):
        list(data.predict_dataloader())
    for folder, message in ((None, "is not set"), (str(tmp_path / "no"), "no such folder")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            data_module(None, predict_folder=folder).setup("predict")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        data_module(None, predict_folder=str(tmp_path / "empty")).setup("predict")


def test_prediction_has_no_shards_of_weights() -> None:
    data = data_module(None, predict_folder=".")
    data.trainer.strategy = ModelParallelStrategy()
    with pytest.raises(ValueError, match="ModelParallelStrategy is not allowed for prediction"):
        data.setup("predict")


def test_order_and_augmentation_follow_from_seed_and_epoch() -> None:
    def epochs(seed: int) -> list[torch.Tensor]:
        data = data_module(batch_size=64, crop="padded", flip=True, seed=seed)
        data.setup("fit")
        loader = data.train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            found.append(next(iter(loader))["pixel_values"])
        return found

    first, second = epochs(1)
    assert all(torch.equal(a, b) for a, b in zip(epochs(1), (first, second), strict=True))
    assert not torch.equal(first, second)
    assert not torch.equal(first, epochs(2)[0])


def test_a_resumed_epoch_begins_where_it_was_left() -> None:
    data = data_module(batch_size=64)
    data.setup("fit")
    whole = [batch["labels"] for batch in data.train_dataloader()]
    data.trainer.fit_loop.epoch_loop.batch_progress.current.ready = 11
    rest = [batch["labels"] for batch in data.train_dataloader()]
    assert len(rest) == len(whole) - 11
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[11:], strict=True))


@pytest.mark.parametrize("crop", ["none", "padded", "resized"])
def test_crops_keep_size_and_range(crop: str) -> None:
    image = Image.effect_noise((50, 37), 80).convert("RGB")
    augment = FlipAndCrop((24, 32), crop, flip=True)
    results = {augment(image, np.random.default_rng(seed)).tobytes() for seed in range(20)}
    size = (50, 37) if crop == "none" else (32, 24)
    assert augment(image, np.random.default_rng(0)).size == size
    assert len(results) == 2 if crop == "none" else len(results) > 15


def test_half_of_the_images_are_mirrored() -> None:
    image = Image.new("L", (2, 1))
    image.putpixel((0, 0), 255)
    augment = FlipAndCrop((1, 2), flip=True)
    generator = np.random.default_rng(0)
    mirrored = sum(augment(image, generator).getpixel((1, 0)) == 255 for _ in range(1000))
    assert 450 < mirrored < 550


def test_a_crop_of_a_very_long_image_is_its_middle() -> None:
    image = Image.new("L", (1000, 4))
    image.paste(255, (490, 0, 510, 4))
    crops = [
        np.asarray(FlipAndCrop((8, 8), "resized")(image, np.random.default_rng(seed)))
        for seed in range(200)
    ]
    assert max(crop.min() for crop in crops) == 255


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"random_erasing": 1.5}, "random_erasing=1.5"),
        ({"mixup": -1.0}, "mixup=-1.0"),
        ({"repeated_augmentation": 0}, "repeated_augmentation=0"),
        ({"rand_augment": "m9"}, "rand_augment='m9'"),
        ({"repeated_augmentation": 3, "streaming": True}, "repeated_augmentation=3"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} is not allowed"):
        HFImageDataModule(DIGITS, **settings)


def test_rows_without_image_or_label_are_named(tmp_path: Path) -> None:
    features = Features({"photo": ImageFeature(), "kind": ClassLabel(names=["a", "b"])})
    images = [{"bytes": PNG, "path": None}] * 3

    def write(name: str, **columns: Any) -> str:
        (tmp_path / name).mkdir()
        rows = Dataset.from_dict({"photo": images, "kind": [0, 1, 0], **columns}, features=features)
        rows.to_parquet(tmp_path / name / "train.parquet")
        return str(tmp_path / name)

    data = data_module(write("imageless", photo=[images[0], None, images[0]]), val_split="train")
    data.setup("fit")
    with pytest.raises(ValueError, match="row 1 of .* has no image"):
        list(data.val_dataloader())
    with pytest.raises(ValueError, match="row 2 of .* has no label"):
        data_module(write("unlabelled", kind=[0, 1, None]), val_split="train").setup("fit")
    with pytest.raises(ValueError, match="val_fraction=0.9 leaves none of the 3 rows"):
        data_module(write("small"), val_fraction=0.9).setup("fit")


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    photo = Image.new("RGB", (40, 20))
    photo.paste((255, 255, 255), (0, 0, 20, 20))
    orientation = Image.Exif()
    orientation[0x0112] = 6  # the camera was held sideways: turn by 90 degrees clockwise
    photo.save(tmp_path / "photo.jpg", exif=orientation)
    upright = read_image(tmp_path / "photo.jpg")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[0] > 250 and upright.getpixel((10, 35))[0] < 5


def test_a_copy_of_an_image_is_augmented_in_another_way() -> None:
    def batches(rank: int, world_size: int, done: int = 0) -> list[dict[str, Any]]:
        data = data_module(
            batch_size=12, crop="resized", repeated_augmentation=3, random_erasing=0.25
        )
        data.trainer.world_size, data.trainer.global_rank = world_size, rank
        data.trainer.fit_loop.epoch_loop.batch_progress.current.ready = done
        data.setup("fit")
        return list(data.train_dataloader())

    alone = batches(0, 1)
    assert len(alone) == 97  # as without: 1167 images, twelve at a time
    for batch in alone[:3]:
        assert (batch["labels"].reshape(4, 3) == batch["labels"][::3, None]).all()
        images = batch["pixel_values"].reshape(4, 3, -1)
        assert not (images[:, 0] == images[:, 1]).all(1).any()
        assert len({tuple(draws) for draws in batch["draws"].tolist()}) == 12
    shared = [batches(rank, 3) for rank in range(3)]
    for number in range(5):  # a global batch is the same images, and no process has two copies
        parts = [batch["draws"] for part in shared for batch in part[number : number + 1]]
        whole = torch.cat([batch["draws"] for batch in alone[3 * number : 3 * number + 3]])
        assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole)
    assert torch.equal(batches(0, 1, done=40)[0]["draws"], alone[40]["draws"])


def test_an_epoch_with_copies_sees_a_third_of_the_images() -> None:
    seen = [
        Counter(
            index
            for rank in range(2)
            for _, index, _ in ResumableSampler(
                range(101), num_replicas=2, rank=rank, shuffle=True, seed=epoch, repeats=3
            )
        )
        for epoch in range(2)
    ]
    assert all(sum(counts.values()) == 102 and set(counts.values()) == {3} for counts in seen)
    assert set(seen[0]) != set(seen[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_skipped_and_counted(workers: int, tmp_path: Path) -> None:
    rows = [(PNG, i % 2) for i in range(20)]
    for row, data in zip((3, 7, 8, 19), BROKEN, strict=True):
        rows[row] = (data, 1)
    folder = write_dataset(tmp_path / "set", rows)
    data = data_module(
        folder,
        val_split="train",
        batch_size=5,
        eval_batch_size=4,
        num_workers=workers,
        on_bad_image="skip",
    )
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [5, 5, 5, 5]
    assert sum(int(batch["skipped"].sum()) for batch in batches) == 4
    labels = torch.cat([batch["labels"] for batch in batches])
    assert labels.sum() == 10 - 3 + 2  # rows 4, 9 twice for 3, 7 and 8; row 0 for 19
    evaluated = list(data.val_dataloader())
    counted = [int((batch["labels"] != NOT_COUNTED).sum()) for batch in evaluated]
    assert counted == [3, 3, 3, 4, 3]
    assert [int(batch["skipped"].sum()) for batch in evaluated] == [1, 1, 1, 0, 1]
    if not workers:
        with pytest.warns(UserWarning, match="row 7 of .* holds no readable image: .*: skipped"):
            data.train_dataloader().dataset[7]


def test_a_set_of_nothing_but_broken_images_is_an_error(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "set", [(data, 0) for data in BROKEN])
    data = data_module(folder, val_split="train", on_bad_image="skip", batch_size=2)
    data.setup("fit")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of the 4 images of"):
        next(iter(data.train_dataloader()))
    with pytest.warns(UserWarning):
        batches = list(data.val_dataloader())
    assert [batch["labels"].tolist() for batch in batches] == 2 * [2 * [NOT_COUNTED]]
    assert [batch["skipped"].tolist() for batch in batches] == 2 * [[1, 1]]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_training_logs_how_many_images_it_skipped(
    precision: str, tiny_folder: Path, tmp_path: Path
) -> None:
    rows = [(PNG, i % 2) for i in range(12)]
    rows[5] = rows[6] = (BROKEN[0], 0)
    folder = write_dataset(tmp_path / "set", rows)
    data = HFImageDataModule(
        folder,
        val_split="train",
        batch_size=4,
        num_workers=0,
        rand_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.5,
        mixup=0.8,
        on_bad_image="skip",
    )
    module = MCTFFinetuner(str(tiny_folder), r=6, num_labels=2)
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    with pytest.warns(UserWarning, match="row 5 of .*: skipped"):
        trainer.fit(module, data)
    assert trainer.callback_metrics["train/skipped_images"] == 2
    assert trainer.callback_metrics["val/skipped_images"] == 2
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_the_input_pipeline_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["benchmark-data", "--data.dataset", DIGITS, "--data.batch_size", "16"]
    command += ["--data.num_workers", "0", "--image_size", "16", "--warmup", "1"]
    main([*command, "--data.random_erasing", "0.5", "--batches", "2"])
    speeds = re.findall(r"(normalize|batches) +│ +([\d,]+) ", capsys.readouterr().out)
    assert [name for name, _ in speeds] == ["normalize", "batches"]
    assert all(int(speed.replace(",", "")) > 1 for _, speed in speeds)
    with pytest.raises(SystemExit):
        main([*command, "--batches", "0"])
    assert "batches=0 is not allowed: it must be at least 1" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_worker_is_one_clear_error(
    tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {child.pid for child in multiprocessing.active_children()}

    def kill_one() -> None:
        while not (own := {child.pid for child in multiprocessing.active_children()} - before):
            time.sleep(0.05)
        os.kill(own.pop(), signal.SIGKILL)

    words = [
        "fit",
        "--model.pretrained",
        str(tiny_folder),
        "--model.r",
        "6",
        "--data.dataset",
        DIGITS,
    ]
    words += ["--data.num_workers", "2", "--data.batch_size", "8", "--trainer.accelerator", "cpu"]
    words += ["--trainer.max_epochs", "200", "--trainer.logger", "false"]
    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with pytest.raises(SystemExit):
        main(words)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "mctf: error:" in line]
    assert "a process that loads images has died (DataLoader worker (pid" in line
    assert "use fewer num_workers" in line


def test_processors_that_crop_give_their_crop_in_training_too() -> None:
    processor = DeiTImageProcessorPil(size={"height": 256, "width": 256}, crop_size=224)
    for crop in ("none", "resized", "padded"):
        data = data_module(crop=crop)
        data.open("fit", ImageTask(processor, 10))
        assert data.train_dataloader().dataset[0]["pixel_values"].shape == (3, 224, 224)
        assert data.val_dataloader().dataset[0]["pixel_values"].shape == (3, 224, 224)


def test_sixteen_bits_keep_their_upper_half_and_numbers_without_an_end_are_refused() -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for kind in ("png", "tiff"):
        found = np.asarray(read_image(io.BytesIO(encoded(Image.fromarray(ramp), kind))))
        assert found.shape == (16, 16, 3)
        assert (found == np.arange(256).reshape(16, 16, 1)).all()
    shifted = Image.fromarray(np.full((4, 4), 0xFF00, dtype=np.uint16))
    assert (np.asarray(read_image(io.BytesIO(encoded(shifted)))) == 255).all()
    grey = b"P5 2 1 65535\n\x80\x00\xff\x00"
    assert np.asarray(read_image(io.BytesIO(grey)))[0, :, 0].tolist() == [128, 255]
    for mode in ("I", "F"):
        stored = {"bytes": encoded(Image.new(mode, (4, 4)), "tiff"), "path": None}
        refused = f"row 3 .*: mode {mode} does not define what is white"
        with pytest.raises(ValueError, match=refused):
            decode(stored, "row 3")
