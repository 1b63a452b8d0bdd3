"""Files of weights that other code has written, read without running anything in them."""

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
# Where training scripts keep their weights among other things, in the order of preference: the
# official scripts evaluate "model".
ENTRIES = ("model", "state_dict", "model_ema", "state_dict_ema")
# Names that a wrapper of the model put before all others.
_WRAPPERS = ("module.", "_orig_mod.")
# Whatever a damaged pickle makes its reader stumble over; found by damaging some at random.
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
# The same where more than a pickle is read, so that other mistakes keep their own words.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError)


@dataclass(frozen=True)
class Checkpoint:
    """What a file held.

    Attributes:
        weights: by their own names.
        entry: the name that the weights had in the file; ``None`` if they were all of it.
        left_out: names of what else was there.
    """

    weights: dict[str, Tensor]
    entry: str | None
    left_out: tuple[str, ...]


def load_checkpoint(file: str | os.PathLike, entry: str | None = None) -> dict[str, Tensor]:
    """The weights in a file, by their own names; see :func:`read_checkpoint`."""
    return read_checkpoint(file, entry).weights


def read_checkpoint(file: str | os.PathLike, entry: str | None = None) -> Checkpoint:
    """Read a file of weights without running anything that it may hold.

    Args:
        file: its name ends in .safetensors, or in .pth, .pt or .bin for what ``torch.save`` wrote.
        entry: where in the file the weights are. Unset: the whole file, if it holds nothing else,
            or else the first of ``ENTRIES`` that is there.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a name that ends otherwise, and a file that is damaged, holds no weights or
            fewer numbers than they say, or would call anything but what makes tensors and plain
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
    """Raise ValueError for a file whose parts are larger than it is, when they are unpacked."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > path.stat().st_size:
            raise ValueError(f"{path.stat().st_size:,} bytes become {unpacked:,} when unpacked")


def _check_held(file: str | os.PathLike, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError for weights of more numbers than the file has for them."""
    for name, tensor in weights.items():
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        held = tensor.untyped_storage().nbytes() if dense else 0
        if tensor.numel() * tensor.element_size() > held:
            raise ValueError(
                f"{file} is refused: {name} says that it has {tensor.numel():,} numbers "
                f"({list(tensor.shape)}), and the file holds {held:,} bytes for them"
            )


def _unpickle(path: Path) -> Any:
    # The scripts of DeiT and MCTF keep their command line in their checkpoints. Its class may be
    # let in: it does nothing but hold attributes, whatever a file makes of it.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error says enough
        return torch.load(path, weights_only=True, map_location="cpu")


@contextlib.contextmanager
def reading(file: str | os.PathLike, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Tell in a line, as ValueError, why a file of weights cannot be read."""
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
