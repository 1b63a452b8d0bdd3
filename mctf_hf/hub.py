"""Model folders that load anywhere."""

import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def save(model: PreTrainedModel, image_processor: Any, folder: str | os.PathLike) -> Path:
    """Write a model, its code and its image processor to a folder, or leave the folder as it was.

    Everything is written beside the folder first and then moved file by file, the configuration
    last. Weight files of an earlier save that the new one lacks are removed; nothing else is.

    Returns:
        The folder.

    Raises:
        FileExistsError: see :func:`check_folder`.
    """
    folder = check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as draft:
        model.save_pretrained(draft)
        image_processor.save_pretrained(draft)
        names = sorted(os.listdir(draft), key=lambda name: (name == "config.json", name))
        folder.mkdir(exist_ok=True)
        for name in names:
            os.replace(Path(draft, name), folder / name)
    for stale in {
        *folder.glob("model*.safetensors"),
        *folder.glob("model*.safetensors.index.json"),
    }:
        if stale.name not in names:
            stale.unlink()
    return folder


def check_folder(folder: str | os.PathLike) -> Path:
    """The folder, if a model may be saved there.

    Raises:
        FileExistsError: if it is a file, or holds files but no model.
    """
    folder = Path(folder)
    occupied = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if occupied and not (folder / "config.json").exists():
        raise FileExistsError(
            f"{folder} holds something else than a model: name a new folder or that of a model"
        )
    return folder
