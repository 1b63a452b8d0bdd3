"""What ``mctf fit`` makes of checkpoints, settings and folders, seen from the keyboard."""

import os
import re
import resource
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from lightning.pytorch.callbacks import Callback
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from cli.main import main
from lightning_modules import HuggingFaceFolder, LastCheckpoint, MCTFFinetuner, ProgressLines
from mctf_hf import MCTFViTForImageClassification
from mctf_hf.trainer import ConsistencyTrainer
from tests.helpers import DIGITS, TINY, in_timm_names
from tests.training_runs import finetuner, images, start, trainer

pytestmark = pytest.mark.timeout(300)

FEW_STEPS: tuple[Any, ...] = (
    "--data.dataset", DIGITS, "--data.num_workers", 0, "--data.batch_size", 16,
    "--trainer.accelerator", "cpu", "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 3,
    "--trainer.limit_val_batches", 1, "--summary.enabled", "false",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
)  # fmt: skip


def run(command: str, *words: Any) -> None:
    main([command, *map(str, words)])


def refused(command: str, *words: Any, capsys: pytest.CaptureFixture) -> str:
    """What a command prints that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(command, *words)
    assert stopped.value.code == 1
    return capsys.readouterr().err


def plain_vit(folder: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Save a plain ViT, and return its weights in float32."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**{**TINY, "num_labels": 10})).to(dtype)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return {name: weight.float() for name, weight in model.state_dict().items()}


def part_changed(found: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    same = sum((found[name].float() == weight).sum().item() for name, weight in before.items())
    return 1 - same / sum(weight.numel() for weight in before.values())


@pytest.mark.parametrize(
    ("stored", "precision", "kept", "least", "most"),
    [
        (torch.bfloat16, "bf16-mixed", torch.float32, 0.9, 1),
        (torch.float16, "32-true", torch.float32, 0.9, 1),
        (torch.bfloat16, "bf16-true", torch.bfloat16, 0, 0.5),  # rounded away, as asked for
    ],
)
def test_training_holds_float32_weights_unless_told_otherwise(
    stored: torch.dtype, precision: str, kept: torch.dtype, least: float, most: float
) -> None:
    before = plain_vit("plain", stored)
    run("fit", "--model.pretrained", "plain", "--model.r", 6, "--export.folder", "trained",
        "--trainer.precision", precision, "--last.folder", "kept", *FEW_STEPS)  # fmt: skip
    found = load_file("trained/model.safetensors")
    assert {weight.dtype for weight in found.values()} == {kept}
    assert least <= part_changed(found, before) <= most
    assert all(torch.isfinite(weight).all() for weight in found.values())
    state = torch.load("kept/last.ckpt")
    moments = [
        value for one in state["optimizer_states"][0]["state"].values() for value in one.values()
    ]
    assert {weight.dtype for weight in state["state_dict"].values() if weight.ndim} == {kept}
    assert {moment.dtype for moment in moments if moment.ndim} == {kept}


def test_a_converted_file_in_float16_trains_too() -> None:
    before = plain_vit("plain", torch.float16)
    weights = {name: weight.half() for name, weight in before.items()}
    torch.save(in_timm_names(weights), "timm.pth")
    run("convert", "timm.pth,r=6", "--output", "converted", "--num-heads", 2)
    assert load_file("converted/model.safetensors").popitem()[1].dtype == torch.float16
    run("fit", "--model.pretrained", "converted", "--export.folder", "trained", *FEW_STEPS)
    found = load_file("trained/model.safetensors")
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    assert part_changed(found, before) > 0.9


def test_a_guide_in_float16_teaches_a_mixed_training() -> None:
    plain_vit("guide", torch.float16)
    plain_vit("plain", torch.float32)
    run("fit", "--model.pretrained", "plain", "--model.r", 6, "--model.distill_from", "guide",
        "--trainer.precision", "bf16-mixed", "--export.folder", "trained", *FEW_STEPS)  # fmt: skip
    assert Path("trained/config.json").exists()


def plain_accuracy(folder: str) -> float:
    """Of transformers' own model on the test images of the digits."""
    model = ViTForImageClassification.from_pretrained(folder).eval()
    rows = load_dataset(DIGITS, split="test")
    processor = ViTImageProcessorPil.from_pretrained(folder)
    pixels = processor([row.convert("RGB") for row in rows["image"]], return_tensors="pt")
    with torch.inference_mode():
        found = model(**pixels).logits.argmax(-1)
    return (found == torch.tensor(rows["label"][:])).float().mean().item()


def test_a_plain_checkpoint_is_the_plain_model_for_every_command(
    capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    plain_vit("plain", torch.float32)
    expected = plain_accuracy("plain")
    data = ("--data.dataset", DIGITS, "--data.num_workers", 0, "--trainer.accelerator", "cpu",
            "--trainer.logger", "false")  # fmt: skip
    capsys.readouterr()
    run("test", "--model.pretrained", "plain", *data)
    accuracy = re.search(r"test/accuracy\W+([\d.]+)", capsys.readouterr().out)
    assert accuracy is not None and float(accuracy[1]) == pytest.approx(expected)
    run("convert", "plain", "--output", "converted")
    assert "none: all 65 tokens stay" in capsys.readouterr().out
    assert MCTFViTForImageClassification.from_pretrained("converted").config.r == 0
    run("convert", "plain,skip_unread=false", "--output", "whole")
    assert MCTFViTForImageClassification.from_pretrained("whole").config.r == 0
    run("visualize", "plain", "plain,r=4", "--images", DIGITS, "--output", "drawn.png")
    shown = capsys.readouterr().out
    assert "plain: 65 -> 65 tokens" in shown and "r=4: 65 -> 49 tokens" in shown
    with caplog.at_level("INFO"):
        run("fit", "--model.pretrained", "plain", "--export.folder", "trained", *FEW_STEPS)
    assert "fusion: none: all 65 tokens stay, 0.0028 GMACs" in caplog.text
    trained = MCTFViTForImageClassification.from_pretrained("trained")
    assert not any(trained.config.tokens_fused(65))
    run("fit", "--model.pretrained", "trained", "--model.r", 6, "--export.folder", "fused",
        *FEW_STEPS)  # fmt: skip
    assert "fusion: mctf, r 6: 65 tokens become 41 (by layer: 0, 6, 6, 6, 6 fewer)" in caplog.text
    capsys.readouterr()
    run("visualize", "fused", "--images", DIGITS, "--output", "drawn.png")  # as its config says
    assert "fused: 65 -> 41 tokens" in capsys.readouterr().out


def test_a_model_from_scratch_fuses_what_is_asked_for() -> None:
    config = {**TINY, "num_labels": 10}
    assert not any(MCTFFinetuner(config=config).model.config.tokens_fused(65))
    assert MCTFFinetuner(config=config | {"r": 3}).model.config.r == 3
    assert MCTFFinetuner(config=config, reduction="tome").model.config.r == 16


RUN: tuple[Any, ...] = (
    "--model.pretrained", "plain", "--last.folder", "kept", *FEW_STEPS, "--trainer.max_epochs", 3,
)  # fmt: skip


def test_a_resumed_run_tells_what_is_different_or_refuses_it(
    capsys: pytest.CaptureFixture,
) -> None:
    plain_vit("plain", torch.float32)
    few = ("--model.r", 6, "--trainer.max_epochs", 1)
    run("fit", *RUN, *few)
    resumed = (*RUN, "--ckpt_path", "kept/last.ckpt")
    with pytest.warns(UserWarning, match="is resumed with other settings than its run had") as told:
        run("fit", *resumed, "--model.reduction", "tome", "--model.r", 5, "--trainer.precision",
            "bf16-mixed", "--model.consistency_weight", 1, "--trainer.max_epochs", 1)  # fmt: skip
    (shown,) = [str(one.message) for one in told if "resumed with other" in str(one.message)]
    for line in (
        "model.reduction: mctf → tome",
        "model.r: 6 → 5",
        "trainer.precision: 32-true → bf16-mixed",
        "model.consistency_weight: 3.0 → 1.0",
    ):
        assert f"\n  {line}" in shown
    assert shown.count("→") == 5  # and r_max, which follows r
    run("fit", *RUN, *few, "--last.folder", "other")
    shown = refused(
        "fit", *RUN, "--model.r", 6, "--ckpt_path", "other/last.ckpt", "--data.batch_size", 8,
        "--seed_everything", 3, "--model.learning_rate", 1e-3, "--data.val_fraction", 0.5,
        "--ema.decay", 0.9, capsys=capsys,
    )  # fmt: skip
    assert "other/last.ckpt can't be resumed with other settings than its run had" in shown
    for line in (
        "images per batch, over all processes: 16 → 8",
        "images to train on: 1167 → 649",
        "data.seed: 0 → 3",
        "model.seed: 0 → 3",
        "data.val_fraction: 0.1 → 0.5",
        "model.learning_rate: 1.5e-05 → 0.001",
        "ema.decay: None → 0.9",
    ):
        assert f"\n  {line}\n" in shown
    shutil.copytree(DIGITS, "letters")
    shown = refused("fit", *RUN, "--model.r", 6, "--data.dataset", "letters", "--ckpt_path",
                    "other/last.ckpt", capsys=capsys)  # fmt: skip
    assert "data.dataset: digits → letters" in shown
    shutil.copytree(DIGITS, "moved/digits")  # the same, elsewhere
    run("fit", *RUN, "--model.r", 6, "--data.dataset", "moved/digits", "--ckpt_path",
        "other/last.ckpt", "--trainer.max_epochs", 1)  # fmt: skip


def leader(words: list[str]) -> None:
    """Run a command in a group of its own, as a terminal does."""
    os.setpgrp()
    main(words)


def test_ctrl_c_saves_and_says_how_to_go_on_and_a_log_shows_how_far_it_is(tmp_path: Path) -> None:
    plain_vit("a plain vit", torch.float32)
    output, kept = tmp_path / "output", tmp_path / "kept"
    words = ["fit", "--model.pretrained", "a plain vit", "--model.r", "6", "--data.dataset", DIGITS,
             "--data.num_workers", "1", "--data.batch_size", "16", "--trainer.max_epochs", "200",
             "--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "1",
             "--trainer.log_every_n_steps", "2", "--trainer.accelerator", "cpu",
             "--last.folder", str(kept)]  # fmt: skip
    process = start(leader, words, output=output)
    while not output.exists() or "end of epoch 2 of 200" not in output.read_text():
        assert process.is_alive(), output.read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # workers too
    process.join()
    shown = output.read_text()
    assert process.exitcode == 130, shown
    assert "This step ends, then its state is saved" in shown and "Traceback" not in shown
    step = torch.load(kept / "last.ckpt")["global_step"]
    *_, told, go_on = shown.splitlines()
    assert told == (
        f"mctf: told to stop (SIGINT) at step {step}, its state is saved. Go on from there with"
    )
    assert shlex.split(go_on) == ["mctf", *words, "--ckpt_path", str(kept / "last.ckpt")]
    number = r"[\d.e+-]+"
    line = rf"epoch 1 of 200, step 1 of 800, train/loss {number}, \d+ images/s, \d+:\d\d:\d\d left"
    assert re.search(f"^{line}$", shown, re.MULTILINE)
    line = (
        rf"end of epoch 2 of 200, step 8 of 800, train/loss {number}, val/accuracy {number}, "
        rf"(val/[a-z0-9_]+ {number}, )*[\d,]+ images/s, \d+:\d\d:\d\d left"
    )
    assert re.search(f"^{line}$", shown, re.MULTILINE)


@pytest.mark.parametrize("times", [1, 2])
def test_signals_mean_what_they_meant_before_once_a_run_has_stopped(
    times: int, tmp_path: Path
) -> None:
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            for _ in range(times if trainer.global_step == 3 else 0):
                os.kill(os.getpid(), signal.SIGINT)

    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    run = trainer(tmp_path, Interrupt(), LastCheckpoint(folder=str(tmp_path / "kept")))
    with pytest.raises(SystemExit) as stopped:
        run.fit(finetuner(), images())
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
    if times == 1:
        assert str(stopped.value) == (
            f"told to stop (SIGINT) at step 4: go on from there with --ckpt_path "
            f"{tmp_path / 'kept' / 'last.ckpt'}"
        )
        assert torch.load(tmp_path / "kept" / "last.ckpt")["global_step"] == 4
    else:  # at once
        assert isinstance(stopped.value.__context__, KeyboardInterrupt)
        assert not (tmp_path / "kept" / "last.ckpt").exists()


def test_signals_are_given_back_without_the_trainers_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    connectors = "lightning.pytorch.trainer.connectors.signal_connector._SignalConnector"
    monkeypatch.setattr(f"{connectors}.register_signal_handlers", lambda self: None)
    monkeypatch.setattr(f"{connectors}.teardown", lambda self: None)
    trainer(tmp_path, LastCheckpoint(), max_epochs=1).fit(finetuner(), images())
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


def test_lines_on_progress_make_way_for_a_terminals_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for lines in (ProgressLines(terminal=True), ProgressLines(0, terminal=False)):
        trainer(tmp_path, lines, max_epochs=1, enable_checkpointing=False).fit(
            finetuner(), images()
        )
    assert "epoch" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="every_n_seconds=-1 is not allowed"):
        ProgressLines(-1)


TOO_EARLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "no steps": (
        ("--trainer.limit_train_batches", 0),
        "trainer.limit_train_batches=0 is not allowed: nothing would be trained",
    ),
    "no devices": (("--trainer.devices", -3), "trainer.devices='-3' is not allowed: "),
    "no such metric": (
        ("--best.monitor", "val/acuracy"),
        "best.monitor='val/acuracy' is not allowed: there is no such metric, only epoch, step, "
        "val/accuracy, val/accuracy_top5, ",
    ),
    "no such checkpoint": (("--ckpt_path", "nope.ckpt"), "nope.ckpt: there is no such checkpoint"),
    "an export in a file": (
        ("--export.folder", "file/model"),
        "export.folder='file/model' is not allowed: it can't be written to (",
    ),
    "checkpoints in a file": (
        ("--last.folder", "file"),
        "last.folder='file' is not allowed: it can't be written to (",
    ),
    "two learning rates": (
        ("--optimizer", "SGD", "--model.learning_rate", 0.123, "--model.warmup_epochs", 1),
        "model.learning_rate, model.warmup_epochs is not allowed with --optimizer, which takes the "
        "place of AdamW and its schedule: set --optimizer.lr",
    ),
    "a schedule of nothing": (
        ("--lr_scheduler", "StepLR", "--lr_scheduler.step_size", 3),
        "--lr_scheduler is not allowed without --optimizer",
    ),
}


@pytest.mark.parametrize("case", TOO_EARLY)
def test_what_can_be_known_before_training_is_told_before(
    case: str, tiny_folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MCTFFinetuner, "training_step", lambda *_: pytest.fail("it trains"))
    Path("file").write_text("in the way")
    words, told = TOO_EARLY[case]
    shown = refused("fit", "--model.pretrained", tiny_folder, "--trainer.logger", "false",
                    *FEW_STEPS, *words, capsys=capsys)  # fmt: skip
    assert f"mctf: error: {told}" in shown


def test_an_optimizer_of_lightnings_command_line_has_its_own_learning_rate(
    tiny_folder: Path,
) -> None:
    run("fit", "--model.pretrained", tiny_folder, "--last.folder", "kept", *FEW_STEPS,
        "--optimizer", "SGD", "--optimizer.lr", 0.123)  # fmt: skip
    (group,) = torch.load("kept/last.ckpt")["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 0.123


def test_where_predictions_cannot_be_written_none_are_made(
    tiny_folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MCTFFinetuner, "predict_step", lambda *_: pytest.fail("it predicts"))
    Path("file").write_text("in the way")
    Path("a.csv").mkdir()
    Image.new("RGB", (32, 32)).save("a.png")
    for path, told in (
        ("file/rows.csv", "predictions.path='file/rows.csv' cannot be written: its folder cannot"),
        ("a.csv", "predictions.path='a.csv' is a folder"),
    ):
        shown = refused("predict", "--model.pretrained", tiny_folder, "--data.predict_folder", ".",
                        "--predictions.path", path, "--trainer.logger", "false",
                        "--trainer.accelerator", "cpu", capsys=capsys)  # fmt: skip
        assert told in shown


def test_a_full_disk_at_the_end_leaves_the_folder_that_was_there(tmp_path: Path) -> None:
    class FillDisk(Callback):
        def on_train_end(self, *_: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "model"
    for full in (False, True):
        calls = [HuggingFaceFolder(str(folder)), *([FillDisk()] if full else [])]
        one = trainer(tmp_path, *calls, max_epochs=1, enable_checkpointing=False)
        if not full:
            one.fit(finetuner(cooldown_epochs=0), images())
            before = {file.name: file.read_bytes() for file in folder.iterdir()}
            continue
        try:
            with pytest.raises(
                OSError, match=f"{folder} was not written, and its files are unch.*File too large"
            ):
                one.fit(finetuner(cooldown_epochs=0), images())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not list(tmp_path.glob(".*"))


def test_a_module_is_not_loaded_from_a_damaged_checkpoint(tmp_path: Path) -> None:
    module = finetuner(cooldown_epochs=0)
    kept = LastCheckpoint(folder=str(tmp_path))
    trainer(tmp_path, kept, max_epochs=1, limit_train_batches=1).fit(module, images())
    file = tmp_path / "last.ckpt"
    loaded = MCTFFinetuner.load_from_checkpoint(file)
    for name, weight in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 8
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=f"{file} is damaged or no checkpoint"):
        MCTFFinetuner.load_from_checkpoint(file)


def test_evaluation_without_a_terminal_tells_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = ProgressLines(1e-9, terminal=False)
    one = trainer(tmp_path, lines, limit_test_batches=3, enable_checkpointing=False)
    one.test(finetuner(), images(), verbose=False)
    shown = capsys.readouterr().out
    assert [f"test: batch {i} of 3" in shown for i in (1, 2, 3)] == [True] * 3
    one.validate(finetuner(), images(), verbose=False)
    assert "validation: batch 2 of 2" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainer_of_transformers_keeps_the_precision_of_loading(dtype: torch.dtype) -> None:
    before = plain_vit("plain", torch.bfloat16)
    model = MCTFViTForImageClassification.from_pretrained("plain", r=6, dtype=dtype)
    draw = torch.Generator().manual_seed(0)
    rows = [
        {"pixel_values": torch.randn(3, 32, 32, generator=draw), "labels": i} for i in range(10)
    ]
    arguments = TrainingArguments(
        "trained", max_steps=1, bf16=True, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    ConsistencyTrainer(model, arguments, train_dataset=rows, r_max=3).train()
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert (part_changed(model.state_dict(), before) > 0.9) == (dtype == torch.float32)
