"""LV-ViT that fuses tokens (All Tokens Matter, arXiv 2104.10858).

A stem of convolutions before the patches, residual branches divided by a constant, and a head on
all tokens beside that on the class token; everything else is :mod:`modeling_mctf_vit`.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from .configuration_mctf import MCTFLVViTConfig, MCTFViTConfig, as_pair
from .modeling_mctf_vit import (
    MCTFViTEmbeddings,
    MCTFViTForImageClassification,
    MCTFViTModel,
    make_head,
)


class LVViTPatchEmbeddings(nn.Module):
    """Three convolutions at half of the image's resolution, and one that makes the patches."""

    def __init__(self, config: MCTFLVViTConfig):
        super().__init__()
        channels = config.stem_channels
        self.numbers_per_pixel = channels / 4
        stem: list[nn.Module] = []
        for entering, kernel, stride in (
            (config.num_channels, 7, 2),
            (channels, 3, 1),
            (channels, 3, 1),
        ):
            stem += [
                nn.Conv2d(entering, channels, kernel, stride, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
        self.stem = nn.Sequential(*stem)
        height, width = as_pair(config.patch_size)
        patch = (height // 2, width // 2)
        self.projection = nn.Conv2d(channels, config.hidden_size, patch, stride=patch)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(b, channels, height, width) -> (b, patches, d)."""
        return self.projection(self.stem(pixel_values)).flatten(2).transpose(1, 2)


class MCTFLVViTModel(MCTFViTModel):
    """LV-ViT encoder with token fusion; see :class:`MCTFViTModel`."""

    config: MCTFLVViTConfig
    config_class = MCTFLVViTConfig

    def _make_embeddings(self, config: Any, use_mask_token: bool) -> nn.Module:
        return MCTFViTEmbeddings(config, use_mask_token, LVViTPatchEmbeddings(config))


class MCTFLVViTForImageClassification(MCTFViTForImageClassification):
    """LV-ViT with token fusion, a head on the class token and one on all patch tokens."""

    config: MCTFLVViTConfig
    config_class = MCTFLVViTConfig
    backbone_class: ClassVar[type[MCTFViTModel]] = MCTFLVViTModel

    def _make_heads(self, config: MCTFViTConfig) -> None:
        super()._make_heads(config)
        self.auxiliary_classifier = make_head(config) if config.auxiliary_weight else None

    def _classify(self, hidden_states: Tensor, class_token: Tensor) -> Tensor:
        logits = super()._classify(hidden_states, class_token)
        if self.auxiliary_classifier is None:
            return logits
        patches = hidden_states[:, self.config.num_prefix_tokens :]
        auxiliary = self.auxiliary_classifier(patches).amax(1)  # [b, labels]
        return logits + self.config.auxiliary_weight * auxiliary
