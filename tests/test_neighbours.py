"""``mctf neighbours``: the nearest vectors of a folder, and the images that they are of."""

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cli.main import main
from lightning_modules.nearest import nearest
from lightning_modules.vector_folder import VectorFolder
from mctf_hf.images import read_image
from mctf_hf.texts import TextEncoder
from tests.helpers import fails
from tests.vector_folders import embed_words, embedded, names, vectors_of, write_parquet, write_tars

pytestmark = pytest.mark.timeout(300)


def table(capsys: pytest.CaptureFixture[str]) -> list[tuple[float, str]]:
    """Cosines and ids of the rows that were told."""
    found = re.findall(r"^│ +(-?\d\.\d+) │ (\S+)", capsys.readouterr().out, re.MULTILINE)
    return [(float(cosine), name) for cosine, name in found]


def expected_of(query: torch.Tensor, vectors: torch.Tensor, ids: list[str], count: int) -> Any:
    cosines = torch.cosine_similarity(query[None], vectors)
    best = cosines.argsort(descending=True)[:count].tolist()
    return [(pytest.approx(float(cosines[i]), abs=2e-4), ids[i]) for i in best]


def test_the_nearest_to_an_image_are_told_and_drawn(
    dino: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = embedded(f"{dino},r=8", photos, "out", "--shard-size", "5")
    query = names(photos)[3]
    capsys.readouterr()
    main(["neighbours", "out", "--query", str(photos / query), "--count", "7"])
    found = table(capsys)
    vectors = vectors_of(rows)
    assert found == expected_of(vectors[3], vectors, names(photos), 7)
    assert found[0] == (1.0, query)
    with Image.open("neighbours.png") as opened:
        picture = opened.convert("RGB")
    # Eight thumbnails: the query and itself are the first two, side by side.
    assert picture.width > 6 * 224 and picture.height > 2 * 224
    shown = np.asarray(picture)
    drawn = [np.asarray(ImageOps.pad(read_image(photos / name), (224, 224), color="white"))
             for name in (query, query, found[1][1])]  # fmt: skip
    for number, own in enumerate(drawn):
        column = shown[:, 8 + number * 232 : 8 + number * 232 + 224]
        tops = range(picture.height - 223)
        assert any(np.array_equal(column[top : top + 224], own) for top in tops)


@pytest.mark.parametrize("kind", ["tables", "tars"])
def test_images_are_found_again_in_every_kind_of_source(
    kind: str, dino: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    {"tables": write_parquet, "tars": write_tars}[kind](photos, Path(kind))
    rows = embedded(dino, kind, "out", "--shard-size", "5")
    query = photos / names(photos)[9]
    capsys.readouterr()
    main(["neighbours", "out", "--query", str(query), "--count", "2", "--output", "two.png"])
    found = table(capsys)
    assert found[0] == (1.0, rows["id"].to_pylist()[9]) and Path("two.png").exists()


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_the_nearest_to_a_text_are_told(
    name: str, pairs: dict[str, Path], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = embedded(pairs[name], photos, "out", "--shard-size", "5")
    capsys.readouterr()
    main(["neighbours", "out", "--query", "a photo of a cat", "--count", "5"])
    query = TextEncoder(str(pairs[name]))(["a photo of a cat"])[0]
    assert table(capsys) == expected_of(query, vectors_of(rows), names(photos), 5)


def test_faiss_searches_where_it_is_installed(
    dino: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = embedded(dino, photos, "out", "--shard-size", "5")
    query = vectors_of(rows)[4] + 0.1
    own = nearest(VectorFolder("out"), query, 6)
    asked: list[int] = []

    def knn(queries: Any, vectors: Any, count: int, metric: int) -> tuple[Any, Any]:
        """The inner product, as FAISS's function of this name has it."""
        assert metric == 0
        asked.append(len(vectors))
        products = queries @ vectors.T
        order = np.argsort(-products, axis=1)[:, :count]
        return np.take_along_axis(products, order, 1), order

    stand_in: Any = SimpleNamespace(knn=knn, METRIC_INNER_PRODUCT=0, __spec__=object())
    monkeypatch.setitem(sys.modules, "faiss", stand_in)
    found = nearest(VectorFolder("out"), query, 6)
    assert asked == [5, 5, 5, 5, 3]
    assert [one.row for one in found] == [one.row for one in own]
    assert [one.cosine for one in found] == pytest.approx([one.cosine for one in own], abs=1e-5)


def test_what_is_wrong_is_told_in_a_line(
    dino: Path, pairs: dict[str, Path], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, "some")
    main(embed_words(dino, "some", "out"))
    main(embed_words(pairs["CLIP"], "some", "tokens", "--vector", "class_token"))
    image = str(photos / names(photos)[0])
    cases = [
        ("nothing does not exist", ["nothing", "--query", image]),
        ("some holds no vectors", ["some", "--query", image]),
        ("query='no.jpg': there is no such file", ["out", "--query", "no.jpg"]),
        ("query='a cat' is no file, and as a text: ", ["out", "--query", "a cat"]),
        ("tokens holds vectors of the kind class_token", ["tokens", "--query", "a cat"]),
        ("count=0 is not allowed", ["out", "--query", image, "--count", "0"]),
        ("the file's name ends in .png", ["out", "--query", image, "--output", "x.gif"]),
    ]
    for told, given in cases:
        assert told in fails(["neighbours", *given], capsys), given
    Path("some/new.png").write_bytes(Path(image).read_bytes())
    assert "files have changed since" in fails(["neighbours", "out", "--query", image], capsys)
    assert not Path("neighbours.png").exists()
    main(["neighbours", "out", "--query", image, "--output", "null"])
    assert table(capsys)[0] == (1.0, names(photos)[0])
