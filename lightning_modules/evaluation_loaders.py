"""Evaluation in several processes: each image counts once, all processes run equally many steps.

Processes may exchange data in a step, such as sharded weights or BatchNorm statistics. A process
without a batch would then make the other processes wait forever.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, default_collate

Batch = dict[str, Any]


class UnpaddedSampler(DistributedSampler):
    """Every ``num_replicas``-th item from ``rank`` on; each item occurs in exactly one process."""

    dataset: Any

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))


class EvaluationLoader(DataLoader):
    """Yields as many batches in every process as process 0 has with :class:`UnpaddedSampler`."""

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
    """Yield the batches, then batches of one uncounted black image until all processes are done.

    Args:
        images: dataset of the batches, with the attributes ``black`` and ``on_bad_image``.
        goes_on: called before each step with whether this process has another batch; returns
            whether any process has one.
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
