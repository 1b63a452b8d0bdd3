"""Images of any Hugging Face dataset, or of a folder, as batches for an image classifier."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value, get_dataset_split_names, load_dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.data import Dataset as TorchDataset

from .augmentation import Crop, FlipAndCrop

Sample = dict[str, Any]


class HFImageDataModule(L.LightningDataModule):
    """Training, validation, test and prediction images.

    Images are converted to RGB and go through the model's own image processor, which is taken
    from the module that is trained. Whatever is random here is a function of the seed, the epoch
    and the image alone, so neither the number of workers nor an interruption changes it.

    Args:
        dataset: id of a dataset on the Hugging Face Hub, or a local folder of parquet files or of
            images in one subfolder per class. Not needed for prediction.
        name: configuration of the dataset, if it has several.
        revision: branch, tag or commit of the dataset on the Hub.
        train_split: split to train on.
        val_split: split to validate on. Unset: ``validation``, if the dataset has one, or else
            ``val_fraction`` of the training split, which is then left out of training.
        val_fraction: part of the training split to validate on where there is no other.
        test_split: split for the final test.
        image_column: column of the images. Unset: the only one of type image.
        label_column: column of the labels. Unset: the only one of type class label.
        batch_size: images per process and step in training.
        eval_batch_size: images per process and step otherwise. Unset: the same.
        num_workers: processes that load and augment images; 0 does it in the main process.
        crop: random crop in training: ``none``, ``padded`` (for small images) or ``resized`` (for
            ImageNet).
        flip: mirror half of the training images.
        predict_folder: folder of images to predict, searched with its subfolders.
        seed: of the order, the augmentation and the cut of the validation part.
    """

    def __init__(
        self,
        dataset: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.1,
        test_split: str = "test",
        image_column: str | None = None,
        label_column: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        crop: Crop = "none",
        flip: bool = False,
        predict_folder: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction!r} is not allowed: it is between 0 and 1")
        for setting, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{setting}={value!r} is not allowed: it is at least 1")
        self.dataset = dataset
        self.name = name
        self.revision = revision
        self.train_split = train_split
        self.val_split = val_split
        self.val_fraction = val_fraction
        self.test_split = test_split
        self.image_column = image_column
        self.label_column = label_column
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.crop = crop
        self.flip = flip
        self.predict_folder = predict_folder
        self.seed = seed
        self.label_names: list[str] | None = None
        self._sets: dict[str, TorchDataset] = {}

    def setup(self, stage: str) -> None:
        """Open what a stage needs.

        Raises:
            ValueError: for a missing folder, column or split, or labels that the model lacks.
        """
        model = self.trainer.lightning_module
        processor = model.image_processor
        if stage == "predict":
            self._sets["predict"] = ImageFolder(self._image_files(), processor)
            return
        if stage == "test":
            self._sets["test"] = LabelledImages(self.rows(self.test_split), Process(processor))
        elif not self._sets.keys() >= ({"train", "val"} if stage == "fit" else {"val"}):
            self._open_train_and_val(processor, train=stage == "fit")
        self._check_labels(model.num_labels)

    def _open_train_and_val(self, processor: Any, *, train: bool) -> None:
        val_split = self.val_split
        if val_split is None and "validation" in self._splits():
            val_split = "validation"
        train_rows = self.rows(self.train_split) if train or val_split is None else None
        if val_split is not None:
            val_rows, kept, held_out = self.rows(val_split), None, None
        else:
            val_rows = train_rows
            order = np.random.default_rng([self.seed, len(val_rows)]).permutation(len(val_rows))
            cut = max(1, round(len(order) * self.val_fraction))
            kept, held_out = np.sort(order[cut:]), np.sort(order[:cut])
            if train and not len(kept):
                raise ValueError(
                    f"val_fraction={self.val_fraction!r} leaves none of the {len(order)} rows of "
                    f"{val_rows.origin} to train on"
                )
        self._sets["val"] = LabelledImages(val_rows, Process(processor), indices=held_out)
        if train:
            sized = {} if self.crop == "none" else {"do_resize": False, "do_center_crop": False}
            self._sets["train"] = LabelledImages(
                train_rows,
                Process(processor, **sized),
                augment=FlipAndCrop(
                    _output_size(processor), self.crop, self.flip, resample=processor.resample
                ),
                indices=kept,
                seed=self.seed,
            )

    def _splits(self) -> list[str]:
        if self.dataset is None:
            raise ValueError("dataset is not set: name a dataset of the Hub or a local folder")
        if not os.path.exists(self.dataset) and self.dataset.startswith((".", "/", "~")):
            raise FileNotFoundError(f"dataset={self.dataset!r}: there is no such folder")
        return get_dataset_split_names(self.dataset, self.name, revision=self.revision)

    def rows(self, split: str) -> "Rows":
        """Open a split.

        Raises:
            ValueError: for a split or column that is missing.
            FileNotFoundError: for a folder that is missing.
        """
        splits = self._splits()
        if split not in splits:
            raise ValueError(f"{self.dataset} has no split {split!r}: it has {', '.join(splits)}")
        rows = load_dataset(self.dataset, self.name, split=split, revision=self.revision)
        return Rows(rows, f"{self.dataset}, split {split}", self.image_column, self.label_column)

    def _check_labels(self, num_labels: int) -> None:
        """Compare the labels of all open splits with the model's classes."""
        for images in self._sets.values():
            if isinstance(images, LabelledImages):
                images.rows.check_labels(num_labels)
                self.label_names = images.rows.label_names

    def _image_files(self) -> list[Path]:
        if self.predict_folder is None:
            raise ValueError("predict_folder is not set: name the folder of images to predict")
        folder = Path(self.predict_folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"predict_folder={self.predict_folder!r}: there is no such folder"
            )
        known = Image.registered_extensions()
        files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in known]
        if not files:
            raise ValueError(f"predict_folder={self.predict_folder!r} holds no images")
        return files

    def train_dataloader(self) -> DataLoader:
        images = self._sets["train"]
        sampler = ResumableSampler(
            images,
            num_replicas=self.trainer.world_size,
            rank=self.trainer.global_rank,
            shuffle=True,
            seed=self.seed,
        )
        return ResumableDataLoader(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            drop_last=len(sampler) >= self.batch_size,
            pin_memory=torch.cuda.is_available(),
            batches_done=lambda: self.trainer.fit_loop.epoch_loop.batch_progress.current.ready,
        )

    def val_dataloader(self) -> DataLoader:
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._eval_dataloader("predict")

    def _eval_dataloader(self, which: str) -> DataLoader:
        return DataLoader(
            self._sets[which],
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


def _output_size(processor: Any) -> tuple[int, int]:
    """Height and width of what an image processor returns, in pixels."""
    cropped = getattr(processor, "do_center_crop", None)
    size = processor.crop_size if cropped else processor.size
    edge = size.get("shortest_edge")
    return (edge, edge) if edge else (size["height"], size["width"])


class Process:
    """An image processor, with options of its own, for one image -> (channels, height, width)."""

    def __init__(self, processor: Any, **options: Any):
        self.processor = processor
        self.options = options

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(image, return_tensors="pt", **self.options)["pixel_values"][0]


class Rows:
    """Rows of one split: images, undecoded, and labels as integers.

    Raises:
        ValueError: if a column is missing or can't be told from the others.
    """

    def __init__(
        self, rows: Dataset, origin: str, image_column: str | None, label_column: str | None
    ):
        self.origin = origin
        self.image_column = _column(rows, "image_column", image_column, ImageFeature, origin)
        label_column = _column(rows, "label_column", label_column, ClassLabel, origin)
        feature = rows.features[label_column]
        if not isinstance(rows.features[self.image_column], ImageFeature):
            raise ValueError(
                f"image_column={self.image_column!r} of {origin} holds "
                f"{rows.features[self.image_column]}: it is to hold images"
            )
        integers = isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))
        if not integers and not isinstance(feature, ClassLabel):
            raise ValueError(
                f"label_column={label_column!r} of {origin} holds {feature}: labels are integers "
                "or class labels (datasets' class_encode_column makes them)"
            )
        labels = rows[label_column][:]
        if None in labels:
            raise ValueError(f"row {labels.index(None)} of {origin} has no label")
        self.labels = np.asarray(labels, dtype=np.int64)
        self.label_names = list(feature.names) if isinstance(feature, ClassLabel) else None
        self.images = rows.select_columns([self.image_column]).cast_column(
            self.image_column, ImageFeature(decode=False)
        )

    def __len__(self) -> int:
        return len(self.labels)

    def check_labels(self, num_labels: int) -> None:
        """Compare the labels with the number of a model's classes.

        Raises:
            ValueError: for the first label that the model lacks.
        """
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= num_labels))
        if len(wrong):
            raise ValueError(
                f"row {wrong[0]} of {self.origin} has the label {self.labels[wrong[0]]}: the "
                f"model has the classes 0 to {num_labels - 1} (set num_labels for a new head)"
            )

    def image(self, index: int) -> Image.Image:
        """The image of a row, in RGB.

        Raises:
            ValueError: if it can't be decoded; the message names the row.
        """
        stored = self.images[index][self.image_column]
        if stored is None:
            raise ValueError(f"row {index} of {self.origin} has no image")
        try:
            source = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
            return read_image(source)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            path = f" ({stored['path']})" if stored["path"] else ""
            raise ValueError(
                f"row {index} of {self.origin}{path} holds no readable image: {error}"
            ) from error


def read_image(source: Any) -> Image.Image:
    """Decode an image file of any mode to RGB."""
    with Image.open(source) as stored:
        image = ImageOps.exif_transpose(stored)
        if image.mode == "P" and "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")
        return image.convert("RGB")


def _column(rows: Dataset, setting: str, column: str | None, kind: type, origin: str) -> str:
    known = ", ".join(rows.column_names)
    if column is not None:
        if column not in rows.column_names:
            raise ValueError(f"{setting}={column!r}: {origin} has the columns {known}")
        return column
    fitting = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    if len(fitting) != 1:
        raise ValueError(
            f"{setting} is not set, and {origin} has {len(fitting)} columns of type "
            f"{kind.__name__} among {known}: name the one to use"
        )
    return fitting[0]


class LabelledImages(TorchDataset):
    """Images and labels of some rows.

    An item is asked for by its index, or by (epoch, index): the epoch, together with the seed and
    the row, determines how it is augmented.
    """

    def __init__(
        self,
        rows: Rows,
        process: Callable[[Image.Image], Tensor],
        *,
        augment: FlipAndCrop | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        seed: int = 0,
    ):
        self.rows = rows
        self.process = process
        self.augment = augment
        self.indices = range(len(rows)) if indices is None else indices
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        row = int(self.indices[index])
        image = self.rows.image(row)
        if self.augment is not None:
            image = self.augment(image, np.random.default_rng([self.seed, epoch, row]))
        return {"pixel_values": self.process(image), "labels": int(self.rows.labels[row])}


class ImageFolder(TorchDataset):
    """Images of files, with the files' names."""

    def __init__(self, files: Sequence[Path], processor: Any):
        self.files = files
        self.process = Process(processor)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        try:
            image = read_image(file)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file} holds no readable image: {error}") from error
        return {"pixel_values": self.process(image), "files": str(file)}


class ResumableSampler(DistributedSampler):
    """Items in an order that seed and epoch determine, as (epoch, index), from ``start`` on."""

    start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in islice(super().__iter__(), self.start, None):
            yield self.epoch, index


class ResumableDataLoader(DataLoader):
    """A loader that begins an epoch where an interrupted run had left it.

    Lightning restores its count of this epoch's batches after loaders have been set up, so
    ``batches_done`` is asked when the first batch is fetched.
    """

    def __init__(self, *args: Any, batches_done: Callable[[], int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batches_done = batches_done

    def __iter__(self) -> Iterator[Any]:
        self.sampler.start = self.batches_done() * (self.batch_size or 1)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer's own count of batches is the state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load, see :meth:`state_dict`."""
