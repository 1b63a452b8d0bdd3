"""Streams of shards: each image once over processes and workers, in an order to be resumed."""

import io
import tarfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from PIL import Image

from lightning_modules.image_task import ImageTask
from lightning_modules.labelled_images import AsBytes, PixelReader
from lightning_modules.labels import NOT_COUNTED
from lightning_modules.streaming import Share, StreamedImages, StreamLoader, count_rows
from tests.helpers import DIGITS
from tests.image_sets import BROKEN, PROCESSOR, data_module, numbered_png, write_shards

EVEN, UNEVEN = (6, 6, 6, 6, 6, 6, 6, 6), (7, 5, 9, 2, 3, 8, 11)
ALL = 1000


def write_tar(folder: Path, sizes: Sequence[int]) -> str:
    """The same as WebDataset shards."""
    folder.mkdir()
    first = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for n in range(first, first + size):
                for name, data in (
                    (f"{n:06d}.png", numbered_png(n)),
                    (f"{n:06d}.cls", str(n).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        first += size
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("shards")
    return {
        "even": write_shards(base / "even", EVEN),
        "uneven": write_shards(base / "uneven", UNEVEN),
        "tar": write_tar(base / "tar", UNEVEN),
    }


def loader(
    folder: str,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    batch_size: int = 4,
    steps: int | None = None,
    epoch: int = 0,
    done: int = 0,
    **options: Any,
) -> StreamLoader:
    images = StreamedImages(
        load_dataset(folder, split="train", streaming=True),
        folder,
        options.pop("reader", AsBytes(PROCESSOR)),
        share=Share(rank, world_size),
        task=ImageTask(PROCESSOR, ALL),
        batch_size=batch_size,
        label_column="cls" if folder.endswith("tar") else "label",
        **{
            "shuffle_buffer": 10,
            "augment": lambda image, generator: image,
            "num_draws": 2,
            "seed": 5,
            **options,
        },
    )
    return StreamLoader(
        images,
        steps=steps,
        epoch=lambda: epoch,
        batches_done=lambda: done,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def labels_of(batches: Any) -> list[int]:
    return [label for batch in batches for label in batch["labels"].tolist()]


@pytest.mark.parametrize("shards", ["even", "uneven", "tar"])
@pytest.mark.parametrize(("world_size", "workers"), [(2, 2), (3, 0)])
def test_each_image_is_read_once_by_all_processes_and_workers(
    shards: str, world_size: int, workers: int, folders: dict[str, str]
) -> None:
    total = sum(EVEN if shards == "even" else UNEVEN)
    orders = []
    for epoch in range(2):
        parts = [
            list(
                loader(
                    folders[shards],
                    rank=rank,
                    world_size=world_size,
                    workers=workers,
                    epoch=epoch,
                )
            )
            for rank in range(world_size)
        ]
        for part in parts:  # whole batches, whatever the workers leave over
            assert all(len(batch["labels"]) == 4 for batch in part[:-1])
            for batch in part:
                assert batch["pixel_values"][:, 0, 0, 0].tolist() == batch["labels"].tolist()
        read = [labels_of(part) for part in parts]
        assert sorted(label for part in read for label in part) == list(range(total))
        orders.append(read)
    assert orders[0] != orders[1]


def test_training_on_even_shards_sees_every_image_once(folders: dict[str, str]) -> None:
    for epoch in range(2):
        parts = [
            loader(
                folders["even"],
                rank=rank,
                world_size=2,
                workers=2,
                batch_size=6,
                steps=4,
                epoch=epoch,
            )
            for rank in range(2)
        ]
        assert [len(part) for part in parts] == [4, 4]
        assert sorted(label for part in parts for label in labels_of(part)) == list(range(48))


def test_a_share_that_ends_early_starts_again(folders: dict[str, str]) -> None:
    batches = list(loader(folders["uneven"], batch_size=8, steps=12))
    assert [len(batch["labels"]) for batch in batches] == [8] * 12
    passes = [labels_of(batches[i : i + 5]) for i in (0, 5, 10)]
    assert [len(set(part)) for part in passes] == [40, 40, 16]
    assert passes[0] == passes[1]
    draws = torch.cat([batch["draws"] for batch in batches])
    assert len({tuple(row) for row in draws.tolist()}) == 96  # nothing is augmented alike twice


@pytest.mark.parametrize(
    ("shards", "workers", "batch_size", "steps"),
    [("uneven", 2, 3, 7), ("uneven", 0, 4, 9), ("tar", 2, 2, 20)],
)
def test_a_resumed_epoch_goes_on_exactly(
    shards: str, workers: int, batch_size: int, steps: int, folders: dict[str, str]
) -> None:
    settings: dict[str, Any] = {
        "rank": 1,
        "world_size": 2,
        "workers": workers,
        "batch_size": batch_size,
        "steps": steps,
        "epoch": 3,
    }
    whole = list(loader(folders[shards], **settings))
    assert len(whole) == steps
    for done in (1, 2, steps // 2, steps - 1):
        rest = list(loader(folders[shards], done=done, **settings))
        assert len(rest) == steps - done
        for resumed, expected in zip(rest, whole[done:], strict=True):
            for name in ("labels", "pixel_values", "draws"):
                assert torch.equal(resumed[name], expected[name])


def test_images_that_a_resumed_run_has_seen_are_not_decoded(
    folders: dict[str, str],
) -> None:
    decoded = []

    class Remembering(AsBytes):
        def __call__(self, image: Image.Image) -> torch.Tensor:
            decoded.append(image.getpixel((0, 0))[0])
            return super().__call__(image)

    stream = loader(folders["even"], steps=12, done=9, reader=Remembering(PROCESSOR))
    rest = labels_of(stream)
    assert sorted(decoded) == sorted(rest) and len(rest) == 12


def test_workers_live_on_between_epochs(folders: dict[str, str]) -> None:
    epochs = iter((0, 1, 0))
    stream = loader(folders["even"], workers=2, steps=5)
    stream.epoch = lambda: next(epochs)
    first, second, third = (labels_of(stream) for _ in range(3))
    assert first == third != second
    assert first == labels_of(loader(folders["even"], workers=2, steps=5))


def test_broken_images_of_a_stream(tmp_path: Path) -> None:
    broken = dict(zip((3, 7, 8, 44), BROKEN, strict=True))
    folder = write_shards(tmp_path / "broken", UNEVEN, broken)
    with pytest.raises(
        ValueError, match=r"row 3 that worker 0 of process 0 reads in epoch 0 of .*"
    ):
        list(loader(folder, shuffle_buffer=None))
    batches = list(loader(folder, workers=2, on_bad_image="skip", steps=11))
    assert [len(batch["labels"]) for batch in batches] == [4] * 11
    read = Counter(labels_of(batches))
    assert not set(read) & set(broken)
    assert sum(int(batch["skipped"].sum()) for batch in batches) == sum(
        count - 1 for count in read.values()
    )
    evaluated = list(
        loader(
            folder,
            workers=2,
            on_bad_image="skip",
            augment=None,
            shuffle_buffer=None,
            reader=PixelReader(PROCESSOR),
            num_draws=0,
        )
    )
    assert sorted(labels_of(evaluated)) == sorted(
        [NOT_COUNTED] * 4 + [*set(range(45)) - set(broken)]
    )
    assert sum(int(batch["skipped"].sum()) for batch in evaluated) == 4
    whole = list(loader(folder, workers=2, on_bad_image="skip", steps=11))
    rest = list(loader(folder, workers=2, on_bad_image="skip", steps=11, done=6))
    assert labels_of(rest) == labels_of(whole[6:])


def test_labels_that_the_model_lacks_are_named(folders: dict[str, str]) -> None:
    stream = loader(folders["uneven"], shuffle_buffer=None)
    stream.dataset.task = ImageTask(PROCESSOR, 10)
    with pytest.raises(
        ValueError, match="row 10 that .* has the label 10: the model has the class"
    ):
        list(stream)


def test_rows_are_counted_where_the_files_tell(folders: dict[str, str]) -> None:
    assert count_rows(folders["uneven"], None, None, "train") == 45
    assert count_rows(folders["tar"], None, None, "train") is None


def test_the_data_module_streams(folders: dict[str, str]) -> None:
    def stream(folder: str, **settings: Any) -> Any:
        settings = {"val_split": "train", "batch_size": 5, "num_labels": ALL, **settings}
        data = data_module(folder, streaming=True, crop="padded", **settings)
        data.trainer.current_epoch = 0
        data.setup("fit")
        return data

    data = stream(folders["uneven"], label_column="label", random_erasing=0.5)
    train = data.train_dataloader()
    assert len(train) == 9 and train.batch_size == 5
    batch = next(iter(train))
    assert (
        batch["pixel_values"].shape == (5, 3, 32, 32) and batch["pixel_values"].dtype == torch.uint8
    )
    assert batch["draws"].shape == (5, 24)
    assert sorted(labels_of(data.val_dataloader())) == list(range(45))

    data = stream(folders["tar"], label_column="cls", train_images=45)
    assert len(data.train_dataloader()) == 9
    data = stream(folders["tar"], label_column="cls")
    with pytest.raises(ValueError, match="train_images is not set, and .* does not say how many"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="batch_size=50 is not allowed: .* has 45 rows, less than"):
        stream(folders["uneven"], label_column="label", batch_size=50).train_dataloader()
    assert stream(folders["uneven"]).label_names is None  # integers, in the column label
    with pytest.raises(ValueError, match="no validation split, .* from a stream: set val_split to"):
        stream(folders["uneven"], val_split=None, label_column="label")
    data = stream(DIGITS, val_split="test")
    assert data.label_names == list("0123456789")


def test_a_stream_is_opened_anew_for_another_share(folders: dict[str, str]) -> None:
    data = data_module(folders["uneven"], ALL, streaming=True, val_split="train")
    task = ImageTask(PROCESSOR, ALL)
    found = []
    for share in (Share(0, 2), Share(1, 2), Share(0, 1)):
        data.open("validate", task, share)
        found.append(sorted(labels_of(data.val_dataloader())))
    assert sorted(found[0] + found[1]) == found[2] == list(range(45))


def test_many_shards_are_shared_out_and_few_are_all_read(tmp_path: Path) -> None:
    write_shards(tmp_path / "many", [2] * 17)
    for folder, each, all_read in (("many", 16, False), ("few", 2, True)):
        if folder == "few":
            write_shards(tmp_path / "few", [6, 5, 6])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            shares = [
                loader(str(tmp_path / folder), rank=rank, world_size=2, batch_size=2, steps=8)
                for rank in range(2)
            ]
        assert any("reads all of them" in str(w.message) for w in said) is all_read
        read = [set(labels_of(share)) for share in shares]
        assert not read[0] & read[1] and all(len(part) >= each for part in read)
        assert [share.dataset.rows.num_shards for share in shares] == (
            [3, 3] if all_read else [9, 8]
        )
    # In evaluation nobody waits for rows of others' shards.
    shares = [
        loader(str(tmp_path / "few"), rank=rank, world_size=2, augment=None, shuffle_buffer=None)
        for rank in range(2)
    ]
    assert [sorted(labels_of(share)) for share in shares] == [
        [*range(6), *range(11, 17)], [*range(6, 11)],
    ]  # fmt: skip
