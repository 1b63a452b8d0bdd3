"""``mctf embed`` for tests: its words, the vectors it wrote, the sources it reads."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature

from cli.main import main


def embed_words(model: Path | str, images: Path | str, output: str, *more: str) -> list[str]:
    return [
        "embed", str(model), "--images", str(images), "--output", output, "--num-workers", "0",
        "--trainer.accelerator", "cpu", *more,
    ]  # fmt: skip


def rows_of(folder: Path | str) -> pa.Table:
    """All rows of a folder of vectors, in order."""
    return pa.concat_tables(pq.read_table(file) for file in sorted(Path(folder).glob("*.parquet")))


def embedded(*args: Any) -> pa.Table:
    given = embed_words(*args)
    main(given)
    return rows_of(given[5])


def vectors_of(rows: pa.Table) -> torch.Tensor:
    return torch.tensor(np.stack(rows["vector"].to_pylist()), dtype=torch.float32)


def manifest_of(folder: Path | str) -> dict[str, Any]:
    return json.loads(Path(folder, "manifest.json").read_text())


def names(photos: Path) -> list[str]:
    return sorted(str(file.relative_to(photos)) for file in photos.rglob("*.png"))


def write_parquet(photos: Path, folder: Path) -> None:
    """The photos with a class and a key, in three files of several row groups."""
    folder.mkdir()
    features = Features(
        {"image": ImageFeature(), "kind": ClassLabel(names=["x", "y"]), "key": Value("int64")}
    )
    stored = [{"bytes": (photos / one).read_bytes(), "path": None} for one in names(photos)]
    columns = {"image": stored, "kind": [i % 2 for i in range(23)], "key": list(range(100, 123))}
    rows = Dataset.from_dict(columns, features=features)
    for i, (first, last) in enumerate(((0, 7), (7, 8), (8, 23))):
        rows.select(range(first, last)).to_parquet(folder / f"part{i}.parquet", batch_size=4)


def write_tars(photos: Path, folder: Path) -> None:
    folder.mkdir()
    for i, (first, last) in enumerate(((0, 7), (7, 8), (8, 23))):
        with tarfile.open(folder / f"{i:04}.tar", "w") as archive:
            for number, name in enumerate(names(photos)[first:last], first):
                image = (photos / name).read_bytes()
                for ending, data in (("png", image), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{number:06}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
