"""LV-ViT with token fusion (All Tokens Matter, arXiv 2104.10858).

It has a stem of convolutions before the patches, divides residual branches by a constant, and has a
second head on all patch tokens. Everything else is as in :mod:`modeling_mctf_vit`.
"""

from .dependencies import OLDEST as OLDEST  # first, to report releases that are too old

# isort: split

from dataclasses import field
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from .configuration_mctf import as_pair, number
from .modeling_mctf import check_reads_class_token
from .modeling_mctf_vit import (
    HeadLogits,
    MCTFViTConfig,
    MCTFViTEmbeddings,
    MCTFViTForImageClassification,
    MCTFViTModel,
    make_head,
)


@strict
class MCTFLVViTConfig(MCTFViTConfig):
    """Configuration of an LV-ViT (arXiv 2104.10858) that fuses tokens.

    All fields of :class:`MCTFViTConfig`, with the defaults of LV-ViT-S, and:

    Args:
        skip_lambda: divisor of the residual branches.
        stem_channels: channels of the convolutions before the patches.
        auxiliary_weight: weight of the auxiliary head, whose largest logit of each class over all
            patch tokens is added to the class token's logit; 0 removes the head.
    """

    model_type = "mctf_lv_vit"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "modeling_mctf_lv_vit.MCTFLVViTConfig",
        "AutoModel": "modeling_mctf_lv_vit.MCTFLVViTModel",
        "AutoModelForImageClassification": "modeling_mctf_lv_vit.MCTFLVViTForImageClassification",
    }
    plain_types: ClassVar[dict[str, str]] = {}

    hidden_size: int = 384
    num_hidden_layers: int = 16
    num_attention_heads: int = 6
    intermediate_size: int = 1152
    qkv_bias: bool = False
    layer_norm_eps: float = 1e-5
    skip_lambda: float | int = field(default=2.0, metadata=number("skip_lambda", 1))
    stem_channels: int = field(default=64, metadata=number("stem_channels", 1))
    auxiliary_weight: float | int = field(default=0.5, metadata=number("auxiliary_weight", 0))

    def validate_even(self) -> None:
        """Check that the patch size is even, because the stem halves the resolution."""
        if any(side % 2 for side in as_pair(self.patch_size)):
            raise ValueError(f"patch_size={self.patch_size!r} is not allowed: an LV-ViT's is even")


class LVViTPatchEmbeddings(nn.Module):
    """Three convolutions at half of the image's resolution, and one that creates the patches."""

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
        if config.auxiliary_weight:
            check_reads_class_token(self)

    @property
    def num_read_tokens(self) -> int | None:
        return super().num_read_tokens if self.auxiliary_classifier is None else None

    def _classify(self, hidden_states: Tensor, features: Tensor) -> HeadLogits:
        logits, by_label, by_guide = super()._classify(hidden_states, features)
        if self.auxiliary_classifier is None:
            return HeadLogits(logits, by_label, by_guide)
        patches = hidden_states[:, self.config.num_prefix_tokens :]
        auxiliary = self.auxiliary_classifier(patches).amax(1)  # [b, labels]
        auxiliary = self.config.auxiliary_weight * auxiliary
        return HeadLogits(logits + auxiliary, by_label + auxiliary, by_guide)
