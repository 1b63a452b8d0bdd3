import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BitImageProcessorPil, ViTImageProcessorPil

from tests.helpers import TINY
from tests.tiny_models import save_with_words, tiny

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers, and what they start, share the cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain ViT with random weights for ten classes, as anybody's checkpoint."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-vit"
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**{**TINY, "num_labels": 10}))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 images in folders of two depths."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "a" / "b").mkdir(parents=True)
    for i in range(23):
        noise = np.random.default_rng(i).integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / ("", "a", "a/b")[i % 3] / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "dino"
    tiny("dinov2")[0].save_pretrained(folder)
    size = {"height": 48, "width": 48}
    BitImageProcessorPil(size=size, crop_size=size, do_center_crop=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A CLIP and a SigLIP that know a few words."""
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
