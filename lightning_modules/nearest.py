"""Brute-force search for the nearest vectors in a folder, one shard at a time."""

from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .vector_folder import VectorFolder


class Neighbour(NamedTuple):
    """A row that was found in a folder of vectors.

    Attributes:
        cosine: cosine of its vector and the query.
        unit: number of its shard.
        row: its columns by name, except the vector.
    """

    cosine: float
    unit: int
    row: dict[str, Any]


def nearest(folder: VectorFolder, query: Tensor, count: int) -> list[Neighbour]:
    """Find the rows whose vectors have the highest cosine with a query, the highest first.

    Only one shard at a time is in memory. FAISS searches it if it is installed, otherwise PyTorch.
    Both compare every row.

    Args:
        query: query vector (d).
        count: number of rows to find.

    Raises:
        ValueError: if the query and the vectors of the folder differ in length.
    """
    search = _by_faiss if find_spec("faiss") is not None else _by_torch
    wanted = F.normalize(query.float(), dim=0)
    best: list[tuple[float, int, int]] = []
    for unit in folder.done():
        vectors = folder.vectors(unit)
        if not len(vectors):
            continue
        if vectors.shape[1] != len(wanted):
            raise ValueError(
                f"{folder.path} has vectors of {vectors.shape[1]} channels, where that of the "
                f"query has {len(wanted)}"
            )
        cosines, rows = search(wanted, F.normalize(vectors), min(count, len(vectors)))
        found = zip(cosines.tolist(), rows.tolist(), strict=True)
        best += [(-cosine, unit, row) for cosine, row in found]
        best = sorted(best)[:count]
    rows_of = {unit: [row for _, one, row in best if one == unit] for _, unit, _ in best}
    columns = {
        (unit, row): columns
        for unit, rows in rows_of.items()
        for row, columns in zip(rows, folder.rows(unit, rows), strict=True)
    }
    return [Neighbour(-minus, unit, columns[unit, row]) for minus, unit, row in best]


def _by_torch(query: Tensor, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    found = (vectors @ query).topk(count)
    return found.values, found.indices


def _by_faiss(query: Tensor, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    import faiss

    cosines, rows = faiss.knn(
        query[None].numpy(), vectors.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT
    )
    return torch.from_numpy(cosines[0]), torch.from_numpy(rows[0])
