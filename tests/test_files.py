"""What is written appears whole or not at all, and nowhere else."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lightning_modules.checkpoints import SafeCheckpointIO
from lightning_modules.locks import FolderLock
from lightning_modules.predictions import PredictionFile
from lightning_modules.watching import write_json
from mctf_hf.files import draft, replace, write_text

WRITERS: dict[str, Any] = {
    "predictions.csv": lambda file: PredictionFile(file).write_on_epoch_end(
        SimpleNamespace(world_size=1, is_global_zero=True),
        nn.Module(),
        [[{"file": "a.png", "label": "cat", "score": 1.0}]],
        [],
    ),
    "summary.json": lambda file: write_json(Path(file), {}),
    "last.ckpt": lambda file: SafeCheckpointIO().save_checkpoint({}, file),
    "results.json": lambda file: write_text(file, "{}"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_links_are_replaced_and_never_followed(name: str) -> None:
    Path("precious").write_text("precious")
    guessed = (f".{name}.{os.getpid()}", f".{name}.draft", f".{name}", f"{name}.tmp")
    for link in (name, *guessed):
        Path(link).symlink_to("precious")
    WRITERS[name](name)
    assert Path("precious").read_text() == "precious"
    assert Path(name).is_file() and not Path(name).is_symlink()
    assert {path.name for path in Path().iterdir()} == {"precious", name, *guessed}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(name).write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[name](name)
    assert [path.name for path in Path().iterdir()] == [name]
    assert Path(name).read_text() == "old"


@pytest.mark.parametrize("link", [".run.lock", ".run.owner"])
def test_a_lock_follows_no_links(link: str) -> None:
    Path("precious").write_text("precious")
    Path("run").mkdir()
    Path("run", link).symlink_to("../precious")
    lock = FolderLock("run", "last.folder")
    with suppress(OSError):  # a link in the place of the lock itself is refused
        lock.acquire()
    lock.release()
    assert Path("precious").read_text() == "precious"


def test_a_draft_that_fails_is_swept_away() -> None:
    Path("model.pt2").write_text("old")
    with pytest.raises(RuntimeError, match="no such operator"), draft("model.pt2") as path:
        path.write_text("half")
        raise RuntimeError("no such operator")
    assert [path.name for path in Path().iterdir()] == ["model.pt2"]
    assert Path("model.pt2").read_text() == "old"


def test_a_file_has_the_usual_rights() -> None:
    write_text("a.json", "{}")
    Path("b.json").write_text("{}")
    assert Path("a.json").stat().st_mode == Path("b.json").stat().st_mode


def test_a_file_does_not_take_the_place_of_a_folder() -> None:
    Path("a.json", "inside").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"a\.json"):
        replace("a.json", lambda path: path.write_text("{}"))
    assert Path("a.json", "inside").is_dir()
