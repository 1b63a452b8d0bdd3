"""The classifier that the trained model learns from in distillation."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from lightning_modules.processors import output_size
from mctf_hf import MCTFViTConfig
from mctf_hf.classes import differing, names_of
from mctf_hf.files import check_indexes
from mctf_hf.hub import load_image_processor
from mctf_hf.images import scaling


class Guide:
    """Runs any image classifier of the Hugging Face Hub on images prepared for another model.

    It is not part of the trained module: it is not averaged, saved or optimised.

    Args:
        name: id of the classifier on the Hub, or a local folder.
        config: configuration of the model that learns from it.
        image_processor: image processor of the model that learns from it.

    Raises:
        ValueError: if its classes differ from those of the model that learns from it.
        OSError: if there is no such classifier.
    """

    def __init__(self, name: str, config: MCTFViTConfig, image_processor: Any):
        check_indexes(name)
        self.model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        _check_classes(name, self.model.config, config)
        own = load_image_processor(name)
        self.size = output_size(own)
        mean, std = scaling(image_processor)
        own_mean, own_std = scaling(own)
        self.scale = (std / own_std).float()  # to the normalisation of the guide, per channel
        self.shift = ((mean - own_mean) / own_std).float()

    def to(self, device: torch.device) -> "Guide":
        """Move the weights to a device and return self."""
        self.model.to(device)
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)
        return self

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """Logits (b, c) of images (b, channels, height, width) prepared for the other model."""
        images = pixel_values * self.scale + self.shift
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images.to(self.model.dtype)).logits


def _check_classes(name: str, guide: Any, config: MCTFViTConfig) -> None:
    if guide.num_labels != config.num_labels:
        raise ValueError(
            f"distill_from={name!r} has {guide.num_labels} classes, the model that learns from it "
            f"{config.num_labels}: both must have the same ones, in the same order"
        )
    theirs, ours = names_of(guide), names_of(config)
    if wrong := differing(theirs, ours):
        index = wrong[0]
        raise ValueError(
            f"distill_from={name!r} calls class {index} {theirs[index]!r}, the model that learns "
            f"from it {ours[index]!r}, and {len(wrong)} of {config.num_labels} classes differ: "
            "they are to be the same ones, in the same order (where only their spelling differs, "
            "change id2label in its config.json)"
        )
