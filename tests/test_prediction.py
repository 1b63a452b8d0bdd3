"""``mctf predict``: every file has its rows, whatever lies in the folder."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

from cli.main import main
from lightning_modules.predictions import PredictionFile
from mctf_hf.hub import load_image_processor
from tests.helpers import TINY, fails, predict_words
from tests.image_sets import JPEG, PNG


def predicted(model: Path, photos: Path, *more: str, name: str = "p.jsonl") -> list[dict[str, Any]]:
    main(predict_words(model, photos, "--predictions.path", name, *more))
    if name.endswith(".csv"):
        with Path(name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return folder


@pytest.mark.skipif(os.name == "nt", reason="pipes and names that are no text")
@pytest.mark.timeout(120)
def test_what_is_no_image_is_left_out_and_told(
    tiny_folder: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "._0.png").write_bytes(b"\0\5\26\7 of a Mac")
    (photos / "paper.pdf").write_bytes(b"%PDF-1.4")
    (photos / "album.png").mkdir()
    (photos / "album.png" / "in.png").write_bytes(PNG)
    os.mkfifo(photos / "pipe.png")
    Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png")).write_bytes(PNG)
    with pytest.warns(UserWarning, match="files are left out: 1 hidden, 1 that are no images"):
        rows = predicted(tiny_folder, photos)
    names = ["0.png", "1.png", "2.png", "in.png", "caf\udce9.png"]
    assert [Path(row["file"]).name for row in rows] == names
    assert "predict: 5 images" in caplog.text
    assert rows[0].keys() == {"file", "label", "score"}
    rows = predicted(tiny_folder, photos, name="p.csv")
    assert Path(rows[-1]["file"]).name == r"caf\udce9.png"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_an_image_that_cannot_be_read_has_its_row(
    suffix: str, tiny_folder: Path, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = predicted(tiny_folder, photos, name=f"whole.{suffix}")
    (photos / "00.jpg").write_bytes(JPEG[: len(JPEG) // 2])
    (photos / "3.gif").write_text("no image at all")
    with pytest.warns(UserWarning, match="00.jpg holds no readable image: .*: skipped"):
        rows = predicted(tiny_folder, photos, "--data.on_bad_image", "skip", name=f"all.{suffix}")
    assert "Predictions of 3 images, and 2 that can't be read" in caplog.text
    nothing = "" if suffix == "csv" else None
    by_name = {Path(row["file"]).name: row for row in rows}
    assert [row | {"error": ""} for row in whole] == [by_name[f"{i}.png"] for i in range(3)]
    for name, reason in (("00.jpg", "image file is truncated"), ("3.gif", "format is unknown")):
        assert reason in by_name[name]["error"]
        assert (by_name[name]["label"], by_name[name]["score"]) == (nothing, nothing)


def test_files_that_are_no_images_are_an_error_before_the_work(
    tiny_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "9.png").write_text("no image at all")
    line = fails(predict_words(tiny_folder, photos), capsys)
    assert "1 of 4 files can't be read, the first: " in line
    assert "9.png holds no readable image: its format is unknown. --data.on_bad_image skip" in line


def write_model(folder: Path, tiny_folder: Path, problem_type: str | None, **settings: Any) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = {name: value for name, value in TINY.items() if name != "num_labels"}
    config = ViTConfig(**shape, initializer_range=0.2, problem_type=problem_type, **settings)
    ViTForImageClassification(config).save_pretrained(folder)
    load_image_processor(str(tiny_folder)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "top_k"),
    [
        (None, 7, 2),
        (None, 7, 20),
        ("single_label_classification", 7, 1),
        ("multi_label_classification", 7, 3),
        ("regression", 1, 1),
        ("regression", 3, 2),
    ],
)
def test_labels_and_scores_are_those_of_the_pipeline(
    problem_type: str | None, num_labels: int, top_k: int, tiny_folder: Path, photos: Path
) -> None:
    names = {i: f"kind {i}" for i in range(num_labels)}
    model = write_model(Path("vit"), tiny_folder, problem_type, id2label=names)
    words = ["--model.reduction", "none", "--predictions.top_k", str(top_k)]
    rows = predicted(model, photos, *words)
    classify = pipeline(
        "image-classification",
        model=AutoModelForImageClassification.from_pretrained(model),
        image_processor=load_image_processor(str(model)),
    )
    for i in range(3):
        file = str(photos / f"{i}.png")
        own = [row for row in rows if row["file"] == file]
        expected = classify(file, top_k=num_labels if problem_type == "regression" else top_k)
        assert len(own) == len(expected) == min(max(top_k, len(expected)), num_labels)
        scores = {row["label"]: row["score"] for row in own}
        assert scores == pytest.approx({one["label"]: one["score"] for one in expected}, abs=1e-5)
        if problem_type != "regression":
            assert [row["label"] for row in own] == [one["label"] for one in expected]


def test_no_cell_is_a_formula(tiny_folder: Path, tmp_path: Path) -> None:
    labels = dict(enumerate(("=1+1", "+a", "-b", "@c", "\td", "\re", "f")))
    model = write_model(tmp_path / "vit", tiny_folder, None, id2label=labels)
    for name in ("=HYPERLINK(1).png", "-1.png", "plain.png"):
        Path(name).write_bytes(PNG)
    words = ("--predictions.top_k", "7")
    rows = predicted(model, Path("."), *words, name="p.csv")
    assert {row["file"] for row in rows} == {"'=HYPERLINK(1).png", "'-1.png", "plain.png"}
    assert {row["label"] for row in rows} == {"'=1+1", "'+a", "'-b", "'@c", "'\td", "'\re", "f"}
    assert {row["label"] for row in predicted(model, Path("."), *words)} == set(labels.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "--data.crop", "none"], "--data.crop is not allowed with `mctf predict`"),
        (["predict", "--data.dataset=x"], "--data.dataset is not allowed with `mctf predict`"),
        (["test", "--data.flip", "true"], "--data.flip is not allowed with `mctf test`"),
        (["fit", "--data.predict_folder", "."], "--data.predict_folder is not allowed with"),
        (["fit", "--predictions.top_k", "2"], "--predictions.top_k is not allowed with `mctf fit`"),
        (["test", "--model.learning_rate", "1"], "--model.learning_rate is not allowed with"),
        (["predict", "--export.folder", "x"], "--export.folder is not allowed with `mctf predict`"),
        (["predict", "--predictions.top_k", "0"], "top_k=0 is not allowed: it must be at least 1"),
    ],
)
def test_options_without_an_effect_are_refused(
    words: list[str], message: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails([*words, "--model.pretrained", str(tiny_folder)], capsys)


def test_several_processes_keep_all_rows_of_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = [
        [{"file": "a", "label": k, "score": 1.0} for k in "xy"],
        [{"file": f, "label": k, "score": 1.0} for f in ("b", "a") for k in "xy"],
    ]

    def gather(into: list[Any], own: Any) -> None:
        into[:] = shares

    class Trainer:
        world_size, is_global_zero = 2, True

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    PredictionFile("p.csv").write_on_epoch_end(Trainer(), None, [shares[0]], [])
    rows = list(csv.DictReader(Path("p.csv").read_text().splitlines()))
    assert [(row["file"], row["label"]) for row in rows] == [
        ("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")
    ]  # fmt: skip
