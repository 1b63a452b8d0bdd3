"""A run that was interrupted ends with the weights of one that was not."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor

from lightning_modules import (
    BestCheckpoint,
    HFImageDataModule,
    HuggingFaceFolder,
    LastCheckpoint,
    MCTFFinetuner,
)
from lightning_modules.run_settings import AUGMENTATION
from tests.helpers import DIGITS
from tests.training_runs import finetuner, images, trainer

STEPS_PER_EPOCH = 4
EPOCHS = 3


EVERY_AUGMENTATION: dict[str, Any] = {
    "crop": "padded",
    "flip": True,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
}


def train(
    folder: Path,
    pretrained: Path,
    ckpt_path: Path | None = None,
    workers: int = 0,
    seed: int = 3,
    keep: bool = False,
    **data_settings: Any,
) -> dict[str, Tensor]:
    """Train to the end, on request with a checkpoint of every step; returns the final weights."""
    module = MCTFFinetuner(
        str(pretrained), r=6, r_max=4, learning_rate=1e-2, drop_path_rate=0.2, seed=seed
    )
    settings = {"val_fraction": 0.95, "repeated_augmentation": 3, **EVERY_AUGMENTATION}
    data = HFImageDataModule(
        DIGITS, batch_size=16, num_workers=workers, seed=seed, **{**settings, **data_settings}
    )
    every = (
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1),
        ModelCheckpoint(folder, filename="end-of-{epoch}", save_top_k=-1, every_n_epochs=1),
    )
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        limit_train_batches=STEPS_PER_EPOCH,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*(every if keep else ()), LastCheckpoint(every_n_train_steps=5)],
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return {name: weight.clone() for name, weight in module.model.state_dict().items()}


def test_every_augmentation_is_among_these() -> None:
    assert set(EVERY_AUGMENTATION) == set(AUGMENTATION)


@pytest.fixture(scope="module")
def whole_run(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder, tiny_folder, keep=True)


@pytest.mark.parametrize(
    "checkpoint",
    [f"step={step}.ckpt" for step in (1, 3, 4, 5, 6, 8, 11)]
    + ["end-of-epoch=0.ckpt", "end-of-epoch=1.ckpt"],
)
def test_resuming_from_any_step_ends_with_the_same_weights(
    checkpoint: str, whole_run: tuple[Path, dict[str, Tensor]], tiny_folder: Path, tmp_path: Path
) -> None:
    folder, expected = whole_run
    resumed = train(tmp_path, tiny_folder, folder / checkpoint)
    differing = [name for name in expected if not torch.equal(resumed[name], expected[name])]
    assert not differing


def test_a_stream_is_resumed_too(tiny_folder: Path, tmp_path: Path) -> None:
    stream = {"streaming": True, "val_split": "test", "repeated_augmentation": 1}
    expected = train(tmp_path / "whole", tiny_folder, keep=True, **stream)
    resumed = train(tmp_path / "rest", tiny_folder, tmp_path / "whole" / "step=6.ckpt", **stream)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_workers_do_not_change_the_weights(
    whole_run: tuple[Path, dict[str, Tensor]], tiny_folder: Path, tmp_path: Path
) -> None:
    _, expected = whole_run
    with_workers = train(tmp_path, tiny_folder, workers=2)
    assert all(torch.equal(with_workers[name], expected[name]) for name in expected)


def test_another_seed_ends_with_other_weights(
    whole_run: tuple[Path, dict[str, Tensor]], tiny_folder: Path, tmp_path: Path
) -> None:
    _, expected = whole_run
    other = train(tmp_path, tiny_folder, seed=4)
    assert not any(torch.equal(other[name], expected[name]) for name in expected)


def test_the_last_checkpoint_is_the_last_state(whole_run: tuple[Path, dict[str, Tensor]]) -> None:
    folder, expected = whole_run
    last = torch.load(folder / "last.ckpt", weights_only=False)
    assert last["global_step"] == STEPS_PER_EPOCH * EPOCHS
    for name, weight in expected.items():
        assert torch.equal(last["state_dict"][f"model.{name}"], weight)


def test_a_resumed_run_that_logs_elsewhere_remembers_the_best(tmp_path: Path) -> None:
    def checkpoint(folder: Path) -> BestCheckpoint:
        return BestCheckpoint(folder, monitor="val/accuracy", mode="max")

    best = checkpoint(tmp_path / "version_0")
    best.best_model_score = torch.tensor(0.9)
    best.best_model_path = str(tmp_path / "version_0" / "best.ckpt")
    best.best_k_models = {best.best_model_path: best.best_model_score}
    resumed = checkpoint(tmp_path / "version_1")
    resumed.load_state_dict(best.state_dict())
    assert resumed.best_model_score == best.best_model_score
    assert resumed.best_k_models == best.best_k_models
    assert resumed.best_model_path == best.best_model_path


def test_a_best_checkpoint_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    def fit(epochs: int, folder: Path, ckpt_path: Path | None = None) -> L.Trainer:
        callbacks = (
            BestCheckpoint(folder, "best", monitor="step", mode="min"),  # the first one's, for ever
            LastCheckpoint(folder=str(tmp_path / "kept")),
            HuggingFaceFolder(str(tmp_path / "model")),
        )
        run = trainer(folder, *callbacks, max_epochs=epochs, limit_train_batches=2)
        run.fit(finetuner(cooldown_epochs=0), images(), ckpt_path=ckpt_path)
        return run

    fit(1, tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    shutil.rmtree(tmp_path / "model")
    last = tmp_path / "kept" / "last.ckpt"
    with pytest.warns(UserWarning, match="best-?.*ckpt, is gone: the best from here on counts"):
        run = fit(3, tmp_path / "second", last)
    best = Path(run.checkpoint_callbacks[0].best_model_path)
    assert best.parent == tmp_path / "second" and torch.load(best)["epoch"] == 1
    written = load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in torch.load(best)["state_dict"].items():
        assert torch.equal(written[name.removeprefix("model.")], weight)
    shutil.rmtree(tmp_path / "second")
    shutil.rmtree(tmp_path / "model")
    with pytest.warns(UserWarning, match="is gone"):  # and where nothing is left to train
        fit(3, tmp_path / "third", last)
    written = load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in torch.load(last)["state_dict"].items():
        assert torch.equal(written[name.removeprefix("model.")], weight)
