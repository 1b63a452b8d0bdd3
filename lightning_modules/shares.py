"""Evaluation by several processes: each image counts once, and all make the same number of steps.

Where processes exchange anything in a step, weights in shards or the statistics of a BatchNorm, one
that has no batch left would let the others wait for ever.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler

Batch = dict[str, Any]
NOT_COUNTED = -100  # the label of an image that is not to be counted, as PyTorch's losses have it


class OwnShare(DistributedSampler):
    """Every ``num_replicas``-th item from ``rank`` on: none twice, and none left out."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))


class EvaluationLoader(DataLoader):
    """Batches of a process's share of labelled images, with as many as the first process has.

    Args:
        images: :class:`LabelledImages`.
        rank: of this process.
        world_size: number of processes.
        options: arguments of ``DataLoader``.
    """

    def __init__(self, images: Any, *, rank: int, world_size: int, **options: Any):
        share = OwnShare(images, num_replicas=world_size, rank=rank, shuffle=False)
        super().__init__(images, sampler=share, **options)

    def __len__(self) -> int:
        longest = -(-len(self.dataset) // self.sampler.num_replicas)
        return -(-longest // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        steps = iter(range(len(self)))
        yield from in_step(
            super().__iter__(), self.dataset, lambda _: next(steps, None) is not None
        )


def in_step(
    batches: Iterable[Batch], images: Any, goes_on: Callable[[bool], bool]
) -> Iterator[Batch]:
    """The batches, and then some of one black image that is not counted.

    Args:
        images: what the batches are made of, with the attributes ``process`` and ``on_bad_image``.
        goes_on: asked before each batch, and told whether there is one: whether any process has.
    """
    own = iter(batches)
    while True:
        batch = next(own, None)
        if not goes_on(batch is not None):
            return
        yield _black(images) if batch is None else batch


def _black(images: Any) -> Batch:
    pixel_values = images.process(Image.new("RGB", (64, 64)))[None]
    batch = {"pixel_values": pixel_values, "labels": torch.tensor([NOT_COUNTED])}
    if images.on_bad_image == "skip":
        batch["skipped"] = torch.tensor([0])
    return batch
