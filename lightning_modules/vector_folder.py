"""A folder of vectors: parquet shards that are complete or absent, and a manifest of the run.

Each unit of an image collection has its own shard, so existing shards show which units are done.
Shapes: ``b`` images, ``d`` channels, ``c`` labels.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features, List, Value
from torch import Tensor

from mctf_hf.embedding import Embedded
from mctf_hf.files import draft, read_object, write_csv, write_text

MANIFEST, UNREADABLE = "manifest.json", "unreadable.csv"
FORMAT = 1
DTYPES = ("float32", "float16")
OWN_COLUMNS = ("id", "vector", "predicted", "score", "scores")
ROWS_IN_GROUP = 1024  # rows of a shard that are kept in memory before they are written
_SHARD = re.compile(r"vectors-(\d{6,})\.parquet")
_UNIT = b"mctf"  # key in a shard's footer for its unit and its unreadable images


class Unreadable(NamedTuple):
    """An image that could not be read, and the reason."""

    id: str
    reason: str


@dataclass
class UnitBatch:
    """Consecutive images of a unit.

    Attributes:
        unit: number of the unit.
        last: whether this is the last batch of the unit.
        ids: ids of the readable images.
        columns: values of the carried columns of these images, by name.
        pixel_values: pixels of these images, (b, channels, height, width); ``None`` for no image.
        unreadable: images that could not be read.
    """

    unit: int
    last: bool
    ids: list[str]
    columns: dict[str, list[Any]]
    pixel_values: Tensor | None
    unreadable: list[Unreadable]

    def pin_memory(self) -> "UnitBatch":
        """Copy to pinned memory, for a fast transfer to a GPU; loaders call this method."""
        pinned = None if self.pixel_values is None else self.pixel_values.pin_memory()
        return dataclasses.replace(self, pixel_values=pinned)


def row_features(
    carried: Features,
    width: int,
    dtype: str,
    labels: Sequence[str] | None,
    *,
    names_best: bool,
    all_scores: bool,
) -> Features:
    """The columns of a shard.

    Args:
        carried: columns that are carried along from the source.
        width: number of channels of a vector.
        dtype: dtype of the vectors, one of :data:`DTYPES`.
        labels: labels of the model; ``None`` if it has none.
        names_best: whether to store the best label and its score, if there are labels.
        all_scores: whether to store the scores of all labels.

    Raises:
        ValueError: for a carried column with a name of :data:`OWN_COLUMNS`, or another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not allowed: it must be one of {', '.join(DTYPES)}")
    taken = sorted(set(carried) & set(OWN_COLUMNS))
    if taken:
        raise ValueError(
            f"columns={','.join(carried)!r} is not allowed: {taken[0]!r} is a column of the "
            "vectors themselves"
        )
    features = {"id": Value("string"), **carried}
    features["vector"] = List(Value(dtype), length=width)
    if labels is not None and names_best:
        features |= {"predicted": Value("string"), "score": Value("float32")}
    if labels is not None and all_scores:
        features["scores"] = List(Value("float32"), length=len(labels))
    return Features(features)


class VectorFolder:
    """A folder of vectors.

    Args:
        path: local path, or a path on a file system that all processes share.

    Raises:
        ValueError: for a URL.
    """

    def __init__(self, path: str | os.PathLike):
        if "://" in str(path):
            raise ValueError(
                f"output={str(path)!r} is not allowed: it must be a folder, of this machine or one "
                "that is mounted. Copy it where it is to go when it is finished"
            )
        self.path = Path(path)

    def shard(self, unit: int) -> Path:
        """Path of the shard of a unit."""
        return self.path / f"vectors-{unit:06d}.parquet"

    def done(self) -> list[int]:
        """Numbers of the units that have a shard, in order."""
        names = os.listdir(self.path) if self.path.is_dir() else []
        return sorted(int(found[1]) for name in names if (found := _SHARD.fullmatch(name)))

    def manifest(self) -> dict[str, Any]:
        """Read the manifest.

        Raises:
            FileNotFoundError: if the folder does not exist or has no manifest.
            ValueError: if the manifest cannot be read or has an unknown format version.
        """
        file = self.path / MANIFEST
        if not file.exists():
            there = "holds no vectors" if self.path.exists() else "does not exist"
            raise FileNotFoundError(f"{self.path} {there}: there is no {MANIFEST}")
        manifest = read_object(file)
        if manifest.get("format") != FORMAT:
            raise ValueError(
                f"{file} is not allowed: its format is {manifest.get('format')!r}, where this "
                f"version knows {FORMAT}"
            )
        return manifest

    def check(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the manifest of an earlier start of the same run; ``None`` if there was none.

        Args:
            settings: all settings that determine the rows.

        Raises:
            FileExistsError: if the folder contains other files, or is a file.
            ValueError: if it contains vectors of another model, other images or other settings.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"output={str(self.path)!r} is not allowed: it is a file")
        if not (self.path / MANIFEST).exists():
            kept = [name for name in _listed(self.path) if not _is_ours(name)]
            if kept:
                raise FileExistsError(
                    f"output={str(self.path)!r} is not allowed: it holds something else "
                    f"({kept[0]}). Name a new folder"
                )
            return None
        manifest = self.manifest()
        before, now = _flat(manifest["settings"]), _flat(json.loads(json.dumps(settings)))
        other = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if other:
            differences = "; ".join(
                f"{k} is {before.get(k)!r} there, {now.get(k)!r} here" for k in other
            )
            raise ValueError(
                f"output={str(self.path)!r} is not allowed: it holds vectors of another run: "
                f"{differences}. Name a new folder"
            )
        return manifest

    def begin(
        self, settings: Mapping[str, Any], record: Mapping[str, Any], num_units: int
    ) -> list[int]:
        """Write the folder's manifest, or check that it belongs to the same run.

        Incomplete shards of a killed run are removed, so no other run may write to the folder.

        Args:
            settings: see :meth:`check`.
            record: further information about the run.

        Returns:
            Numbers of the units that have no shard yet.

        Raises:
            FileExistsError, ValueError: see :meth:`check`.
            OSError: if the folder cannot be written to.
        """
        earlier = self.check(settings)
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(".draft-*"):
            shutil.rmtree(left, ignore_errors=True)
        if earlier is None:
            content = {"format": FORMAT, "status": "running", "settings": settings, **record}
            self._write_manifest(content)
        return sorted(set(range(num_units)) - set(self.done()))

    def finish(self, num_units: int) -> dict[str, Any]:
        """Count the rows of all shards, and mark the run as finished in the manifest.

        Returns:
            The manifest.

        Raises:
            ValueError: if a shard is missing, damaged or not the shard of its unit.
        """
        missing = sorted(set(range(num_units)) - set(self.done()))
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing)} of {num_units} shards, the first of them "
                f"{self.shard(missing[0]).name}: run the same command again"
            )
        rows, unreadable = 0, list[Unreadable]()
        for unit in range(num_units):
            written, lacking = self._footer(unit)
            rows, unreadable = rows + written, unreadable + lacking
        if unreadable:
            with (
                draft(self.path / UNREADABLE) as path,
                path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
            ):
                write_csv(file, Unreadable._fields, (one._asdict() for one in unreadable))
        counts = {
            "images": rows + len(unreadable),
            "vectors": rows,
            "unreadable": len(unreadable),
            "shards": num_units,
        }
        self.add_to_manifest({"status": "finished", "counts": counts})
        return self.manifest()

    def add_to_manifest(self, more: Mapping[str, Any]) -> None:
        """Add entries to the manifest."""
        self._write_manifest({**self.manifest(), **more})

    def _write_manifest(self, content: Mapping[str, Any]) -> None:
        write_text(self.path / MANIFEST, json.dumps(content, indent=2) + "\n")

    def _footer(self, unit: int) -> tuple[int, list[Unreadable]]:
        """Number of rows of a shard, and its unreadable images."""
        file = self.shard(unit)
        try:
            footer = pq.read_metadata(file)
            unit_record = json.loads((footer.metadata or {})[_UNIT])
            if unit_record["unit"] != unit:
                raise ValueError(f"it is that of unit {unit_record['unit']}")
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise ValueError(
                f"{file} is not what was written ({error}): remove it, and run the same command "
                "again"
            ) from error
        return footer.num_rows, [Unreadable(*one) for one in unit_record["unreadable"]]

    def vectors(self, unit: int) -> Tensor:
        """Read the vectors of a shard, (b, d) float32."""
        column = pq.read_table(self.shard(unit), columns=["vector"])["vector"]
        numbers = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        width = column.type.list_size
        return torch.from_numpy(numbers.astype(np.float32).reshape(-1, width))

    def rows(self, unit: int, numbers: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Read rows of a shard without their vectors: all, or those with the given numbers."""
        names = [name for name in pq.read_schema(self.shard(unit)).names if name != "vector"]
        table = pq.read_table(self.shard(unit), columns=names)
        return (table if numbers is None else table.take(list(numbers))).to_pylist()


def _listed(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def _is_ours(name: str) -> bool:
    """Whether a file belongs to a run that has not written its manifest yet."""
    return name.startswith((".draft-", ".run."))


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        whole = f"{above}{name}"
        flat |= _flat(value, f"{whole}.") if isinstance(value, Mapping) else {whole: value}
    return flat


@dataclass
class _OpenShard:
    """A shard that is being written."""

    stack: ExitStack
    writer: pq.ParquetWriter
    tables: list[pa.Table] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)

    def flush(self) -> None:
        if self.tables:
            self.writer.write_table(pa.concat_tables(self.tables))
            self.tables = []


class ShardWriter:
    """Writes the rows of each unit to its shard. Batches of several units may alternate.

    Args:
        folder: output folder.
        features: columns of the rows, see :func:`row_features`.
        labels: labels whose scores are written; ``None`` for none.
    """

    def __init__(self, folder: VectorFolder, features: Features, labels: Sequence[str] | None):
        self.folder, self.labels = folder, labels
        self.schema = features.arrow_schema
        self._open: dict[int, _OpenShard] = {}

    def add(self, batch: UnitBatch, embedded: Embedded | None = None) -> None:
        """Write the rows of a batch, if it has any. The last batch of a unit completes its shard.

        Raises:
            ValueError: for vectors that are not finite in their dtype.
            OSError: if the shard cannot be written; its incomplete file is removed.
        """
        try:
            shard = self._open.get(batch.unit) or self._begin(batch.unit)
            shard.unreadable += batch.unreadable
            if embedded is not None:
                shard.tables.append(self._table(batch, embedded))
            if sum(map(len, shard.tables)) >= ROWS_IN_GROUP or batch.last:
                shard.flush()
            if batch.last:
                unit_record = {"unit": batch.unit, "unreadable": shard.unreadable}
                shard.writer.add_key_value_metadata({_UNIT: json.dumps(unit_record)})
                shard.stack.close()
                del self._open[batch.unit]
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                file = self.folder.shard(batch.unit)
                raise OSError(
                    f"{file} was not written ({error.strerror or error}): the shards before it are "
                    "there. Run the same command again when there is room, which goes on from them"
                ) from error
            raise

    def _begin(self, unit: int) -> _OpenShard:
        with ExitStack() as stack:
            path = stack.enter_context(draft(self.folder.shard(unit)))
            writer = stack.enter_context(pq.ParquetWriter(path, self.schema, use_dictionary=False))
            shard = self._open[unit] = _OpenShard(stack.pop_all(), writer)
        return shard

    def close(self) -> None:
        """Discard incomplete shards."""
        stopped = InterruptedError("not complete")
        for shard in self._open.values():
            with suppress(OSError):  # the disk may be full; the shard is discarded anyway
                shard.stack.__exit__(type(stopped), stopped, None)
        self._open.clear()

    def _table(self, batch: UnitBatch, embedded: Embedded) -> pa.Table:
        columns: dict[str, Any] = {"id": batch.ids, **batch.columns}
        vectors, kind = embedded.vectors.cpu(), self.schema.field("vector").type
        numbers = vectors.numpy().astype(kind.value_type.to_pandas_dtype())
        finite = np.isfinite(numbers).all(1)
        if not finite.all():
            first = batch.ids[int(np.argmin(finite))]
            raise ValueError(
                f"the vector of {first} has numbers that are not finite in {kind.value_type}: are "
                "the weights, the precision and the image right? (dtype=float32 holds larger ones)"
            )
        columns["vector"] = _lists(numbers, kind)
        if embedded.scores is not None:
            found = embedded.scores.float().cpu()
            if "predicted" in self.schema.names:
                assert self.labels is not None
                score, best = found.max(1)
                columns["predicted"] = [self.labels[i] for i in best.tolist()]
                columns["score"] = score.tolist()
            if "scores" in self.schema.names:
                columns["scores"] = _lists(found.numpy(), self.schema.field("scores").type)
        arrays = [
            value if isinstance(value := columns[own.name], pa.Array) else pa.array(value, own.type)
            for own in self.schema
        ]
        return pa.Table.from_arrays(arrays, schema=self.schema)


def _lists(numbers: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Convert rows (b, d) to lists of a fixed length."""
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), type=kind)
