"""In what order training sees its images, so that an interrupted epoch can be taken up."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler


class ResumableSampler(DistributedSampler):
    """Items in an order that seed and epoch determine, as (epoch, index, copy), from ``start`` on.

    With ``repeats`` each image comes so many times in a row in the order of all processes, so that
    its copies, which are augmented differently, are in the same global batch and on different
    processes where there are several (repeated augmentation: arXiv 1901.09335; as in DeiT, arXiv
    2012.12877). The epoch has as many samples as without, so it sees one in ``repeats`` images.

    Args:
        repeats: copies of each image in an epoch.
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
    """A loader that begins an epoch where an interrupted run had left it.

    Lightning restores its count of this epoch's batches after loaders have been set up, so
    ``batches_done`` is asked when the first batch is fetched.
    """

    sampler: ResumableSampler

    def __init__(self, *args: Any, batches_done: Callable[[], int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batches_done = batches_done

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.sampler.start = self.batches_done() * (self.batch_size or 1)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer's own count of batches is the state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load, see :meth:`state_dict`."""


def stop_with_parent_only(worker_id: int = 0) -> None:
    """For ``worker_init_fn`` of a ``DataLoader``: signals end a worker if its parent sends them.

    Batch systems signal every process of a job (SIGTERM), and terminals do for Ctrl-C (SIGINT). A
    worker that died of it would end the training by an error before the state is saved. SIGTERM
    ends it all the same where signals do not tell their sender (macOS, Windows).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
