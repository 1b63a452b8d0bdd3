"""What fusion does to vectors: beside those of another setting, on some images of a collection."""

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
    """Vectors of two settings side by side.

    Attributes:
        images: that were compared.
        cosine: of an image's two vectors, the mean.
        cosine_low: below which the lowest hundredth of these lie.
        neighbours: how many nearest ones of an image were looked at, among these images.
        kept: part of them that are the same by both settings.
    """

    images: int
    cosine: float
    cosine_low: float
    neighbours: int
    kept: float


def compare_settings(run: EmbeddingRun, other: Embedder, sample: int) -> Comparison:
    """Compare vectors that were written with those of another setting.

    Args:
        run: at its end.
        other: makes the same kind of vectors, on the device that it is on.
        sample: images to compare, evenly spaced ones of some ten to a unit, or more where there
            are fewer units.

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
    """Vectors (b, d) of images and what the model takes of them, (b, channels, height, width)."""
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
    """Two vectors of each image, (n, d) both."""
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
    """The other vectors that are nearest to each by cosine: (n, d) -> (n, count)."""
    directions = F.normalize(vectors)
    return (directions @ directions.T).fill_diagonal_(-torch.inf).topk(count).indices


def _evenly(items: "list[int] | range", count: int) -> list[int]:
    """So many of them, evenly spaced, or all where there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
