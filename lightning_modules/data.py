"""Images of any Hugging Face dataset, or of a folder, as batches for an image classifier."""

import warnings
from collections.abc import Sequence
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
from mctf_hf.classes import names_of
from mctf_hf.images import OnBadImage, UnreadableImage, check_head
from mctf_hf.problems import SINGLE

from .augmentation import Crop, FlipAndCrop
from .batch_augmentation import BatchAugmentation, Mixing, Normalization, RandomErasing
from .evaluation_loaders import EvaluationLoader, UnpaddedSampler
from .folders import find_images
from .labelled_images import (
    AsBytes,
    ImageFolder,
    LabelledImages,
    PixelReader,
    Rows,
)
from .opening import NamedDataset
from .processors import output_size
from .rand_augment import RandAugment
from .sampling import ResumableDataLoader, ResumableSampler, stop_with_parent_only
from .streaming import Share, StreamedImages, StreamLoader


class HFImageDataModule(L.LightningDataModule):
    """Training, validation, test and prediction images.

    Images are converted to RGB and go through the model's own image processor, which is taken
    from the module that is trained. In training, workers decode, crop and flip, and the model's
    device does the rest with whole batches: RandAugment, normalisation, random erasing, mixing.
    Whatever is random here is a function of the seed, the epoch and the image alone (for a stream:
    and of its place in the stream), so an interruption does not change it.

    Args:
        dataset: id of a dataset on the Hugging Face Hub, or a local folder of parquet files or of
            images in one subfolder per class, in splits (``train/``, ``val/``, ``test/``) or not;
            see :func:`open_image_folder`. Not needed for prediction.
        name: configuration of the dataset, if it has several.
        revision: branch, tag or commit of the dataset on the Hub.
        train_split: split to train on.
        val_split: split to validate on. Unset: ``validation``, if the dataset has one, or else
            ``val_fraction`` of the training split, which is then left out of training.
        val_fraction: part of the training split to validate on where there is no other.
        test_split: split for the final test.
        image_column: column of the images. Unset: the only one of type image.
        label_column: column of the labels: integers, class labels or names; for several labels per
            image, lists of class labels or of 1 and 0; for regression, numbers or lists of them.
            Unset: the only one of type class label, the only list of these, ``label`` if it holds
            integers or names, or the only one of texts.
        batch_size: images per process and step in training.
        eval_batch_size: images per process and step otherwise. Unset: the same.
        num_workers: processes that load and augment images; 0 does it in the main process.
        crop: random crop in training: ``none``, ``padded`` (for small images) or ``resized`` (for
            ImageNet).
        flip: mirror half of the training images.
        rand_augment: policy of RandAugment, such as ``rand-m9-mstd0.5-inc1``, that of DeiT.
        random_erasing: part of the training images of which a rectangle is replaced by noise.
        mixup: alpha of mixup; 0 is off.
        cutmix: alpha of cutmix; 0 is off. With both, each batch gets one of the two at random.
        repeated_augmentation: copies of an image in a global batch, differently augmented; an
            epoch has as many samples as without.
        on_bad_image: ``error`` stops at an image that can't be read. ``skip`` warns and counts it;
            in training, the next row that can be read takes its place, in evaluation it is left
            out, and in prediction its row tells why.
        streaming: read the dataset as a stream, which takes no place on the disk: parquet files
            or tar files in WebDataset format, best with as many shards as a multiple of the
            processes times ``num_workers``.
        shuffle_buffer: rows of a worker among which the next one is drawn when streaming.
        train_images: rows of ``train_split`` when streaming. Unset: what the dataset's card or
            parquet files tell, which tar files don't.
        predict_folder: folder of images to predict, searched with its subfolders.
        seed: of the order, the augmentation and the cut of the validation part.
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
            raise ValueError(f"val_fraction={val_fraction!r} is not allowed: it is between 0 and 1")
        check_range(0, 1, random_erasing=random_erasing)
        check_range(0, num_workers=num_workers, mixup=mixup, cutmix=cutmix)
        check_range(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_range(1, repeated_augmentation=repeated_augmentation)
        check_range(1, shuffle_buffer=shuffle_buffer, train_images=train_images)
        if streaming and repeated_augmentation > 1:
            raise ValueError(
                f"repeated_augmentation={repeated_augmentation!r} is not allowed with streaming: "
                "a stream tells each image once"
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
        self._fitting = False
        self._sets = {}
        self._policy = None if rand_augment is None else RandAugment.parse(rand_augment)
        self._augmentation: BatchAugmentation | None = None
        self._quiet = ExitStack()  # while a trainer runs

    def setup(self, stage: str) -> None:
        """Open what a stage needs.

        Raises:
            ValueError: for a missing folder, column or split, or labels that the model lacks.
        """
        model: Any = self.trainer.lightning_module
        processor = model.image_processor
        if stage == "predict":
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                raise ValueError(
                    "trainer.strategy: ModelParallelStrategy is not allowed for prediction, where "
                    "processes may have unequal numbers of batches: use ddp"
                )
            self._sets["predict"] = ImageFolder(
                self._image_files(), self._reader(processor), self.on_bad_image
            )
            return
        self._fitting = stage == "fit"
        if self._fitting:
            self._augmentation = BatchAugmentation(
                Normalization.of(processor),
                model.num_labels,
                self._policy,
                RandomErasing(self.random_erasing) if self.random_erasing else None,
                Mixing(self.mixup, self.cutmix) if self.mixup or self.cutmix else None,
            )
        if stage == "test":
            self._sets["test"] = self._evaluated(self.test_split, processor)
        elif not self._sets.keys() >= ({"train", "val"} if stage == "fit" else {"val"}):
            self._open_train_and_val(processor, train=stage == "fit")
        self._settle_labels()
        names = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        for name in names:
            images = self._sets[name]
            assert not isinstance(images, ImageFolder)
            rank_zero_info(f"{name}: {images.summary()}")

    @property
    def num_train_images(self) -> int | None:
        """How many images there are to train on, where that is known and they are opened."""
        images = self._sets.get("train")
        return len(images) if isinstance(images, LabelledImages) else None

    def _open_train_and_val(self, processor: Any, *, train: bool) -> None:
        val_split = self.val_split
        if val_split is None and "validation" in self.named.splits:
            val_split = "validation"
        if val_split is not None:
            self._sets["val"] = self._evaluated(val_split, processor)
            if train:
                self._sets["train"] = self._augmented(processor)
            return
        if self.streaming:
            raise ValueError(
                f"{self.dataset} has no validation split, and none can be cut from a stream: set "
                f"val_split to one of {', '.join(self.named.splits)}"
            )
        rows = self._own_rows(self.train_split)
        order = np.random.default_rng([self.seed, len(rows)]).permutation(len(rows))
        cut = max(1, round(len(order) * self.val_fraction))
        if train and cut == len(order):
            raise ValueError(
                f"val_fraction={self.val_fraction!r} leaves none of the {len(order)} rows of "
                f"{rows.origin} to train on"
            )
        self._sets["val"] = self._evaluated(rows, processor, indices=np.sort(order[:cut]))
        if train:
            self._sets["train"] = self._augmented(processor, rows, indices=np.sort(order[cut:]))

    def _reader(
        self, processor: Any, kind: type[PixelReader] = PixelReader, **options: Any
    ) -> PixelReader:
        channels = getattr(self.trainer.lightning_module, "num_channels", 3)
        return kind(processor, channels, **options)

    def _evaluated(
        self, source: "str | Rows", processor: Any, **options: Any
    ) -> LabelledImages | StreamedImages:
        """A split as the image processor makes it."""
        if self.streaming:
            assert isinstance(source, str)
            return self._stream(source, self._reader(processor), self.eval_batch_size)
        rows = self._own_rows(source) if isinstance(source, str) else source
        options |= {"on_bad_image": self.on_bad_image, "leave_out": True}
        return LabelledImages(rows, self._reader(processor), **options)

    def _augmented(
        self, processor: Any, rows: Rows | None = None, **options: Any
    ) -> LabelledImages | StreamedImages:
        """The training split as bytes, cropped and flipped."""
        assert self._augmentation is not None
        reader = self._reader(processor, AsBytes)
        if self.crop == "none":
            reader = self._reader(processor, do_rescale=False, do_normalize=False)
        options |= {
            "augment": FlipAndCrop(
                output_size(processor), self.crop, self.flip, resample=processor.resample
            ),
            "num_draws": self._augmentation.num_draws,
        }
        if self.streaming:
            options |= {"shuffle_buffer": self.shuffle_buffer}
            return self._stream(self.train_split, reader, self.batch_size, **options)
        options |= {"seed": self.seed, "on_bad_image": self.on_bad_image}
        return LabelledImages(rows or self._own_rows(self.train_split), reader, **options)

    def _stream(self, split: str, reader: Any, batch_size: int, **options: Any) -> StreamedImages:
        problem, num_labels = self._head()
        images = StreamedImages(
            self.named.load(split, streaming=True),
            f"{self.dataset}, split {split}",
            reader,
            share=Share(self.trainer.global_rank, self.trainer.world_size),
            problem=problem,
            num_labels=num_labels,
            batch_size=batch_size,
            image_column=self.image_column,
            label_column=self.label_column,
            seed=self.seed,
            on_bad_image=self.on_bad_image,
            **options,
        )
        self.label_names = images.columns.label_names
        return images

    @property
    def named(self) -> NamedDataset:
        """The dataset. Raises as :class:`NamedDataset` does."""
        if self._named is None:
            self._named = NamedDataset(self.dataset, self.name, self.revision)
        return self._named

    def rows(
        self, split: str, known: Sequence[str] | None = None, *, all_of_them: bool = False
    ) -> Rows:
        """Open a split, see :meth:`.NamedDataset.rows`, which raises."""
        columns = {"image_column": self.image_column, "label_column": self.label_column}
        return self.named.rows(split, known, **columns, all_of_them=all_of_them)

    def _head(self) -> tuple[str, int]:
        """The model's ``problem_type`` and its number of outputs."""
        model: Any = self.trainer.lightning_module
        return getattr(model, "problem_type", SINGLE), model.num_labels

    def _own_rows(self, split: str) -> Rows:
        """The same for the model that is trained or evaluated."""
        model = self.trainer.lightning_module
        config = getattr(getattr(model, "model", None), "config", None)
        known = None if config is None else names_of(config)
        return self.rows(split, known, all_of_them=self._fitting)

    def _settle_labels(self) -> None:
        """Make the labels of all open splits those of the model's head."""
        for images in self._sets.values():
            if isinstance(images, LabelledImages):
                images.rows.settle_labels(*self._head())
                self.label_names = images.rows.label_names

    def training_labels(self) -> np.ndarray | None:
        """Labels of the rows to train on, (rows,) or (rows, labels); None of a stream."""
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
        """Keep random numbers where they are needed: they decide what the device is told to do."""
        if "draws" in batch:
            batch = {**batch, "draws": batch["draws"].numpy()}
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment and normalise a batch of training images on the model's device."""
        if not self.trainer.training:
            return batch
        assert self._augmentation is not None
        images, labels = self._augmentation(
            batch["pixel_values"], batch["labels"], batch.pop("draws", None)
        )
        # Lightning has converted the batch to the precision of the weights before it was augmented.
        convert = self.trainer.precision_plugin.convert_input
        return {**batch, **convert({"pixel_values": images, "labels": labels})}

    def train_dataloader(self) -> DataLoader:
        images, trainer = self._sets["train"], self.trainer
        options = self._loader_options() | {
            "batches_done": lambda: trainer.fit_loop.epoch_loop.batch_progress.current.ready
        }
        if isinstance(images, StreamedImages):
            return self._train_stream(images, options)
        sampler = ResumableSampler(
            images,
            num_replicas=trainer.world_size,
            rank=trainer.global_rank,
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

    def _train_stream(self, images: StreamedImages, options: dict[str, Any]) -> StreamLoader:
        rows = self.train_images or self.named.count(self.train_split)
        if rows is None:
            raise ValueError(
                f"train_images is not set, and {images.origin} does not tell how many rows it "
                "has, which the length of an epoch depends on"
            )
        steps = rows // (self.batch_size * self.trainer.world_size)
        if not steps:
            raise ValueError(
                f"batch_size={self.batch_size!r} is not allowed: {images.origin} has {rows} rows, "
                f"less than a batch for each of {self.trainer.world_size} processes"
            )
        # All our workers have shares of their own, and the loader counts whole batches.
        self._quiet.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
        return StreamLoader(
            images, steps=steps, epoch=lambda: self.trainer.current_epoch, **options
        )

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
    """Raise ValueError for files that are no images, before any work is done."""
    errors = []
    for file in files:
        try:
            check_head(file)
        except UnreadableImage as error:
            errors.append(error)
    if errors:
        raise ValueError(
            f"{len(errors)} of {len(files)} files can't be read, the first: {errors[0]}. "
            "--data.on_bad_image skip classifies the others, and tells of these"
        )
