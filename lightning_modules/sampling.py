"""The order of training images, and loaders that continue an interrupted epoch."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler


class ResumableSampler(DistributedSampler):
    """Yields (epoch, index, copy) in an order that seed and epoch determine, from ``start`` on.

    In the order over all processes, each image occurs ``repeats`` times in a row. Its copies are
    augmented differently. They are in the same global batch, and on different processes if there
    are several (repeated augmentation: arXiv 1901.09335; as in DeiT, arXiv 2012.12877). The number
    of samples per epoch does not change, so an epoch uses one in ``repeats`` images.

    Args:
        repeats: number of copies of an image in an epoch.
        others: arguments of ``DistributedSampler``.
    """

    dataset: Any
    start = 0

    def __init__(self, *others: Any, repeats: int = 1, **named: Any):
        super().__init__(*others, **named)
        self.repeats = repeats

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        first = self.rank + self.start * self.num_replicas
        for position in range(first, self.total_size, self.num_replicas):
            image, copy = divmod(position, self.repeats)
            yield self.epoch, order[image % len(order)], copy


class ResumableDataLoader(DataLoader):
    """Loader that starts an epoch where an interrupted run stopped.

    Lightning restores its batch count of the epoch after the setup of the loaders, so
    ``batches_done`` is called when the first batch is fetched.
    """

    sampler: ResumableSampler

    def __init__(self, *args: Any, batches_done: Callable[[], int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batches_done = batches_done

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.sampler.start = self.batches_done() * (self.batch_size or 1)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: the trainer's batch count is the state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing, see :meth:`state_dict`."""


def stop_with_parent_only(worker_id: int = 0) -> None:
    """Ignore SIGINT, and SIGTERM unless the parent sends it; for DataLoader's ``worker_init_fn``.

    Batch systems send SIGTERM, and terminals send SIGINT (Ctrl-C), to every process of a job. A
    worker that ended then would stop the training with an error before the state is saved. Any
    SIGTERM still ends a worker that was not forked, because its imports have started threads, and
    one on a system where signals do not report their sender (macOS, Windows).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    parent = multiprocessing.parent_process()  # not the forkserver, whose child this may be
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)
