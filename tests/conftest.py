import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import ViTImageProcessorPil

from mctf_hf import MCTFViTConfig, MCTFViTForImageClassification

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers, and what they start, share the cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("MCTF_SHARED", REPOSITORY.parent / "shared"))
DIGITS = str(REPOSITORY / "data" / "digits")

# A model small enough to run in milliseconds; golden/ has weights of this shape.
TINY: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 24,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_labels": 5,
    "layer_norm_eps": 1e-6,
}


def environment_of_a_stranger(home: Path) -> dict[str, str]:
    """A process that has none of this one's environment, but as many threads."""
    return {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PATH": "/usr/bin:/bin",
    }


class Golden:
    """Tensors of one file in golden/, computed with the official implementations."""

    def __init__(self, name: str):
        self.file = safe_open(REPOSITORY / "tests" / "golden" / f"{name}.safetensors", "pt")
        self.cases: dict[str, dict[str, Any]] = json.loads(self.file.metadata()["cases"])
        self.names = set(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def weights(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): self[name] for name in self.names if name.startswith(prefix)
        }


def needs_shared(folder: str) -> pytest.MarkDecorator:
    """Skip where the larger real data is not at hand; MCTF_SHARED says where it lies."""
    return pytest.mark.skipif(
        not (SHARED / folder).exists(), reason=f"{folder} is not in MCTF_SHARED={SHARED}"
    )


def tiny_model(**settings: Any) -> MCTFViTForImageClassification:
    torch.manual_seed(0)
    return MCTFViTForImageClassification(MCTFViTConfig(**{**TINY, **settings})).eval()


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


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run every test in an empty folder, so that nothing is written to the checkout."""
    monkeypatch.chdir(tmp_path)
    yield
