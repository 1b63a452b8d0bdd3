"""Images and datasets that tests write, and the data module that reads them."""

import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import ViTImageProcessorPil

from lightning_modules import HFImageDataModule
from lightning_modules.image_task import ImageTask
from tests.helpers import DIGITS

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


PNG = encoded(Image.new("RGB", (20, 10), (200, 100, 50)))
JPEG = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "jpeg")
BROKEN = [JPEG[: len(JPEG) // 2], PNG[:30], b"", b"not an image at all"]


def numbered_png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(file, "png")
    return file.getvalue()


def write_dataset(folder: Path, rows: list[tuple[bytes, Any]], label: Any = None) -> str:
    """A dataset of encoded images with labels, in parquet."""
    folder.mkdir()
    label = label or ClassLabel(names=["a", "b"])
    features = Features({"photo": ImageFeature(), "kind": label, "weight": Value("float32")})
    columns = {
        "photo": [{"bytes": data, "path": None} for data, _ in rows],
        "kind": [kind for _, kind in rows],
        "weight": [0.0] * len(rows),
    }
    Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    return str(folder)


def write_shards(folder: Path, sizes: Sequence[int], broken: dict[int, bytes] | None = None) -> str:
    """Shards of numbered images, whose labels are the numbers."""
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    folder.mkdir()
    first = 0
    for shard, size in enumerate(sizes):
        numbers = range(first, first + size)
        images = [
            {"bytes": (broken or {}).get(n, numbered_png(n)), "path": f"{n}.png"} for n in numbers
        ]
        rows = Dataset.from_dict({"image": images, "label": list(numbers)}, features=features)
        rows.to_parquet(folder / f"train-{shard:05d}-of-{len(sizes):05d}.parquet")
        first += size
    return str(folder)


def data_module(
    dataset: str | None = DIGITS, num_labels: int = 10, **settings: Any
) -> HFImageDataModule:
    """A data module as a trainer would hold it."""
    module = HFImageDataModule(dataset, **{"num_workers": 0, **settings})
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    module.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(task=ImageTask(PROCESSOR, num_labels)),
        world_size=1,
        global_rank=0,
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    return module
