"""Data module for image classifiers: batches from a Hugging Face dataset or a folder."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from mctf_hf.checks import check_range
from mctf_hf.images import OnBadImage, UnreadableImage, check_head

from .augmentation import Crop, FlipAndCrop
from .batch_augmentation import BatchAugmentation, Mixing, Normalization, RandomErasing
from .evaluation_loaders import EvaluationLoader, UnpaddedSampler
from .folders import find_images
from .image_task import ImageTask
from .labelled_images import AsBytes, ImageFolder, LabelledImages, PixelReader, Rows
from .opening import NamedDataset
from .processors import output_size
from .rand_augment import RandAugment
from .sampling import ResumableDataLoader, ResumableSampler, stop_with_parent_only
from .streaming import Share, StreamedImages, StreamLoader

_ALONE = Share()


class HFImageDataModule(L.LightningDataModule):
    """Training, validation, test and prediction images.

    Images are converted to RGB, or to grey for models with one channel. Then they go through the
    model's image processor, which the trained module provides in its ``task``, an
    :class:`.ImageTask`. In training, workers decode, crop and flip the images. The model's device
    processes whole batches: RandAugment, normalisation, random erasing and mixing.
    All randomness depends only on the seed, the epoch and the image (in a stream, also on the
    position in the stream), so an interruption does not change it.

    Args:
        dataset: id of a dataset on the Hugging Face Hub, or a local folder. The folder contains
            parquet files, or images in one subfolder per class, with or without splits
            (``train/``, ``val/``, ``test/``). Not needed for prediction.
        name: configuration of the dataset, if it has several.
        revision: branch, tag or commit of the dataset on the Hub.
        train_split: split to train on.
        val_split: split to validate on. Unset: ``validation``, if the dataset has this split;
            otherwise ``val_fraction`` of the training split, which is then not trained on.
        val_fraction: fraction of the training split to validate on if there is no other split.
        test_split: split for the final test.
        image_column: column of the images. Unset: the only column of type image.
        label_column: column of the labels: integers, class labels or names; for several labels per
            image, lists of class labels or of 1 and 0; for regression, numbers or lists of numbers.
            Unset: the only column of class labels, the only column of lists of class labels,
            ``label`` if it contains integers or names, or the only column of texts.
        batch_size: images per process and step in training.
        eval_batch_size: images per process and step in evaluation. Unset: ``batch_size``.
        num_workers: worker processes that load and augment images; 0 uses the main process.
        crop: random crop in training: ``none``, ``padded`` (small images), ``resized`` (ImageNet).
        flip: mirror half of the training images, chosen at random.
        rand_augment: policy of RandAugment, such as ``rand-m9-mstd0.5-inc1``, the policy of DeiT.
        random_erasing: fraction of the training images in which noise replaces a rectangle.
        mixup: alpha of mixup; 0 turns it off.
        cutmix: alpha of cutmix; 0 turns it off. If both are on, each batch uses one at random.
        repeated_augmentation: number of copies of an image in a global batch, each with its own
            augmentation. The number of samples per epoch does not change.
        on_bad_image: ``error`` stops at an image that cannot be read. ``skip`` warns and counts the
            image; training uses the next readable row instead, evaluation leaves the image out,
            and prediction writes the reason to its row.
        streaming: read the dataset as a stream, without storing it on the disk: parquet files or
            tar files in WebDataset format. Most efficient if the number of shards is a multiple of
            the processes times ``num_workers``.
        shuffle_buffer: rows per worker from which a stream draws the next row at random.
        train_images: number of rows of ``train_split`` when streaming. Unset: read from the
            dataset's card or parquet files; tar files do not contain it.
        predict_folder: folder of images to predict, including its subfolders.
        seed: seed of the order, the augmentation and the choice of validation images.
    """

    trainer: L.Trainer
    _sets: dict[str, LabelledImages | StreamedImages | ImageFolder]

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
        rand_augment: str | None = None,
        random_erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        repeated_augmentation: int = 1,
        on_bad_image: OnBadImage = "error",
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        train_images: int | None = None,
        predict_folder: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(
                f"val_fraction={val_fraction!r} is not allowed: it must be between 0 and 1"
            )
        check_range(0, 1, random_erasing=random_erasing)
        check_range(0, num_workers=num_workers, mixup=mixup, cutmix=cutmix)
        check_range(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_range(1, repeated_augmentation=repeated_augmentation)
        check_range(1, shuffle_buffer=shuffle_buffer, train_images=train_images)
        if streaming and repeated_augmentation > 1:
            raise ValueError(
                f"repeated_augmentation={repeated_augmentation!r} is not allowed with streaming: "
                "a stream yields each image once"
            )
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
        self.rand_augment = rand_augment
        self.random_erasing = random_erasing
        self.mixup = mixup
        self.cutmix = cutmix
        self.repeated_augmentation = repeated_augmentation
        self.on_bad_image = on_bad_image
        self.streaming = streaming
        self.shuffle_buffer = shuffle_buffer
        self.train_images = train_images
        self.predict_folder = predict_folder
        self.seed = seed
        self.label_names: list[str] | None = None
        self._named: NamedDataset | None = None
        self._opened_for: tuple[ImageTask, Share] | None = None
        self._sets = {}
        self._policy = None if rand_augment is None else RandAugment.parse(rand_augment)
        self._augmentation: BatchAugmentation | None = None
        self._quiet = ExitStack()  # filters of warnings while a trainer runs

    def setup(self, stage: str) -> None:
        """Open the images of a stage, for the ``task`` of the trainer's module.

        Raises:
            ValueError: for a missing column or split, or labels that the model does not have.
            FileNotFoundError: for a missing folder.
        """
        trainer: Any = self.trainer
        if stage == "predict" and isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "trainer.strategy: ModelParallelStrategy is not allowed for prediction, where "
                "processes may have unequal numbers of batches: use ddp"
            )
        share = Share(trainer.global_rank, trainer.world_size)
        self.open(stage, trainer.lightning_module.task, share)

    def open(self, stage: str, task: ImageTask, share: Share = _ALONE) -> None:
        """Open the images of a stage without a trainer. Raises the errors of :meth:`setup`.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
            task: pixels and labels that the model takes.
            share: this process's part of a stream.
        """
        if self._opened_for != (task, share):
            self._opened_for, self._sets = (task, share), {}
        if stage == "predict":
            reader = PixelReader(task.processor, task.num_channels)
            self._sets["predict"] = ImageFolder(self._image_files(), reader, self.on_bad_image)
            return
        if stage == "fit":
            self._augmentation = BatchAugmentation(
                Normalization.of(task.processor),
                task.num_labels,
                self._policy,
                RandomErasing(self.random_erasing) if self.random_erasing else None,
                Mixing(self.mixup, self.cutmix) if self.mixup or self.cutmix else None,
            )
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        if stage == "test":
            self._sets["test"] = self._evaluated(task, share, self.test_split)
        elif not self._sets.keys() >= set(needed):
            self._open_train_and_val(task, share, train=stage == "fit")
        for name in needed:
            images = self._sets[name]
            assert not isinstance(images, ImageFolder)
            self.label_names = images.label_names
            rank_zero_info(f"{name}: {images.summary()}")

    @property
    def num_train_images(self) -> int | None:
        """Number of training images; None if they are not open or a stream."""
        images = self._sets.get("train")
        return len(images) if isinstance(images, LabelledImages) else None

    def _open_train_and_val(self, task: ImageTask, share: Share, *, train: bool) -> None:
        val_split = self.val_split
        if val_split is None and "validation" in self.named.splits:
            val_split = "validation"
        if val_split is not None:
            self._sets["val"] = self._evaluated(task, share, val_split, fit=train)
            if train:
                self._sets["train"] = self._augmented(task, share)
            return
        if self.streaming:
            raise ValueError(
                f"{self.dataset} has no validation split, and none can be cut from a stream: set "
                f"val_split to one of {', '.join(self.named.splits)}"
            )
        rows = self._rows(task, self.train_split, fit=train)
        order = np.random.default_rng([self.seed, len(rows)]).permutation(len(rows))
        cut = max(1, round(len(order) * self.val_fraction))
        if train and cut == len(order):
            raise ValueError(
                f"val_fraction={self.val_fraction!r} leaves none of the {len(order)} rows of "
                f"{rows.origin} to train on"
            )
        self._sets["val"] = self._evaluated(task, share, rows, indices=np.sort(order[:cut]))
        if train:
            self._sets["train"] = self._augmented(task, share, rows, indices=np.sort(order[cut:]))

    def _rows(self, task: ImageTask, split: str, *, fit: bool) -> Rows:
        columns = {"image_column": self.image_column, "label_column": self.label_column}
        return self.named.rows(split, task, **columns, all_of_them=fit)

    def _evaluated(
        self,
        task: ImageTask,
        share: Share,
        source: str | Rows,
        *,
        fit: bool = False,
        **options: Any,
    ) -> LabelledImages | StreamedImages:
        """Open a split with pixel values as the image processor outputs them."""
        reader = PixelReader(task.processor, task.num_channels)
        if self.streaming:
            assert isinstance(source, str)
            return self._stream(task, share, source, reader, self.eval_batch_size)
        rows = self._rows(task, source, fit=fit) if isinstance(source, str) else source
        options |= {"on_bad_image": self.on_bad_image, "leave_out": True}
        return LabelledImages(rows, reader, **options)

    def _augmented(
        self, task: ImageTask, share: Share, rows: Rows | None = None, **options: Any
    ) -> LabelledImages | StreamedImages:
        """Open the training split as bytes, cropped and flipped."""
        assert self._augmentation is not None
        processor, channels = task.processor, task.num_channels
        reader: PixelReader = AsBytes(processor, channels)
        if self.crop == "none":
            reader = PixelReader(processor, channels, do_rescale=False, do_normalize=False)
        options |= {
            "augment": FlipAndCrop(
                output_size(processor), self.crop, self.flip, resample=processor.resample
            ),
            "num_draws": self._augmentation.num_draws,
        }
        if self.streaming:
            options |= {"shuffle_buffer": self.shuffle_buffer}
            return self._stream(task, share, self.train_split, reader, self.batch_size, **options)
        options |= {"seed": self.seed, "on_bad_image": self.on_bad_image}
        rows = rows or self._rows(task, self.train_split, fit=True)
        return LabelledImages(rows, reader, **options)

    def _stream(
        self,
        task: ImageTask,
        share: Share,
        split: str,
        reader: PixelReader,
        batch_size: int,
        **options: Any,
    ) -> StreamedImages:
        return StreamedImages(
            self.named.load(split, streaming=True),
            f"{self.dataset}, split {split}",
            reader,
            share=share,
            task=task,
            batch_size=batch_size,
            image_column=self.image_column,
            label_column=self.label_column,
            seed=self.seed,
            on_bad_image=self.on_bad_image,
            **options,
        )

    @property
    def named(self) -> NamedDataset:
        """The dataset. Raises the errors of :class:`NamedDataset`."""
        if self._named is None:
            self._named = NamedDataset(self.dataset, self.name, self.revision)
        return self._named

    def training_labels(self) -> np.ndarray | None:
        """Labels of the training rows, (rows,) or (rows, labels); None for a stream."""
        images = self._sets.get("train")
        if not isinstance(images, LabelledImages):
            return None
        return images.rows.labels[np.asarray(images.indices)]

    def _image_files(self) -> list[Path]:
        if self.predict_folder is None:
            raise ValueError("predict_folder is not set: name the folder of images to predict")
        folder = Path(self.predict_folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"predict_folder={self.predict_folder!r}: there is no such folder"
                + (", it is a file" if folder.exists() else "")
            )
        found = find_images(folder)
        if not found.images:
            left_out = f": left out are {found.summary()}" if found.left_out else ""
            raise ValueError(f"predict_folder={self.predict_folder!r} holds no images{left_out}")
        if found.left_out:
            rank_zero_warn(f"{folder}: files are left out: {found.summary()}")
        if self.on_bad_image == "error":
            _check_heads(found.images)
        rank_zero_info(f"predict: {len(found.images):,} images")
        return found.images

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Keep random numbers on the CPU, where they select the operations that the device runs."""
        if "draws" in batch:
            batch = {**batch, "draws": batch["draws"].numpy()}
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment and normalise a batch of training images on the model's device."""
        if not self.trainer.training:
            return batch
        augmented = self.augment(batch)
        # Lightning converted the batch to the weights' precision, and augmentation changed that.
        convert = self.trainer.precision_plugin.convert_input
        return augmented | convert({name: augmented[name] for name in ("pixel_values", "labels")})

    def augment(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Augment and normalise a batch of training images on its own device."""
        assert self._augmentation is not None
        rest = {name: value for name, value in batch.items() if name != "draws"}
        images, labels = self._augmentation(
            batch["pixel_values"], batch["labels"], batch.get("draws")
        )
        return {**rest, "pixel_values": images, "labels": labels}

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        return self.training_loader(
            epoch=lambda: trainer.current_epoch,
            batches_done=lambda: trainer.fit_loop.epoch_loop.batch_progress.current.ready,
        )

    def training_loader(
        self,
        *,
        epoch: Callable[[], int] = lambda: 0,
        batches_done: Callable[[], int] = lambda: 0,
    ) -> DataLoader:
        """Loader of training batches, after :meth:`open`.

        Each batch goes through :meth:`on_before_batch_transfer`, then to the device, then through
        :meth:`augment`.

        Args:
            epoch: returns the number of the epoch that begins, for streams.
            batches_done: returns the number of batches of the epoch that an interrupted run used.

        Raises:
            ValueError: for a stream whose length is unknown or too short for one batch.
        """
        assert self._opened_for is not None
        images, (_, share) = self._sets["train"], self._opened_for
        options = self._loader_options() | {"batches_done": batches_done}
        if isinstance(images, StreamedImages):
            steps = self._steps(images, share)
            # The warning does not apply: workers have separate shares, StreamLoader counts batches.
            self._quiet.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__`")
            return StreamLoader(images, steps=steps, epoch=epoch, **options)
        sampler = ResumableSampler(
            images,
            num_replicas=share.world_size,
            rank=share.rank,
            shuffle=True,
            seed=self.seed,
            repeats=self.repeated_augmentation,
        )
        return ResumableDataLoader(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=len(sampler) >= self.batch_size,
            **options,
        )

    def _steps(self, images: StreamedImages, share: Share) -> int:
        """Number of batches per epoch of a stream."""
        rows = self.train_images or self.named.count(self.train_split)
        if rows is None:
            raise ValueError(
                f"train_images is not set, and {images.origin} does not say how many rows it "
                "has, and the length of an epoch depends on it"
            )
        steps = rows // (self.batch_size * share.world_size)
        if not steps:
            raise ValueError(
                f"batch_size={self.batch_size!r} is not allowed: {images.origin} has {rows} rows, "
                f"less than a batch for each of {share.world_size} processes"
            )
        return steps

    def teardown(self, stage: str) -> None:
        self._quiet.close()

    def on_exception(self, exception: BaseException) -> None:
        self._quiet.close()

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": stop_with_parent_only,
        }

    def val_dataloader(self) -> DataLoader:
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._eval_dataloader("predict")

    def _eval_dataloader(self, which: str) -> DataLoader:
        images, options = self._sets[which], self._loader_options()
        trainer = self.trainer
        if isinstance(images, StreamedImages):
            any_process = partial(trainer.strategy.reduce_boolean_decision, all=False)
            return StreamLoader(images, goes_on=any_process, **options)
        options["batch_size"] = self.eval_batch_size
        if isinstance(images, LabelledImages):
            share = UnpaddedSampler(images, trainer.world_size, trainer.global_rank, shuffle=False)
            return EvaluationLoader(images, sampler=share, **options)
        return DataLoader(images, **options)


def _check_heads(files: Sequence[Path]) -> None:
    """Raise ValueError for files that are not images, before any work is done."""
    errors = []
    for file in files:
        try:
            check_head(file)
        except UnreadableImage as error:
            errors.append(error)
    if errors:
        raise ValueError(
            f"{len(errors)} of {len(files)} files can't be read, the first: {errors[0]}. "
            "--data.on_bad_image skip classifies the others, and reports these"
        )
