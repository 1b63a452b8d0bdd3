"""Two processes train as one with twice the batch does."""

import json
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import nn

from lightning_modules import (
    BestCheckpoint,
    HFImageDataModule,
    HuggingFaceFolder,
    LastCheckpoint,
    Summary,
)
from mctf_hf.losses import TokenReductionConsistency
from tests.image_sets import write_shards
from tests.training_runs import (
    Curve,
    Journal,
    as_rank,
    finetuner,
    free_port,
    images,
    start,
    trainer,
)

pytestmark = pytest.mark.timeout(300)
WEIGHT = 3000.0  # of consistency, so that it counts in a model that has hardly learnt


def fit(
    folder: Path,
    batch_size: int,
    ckpt_path: Path | None = None,
    stop: str | None = None,
    **settings: Any,
) -> None:
    """Train two epochs and leave what was logged, and the model."""
    rank = int(os.environ.get("RANK", 0))
    # Drop path draws for each image of a process, so that no two layouts could agree.
    module = finetuner(drop_path_rate=0.0, confidence_threshold=0.12, consistency_weight=WEIGHT)
    # 131 images: the second of two processes has one fewer, and no image for its second batch.
    data = images(batch_size=batch_size, eval_batch_size=65, val_fraction=0.101)
    callbacks = (
        BestCheckpoint(folder / "best", "best", monitor="step", mode="max"),  # the last epoch's
        LastCheckpoint(folder=str(folder)),
        HuggingFaceFolder(str(folder / "model")),
        Summary(),
        Curve(folder),
        Journal(folder / f"journal{rank}", stop if rank == 1 else None),
    )
    run = trainer(folder, *callbacks, max_epochs=2, limit_val_batches=1.0, **strategy_of(settings))
    run.fit(module, data, ckpt_path=ckpt_path)


def strategy_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the trainer, with the strategy that is called sharded here."""
    if settings.get("strategy") != "sharded":
        return settings
    sharded = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
    )
    return {**settings, "strategy": sharded}


def evaluate(folder: Path, **settings: Any) -> None:
    """Validate on a stream of a process's own shards, and leave what was found."""
    data = HFImageDataModule(
        str(folder / "shards"), val_split="train", eval_batch_size=4, num_workers=0,
        label_column="label", streaming=True, on_bad_image="skip",
    )  # fmt: skip
    run = trainer(folder, limit_val_batches=1.0, **strategy_of(settings))
    (found,) = run.validate(finetuner(num_labels=45), data, verbose=False)
    (folder / f"found{run.world_size}.{run.global_rank}.json").write_text(json.dumps(found))


def begin(
    folder: Path, strategy: str, *args: Any, run: Callable[..., None] = fit
) -> list[ForkServerProcess]:
    folder.mkdir(exist_ok=True)
    port = free_port()
    arguments = (folder, 8, *args) if run is fit else (folder,)
    return [
        start(
            as_rank, rank, 2, port, run, *arguments,
            strategy=strategy, devices=2, output=folder / f"output{rank}",
        )
        for rank in range(2)
    ]  # fmt: skip


def finish(folder: Path, ranks: list[ForkServerProcess]) -> None:
    for rank, process in enumerate(ranks):
        process.join()
        assert process.exitcode == 0, (folder / f"output{rank}").read_text()


@pytest.fixture(scope="module", params=["ddp", "sharded"])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together") / request.param
    finish(folder, begin(folder, request.param))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    process = start(fit, folder, 16, output=folder / "output")
    process.join()
    assert process.exitcode == 0, (folder / "output").read_text()
    return folder


def curve(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"rank{rank}.json").read_text())


def test_two_processes_have_the_loss_curve_of_one_with_twice_the_batch(
    together: Path, alone: Path
) -> None:
    folder = together
    expected, found = curve(alone), curve(folder)
    assert len(found["steps"]) == len(expected["steps"]) == 12
    for own, wanted in zip(found["steps"], expected["steps"], strict=True):
        assert own == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    passing = {step["train/passing"] for step in found["steps"]}
    assert len(passing) > 3 and {step["train/teacher_r"] for step in found["steps"]} == {0.0, 1.0}
    assert any(WEIGHT * step["train/consistency"] > 0.5 for step in found["steps"])
    assert found["validation"] == pytest.approx(expected["validation"], rel=1e-4)
    assert curve(folder, rank=1) == found, "what is logged agrees over processes, the r drawn too"

    weights = load_file(folder / "model" / "model.safetensors")
    for name, weight in load_file(alone / "model" / "model.safetensors").items():
        if name.endswith("k_proj.bias"):  # its gradient is zero but for rounding
            continue
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-4)
    told = [json.loads((run / "summary.json").read_text()) for run in (alone, folder)]
    assert [row["val_accuracy"] for row in told[1]] == [row["val_accuracy"] for row in told[0]]
    assert [row["images"] for row in told[1]] == [131] * len(told[1])
    last = torch.load(folder / "last.ckpt", map_location="cpu")
    assert last["global_step"] == 12


def test_a_signal_to_one_process_stops_both_and_nothing_is_lost(
    together: Path, tmp_path: Path
) -> None:
    folder, strategy = tmp_path / "stopped", together.name
    ranks = begin(folder, strategy, None, "optimizer 7")
    for rank, process in enumerate(ranks):
        process.join()
        assert process.exitcode == 1
        assert "told to stop (SIGTERM) at step" in (folder / f"output{rank}").read_text()
    assert not (folder / "model").exists()
    finish(folder, begin(folder, strategy, folder / "last.ckpt"))
    weights = load_file(folder / "model" / "model.safetensors")
    for name, weight in load_file(together / "model" / "model.safetensors").items():
        assert torch.equal(weights[name], weight), name


def test_a_finished_run_that_is_resumed_exports_the_same(together: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    (together / "best").rename(together / "gone")
    finish(folder, begin(folder, together.name, together / "last.ckpt"))
    assert "is gone: the" in (folder / "output0").read_text()
    weights = load_file(folder / "model" / "model.safetensors")
    for name, weight in load_file(together / "model" / "model.safetensors").items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("sizes", [(20, 3), (6, 0)])
def test_processes_whose_streams_end_early_wait_for_the_others(
    sizes: tuple[int, int], tmp_path: Path
) -> None:
    write_shards(tmp_path / "shards", sizes, {2: b"no image"})
    finish(tmp_path, begin(tmp_path, "sharded", run=evaluate))
    process = start(evaluate, tmp_path, output=tmp_path / "output")
    process.join()
    assert process.exitcode == 0, (tmp_path / "output").read_text()
    found = json.loads((tmp_path / "found2.0.json").read_text())
    assert found == json.loads((tmp_path / "found2.1.json").read_text())
    assert found == pytest.approx(json.loads((tmp_path / "found1.0.json").read_text()), rel=1e-5)
    assert found["val/skipped_images"] == 1


def test_consistency_is_a_mean_over_the_passing_images_of_all_processes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, others = torch.randn(2, 12, 5, generator=generator)
    tokens, targets = torch.randn(2, 12, 7, generator=generator)
    labels = torch.arange(12) % 5
    logits[:3, :] = torch.nn.functional.one_hot(labels[:3], 5) * 9.0  # pass, mostly in one process
    loss = TokenReductionConsistency(confidence_threshold=0.6)
    whole = loss(logits, tokens, others, targets, labels)
    for cut in (2, 6, 11):
        parts = [slice(0, cut), slice(cut, 12)]
        counts = [
            loss(logits[p], tokens[p], others[p], targets[p], labels[p]).passing * len(labels[p])
            for p in parts
        ]
        shares = [
            loss(
                logits[p], tokens[p], others[p], targets[p], labels[p],
                mean_over_processes=lambda _, counts=counts: sum(counts) / 2,
            ).consistency
            for p in parts
        ]  # fmt: skip
        torch.testing.assert_close(sum(shares) / 2, whole.consistency)
    nobody = TokenReductionConsistency(confidence_threshold=1.0)
    assert nobody(logits, tokens, others, targets, labels).consistency == 0


def test_what_the_first_process_fails_to_load_is_every_processs_error(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    told: list[Any] = []
    first = SimpleNamespace(broadcast=lambda value: told.append(value) or value)
    other = SimpleNamespace(broadcast=lambda value: told.pop(0))
    best = BestCheckpoint(tmp_path, "best", monitor="val/loss")
    best.best_model_path = str(path)
    for strategy in (first, other):
        run = SimpleNamespace(
            is_global_zero=strategy is first,
            strategy=strategy,
            checkpoint_callbacks=[best],
            log_dir=tmp_path,
            fast_dev_run=False,
            interrupted=False,
        )
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            HuggingFaceFolder(tmp_path / "model").on_fit_end(run, nn.Module())
    assert not told and not (tmp_path / "model").exists()
