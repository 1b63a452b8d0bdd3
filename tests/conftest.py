import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# torch and what needs it are imported where they are used: the process that hands out tests to
# others needs none of it.
if TYPE_CHECKING:
    from torch import Tensor

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    # The workers, and what they start, share the cores.
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not go through it again and again."""
    if IS_WORKER:
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def short_waits() -> Iterator[None]:
    """Libraries wait for seconds where something ends; that it has ended is seen sooner."""
    import datasets
    import torch.utils.data._utils

    with pytest.MonkeyPatch.context() as patch:
        # Workers of a loader that a failed training leaves behind.
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
        # Newer releases wait for threads of remote files after each pass over a stream.
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        yield


@pytest.fixture
def images() -> "Tensor":
    import torch

    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain ViT with random weights for ten classes, as anybody's checkpoint."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    from tests.helpers import TINY

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-vit"
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**{**TINY, "num_labels": 10}))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flat_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two layers, for what takes long for each of them."""
    from transformers import ViTForImageClassification

    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("checkpoint") / "flat-vit")
    model = ViTForImageClassification.from_pretrained(tiny_folder, num_hidden_layers=2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images in folders of two depths."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    (folder / "a" / "b").mkdir(parents=True)
    for i in range(23):
        noise = np.random.default_rng(i).integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / ("", "a", "a/b")[i % 3] / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BitImageProcessorPil

    from tests.tiny_models import tiny

    folder = tmp_path_factory.mktemp("model") / "dino"
    tiny("dinov2")[0].save_pretrained(folder)
    size = {"height": 48, "width": 48}
    BitImageProcessorPil(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A CLIP and a SigLIP that know a few words."""
    from tests.tiny_models import save_with_words

    folder = tmp_path_factory.mktemp("pairs")
    return {name: save_with_words(name, folder / name) for name in ("CLIP", "SigLIP")}


@pytest.fixture(scope="session", autouse=True)
def lasting_log() -> None:
    """Lightning logs to what is stderr when it is imported: not to that of the test which does."""
    import lightning.pytorch  # noqa: F401


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run every test in an empty folder, so that nothing is written to the checkout."""
    monkeypatch.chdir(tmp_path)
    yield
