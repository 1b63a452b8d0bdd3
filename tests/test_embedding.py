"""``mctf embed``: vectors that are the model's, of every image once, however a run goes."""

import csv
import io
import json
import os
import random
import resource
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from rich.console import Console
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ViTForImageClassification,
    ViTModel,
)

from cli.main import main
from cli.models import load_encoder
from lightning_modules.embedding_run import Pace
from lightning_modules.vector_folder import UnitBatch
from mctf_hf.embedding import Embedder
from mctf_hf.hub import load_image_processor
from mctf_hf.images import read_image
from tests.helpers import fails
from tests.tiny_models import tiny
from tests.training_runs import as_rank, free_port, start
from tests.vector_folders import (
    embed_words,
    embedded,
    manifest_of,
    names,
    rows_of,
    vectors_of,
    write_parquet,
    write_tars,
)

pytestmark = pytest.mark.timeout(300)
KILLS = 10


def pixels(model: Path, photos: Path) -> torch.Tensor:
    processor = load_image_processor(str(model))
    images = [read_image(photos / name) for name in names(photos)]
    return torch.cat([processor(one, return_tensors="pt")["pixel_values"] for one in images])


# What transformers makes of the images: of its encoder's output, the vector.
READ: dict[str, Callable[[Any], torch.Tensor]] = {
    "class_token": lambda output: output.last_hidden_state[:, 0],
    "pooled": lambda output: output.pooler_output,
    "mean_patches": lambda output: output.last_hidden_state[:, 1:].mean(1),
}


@pytest.mark.parametrize("vector", READ)
def test_vectors_are_those_of_transformers(vector: str, dino: Path, photos: Path) -> None:
    rows = embedded(dino, photos, "out", "--vector", vector, "--batch-size", "4")
    with torch.inference_mode():
        expected = READ[vector](AutoModel.from_pretrained(dino)(pixels(dino, photos)))
    assert rows["id"].to_pylist() == names(photos)
    assert rows.schema.field("vector").type == pa.list_(pa.float32(), 24)
    torch.testing.assert_close(vectors_of(rows), expected, rtol=1e-4, atol=1e-5)
    assert manifest_of("out")["settings"]["vector"] == vector


def test_fused_vectors_are_those_of_the_fused_model(dino: Path, photos: Path) -> None:
    rows = embedded(f"{dino},r=8", photos, "out", "--batch-size", "23")
    model, _ = load_encoder(f"{dino},r=8")
    with torch.inference_mode():
        expected = model(pixels(dino, photos)).last_hidden_state[:, 0]
        unfused = model(pixels(dino, photos), r=0).last_hidden_state[:, 0]
    torch.testing.assert_close(vectors_of(rows), expected, rtol=1e-4, atol=1e-5)
    assert (vectors_of(rows) - unfused).abs().max() > 0.01
    told = manifest_of("out")
    assert told["settings"]["fusion"]["r"] == 8 and told["settings"]["vector"] == "class_token"
    assert told["counts"] == {"images": 23, "vectors": 23, "unreadable": 0, "shards": 1}
    assert told["versions"]["torch"] == version("torch")


@pytest.mark.parametrize("vector", ["class_token", "pooled", "mean_patches"])
def test_the_last_layer_computes_only_what_is_read(vector: str, dino: Path) -> None:
    model, _ = load_encoder(f"{dino},r=8")
    rows: list[int] = []
    forward = model.forward

    def counting(*args: Any, **options: Any) -> Any:
        output = forward(*args, **options)
        rows.append(output.last_hidden_state.shape[1])
        return output

    model.forward = counting
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    found = Embedder(model, vector)(images).vectors
    model.config.skip_unread = False
    torch.testing.assert_close(Embedder(model, vector)(images).vectors, found)
    assert rows == [65 if vector == "mean_patches" else 1, 65]


def test_normalized_halves_are_written_as_such(dino: Path, photos: Path) -> None:
    whole = vectors_of(embedded(dino, photos, "whole"))
    rows = embedded(dino, photos, "half", "--normalize", "true", "--dtype", "float16")
    assert rows.schema.field("vector").type.value_type == pa.float16()
    expected = whole / whole.norm(dim=1, keepdim=True)
    torch.testing.assert_close(vectors_of(rows), expected, rtol=1e-3, atol=1e-3)
    low = vectors_of(embedded(dino, photos, "low", "--trainer.precision", "bf16-true"))
    assert 1e-4 < (low - whole).abs().max() < 0.2
    assert manifest_of("low")["settings"]["precision"] == "bf16-true"


def test_a_classifier_names_what_it_sees(tiny_folder: Path, photos: Path) -> None:
    rows = embedded(tiny_folder, photos, "out")
    model = ViTForImageClassification.from_pretrained(tiny_folder)
    with torch.inference_mode():
        scores = model(pixels(tiny_folder, photos)).logits.softmax(-1)
        expected = model.vit(pixels(tiny_folder, photos)).last_hidden_state[:, 0]
    best = [model.config.id2label[i] for i in scores.argmax(1).tolist()]
    assert rows["predicted"].to_pylist() == best
    assert rows["score"].to_pylist() == pytest.approx(scores.amax(1).tolist(), rel=1e-4)
    torch.testing.assert_close(vectors_of(rows), expected, rtol=1e-4, atol=1e-5)
    patches = vectors_of(embedded(tiny_folder, photos, "patches", "--vector", "mean_patches"))
    with torch.inference_mode():
        tokens = model.vit(pixels(tiny_folder, photos)).last_hidden_state
    torch.testing.assert_close(patches, tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)


def test_a_fused_token_counts_for_each_of_its_patches(tiny_folder: Path) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    means = []
    for restored in ("true", "false"):
        model, _ = load_encoder(f"{tiny_folder},r=6,restore={restored}")
        means.append(Embedder(model, "mean_patches")(images).vectors)
    torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-5)
    model, _ = load_encoder(f"{tiny_folder},r=0")
    assert (Embedder(model, "mean_patches")(images).vectors - means[0]).abs().max() > 1e-4


def test_a_vit_without_head_is_an_encoder(tiny_folder: Path, photos: Path) -> None:
    model = ViTModel(ViTForImageClassification.from_pretrained(tiny_folder).config).eval()
    model.save_pretrained("bare")
    load_image_processor(str(tiny_folder)).save_pretrained("bare")
    rows = embedded("bare", photos, "out")
    with torch.inference_mode():
        expected = model(pixels(tiny_folder, photos)).last_hidden_state[:, 0]
    torch.testing.assert_close(vectors_of(rows), expected, rtol=1e-4, atol=1e-5)
    assert rows.column_names == ["id", "vector"]


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_texts_score_images_as_in_transformers(
    name: str, pairs: dict[str, Path], photos: Path
) -> None:
    texts = ["a photo of a cat", "a dog", "w3 w4"]
    Path("texts.txt").write_text("\n".join(texts) + "\n\n")
    rows = embedded(pairs[name], photos, "out", "--texts", "texts.txt")
    model = AutoModel.from_pretrained(pairs[name]).eval()
    padding: Any = {"CLIP": True, "SigLIP": "max_length"}[name]
    tokens = AutoTokenizer.from_pretrained(pairs[name])(
        texts, padding=padding, truncation=True, max_length=96, return_tensors="pt"
    )
    tokens = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        output = model(pixel_values=pixels(pairs[name], photos), **tokens)
    logits = output.logits_per_image
    scores = logits.softmax(-1) if name == "CLIP" else logits.sigmoid()
    found = torch.tensor(rows["scores"].to_pylist())
    torch.testing.assert_close(found, scores, rtol=1e-3, atol=1e-4)
    assert rows["predicted"].to_pylist() == [texts[i] for i in scores.argmax(1).tolist()]
    own = torch.nn.functional.normalize(vectors_of(rows))
    torch.testing.assert_close(own, output.image_embeds, rtol=1e-3, atol=1e-4)
    told = manifest_of("out")
    assert told["labels"] == texts and told["settings"]["vector"] == "pooled"


def test_every_kind_of_source_gives_the_same_vectors(
    dino: Path, photos: Path, tmp_path: Path
) -> None:
    size = ["--shard-size", "5", "--batch-size", "5"]
    expected = vectors_of(embedded(dino, photos, "files", *size))
    write_parquet(photos, Path("tables"))
    write_tars(photos, Path("tars"))
    url = Path.cwd().as_uri()
    sources = {
        "url of files": (photos.as_uri(),),
        "tables": ("tables", "--columns", "kind,key"),
        "url of tables": (f"{url}/tables", "--columns", "kind,key"),
        "pattern": (f"{url}/tables/part*.parquet", "--columns", "key"),
        "dataset": ("tables", "--split", "train", "--columns", "kind,key"),
        "stream": ("tables", "--split", "train", "--streaming", "true", "--columns", "kind,key"),
        "tars": ("tars", "--columns", "cls"),
        "url of tars": (f"{url}/tars",),
    }
    found = {
        name: embedded(dino, *source[:1], f"out {name}", *size, *source[1:])
        for name, source in sources.items()
    }
    for name, rows in found.items():
        torch.testing.assert_close(vectors_of(rows), expected, rtol=1e-5, atol=1e-6, msg=name)
    assert found["url of files"]["id"].to_pylist() == names(photos)
    numbers = [str(i) for i in range(23)]
    for name in ("tables", "url of tables", "pattern", "dataset"):
        assert found[name]["id"].to_pylist() == numbers, name
    assert found["tables"]["kind"].to_pylist() == [i % 2 for i in range(23)]
    for name in ("tables", "dataset", "stream", "pattern"):
        assert found[name]["key"].to_pylist() == list(range(100, 123)), name
    assert found["stream"]["id"].to_pylist()[6:9] == ["0-6", "1-0", "2-0"]
    assert found["tars"]["id"].to_pylist()[6:8] == ["0000.tar/000006", "0001.tar/000007"]
    (tmp_path / "two/b").mkdir(parents=True)
    shutil.copytree("tars", "two/a")
    shutil.copy("tars/0000.tar", "two/b")
    rows = embedded(dino, "two", "out two", *size, "--columns", "CLS", "--image-column", "PNG")
    assert rows["id"].to_pylist()[0] == "a/0000.tar/000000"
    assert rows["id"].to_pylist()[-1] == "b/0000.tar/000006"
    assert rows["CLS"].to_pylist()[:23] == found["tars"]["cls"].to_pylist()
    assert found["tars"]["cls"].to_pylist() == [str(i % 2) for i in range(23)]
    rows = load_dataset("parquet", data_files="out tables/*.parquet", split="train")
    assert rows.features["kind"].names == ["x", "y"]
    torch.testing.assert_close(torch.tensor(rows["vector"][:]), expected, rtol=1e-5, atol=1e-6)


def test_an_image_that_cannot_be_read_stops_or_has_its_record(
    dino: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = embedded(dino, photos, "whole", "--batch-size", "4")
    shutil.copytree(photos, "some")
    for name in ("a/01.png", "00.png"):
        Path("some", name).write_bytes(Path("some", name).read_bytes()[:200])
    Path("some/zz.gif").write_text("=no image")
    given = embed_words(dino, "some", "out", "--batch-size", "4", "--shard-size", "6")
    line = fails(given, capsys)
    assert (
        "00.png of some holds no readable image: " in line
        and "--on_bad_image skip leaves such images out" in line
    )
    assert fails([*given, "--num-workers", "1"], capsys) == line
    assert sorted(os.listdir("out")) == ["manifest.json"]
    with pytest.warns(UserWarning, match="zz.gif of some .*: its format is unknown: skipped"):
        main([*given, "--on-bad-image", "skip"])
    assert "3 images can't be read: out/unreadable.csv" in capsys.readouterr().out
    rows = rows_of("out")
    good = [name for name in names(photos) if name not in ("a/01.png", "00.png")]
    assert rows["id"].to_pylist() == good
    kept = pa.array([name in good for name in whole["id"].to_pylist()])
    torch.testing.assert_close(vectors_of(rows), vectors_of(whole.filter(kept)))
    with Path("out/unreadable.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["id"] for row in table] == ["00.png", "a/01.png", "zz.gif"]
    assert "format is unknown" in table[2]["reason"]
    counts = {"images": 24, "vectors": 21, "unreadable": 3, "shards": 4}
    assert manifest_of("out")["counts"] == counts


def test_a_damaged_tar_file_has_its_record_too(dino: Path, photos: Path) -> None:
    write_tars(photos, Path("tars"))
    last = Path("tars/0002.tar")
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    with tarfile.open("tars/0003.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("alone.cls"))
    with pytest.warns(UserWarning, match="the tar file is damaged behind 0000"):
        rows = embedded(dino, "tars", "out", "--on-bad-image", "skip")
    counts = manifest_of("out")["counts"]
    assert counts["unreadable"] == 2 and counts["vectors"] == len(rows) >= 10
    told = Path("out/unreadable.csv").read_text()
    assert "0002.tar/," in told and "0003.tar/alone" in told and "no image among cls" in told


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 images, of which one can't be read."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(400):
        noise = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:03}.png")
    (folder / "077.png").write_bytes(b"no image")
    return folder


OFTEN = ["--shard-size", "5", "--batch-size", "2", "--on-bad-image", "skip"]


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vectors of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("vectors") / "whole"
    with pytest.warns(UserWarning, match="077"):
        embedded(f"{tiny_folder},r=4", many, str(folder), *OFTEN)
    return folder


@pytest.fixture
def uninterrupted(whole: Path) -> pa.Table:
    return rows_of(whole)


def test_a_run_killed_at_random_moments_ends_with_the_rows_of_one_that_was_not(
    tiny_folder: Path, many: Path, whole: Path, uninterrupted: pa.Table
) -> None:
    given = embed_words(f"{tiny_folder},r=4", many, "out", *OFTEN)
    chance, killed = random.Random(), 0
    for number in range(KILLS):
        process = start(main, given, output=Path("said"))
        # Some die at once, others when they have written shards of their own.
        wanted = len(list(Path().glob("out/*.parquet"))) + (number > 1)
        until = time.monotonic() + (0.3 * chance.random() if number < 2 else 60)
        while process.is_alive() and time.monotonic() < until:
            if number > 1 and len(list(Path().glob("out/*.parquet"))) >= wanted:
                time.sleep(0.01 * chance.random())
                break
            time.sleep(0.001)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed == KILLS, Path("said").read_text()
    assert manifest_of("out")["status"] == "running"
    shards = set(Path("out").glob("*.parquet"))
    dates = {file: file.stat().st_mtime_ns for file in shards}
    assert 0 < len(shards) < 80
    process = start(main, given, output=Path("said"))
    process.join()
    assert process.exitcode == 0, Path("said").read_text()
    assert rows_of("out").equals(uninterrupted)
    assert {file: file.stat().st_mtime_ns for file in shards} == dates, "nothing is made twice"
    left = {file.name for file in Path("out").iterdir() if file.suffix != ".parquet"}
    assert left == {"manifest.json", "unreadable.csv"}
    assert Path("out/unreadable.csv").read_text() == (whole / "unreadable.csv").read_text()


def test_a_run_that_is_told_to_stop_does(
    tiny_folder: Path, many: Path, uninterrupted: pa.Table
) -> None:
    given = embed_words(f"{tiny_folder},r=4", many, "out", *OFTEN)
    process = start(main, given, output=Path("said"))
    while not list(Path().glob("out/*.parquet")):
        assert process.is_alive(), Path("said").read_text()
        time.sleep(0.001)
    process.terminate()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    there = len(list(Path("out").glob("*.parquet")))
    told = f"told to stop (SIGTERM): {there} of 80 shards are there, the same command goes on"
    assert told in Path("said").read_text()
    assert not list(Path("out").glob(".*"))
    main(given)
    assert rows_of("out").equals(uninterrupted)


def test_workers_that_decode_change_nothing(
    tiny_folder: Path, many: Path, uninterrupted: pa.Table
) -> None:
    main(embed_words(f"{tiny_folder},r=4", many, "out", *OFTEN, "--num-workers", "2"))
    assert rows_of("out").equals(uninterrupted)


def by_two(given: list[str]) -> list[int | None]:
    """Run a command as the two processes that torchrun would start; their exit codes."""
    given, port = [*given, "--trainer.devices", "2", "--trainer.strategy", "ddp"], free_port()
    ranks = [
        start(as_rank, rank, 2, port, main, given, output=Path(f"said{rank}")) for rank in range(2)
    ]
    for process in ranks:
        process.join()
    return [process.exitcode for process in ranks]


def test_two_processes_write_the_rows_of_one(
    tiny_folder: Path, many: Path, whole: Path, uninterrupted: pa.Table
) -> None:
    given = embed_words(f"{tiny_folder},r=4", many, "out", *OFTEN)
    assert by_two([*given, "--on-bad-image", "error"]) == [1, 1]
    said = "".join(Path(f"said{rank}").read_text() for rank in range(2))
    assert "mctf: error: 077.png of " in said and "error: another process has ended" in said
    assert by_two(given) == [0, 0], Path("said0").read_text()
    assert rows_of("out").equals(uninterrupted)
    assert manifest_of("out")["counts"] == manifest_of(whole)["counts"]
    assert "399 vectors in 80 shards" in Path("said0").read_text()
    assert "vectors" not in Path("said1").read_text()


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_a_cluster_of_ray_writes_the_rows_of_one_process(
    tiny_folder: Path,
    many: Path,
    uninterrupted: pa.Table,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = embed_words(f"{tiny_folder},r=4", many, "out", *OFTEN)[:-2]
    given = [word for word in given if word not in ("--trainer.accelerator", "cpu")]
    given += ["--engine", "ray", "--actors", "2", "--on-bad-image"]
    assert "many holds no readable image: its format is unknown. --on_bad" in fails(
        [*given, "error"], capsys
    )
    done = {file: file.stat().st_mtime_ns for file in Path("out").glob("*.parquet")}
    assert len(done) < 80
    main([*given, "skip"])
    assert rows_of("out").equals(uninterrupted)
    assert all(file.stat().st_mtime_ns == date for file, date in done.items())


def test_a_finished_run_says_so_and_others_are_refused(
    dino: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = embed_words(f"{dino},r=8", photos, "out")
    main(given)
    before = {file: file.stat().st_mtime_ns for file in Path("out").iterdir()}
    capsys.readouterr()
    main(given)
    assert "out was finished before: nothing is left to do" in capsys.readouterr().out
    others = {
        "fusion.r is 8 there, 4 here": embed_words(f"{dino},r=4", photos, "out"),
        "vector is 'class_token' there, 'pooled' here": [*given, "--vector", "pooled"],
        "dtype is 'float32' there, 'float16' here": [*given, "--dtype", "float16"],
        "normalize is False there, True here": [*given, "--normalize", "true"],
        "shard_size is 1000 there, 7 here": [*given, "--shard-size", "7"],
        "collection is ": embed_words(f"{dino},r=8", photos / "a", "out"),
    }
    for told, changed in others.items():
        line = fails(changed, capsys)
        assert "output='out' is not allowed: it holds vectors of another run: " in line
        assert told in line
    model = tiny("dinov2")[0]
    with torch.no_grad():
        model.layernorm.bias.add_(0.5)
    shutil.copytree(dino, "changed")
    model.save_pretrained("changed")
    assert "weights is " in fails(embed_words("changed,r=8", photos, "out"), capsys)
    assert {file: file.stat().st_mtime_ns for file in Path("out").iterdir()} == before


@pytest.fixture
def text_model() -> Path:
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    BertModel(config).save_pretrained("bert")
    return Path("bert")


def test_what_is_wrong_is_told_in_a_line_and_leaves_nothing(
    dino: Path,
    photos: Path,
    text_model: Path,
    pairs: dict[str, Path],
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    Path("none.txt").write_text("\n \n")
    Path("twice.txt").write_text("a cat\na cat\n")
    Path("texts.txt").write_text("a cat\n")
    write_parquet(photos, Path("sound"))
    shutil.copytree("sound", "tables")
    Path("tables/part1.parquet").write_bytes(b"PAR1 no parquet")
    pq.write_table(pa.table({"a": [1, 2]}), "numbers.parquet")
    cases: list[tuple[str, list[str]]] = [
        ("images='empty' holds no images", embed_words(dino, "empty", "out")),
        ("images='/nowhere': there is no such folder", embed_words(dino, "/nowhere", "out")),
        ("images='' is not allowed", embed_words(dino, "", "out")),
        ("images='xyz://a' can't be opened", embed_words(dino, "xyz://a", "out")),
        ("no column of images among a", embed_words(dino, "numbers.parquet", "out")),
        ("part1.parquet can't be read as parquet", embed_words(dino, "tables", "out")),
        ("columns='q' is not allowed", embed_words(dino, photos, "out", "--columns", "q")),
        ("has no 'q', only image, kind, key", embed_words(dino, "sound", "out", "--columns", "q")),
        ("lists are carried along", embed_words(dino, "sound", "out", "--columns", "image")),
        ("holds something else (thesis.txt)", embed_words(dino, photos, "full")),
        ("output='full/thesis.txt' is not", embed_words(dino, photos, "full/thesis.txt")),
        ("output='s3://a/b' is not allowed", embed_words(dino, photos, "s3://a/b")),
        ("a model of type 'bert'", embed_words(text_model, photos, "out")),
        ("texts are not allowed with", embed_words(dino, photos, "out", "--texts", "texts.txt")),
        (
            "texts are not allowed with",
            embed_words(tiny_folder, photos, "out", "--texts", "texts.txt"),
        ),
        ("texts='no' is not", embed_words(pairs["CLIP"], photos, "out", "--texts", "none.txt")),
        ("is there twice", embed_words(pairs["CLIP"], photos, "out", "--texts", "twice.txt")),
        ("no such file", embed_words(pairs["CLIP"], photos, "out", "--texts", "absent.txt")),
        ("which has none", embed_words(pairs["SigLIP"], photos, "out", "--vector", "class_token")),
        ("--sample is not allowed without", embed_words(dino, photos, "out", "--sample", "5")),
        ("--actors is not allowed without", embed_words(dino, photos, "out", "--actors", "2")),
        ("batch_size=0 is not", embed_words(dino, photos, "out", "--batch-size", "0")),
        ("setting 'q' of", embed_words(dino, photos, "out", "--compare", "q=1")),
        ("trainer.devices='x' is not", embed_words(dino, photos, "out", "--trainer.devices", "x")),
        ("streaming is not allowed with", embed_words(dino, photos, "out", "--streaming", "true")),
    ]
    told = {"texts='no' is not": "texts='none.txt' is not allowed"}
    for part, given in cases:
        assert told.get(part, part) in fails(given, capsys), given
        assert not Path("out").exists(), given
    assert os.listdir("full") == ["thesis.txt"]


def test_a_full_disk_leaves_the_shards_that_are_there(
    dino: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = embedded(dino, photos, "whole", "--shard-size", "12")
    given = embed_words(dino, photos, "out", "--shard-size", "12")
    main(given)
    Path("out/vectors-000001.parquet").unlink()
    told = manifest_of("out")
    Path("out/manifest.json").write_text(json.dumps({**told, "status": "running"}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        line = fails(given, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "out/vectors-000001.parquet was not written (" in line and "when there is room" in line
    assert sorted(os.listdir("out")) == ["manifest.json", "vectors-000000.parquet"]
    main(given)
    assert rows_of("out").equals(whole)


def test_two_runs_do_not_write_to_one_folder(
    dino: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_modules.locks import FolderLock

    lock = FolderLock("out", "output")
    lock.acquire()
    try:
        assert "another run writes to this folder" in fails(
            embed_words(dino, photos, "out"), capsys
        )
    finally:
        lock.release()
    main(embed_words(dino, photos, "out"))
    assert len(rows_of("out")) == 23


def test_a_setting_is_compared_with_another_one(
    dino: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--shard-size", "6", "--compare", "r=0", "--sample", "23"]
    fused = vectors_of(embedded(f"{dino},r=16", photos, "out", *given))
    plain = vectors_of(embedded(dino, photos, "plain"))
    cosines = torch.cosine_similarity(fused, plain)
    kept = []
    for one in range(23):
        near = []
        for vectors in (fused, plain):
            to_one = torch.cosine_similarity(vectors[one : one + 1], vectors)
            order = [i for i in to_one.argsort(descending=True).tolist() if i != one]
            near.append(set(order[:10]))
        kept.append(len(near[0] & near[1]) / 10)
    found = manifest_of("out")["comparison"]
    assert found["images"] == 23 and found["neighbours"] == 10
    assert found["cosine"] == pytest.approx(float(cosines.mean()), abs=1e-5) and cosines.min() < 1
    assert found["kept"] == pytest.approx(sum(kept) / 23) and found["kept"] < 1
    assert f"{100 * found['kept']:.1f}%" in capsys.readouterr().out
    main(
        embed_words(f"{dino},r=16", photos, "out", *given[:2], "--compare", "r=16", "--sample", "8")
    )
    again = manifest_of("out")["comparison"]
    assert again["images"] == 8 and again["cosine"] == pytest.approx(1, abs=1e-5)
    assert again["kept"] == 1
    uneven = ["--shard-size", "20", "--compare", "r=0", "--sample", "16"]  # of 20 and of 3 images
    main(embed_words(f"{dino},r=16", photos, "uneven", *uneven))
    assert manifest_of("uneven")["comparison"]["images"] == 16


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_speed_waiting_and_the_time_left_are_told() -> None:
    clock, said = Clock(), io.StringIO()
    console = Console(file=said, width=100)
    pace = Pace(console, total=1000, _clock=clock)
    trainer: Any = SimpleNamespace(is_global_zero=True, world_size=2)
    batch = UnitBatch(0, False, ["x"] * 10, {}, None, [])
    pace.on_predict_start(trainer, SimpleNamespace())
    for _ in range(11):  # 2 seconds for images, 6 for vectors
        clock.now += 2
        pace.on_predict_batch_start()
        clock.now += 6
        pace.on_predict_batch_end(trainer, SimpleNamespace(), None, batch)
    assert pace.images == 110
    assert pace.speed == pytest.approx(10 / 8) and pace.share_waited == pytest.approx(0.25)
    # After 64 seconds 80 images of this process, and as many of the other: 840 are left.
    assert said.getvalue() == "160 of 1,000 images, 2.5 images/s, 0:05:36 left\n"
    assert UnitBatch(0, True, [], {}, None, []).pin_memory().pixel_values is None
