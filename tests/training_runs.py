"""Trainings of a few steps, here or in processes of their own.

Those are forked from one that has imported everything. They are what tests kill, starve of disk
space and run side by side.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import Dinov2Config, Dinov2ForImageClassification

from lightning_modules import (
    AveragedWeights,
    BestCheckpoint,
    HFImageDataModule,
    LastCheckpoint,
    MCTFFinetuner,
)
from mctf_hf import fuse_tokens
from tests.helpers import DIGITS, REPOSITORY

CONFIG = {
    "image_size": 16, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_labels": 10, "min_tokens": 2,
    "initializer_range": 0.2,
}  # fmt: skip
STEPS_PER_EPOCH, EPOCHS = 6, 3


def forkserver() -> ForkServerContext:
    """Processes that begin with everything imported, and nothing else of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training_runs"])
    with pytest.MonkeyPatch.context() as patch:  # its search path is not this process's
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        ensure_running()
    return context


def start(run: Callable[..., None], *args: Any, **options: Any) -> ForkServerProcess:
    process = forkserver().Process(target=_quietly, args=(run, args, options))
    process.start()
    return process


def _quietly(run: Callable[..., None], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # the default, as in a process of a user
    sys.stdout = sys.stderr = open(options.pop("output", os.devnull), "w", buffering=1)  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    run(*args, **options)


def finetuner(**settings: Any) -> MCTFFinetuner:
    torch.manual_seed(0)
    return MCTFFinetuner(
        **{
            "config": CONFIG, "r": 3, "r_max": 2, "learning_rate": 0.3, "confidence_threshold": 0.1,
            "drop_path_rate": 0.2, "layer_decay": 0.9, "cooldown_epochs": 0.5, **settings,
        }
    )  # fmt: skip


def images(**settings: Any) -> HFImageDataModule:
    return HFImageDataModule(
        DIGITS, **{"batch_size": 16, "num_workers": 0, "crop": "padded", "flip": True, **settings}
    )


def trainer(folder: Path | str, *callbacks: Callback, **settings: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "default_root_dir": folder,
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": bool(callbacks),
            "limit_train_batches": STEPS_PER_EPOCH,
            "limit_val_batches": 2,
            "num_sanity_val_steps": 0,
            "gradient_clip_val": 1.0,
            "callbacks": list(callbacks),
            **settings,
        }
    )


def digits(**settings: Any) -> HFImageDataModule:
    return HFImageDataModule(DIGITS, **{"batch_size": 16, "num_workers": 0, **settings})


def short_trainer(folder: Path, **settings: Any) -> L.Trainer:
    """A trainer of ten steps that writes nothing."""
    return L.Trainer(
        **{
            "default_root_dir": folder,
            "max_epochs": 2,
            "limit_train_batches": 5,
            "limit_val_batches": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            **settings,
        }
    )


def loss_of(module: MCTFFinetuner, folder: Path) -> float:
    """That of 300 test images."""
    data = digits(eval_batch_size=100)
    (result,) = short_trainer(folder, limit_test_batches=3).test(module, data, verbose=False)
    return result["test/loss"]


class Journal(Callback):
    """Write a line for each thing that a training does, to a file, before it happens.

    At the line ``stop`` the process sends itself the signal. A step takes ``pause`` seconds more.
    """

    def __init__(
        self,
        path: Path,
        stop: str | None = None,
        signum: int = signal.SIGTERM,
        pause: float = 0.0,
    ):
        self.pause = pause
        self.path = path
        self.stop = stop
        self.signum = signum

    def note(self, what: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{what}\n")
        if what == self.stop:
            os.kill(os.getpid(), self.signum)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.note(f"step {trainer.global_step}")

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        self.note(f"optimizer {trainer.global_step}")
        time.sleep(self.pause)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.note(f"validation {trainer.global_step}")

    def on_save_checkpoint(self, trainer: L.Trainer, *args: Any) -> None:
        self.note(f"save {trainer.global_step}")


def train(
    folder: Path,
    ckpt_path: Path | None = None,
    stop: str | None = None,
    signum: int = signal.SIGTERM,
    num_workers: int = 0,
    pause: float = 0.0,
    **settings: Any,
) -> None:
    """Train to the end, averaged and with checkpoints; leaves ``final.pt`` in the folder."""
    module = finetuner()
    best = BestCheckpoint(
        folder, "best", monitor="val/loss", mode="min", enable_version_counter=False
    )
    average = AveragedWeights(0.8)
    run = trainer(
        folder,
        Journal(folder / "journal", stop, signum, pause),
        average,
        best,
        LastCheckpoint(4),
        **settings,
    )
    run.fit(module, images(num_workers=num_workers), ckpt_path=ckpt_path)
    torch.save(
        {
            "averaged": module.state_dict(),
            "best": torch.load(best.best_model_path)["state_dict"],
            "best score": {"score": best.best_model_score},
            "last": torch.load(folder / "last.ckpt")["current_model_state"],
        },
        folder / "final.pt",
    )


def final(folder: Path) -> dict[str, dict[str, Tensor]]:
    return torch.load(folder / "final.pt")


def differing(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> list:
    assert found.keys() == expected.keys()
    return [
        (kind, name)
        for kind, weights in expected.items()
        for name, weight in weights.items()
        if not torch.equal(found[kind][name], weight)
    ]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def as_rank(
    rank: int, world_size: int, port: int, run: Callable[..., None], *args: Any, **options: Any
) -> None:
    """Run as one of several processes, in the environment that torchrun gives them."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size), GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    run(*args, **options)


def compare_gradients(folder: Path) -> None:
    """Of a fused encoder in two processes and in one; both are to have called :func:`as_rank`."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(0)
    config = Dinov2Config(
        image_size=48, patch_size=6, hidden_size=24, num_hidden_layers=3,
        num_attention_heads=2, use_mask_token=False,
    )  # fmt: skip
    model = DistributedDataParallel(fuse_tokens(Dinov2ForImageClassification(config), r=6))
    pixels = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 1, 0])
    mine = slice(2 * rank, 2 * rank + 2)
    model(pixels[mine], labels=labels[mine]).loss.backward()
    if rank == 0:
        alone = fuse_tokens(Dinov2ForImageClassification(config), r=6)
        alone.load_state_dict(model.module.state_dict())
        alone(pixels, labels=labels).loss.backward()
        for one, other in zip(model.module.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        (folder / "compared").write_text("all gradients")
    distributed.barrier()  # none goes while the other still needs it
    del model
    distributed.destroy_process_group()


class Curve(Callback):
    """Keep what every step logged, and what validation found, in a JSON file per process."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        logged = trainer.callback_metrics
        self.steps.append({k: float(v) for k, v in logged.items() if k.startswith("train/")})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        path = self.folder / f"rank{trainer.global_rank}.json"
        path.write_text(json.dumps({"steps": self.steps, "validation": found}))
