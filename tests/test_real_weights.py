"""Real weights on real images: accuracy with fusion is that of the official implementation.

The official accuracy is of 10,000 images, and a quarter of them is classified here: by chance alone
its accuracy has a standard error of 0.8%. Other tests compare every single number.
"""

import numpy as np
import pytest
import torch
from datasets import load_dataset
from transformers import ViTForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mctf_hf import MCTFViTForImageClassification
from mctf_hf.cost import describe, multiply_accumulates
from tests.helpers import SHARED, needs_shared

pytestmark = [
    needs_shared("data/cifar10"),
    needs_shared("checkpoints/deit-tiny-cifar10"),
    pytest.mark.timeout(600),
]

CHECKPOINT = SHARED / "checkpoints" / "deit-tiny-cifar10"
# setting -> top-1 in % on the 10,000 test images and GMACs, both of the official implementation.
OFFICIAL = {
    "r 6": ({"r": 6}, 67.20, 0.1911),
}


@pytest.fixture(scope="module")
def test_images() -> tuple[torch.Tensor, torch.Tensor]:
    rows = load_dataset(str(SHARED / "data" / "cifar10"), split="test").select(range(0, 10_000, 4))
    processor = AutoImageProcessor.from_pretrained(CHECKPOINT, backend="pil")
    pixels = processor([np.asarray(image) for image in rows["image"]], return_tensors="pt")
    return pixels["pixel_values"], torch.tensor(rows["label"][:])


@torch.inference_mode()
def test_without_fusion_it_is_the_model_of_transformers(
    test_images: tuple[torch.Tensor, torch.Tensor],
) -> None:
    model = MCTFViTForImageClassification.from_pretrained(CHECKPOINT, r=0).eval()
    plain = ViTForImageClassification.from_pretrained(CHECKPOINT).eval()
    images = test_images[0][:100]
    torch.testing.assert_close(model(images).logits, plain(images).logits, rtol=0, atol=1e-5)
    assert describe(model.config).unfused / 1e9 == pytest.approx(0.3667, rel=0.001)


@pytest.mark.parametrize("name", OFFICIAL)
@torch.inference_mode()
def test_accuracy_is_the_official_one_but_for_chance(
    name: str, test_images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    settings, accuracy, gmacs = OFFICIAL[name]
    model = MCTFViTForImageClassification.from_pretrained(CHECKPOINT, **settings).eval()
    images, labels = test_images
    right = sum(
        (model(batch).logits.argmax(-1) == label).sum().item()
        for batch, label in zip(images.split(100), labels.split(100), strict=True)
    )
    assert 100 * right / len(labels) == pytest.approx(accuracy, abs=1.6)
    model.config.skip_unread = False  # as the official code does
    assert multiply_accumulates(model.config) / 1e9 == pytest.approx(gmacs, rel=0.01)
