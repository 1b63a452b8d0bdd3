"""Evaluation by several processes: each image counts once, and all make the same number of steps.

Where processes exchange anything in a step, weights in shards or the statistics of a BatchNorm, one
that has no batch left would let the others wait for ever.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, default_collate

Batch = dict[str, Any]


class UnpaddedSampler(DistributedSampler):
    """Every ``num_replicas``-th item from ``rank`` on: none twice, and none left out."""

    dataset: Any

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))


class EvaluationLoader(DataLoader):
    """As many batches of labelled images as the first process has by :class:`UnpaddedSampler`."""

    dataset: Any
    batch_size: int

    def __len__(self) -> int:
        processes = self.sampler.num_replicas if isinstance(self.sampler, UnpaddedSampler) else 1
        longest = -(-len(self.dataset) // processes)
        return -(-longest // self.batch_size) if processes > 1 else super().__len__()

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        steps = iter(range(len(self)))
        yield from in_step(
            super().__iter__(), self.dataset, lambda _: next(steps, None) is not None
        )


def in_step(
    batches: Iterable[Batch], images: Any, goes_on: Callable[[bool], bool]
) -> Iterator[Batch]:
    """The batches, and then some of one black image that is not counted.

    Args:
        images: what the batches are made of, with the attributes ``black`` and ``on_bad_image``.
        goes_on: called before each step with whether this process has a batch left; returns whether
            any process has.
    """
    own = iter(batches)
    while True:
        batch = next(own, None)
        if not goes_on(batch is not None):
            return
        if batch is None:
            reports = {"skipped": 0} if images.on_bad_image == "skip" else {}
            batch = default_collate([{**images.black(), **reports}])
        yield batch
