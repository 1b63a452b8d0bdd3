"""Embedding of large image collections with Ray Data: actors of a cluster write the shards.

The rows are the same as with one process of Lightning: same units, batches and model.
"""

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from rich.console import Console

from mctf_hf.extras import needed_by

from .embedding_run import EmbeddingRun
from .locks import FolderLock
from .unit_batches import load_units

MOST_AT_ONCE = 8  # units per call of an actor, so that its workers decode ahead


class UnitEmbedder:
    """Embeds units and writes their shards; an actor class for ``map_batches``.

    Args:
        run: list with one reference to an :class:`.EmbeddingRun` in Ray's object store.
    """

    def __init__(self, run: list[Any]):
        import ray

        self.run: EmbeddingRun = ray.get(run[0])
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.run.embedder.to(self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Embed the units in ``unit``; return them with an ``error`` message, empty for success.

        Errors are returned because Ray would hide the cause of an error that is raised here.
        """
        run, writer = self.run, self.run.writer()
        units, wrong = batch["unit"].tolist(), ""
        loader = load_units(run.batches(units), run.num_workers, pin_memory=self.device == "cuda")
        try:
            for part in loader:
                made = [] if part.pixel_values is None else [run.embedder(part.pixel_values)]
                writer.add(part, *made)
        except (ValueError, OSError) as error:
            wrong = str(error)
        finally:
            writer.close()
        return {"unit": batch["unit"], "error": np.array([wrong] * len(units))}


def embed_by_ray(
    run: EmbeddingRun, actors: int, address: str | None, console: Console
) -> dict[str, Any]:
    """Embed all images of a run that have no vector yet, on a Ray cluster.

    Args:
        actors: number of embedding processes; each gets a GPU if the cluster has any.
        address: address of a running cluster; unset, the one that Ray finds, or a new local one.

    Returns:
        The manifest.

    Raises:
        ModuleNotFoundError: if Ray is not installed.
        ValueError, OSError, RuntimeError: see :meth:`.VectorFolder.begin` and
            :class:`.ShardWriter`.
    """
    with needed_by("--engine ray"):
        import ray
        import ray.data

    run.folder.check(run.settings)  # before the lock writes files to it
    begun = not ray.is_initialized()
    if begun:
        ray.init(address=address, log_to_driver=False)
    with ExitStack() as stack:
        if begun:
            stack.callback(ray.shutdown)
        lock = FolderLock(run.folder.path, "output")
        lock.acquire()
        stack.callback(lock.release)
        pending = run.folder.begin(run.settings, run.record, run.source.num_units)
        console.print(f"{len(pending):,} shards to write", highlight=False)
        if pending:
            _embed(run, pending, actors)
        return run.folder.finish(run.source.num_units)


def _embed(run: EmbeddingRun, pending: list[int], actors: int) -> None:
    import ray

    at_once = max(1, min(MOST_AT_ONCE, len(pending) // actors))
    rows = ray.data.from_items(
        [{"unit": unit} for unit in pending], override_num_blocks=-(-len(pending) // at_once)
    )
    embedded = rows.map_batches(
        UnitEmbedder,
        fn_constructor_args=[[ray.put(run)]],
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_gpus=1 if ray.cluster_resources().get("GPU") else 0,
    )
    for batch in embedded.iter_batches(batch_size=None):
        for error in filter(None, batch["error"].tolist()):
            raise ValueError(error)
