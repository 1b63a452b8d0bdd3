"""Reading weight files of other code, without running any code in the files."""

import argparse
import contextlib
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Entries in which training scripts store weights, besides other data, in order of preference: the
# official scripts evaluate "model".
ENTRIES = ("model", "state_dict", "model_ema", "state_dict_ema")
# Prefixes that a wrapper of the model adds to all names.
_WRAPPERS = ("module.", "_orig_mod.")
# Errors from reading a damaged pickle; found by damaging some at random.
DAMAGED = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    EOFError,
    AssertionError,
    struct.error,
)
# The same for code that does more than read a pickle, so that other errors keep their messages.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError)


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a weight file.

    Attributes:
        weights: weights by their own names, without prefixes of wrappers.
        entry: entry of the file with the weights; ``None`` if they are the whole file.
        left_out: names of the other entries.
    """

    weights: dict[str, Tensor]
    entry: str | None
    left_out: tuple[str, ...]


def load_checkpoint(file: str | os.PathLike, entry: str | None = None) -> dict[str, Tensor]:
    """The weights in a file, by their own names; see :func:`read_checkpoint`."""
    return read_checkpoint(file, entry).weights


def read_checkpoint(file: str | os.PathLike, entry: str | None = None) -> Checkpoint:
    """Read a weight file without running any code in it.

    Args:
        file: .safetensors file, or a .pth, .pt or .bin file that ``torch.save`` wrote.
        entry: entry of the file with the weights. Unset: the first of ``ENTRIES`` that exists, or
            else the whole file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another extension, or a file that is damaged, contains no weights or less
            data than their shapes need, or would call functions that do not make tensors or plain
            values.
    """
    path = Path(file)
    if not path.exists():
        raise FileNotFoundError(f"{file}: there is no such file or folder")
    if path.suffix not in SUFFIXES or not path.is_file():
        raise ValueError(
            f"{file} is not allowed: a checkpoint's name ends in {', '.join(SUFFIXES)}"
        )
    with reading(file, DAMAGED):
        _check_archive(path)
        contents = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    if not isinstance(contents, Mapping):
        raise ValueError(f"{file} holds a {type(contents).__name__}, not weights by name")
    if entry is None:
        entry = next((name for name in ENTRIES if isinstance(contents.get(name), Mapping)), None)
    elif entry not in contents:
        raise ValueError(f"{file} has no entry {entry!r}: it has {list(contents)}")
    weights = contents if entry is None else contents[entry]
    if isinstance(weights, tuple) and len(weights) == 1:
        weights = weights[0]  # as the official training script saves its moving average
    if not isinstance(weights, Mapping):
        raise ValueError(f"{file} has no weights in its entry {entry!r}: name another one")
    others = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        where = "" if entry is None else f" in its entry {entry!r}"
        raise ValueError(f"{file} holds something else than weights{where}: {others}")
    left_out = () if entry is None else tuple(str(name) for name in contents if name != entry)
    _check_held(file, weights)
    return Checkpoint(_unwrapped(weights), entry, left_out)


def _check_archive(path: Path) -> None:
    """Raise ValueError for an archive that is larger when unpacked."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError(f"{path.stat().st_size:,} bytes become {unpacked:,} when unpacked")


def _check_held(file: str | os.PathLike, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError for weights whose shapes need more data than the file contains."""
    for name, tensor in weights.items():
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        held = tensor.untyped_storage().nbytes() if dense else 0
        if tensor.numel() * tensor.element_size() > held:
            raise ValueError(
                f"{file} is refused: {name} says that it has {tensor.numel():,} numbers "
                f"({list(tensor.shape)}), and the file holds {held:,} bytes for them"
            )


def _unpickle(path: Path) -> Any:
    # Checkpoints of the DeiT and MCTF scripts contain their command-line arguments. Their class is
    # safe to load, because it only stores attributes.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error says enough
        return torch.load(path, weights_only=True, map_location="cpu")


@contextlib.contextmanager
def reading(file: str | os.PathLike, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Replace errors of the block by a ValueError that says why a weight file cannot be read."""
    try:
        yield
    except errors as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and named:
            raise ValueError(
                f"{file} is refused: reading it would call {named[1]}, which makes no tensor or "
                "plain value; nothing was called (if you trust the file, save its weights alone)"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{file} cannot be read: it is damaged or holds no weights; nothing in it was run "
            f"({reason})"
        ) from error


def _unwrapped(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if weights and all(str(name).startswith(wrapper) for name in weights):
            weights = {name.removeprefix(wrapper): tensor for name, tensor in weights.items()}
    return {str(name): tensor.detach() for name, tensor in weights.items()}
