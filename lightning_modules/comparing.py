"""Comparison of the vectors of two fusion settings, on some images of a collection."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice

import torch
from torch import Tensor
from torch.nn import functional as F

from mctf_hf.embedding import Embedder

from .embedding_run import EmbeddingRun

NEIGHBOURS = 10


@dataclass
class Comparison:
    """Result of a comparison of the vectors of two settings.

    Attributes:
        images: number of compared images.
        cosine: mean cosine of an image's two vectors.
        cosine_low: first percentile of these cosines.
        neighbours: number of nearest neighbours per image, among the compared images.
        kept: fraction of these neighbours that both settings share.
    """

    images: int
    cosine: float
    cosine_low: float
    neighbours: int
    kept: float


def compare_settings(run: EmbeddingRun, other: Embedder, sample: int) -> Comparison:
    """Compare the vectors that a run wrote with those of another setting.

    Args:
        run: finished run.
        other: embedder for the same kind of vectors, which runs on its own device.
        sample: number of images to compare, evenly spaced over some units: about ten per unit, or
            more if there are too few units.

    Raises:
        ValueError: for fewer than two images.
    """
    pairs = [(own, other(pixels).vectors.cpu()) for own, pixels in _sampled(run, sample)]
    count = sum(len(own) for own, _ in pairs)
    if count < 2:
        raise ValueError(f"{run.folder.path} has {count} vectors: 2 are needed to compare")
    vectors, others = (torch.cat(parts)[:sample] for parts in zip(*pairs, strict=True))
    return _compared(vectors, others)


def _sampled(run: EmbeddingRun, sample: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield written vectors (b, d) and the pixels (b, channels, height, width) of their images."""
    units = run.folder.done()
    rows_each = run.folder.manifest()["counts"]["vectors"] / len(units)
    units = _evenly(units, max(sample // 10, math.ceil(sample / max(rows_each, 1))))
    ids = [[row["id"] for row in run.folder.rows(unit)] for unit in units]
    starts = list(accumulate(map(len, ids), initial=0))
    picked = _evenly(range(starts[-1]), sample)
    for unit, names, start in zip(units, ids, starts[:-1], strict=True):
        vectors, numbers = run.folder.vectors(unit), (i - start for i in picked)
        own = {names[i]: vectors[i] for i in numbers if 0 <= i < len(names)}
        images = (image for image in run.source.read(unit) if image.id in own)
        while chunk := list(islice(images, run.batch_size)):
            made = [run.reader(run.reader.read(image.stored, image.id)) for image in chunk]
            yield torch.stack([own[image.id] for image in chunk]), run.reader.stack(made)


def _compared(vectors: Tensor, others: Tensor) -> Comparison:
    """Compare two vectors of each image, both (n, d)."""
    cosines = F.cosine_similarity(vectors, others)
    count = min(NEIGHBOURS, len(vectors) - 1)
    near, other_near = (_nearest(one, count) for one in (vectors, others))
    same = (near[:, :, None] == other_near[:, None, :]).any(2).float()
    return Comparison(
        images=len(vectors),
        cosine=float(cosines.mean()),
        cosine_low=float(cosines.quantile(0.01)),
        neighbours=count,
        kept=float(same.mean()),
    )


def _nearest(vectors: Tensor, count: int) -> Tensor:
    """Indices of the nearest other vectors of each vector by cosine: (n, d) -> (n, count)."""
    directions = F.normalize(vectors)
    return (directions @ directions.T).fill_diagonal_(-torch.inf).topk(count).indices


def _evenly(items: "list[int] | range", count: int) -> list[int]:
    """Return ``count`` evenly spaced items, or all if there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
