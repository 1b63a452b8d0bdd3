"""Opening of datasets by name: of the Hub, or folders of parquet files, tar files or images."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, IterableDataset, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetGenerationCastError, DatasetGenerationError
from datasets.inspect import SplitsNotFoundError

from .columns import class_names, find_columns
from .folders import LABEL, open_image_folder
from .image_task import ImageTask
from .labelled_images import Rows
from .streaming import count_rows

SHARDS = 64  # of a folder of images that is read as a stream


class NamedDataset:
    """A dataset whose splits are opened by name.

    Args:
        dataset: id on the Hub, or a local folder.
        name: configuration of the dataset, if it has several.
        revision: branch, tag or commit of the dataset on the Hub.

    Raises:
        ValueError: if ``dataset`` is not set or a file.
        FileNotFoundError: for a missing folder.
    """

    def __init__(self, dataset: str | None, name: str | None = None, revision: str | None = None):
        if not dataset:
            raise ValueError("dataset is not set: name a dataset of the Hub or a local folder")
        if not os.path.exists(dataset) and dataset.startswith((".", "/", "~")):
            raise FileNotFoundError(f"dataset={dataset!r}: there is no such folder")
        if os.path.exists(dataset) and not os.path.isdir(dataset):
            raise ValueError(f"dataset={dataset!r} is not allowed: it is no folder")
        self.dataset = dataset
        self.name = name
        self.revision = revision

    @cached_property
    def _folder(self) -> dict[str, Dataset] | None:
        return open_image_folder(Path(self.dataset)) if os.path.isdir(self.dataset) else None

    @cached_property
    def splits(self) -> list[str]:
        """Names of the splits.

        Raises:
            ValueError: if the dataset can't be read.
        """
        if self._folder is not None:
            return list(self._folder)
        return self._ask(get_dataset_split_names)

    def load(self, split: str, *, streaming: bool = False) -> Dataset | IterableDataset:
        """Open a split.

        Raises:
            ValueError: if there is no such split, or it can't be read.
        """
        if split not in self.splits:
            raise ValueError(
                f"{self.dataset} has no split {split!r}: it has {', '.join(self.splits)}"
            )
        if self._folder is None:
            return self._ask(load_dataset, split=split, streaming=streaming)
        rows = self._folder[split]
        if not streaming:
            return rows
        if LABEL in rows.column_names:
            names = sorted(self.texts(LABEL))
            number = {name: i for i, name in enumerate(names)}
            numbers = [number[name] for name in rows[LABEL]]
            classes = ClassLabel(names=names)
            rows = rows.remove_columns(LABEL).add_column(LABEL, numbers, feature=classes)
        rows = rows.shuffle(seed=0, keep_in_memory=True)  # to mix the classes in each shard
        return rows.to_iterable_dataset(min(SHARDS, len(rows)))

    def rows(
        self,
        split: str,
        task: ImageTask,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        all_of_them: bool = False,
    ) -> Rows:
        """Open the images and labels of a split.

        Args:
            task: task of the model.
            all_of_them: see :func:`.class_names`.
            image_column, label_column: see :func:`.find_columns`.

        Raises:
            ValueError: for a missing split or column, or labels that the model does not have.
        """
        rows, origin = self.load(split), f"{self.dataset}, split {split}"
        columns = find_columns(rows, origin, image_column, label_column)
        names: Sequence[str] | None = None
        if columns.by_name:
            found = self.texts(columns.label)
            names = class_names(found, task.class_names, all_of_them=all_of_them)
        return Rows(rows, origin, columns, task, names)

    def texts(self, column: str) -> set[str]:
        """Distinct texts of a column, over all splits that have it."""
        opened = [self.load(split) for split in self.splits]
        return {
            text
            for rows in opened
            if column in rows.column_names
            for text in rows.unique(column)
            if text is not None
        }

    def count(self, split: str) -> int | None:
        """Number of rows of a split, if known without reading them."""
        if self._folder is not None:
            return len(self._folder[split])
        return count_rows(self.dataset, self.name, self.revision, split)

    def _ask(self, function: Any, **options: Any) -> Any:
        try:
            return function(self.dataset, self.name, revision=self.revision, **options)
        except ConnectionError:
            raise
        except Exception as error:  # its type depends on the files
            hint = ""
            if os.path.isdir(self.dataset) and any(sign in self.dataset for sign in "*?[]"):
                hint = (
                    ". datasets takes *, ? and [] in the names of folders for patterns: rename it"
                )
            raise ValueError(
                f"dataset={self.dataset!r} can't be read: {_reason(error)}{hint}"
            ) from error


def _reason(error: BaseException) -> str:
    """Message of the cause, for an error of ``datasets`` whose own message gives no reason."""
    while isinstance(error, DatasetGenerationError | SplitsNotFoundError):
        deeper = error.__cause__ or error.__context__
        if deeper is None or isinstance(error, DatasetGenerationCastError):
            break
        error = deeper
    return str(error)
