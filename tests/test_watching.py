"""What a training shows of itself, and how the command line tells that it was stopped."""

import csv
import importlib.util
import json
import multiprocessing
import os
import shlex
import signal
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cli.main import main
from lightning_modules import FusedTokensPicture, Summary, Watch, make_loggers
from lightning_modules.amounts import sweep
from mctf_hf import MCTFViTConfig, MCTFViTForImageClassification
from mctf_hf.cost import multiply_accumulates
from mctf_hf.visualization import fused_tokens
from tests.helpers import DIGITS
from tests.training_runs import CONFIG, STEPS_PER_EPOCH, finetuner, images, start, trainer

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The log directory of a training that showed all it can, and its module."""
    folder = tmp_path_factory.mktemp("watched")
    module = finetuner()
    callbacks = [Watch(), FusedTokensPicture(every_n_epochs=2, images=3), Summary()]
    run = trainer(
        folder, *callbacks, logger=make_loggers(str(folder), "runs"), log_every_n_steps=2,
        enable_checkpointing=False,
    )  # fmt: skip
    run.fit(module, images())
    return folder / "runs" / "version_0", module


def test_tensorboard_and_csv_hold_the_same_numbers(watched: tuple[Path, Any]) -> None:
    folder, _ = watched
    events = EventAccumulator(str(folder)).Reload()
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    expected = {
        "train/loss", "train/student", "train/teacher", "train/consistency", "train/passing",
        "train/confidence", "train/teacher_r", "train/lr", "train/images_per_second", "val/loss",
        "val/accuracy", "tokens/after_layer_0", "tokens/after_layer_2",
    }  # fmt: skip
    assert expected <= set(events.Tags()["scalars"])
    for name in expected:
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        written = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert shown == [(step, pytest.approx(value)) for step, value in written]
    assert len(events.Scalars("train/loss")) == 3 * STEPS_PER_EPOCH // 2
    assert all(event.value > 0 for event in events.Scalars("train/images_per_second"))
    left = [events.Scalars(f"tokens/after_layer_{i}")[0].value for i in range(3)]
    assert left == [17, 14, 11]


def test_pictures_of_fused_tokens_come_every_so_many_epochs(watched: tuple[Path, Any]) -> None:
    folder, module = watched
    pictures = sorted((folder / "fused_tokens").iterdir())
    assert [path.name for path in pictures] == ["epoch=0.png", "epoch=2.png"]
    events = EventAccumulator(str(folder)).Reload()
    assert len(events.Images("fused_tokens")) == 2

    # The last one is of the final weights: mctf visualize's own pictures of the same images.
    rows = images()
    rows.trainer = module.trainer
    rows.setup("fit")
    dataset = rows.val_dataloader().dataset
    originals = [
        dataset.reader.read(*dataset.rows.stored(int(dataset.indices[i]))) for i in range(3)
    ]
    seen = fused_tokens(module.model.eval(), module.image_processor, originals)
    drawn = np.asarray(Image.open(pictures[-1]))
    for one in seen:
        picture = np.asarray(one.picture())
        height, width = picture.shape[:2]
        found = [
            (drawn[top : top + height, -width - 8 : -8] == picture).all()
            for top in range(drawn.shape[0] - height + 1)
        ]
        assert any(found)


def test_the_summary_tells_accuracy_and_cost_at_several_r(watched: tuple[Path, Any]) -> None:
    folder, module = watched
    rows = json.loads((folder / "summary.json").read_text())
    model = module.model.eval()
    loader = module.trainer.val_dataloaders
    batches = [batch for batch, _ in zip(loader, range(2))]  # noqa: B905
    settings = [0, *(amount["r"] for amount in sweep(model.config))]
    assert {row["r"] for row in rows} == set(settings) and len(rows) > 2
    assert [row["r"] for row in rows if row["own"]] == [3]
    costs = [row["gmacs"] for row in rows]
    assert costs == sorted(costs, reverse=True)
    for row in rows:
        with torch.no_grad():
            right = [
                model(batch["pixel_values"], r=row["r"]).logits.argmax(-1) == batch["labels"]
                for batch in batches
            ]
        assert row["val_accuracy"] == torch.cat(right).float().mean().item()
        assert row["gmacs"] == multiply_accumulates(model.config, r=row["r"]) / 1e9
        assert row["images"] == 32


def test_the_summary_leaves_no_workers(tmp_path: Path) -> None:
    before = multiprocessing.active_children()
    run = trainer(tmp_path, Summary(), max_epochs=1, enable_checkpointing=False)
    run.fit(finetuner(), images(num_workers=1))
    assert json.loads((tmp_path / "summary.json").read_text())
    assert multiprocessing.active_children() == before


def test_the_summary_of_a_stream_counts_all_of_it(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, Summary(), max_epochs=1, limit_train_batches=1, limit_val_batches=1.0,
        enable_checkpointing=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Your `IterableDataset` has `__len__` defined")
        filters = list(warnings.filters)
        run.fit(finetuner(), images(streaming=True, val_split="test", eval_batch_size=64))
        assert warnings.filters == filters
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert {row["images"] for row in rows} == {500}
    (own,) = [row for row in rows if row["own"]]
    assert own["val_accuracy"] == pytest.approx(run.callback_metrics["val/accuracy"].item())


def test_weights_and_biases_gets_numbers_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = make_loggers(str(tmp_path), "runs", wandb="mctf")[-1]
    run = trainer(
        tmp_path, Watch(), FusedTokensPicture(1, images=2), max_epochs=1, logger=logger,
        log_every_n_steps=2, enable_checkpointing=False,
    )  # fmt: skip
    run.fit(finetuner(), images())
    logged = dict(logger.experiment.summary)
    assert (logger.experiment.project, logger.experiment.name) == ("mctf", "runs")
    assert logged["train/loss"] == pytest.approx(run.callback_metrics["train/loss"].item())
    assert logged["val/accuracy"] == pytest.approx(run.callback_metrics["val/accuracy"].item())
    assert logged["tokens/after_layer_2"] == 11
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/images/fused_tokens_*.png")
    assert Image.open(picture).width > 2 * 16
    logger.experiment.finish()


def test_weights_and_biases_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="log.wandb='mctf' needs the package wandb"):
        make_loggers(str(tmp_path), wandb="mctf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_epochs": -1}, "every_n_epochs=-1 is not allowed: it must be at least 0"),
        ({"images": 0}, "images=0 is not allowed: it must be at least 1"),
    ],
)
def test_pictures_that_make_no_sense(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedTokensPicture(**settings)


def test_the_command_line_saves_when_told_to_stop_and_goes_on_from_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    kept, output = tmp_path / "kept", tmp_path / "output"
    words = [
        "fit", "--model.config", json.dumps({k: CONFIG[k] for k in CONFIG if k != "num_labels"}),
        "--model.num_labels", "10", "--model.r", "3", "--model.r_max", "2",
        "--data.dataset", DIGITS, "--data.batch_size", "8", "--data.num_workers", "0",
        "--trainer.max_epochs", "2", "--trainer.limit_val_batches", "2",
        "--trainer.limit_train_batches", "30", "--trainer.log_every_n_steps", "5",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--log.folder", str(tmp_path), "--ema.decay", "0.9", "--last.folder", str(kept),
        "--last.every_n_train_steps", "1000", "--ckpt_path", "last",
    ]  # fmt: skip
    process = start(main, words, output=output)
    while "/runs/version_0" not in "".join(map(str, tmp_path.rglob("metrics.csv"))):
        assert process.is_alive(), output.read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    shown = output.read_text()
    assert process.exitcode == 128 + signal.SIGTERM
    assert f"There is no {kept / 'last.ckpt'} yet: training starts from the beginning" in shown
    assert "told to stop (SIGTERM) at step" in shown.splitlines()[-2]
    go_on = shlex.split(shown.splitlines()[-1])
    assert go_on == ["mctf", *words[:-1], str(kept / "last.ckpt")]
    assert "Traceback" not in shown
    saved = torch.load(kept / "last.ckpt")
    assert "averaging_state" in saved
    stopped = saved["global_step"]
    assert 0 < stopped < 2 * 30
    assert not list(tmp_path.rglob("config.json"))

    (kept / "previous.ckpt").write_bytes((kept / "last.ckpt").read_bytes())
    (kept / "last.ckpt").write_bytes((kept / "last.ckpt").read_bytes()[:5000])
    with pytest.raises(SystemExit):
        main(words)
    assert f"{kept / 'last.ckpt'} is damaged" in capsys.readouterr().err
    process = start(main, [*words, "--last.use_previous", "true"], output=output)
    process.join()
    assert process.exitcode == 0, output.read_text()
    assert f"Resuming from the one before it, {kept / 'previous.ckpt'}" in output.read_text()
    assert "The final model on" in output.read_text()
    assert torch.load(kept / "last.ckpt")["global_step"] == 2 * 30
    steps = [
        int(row["step"])
        for version in ("version_0", "version_1", "version_2")
        if (tmp_path / "runs" / version / "metrics.csv").exists()
        for row in csv.DictReader((tmp_path / "runs" / version / "metrics.csv").open())
        if row["train/loss"]
    ]
    assert sorted(steps) == list(range(4, 2 * 30, 5))
    with pytest.raises(SystemExit):
        main(["fit", "--model.config", "{}", "--ckpt_path", "last"])
    assert "ckpt_path='last' needs last.folder" in capsys.readouterr().err


def test_a_sweep_of_a_model_without_fusion_is_that_alone() -> None:
    model = MCTFViTForImageClassification(MCTFViTConfig(**{**CONFIG, "reduction": "none"}))
    assert sweep(model.config) == [{"r": 0}]


def test_a_trial_run_leaves_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path, FusedTokensPicture(1), Summary(), fast_dev_run=True)
    run.fit(finetuner(), images())
    assert not list(tmp_path.rglob("*.png")) and not list(Path().rglob("*.png"))


def test_speed_counts_all_accumulated_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(
        n * n for n in range(1000)
    )  # told once as the first batch begins, then as each ends
    told = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("lightning_modules.watching.time", told)
    run = trainer(
        tmp_path, Watch(), max_epochs=1, accumulate_grad_batches=3, log_every_n_steps=2,
        limit_train_batches=12, logger=make_loggers(str(tmp_path), "runs"),
        enable_checkpointing=False,
    )  # fmt: skip
    run.fit(finetuner(), images(batch_size=8))
    rows = csv.DictReader((tmp_path / "runs" / "version_0" / "metrics.csv").open())
    speeds = [float(row["train/images_per_second"]) for row in rows if row["train/loss"]]
    assert speeds == pytest.approx([6 * 8 / 6**2, 6 * 8 / (13**2 - 7**2)])
