"""Folders of images are read as they are laid out, and what is not read is told."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from cli.main import main
from cli.paths import open_images
from lightning_modules.folders import open_image_folder
from lightning_modules.image_task import ImageTask
from lightning_modules.opening import NamedDataset
from tests.helpers import fails
from tests.image_sets import PNG, PROCESSOR, data_module


def plant(root: Path, *files: str) -> Path:
    """A folder with images of these names."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(PNG)
    return root


def seen(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """File and class of each image, by split."""
    opened = open_image_folder(folder)
    assert opened is not None
    found = {}
    for split, rows in opened.items():
        rows = rows.cast_column("image", ImageFeature(decode=False))
        labels = rows["label"] if "label" in rows.column_names else [""] * len(rows)
        files = [str(Path(row["path"]).relative_to(folder)) for row in rows["image"]]
        found[split] = list(zip(files, labels, strict=True))
    return found


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            ["train/a.png", "test/b.png", "plane/c.png"],
            {"train": [("plane/c.png", "plane"), ("test/b.png", "test"), ("train/a.png", "train")]},
        ),
        (
            ["test/a.png", "train/b.png"],
            {"train": [("test/a.png", "test"), ("train/b.png", "train")]},
        ),
        (
            ["cat/train_1.png", "cat/2.png", "dog/test.png"],
            {"train": [("cat/2.png", "cat"), ("cat/train_1.png", "cat"), ("dog/test.png", "dog")]},
        ),
        (
            ["train/cat/1.png", "val/cat/2.png", "val/dog/deep/3.png", "test/4.png"],
            {
                "test": [("test/4.png", "")],
                "train": [("train/cat/1.png", "cat")],
                "validation": [("val/cat/2.png", "cat"), ("val/dog/deep/3.png", "dog")],
            },
        ),
        (["1.png", "2.png"], {"train": [("1.png", ""), ("2.png", "")]}),
    ],
    ids=["classes called splits", "only such classes", "files called splits", "splits", "flat"],
)
@pytest.mark.parametrize("name", ["plain", "train [a] *b?"])
def test_names_mean_what_the_layout_says(
    name: str, files: list[str], expected: dict[str, Any], tmp_path: Path
) -> None:
    assert seen(plant(tmp_path / name, *files)) == expected


def test_what_is_both_splits_and_classes_is_refused(tmp_path: Path) -> None:
    plant(tmp_path, "train/cat/1.png", "plane/2.png")
    with pytest.raises(ValueError, match="holds train with subfolders, .* and plane: name all"):
        open_image_folder(tmp_path)
    plant(tmp_path / "twice", "val/cat/1.png", "valid/cat/2.png")
    with pytest.raises(ValueError, match="holds val, valid: two of them are one split"):
        open_image_folder(tmp_path / "twice")


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
def test_links_are_followed_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    folder = plant(
        tmp_path / "pets", "cat/1.png", "cat/._1.png", "stray.png", "dog/2.heic", ".x/y/3.png"
    )
    elsewhere = plant(tmp_path / "elsewhere", "3.png", "sub/4.png")
    (folder / "dog" / "link.png").symlink_to(elsewhere / "3.png")
    (folder / "fox").symlink_to(elsewhere / "sub")
    (folder / "dog" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "fox" / "around").symlink_to(folder)
    os.mkfifo(folder / "cat" / "pipe.png")
    (folder / "cat" / "notes.txt").write_text("of a cat")
    with pytest.warns(UserWarning, match="files are left out") as told:
        found = seen(folder)
    assert found == {"train": [("cat/1.png", "cat"), ("dog/link.png", "dog"), ("fox/4.png", "fox")]}
    for reason in ("1 HEIC", "2 hidden", "1 that are in no class", "1 that are links to nothing",
                   "1 that are links to a folder around", "1 that are no regular files",
                   "1 that are no images by their names"):  # fmt: skip
        assert reason in str(told[0].message)


def test_hidden_folders_that_nobody_may_read_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plant(tmp_path / "pets", "cat/1.png", ".Trash-0/2.png")
    scandir = os.scandir

    def refusing(path: Any) -> Any:  # root may read all
        if os.path.basename(path) == ".Trash-0":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert seen(folder) == {"train": [("cat/1.png", "cat")]}


def test_metadata_tells_the_classes(tmp_path: Path) -> None:
    folder = plant(tmp_path / "a", "img/1.png", "img/2.png", "img/3.png")
    (folder / "metadata.csv").write_text("file_name,label\nimg/2.png,dog\nimg/1.png,cat\n")
    with pytest.warns(UserWarning, match="1 that metadata.csv does not list"):
        assert seen(folder) == {"train": [("img/2.png", "dog"), ("img/1.png", "cat")]}
    split = plant(tmp_path / "b", "train/1.png", "test/2.png")
    for name, number in (("train", 1), ("test", 2)):
        row = {"file_name": f"{number}.png", "label": "cat", "weight": 2.5}
        (split / name / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert seen(split) == {"test": [("test/2.png", "cat")], "train": [("train/1.png", "cat")]}
    (folder / "metadata.csv").write_text("file_name,label\n../b/train/1.png,dog\n")
    with pytest.raises(ValueError, match=r"row 0 of .*metadata.csv: there is no image '\.\./b"):
        open_image_folder(folder)
    (folder / "metadata.csv").write_text("file,label\n1.png,dog\n")
    with pytest.raises(ValueError, match="metadata.csv has the columns file, label: it has a"):
        open_image_folder(folder)


def test_names_of_classes_are_the_models_where_it_has_them(tmp_path: Path) -> None:
    folder = plant(tmp_path / "pets", "cat/1.png", "dog/2.png", "dog/3.png")
    dataset = NamedDataset(str(folder))
    for known, all_of_them, expected, labels in (
        (["dog", "cat"], True, ["dog", "cat"], [1, 0, 0]),
        (["fox", "dog", "cat"], False, ["fox", "dog", "cat"], [2, 1, 1]),
        (["fox", "dog", "cat"], True, ["cat", "dog"], [0, 1, 1]),
        ([], False, ["cat", "dog"], [0, 1, 1]),
    ):
        task = ImageTask(PROCESSOR, 3, class_names=known)
        rows = dataset.rows("train", task, all_of_them=all_of_them)
        assert rows.label_names == expected and rows.labels.tolist() == labels


def test_labels_that_are_texts_are_the_same_classes_in_all_splits(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    features = Features({"img": ImageFeature(), "what": Value("string")})
    for split, names in {"train": ["b", "a", "c"], "test": ["c", "b"]}.items():
        images = [{"bytes": PNG, "path": None}] * len(names)
        rows = Dataset.from_dict({"img": images, "what": names}, features=features)
        rows.to_parquet(tmp_path / "set" / f"{split}.parquet")
    data = data_module(str(tmp_path / "set"), num_labels=3)
    data.setup("test")
    assert data.label_names == ["a", "b", "c"]
    assert data.test_dataloader().dataset.rows.labels.tolist() == [2, 1]
    assert next(iter(open_images(str(tmp_path / "set"), 2).values())).size == (20, 10)


def test_streams_of_folders(tmp_path: Path) -> None:
    dataset = NamedDataset(
        str(plant(tmp_path / "x", *(f"{c}/{i}.png" for c in "ba" for i in "12")))
    )
    stream = dataset.load("train", streaming=True)
    assert (stream.num_shards, stream.features["label"].names) == (4, ["a", "b"])
    assert sorted(row["label"] for row in stream) == [0, 0, 1, 1]
    many = NamedDataset(str(plant(tmp_path / "many", *(f"{i % 2}/{i}.png" for i in range(200)))))
    (first, *_) = many.load("train", streaming=True).shard(8, 0).batch(25)
    assert 5 < sum(first["label"]) < 20  # no shard is one class
    assert dataset.count("train") == 4


def test_the_sizes_of_splits_are_told_at_the_start(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = plant(tmp_path / "train [1]", *(f"{c}/{i}.png" for c in "abc" for i in range(8)))
    words = [
        "--model.pretrained", str(tiny_folder), "--data.dataset", str(folder),
        "--data.num_workers", "0", "--trainer.accelerator", "cpu", "--trainer.logger", "false",
        "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    words += ["--model.num_labels", "3", "--model.r", "4", "--data.batch_size", "8"]
    words += ["--trainer.max_epochs", "1", "--export.folder", "out", "--summary.enabled", "false"]
    main(["fit", *words])
    assert "train: 22 images of 3 classes" in caplog.text
    assert "val: 2 images of" in caplog.text
    assert json.loads(Path("out/config.json").read_text())["id2label"] == {
        "0": "a",
        "1": "b",
        "2": "c",
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "a.csv").write_text("a,b\n1,2\n3,4,5\n"), "Expected 2 fields"),
        (lambda folder: (folder / "a.parquet").write_text("PAR1 and rubbish"), "magic bytes"),
    ],
    ids=["csv", "parquet"],
)
def test_an_unreadable_dataset_tells_its_cause(
    make: Any, message: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    make(tmp_path / "set")
    words = ["visualize", f"{tiny_folder},r=4", "--images", str(tmp_path / "set")]
    line = fails([*words, "--output", "x.png"], capsys)
    assert "set' can't be read: " in line and message in line


def test_a_folder_without_classes_is_told_what_it_lacks(tmp_path: Path) -> None:
    folder = plant(tmp_path / "flat", "1.png", "2.png")
    with pytest.raises(ValueError, match="label_column is not set, .* has a subfolder for each"):
        data_module(str(folder)).setup("fit")


def test_images_without_a_name_are_asked_for(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["visualize", f"{tiny_folder},r=4", "--images", "", "--output", "x.png"]
    assert "images='' is not allowed: name an image" in fails(words, capsys)
