"""What kills, signals, full disks and damage leave behind: a run that ends as if nothing was."""

import os
import random
import resource
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cli.main import main
from lightning_modules.checkpoint_files import SafeCheckpointIO
from lightning_modules.locks import FolderLock
from tests.helpers import DIGITS
from tests.loader_workers import parent_of_a_worker
from tests.training_runs import (
    EPOCHS,
    STEPS_PER_EPOCH,
    differing,
    final,
    start,
    train,
)

pytestmark = pytest.mark.timeout(300)
KILLS = 10


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start(train, folder, output=folder / "output")
    process.join()
    assert process.exitcode == 0, (folder / "output").read_text()
    return folder


def lines(folder: Path) -> list[str]:
    path = folder / "journal"
    return path.read_text().splitlines() if path.exists() else []


def interrupt(folder: Path, stop: str, signum: int, **settings: Any) -> tuple[int, str]:
    """Train until a line of the journal, where the process sends itself a signal.

    Returns:
        The exit code, and what was printed.
    """
    output = folder / "output"
    process = start(train, folder, stop=stop, signum=signum, output=output, **settings)
    process.join()
    return process.exitcode, output.read_text()


def kill(folder: Path, when: int, delay: float) -> None:
    """Train until the journal has so many lines, and for some seconds more; then it is killed."""
    output = folder / "output"
    process = start(train, folder, output=output)
    while len(lines(folder)) < when:
        assert process.is_alive(), output.read_text()
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, output.read_text()


def resume(folder: Path, **settings: Any) -> dict[str, dict[str, Tensor]]:
    last = folder / "last.ckpt"
    begun = last if last.exists() else None
    process = start(train, folder, begun, output=folder / "output", **settings)
    process.join()
    assert process.exitcode == 0, (folder / "output").read_text()
    return final(folder)


def test_killed_at_any_moment_it_resumes_to_the_same_weights(
    uninterrupted: Path, tmp_path: Path
) -> None:
    moments = random.Random(7)
    written = len(lines(uninterrupted))
    for number in range(KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        when, delay = moments.randrange(1, written - 10), moments.uniform(0, 0.02)
        kill(folder, when, delay)
        assert not (folder / "final.pt").exists()
        assert not differing(resume(folder), final(uninterrupted)), f"killed after line {when}"


@pytest.mark.parametrize(
    "moment", ["optimizer 5", "optimizer 8", "validation 6", "validation 12", "optimizer 17"]
)
def test_told_to_stop_it_loses_nothing(moment: str, uninterrupted: Path, tmp_path: Path) -> None:
    code, output = interrupt(tmp_path, moment, signal.SIGTERM)
    assert code == 1  # of a bare SystemExit; the command line makes it 143
    assert "told to stop (SIGTERM) at step" in output
    assert f"--ckpt_path {tmp_path / 'last.ckpt'}" in output
    done = lines(tmp_path)
    begun = [line for line in done if line.startswith("step")]
    resumed = resume(tmp_path)
    assert not differing(resumed, final(uninterrupted))
    again = [line for line in lines(tmp_path)[len(done) :] if line.startswith("step")]
    assert begun + again == [f"step {step}" for step in range(STEPS_PER_EPOCH * EPOCHS)]
    assert validated_in_full(tmp_path)


def validated_in_full(folder: Path) -> bool:
    """Whether the validation of each epoch was run to its end."""
    ends = range(STEPS_PER_EPOCH, STEPS_PER_EPOCH * EPOCHS + 1, STEPS_PER_EPOCH)
    batches = "\n".join(line for line in lines(folder) if not line.startswith("save"))
    return all(f"validation {end}\nvalidation {end}" in batches for end in ends)


def test_killed_in_a_validation_it_runs_that_again(uninterrupted: Path, tmp_path: Path) -> None:
    interrupt(tmp_path, "validation 12", signal.SIGKILL)  # a step that a save was due at
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 8
    assert not differing(resume(tmp_path), final(uninterrupted))
    assert validated_in_full(tmp_path)


def in_a_group(folder: Path) -> None:
    """Train with workers that load images, in a group of processes of their own."""
    os.setpgrp()
    train(folder, num_workers=1, pause=0.3)


def test_told_to_stop_together_with_its_workers_it_loses_nothing(
    uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    process = start(in_a_group, tmp_path, output=output)
    while "optimizer 2" not in lines(tmp_path):
        assert process.is_alive(), output.read_text()
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGTERM)
    process.join()
    shown = output.read_text()
    assert process.exitcode == 1 and "told to stop (SIGTERM) at step" in shown, shown
    assert not differing(resume(tmp_path), final(uninterrupted))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_worker_stops_when_its_parent_says_so_and_for_nobody_else(
    method: str, tmp_path: Path
) -> None:
    process = start(parent_of_a_worker, method, output=tmp_path / "output")
    process.join()
    assert process.exitcode == 0, (tmp_path / "output").read_text()


def test_told_to_stop_between_accumulated_batches_it_takes_the_step_first(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    accumulated = {"accumulate_grad_batches": 3}
    expected = resume(whole, **accumulated)
    interrupt(stopped, "step 1", signal.SIGTERM, **accumulated)
    assert torch.load(stopped / "last.ckpt")["global_step"] == 2
    assert not differing(resume(stopped, **accumulated), expected)


def starved(folder: Path, limit: int, ckpt_path: Path | None = None) -> None:
    """Train where no file can grow beyond a limit, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    train(folder, ckpt_path)


def test_a_full_disk_leaves_the_checkpoints_that_are_there(
    uninterrupted: Path, tmp_path: Path
) -> None:
    interrupt(tmp_path, "step 5", signal.SIGTERM)
    before = (tmp_path / "last.ckpt").read_bytes()
    process = start(
        starved, tmp_path, len(before) // 2, tmp_path / "last.ckpt", output=tmp_path / "output"
    )
    process.join()
    shown = (tmp_path / "output").read_text()
    assert process.exitcode == 1
    assert "was not written (File too large" in shown
    assert "checkpoints saved before are unchanged" in shown.splitlines()[-1]
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    assert not differing(resume(tmp_path), final(uninterrupted))


def state(step: int) -> dict[str, Any]:
    return {"step": step, "state_dict": {"w": torch.rand(999)}}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Path]:
    for name, step in (("previous.ckpt", 1), ("last.ckpt", 2)):
        SafeCheckpointIO().save_checkpoint(state(step), tmp_path / name)
    yield tmp_path


def test_what_cannot_be_written_leaves_what_was_there(checkpoints: Path) -> None:
    last = checkpoints / "last.ckpt"
    before = last.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        message = f"{last} was not written .File too large, of [0-9,]+ bytes"
        with pytest.raises(OSError, match=message):
            SafeCheckpointIO().save_checkpoint(state(3), last)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert last.read_bytes() == before
    assert sorted(path.name for path in checkpoints.iterdir()) == ["last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_checkpoint_cut_short_is_refused_or_the_one_before_it_used(
    kept: float, checkpoints: Path
) -> None:
    last = checkpoints / "last.ckpt"
    whole = last.read_bytes()
    last.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    with pytest.raises(ValueError, match=f"{last} is damaged .*previous.ckpt, can be resumed from"):
        SafeCheckpointIO().load_checkpoint(last)
    with pytest.warns(UserWarning, match="Resuming from the one before it"):
        assert SafeCheckpointIO(use_previous=True).load_checkpoint(last)["step"] == 1
    (checkpoints / "previous.ckpt").unlink()
    with pytest.raises(ValueError, match="is damaged or no ((?!previous).)*$"):
        SafeCheckpointIO(use_previous=True).load_checkpoint(last)


def flipped(whole: bytes, place: int, bit: int) -> bytes:
    return whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]


def test_whatever_has_changed_in_a_checkpoint_is_found(checkpoints: Path) -> None:
    last = checkpoints / "last.ckpt"
    whole = last.read_bytes()
    draw = random.Random(5)
    places = {draw.randrange(len(whole)) for _ in range(40)} | set(range(-80, 0)) | {0, 3}
    damaged = [flipped(whole, place % len(whole), draw.randrange(8)) for place in places]
    damaged += [whole[:1024] + bytes(512) + whole[1536:], whole + b"\0", whole[:-71]]
    for contents in damaged:
        last.write_bytes(contents)
        with pytest.raises(ValueError, match=f"{last} is damaged or no checkpoint"):
            SafeCheckpointIO().load_checkpoint(last)
    last.write_bytes(whole)
    moved = last.rename(checkpoints / "elsewhere.ckpt")
    assert SafeCheckpointIO().load_checkpoint(moved)["step"] == torch.load(moved)["step"] == 2


def test_a_checkpoint_without_a_digest_is_checked_by_its_archives_checksums(
    checkpoints: Path,
) -> None:
    old = checkpoints / "last.ckpt"
    torch.save(state(7), old)
    assert SafeCheckpointIO().load_checkpoint(old)["step"] == 7
    whole = old.read_bytes()
    middle = whole.index(torch.load(old)["state_dict"]["w"].numpy().tobytes()[:64]) + 2000
    for contents in (flipped(whole, middle, 0), whole[:middle] + bytes(64) + whole[middle + 64 :]):
        old.write_bytes(contents)
        with pytest.raises(ValueError, match=f"{old} is damaged .* checksum of its part"):
            SafeCheckpointIO().load_checkpoint(old)
        with pytest.warns(UserWarning, match="Resuming from the one before it"):
            assert SafeCheckpointIO(use_previous=True).load_checkpoint(old)["step"] == 1


NO_CHECKPOINTS: dict[str, bytes] = {
    "text": b"step: 3\n" * 9,
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "random bytes": random.Random(1).randbytes(5000),
    "nothing": b"",
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_told_in_a_line(
    kind: str, checkpoints: Path, tiny_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    last = checkpoints / "last.ckpt"
    last.write_bytes(NO_CHECKPOINTS[kind])
    words = ["--model.pretrained", str(tiny_folder), "--data.dataset", DIGITS, "--trainer.logger",
             "false", "--trainer.accelerator", "cpu", "--ckpt_path", str(last)]  # fmt: skip
    for command in ("fit", "validate"):
        with pytest.raises(SystemExit) as stopped:
            main([command, *words])
        assert stopped.value.code == 1
        assert f"mctf: error: {last} is damaged or no checkpoint" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="Resuming from the one before it"):
        assert SafeCheckpointIO(use_previous=True).load_checkpoint(last)["step"] == 1


def test_an_archive_of_something_else_and_a_folder_are_no_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    for contents, told in (({"weight": torch.zeros(3)}, "weight"), ([1], "list")):
        torch.save(contents, file)
        with pytest.raises(
            ValueError, match=f"{file} .* holds no state of a training, but .*{told}"
        ):
            SafeCheckpointIO().load_checkpoint(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("report.txt", "all is well")
    with pytest.raises(ValueError, match=f"{file} is damaged or no checkpoint"):
        SafeCheckpointIO().load_checkpoint(file)
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder, not a checkpoint"):
        SafeCheckpointIO().load_checkpoint(tmp_path)


def test_the_checkpoint_before_the_last_is_kept_and_resumes(
    uninterrupted: Path, tmp_path: Path
) -> None:
    interrupt(tmp_path, "step 11", signal.SIGKILL)
    steps = [torch.load(tmp_path / name)["global_step"] for name in ("previous.ckpt", "last.ckpt")]
    assert steps == [6, 8]
    (tmp_path / "previous.ckpt").rename(tmp_path / "last.ckpt")
    assert not differing(resume(tmp_path), final(uninterrupted))


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_lives(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = start(train, tmp_path, pause=0.5, output=tmp_path / "output")
    while "optimizer 0" not in lines(tmp_path):
        assert first.is_alive(), (tmp_path / "output").read_text()
        time.sleep(0.01)
    words = ["fit", "--model.pretrained", str(tiny_folder), "--data.dataset", DIGITS,
             "--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--data.num_workers", "0",
             "--trainer.limit_val_batches", "1", "--summary.enabled", "false",
             "--last.folder", str(tmp_path), "--export.folder", "model"]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 1
    assert (
        f"last.folder='{tmp_path}' is not allowed: another run writes to this folder (process "
        f"{first.pid} on " in capsys.readouterr().err
    )
    first.kill()
    first.join()
    main(words)
    assert (tmp_path / "last.ckpt").exists() and not list(tmp_path.glob(".run.*"))
    other = FolderLock("model", "export.folder", beside=True)
    other.acquire()
    with pytest.raises(SystemExit):
        main(words)
    assert "export.folder='model' is not allowed: another run" in capsys.readouterr().err
    other.release()
    assert not list(tmp_path.glob(".model.*"))
