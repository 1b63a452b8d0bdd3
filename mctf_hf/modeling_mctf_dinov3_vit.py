"""DINOv3's Vision Transformer (arXiv 2508.10104) with token fusion."""

from .dependencies import OLDEST as OLDEST  # first, to report releases that are too old

# isort: split

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import DINOv3ViTConfig
from transformers.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTModel,
    DINOv3ViTPreTrainedModel,
    augment_patches_center_coordinates,
    get_patches_center_coordinates,
)

from .anatomy import DINO
from .attention import Rotation
from .configuration_mctf import AnySizeConfigMixin, EncoderConfigMixin, RotaryConfigMixin, as_pair
from .fused_encoder import Rotary, exchange_class, fused_class
from .fused_layer import rotation_at
from .modeling_mctf import take_over_names
from .modeling_mctf_encoder import MCTFEncoderClassifierMixin, MCTFEncoderMixin

take_over_names(("MCTFDINOv3ViTModel",), "dinov3_vit")


class FusedRotaryEmbedding:
    """Rotary embedding that also returns coordinates; mixed in before a transformers class."""

    if TYPE_CHECKING:
        config: Any
        training: bool
        inv_freq: Tensor

    def forward(self, pixel_values: Tensor) -> Rotary:
        """Rotary positions of the patches of images (b, channels, height, width)."""
        height, width = pixel_values.shape[-2:]
        patch_height, patch_width = as_pair(self.config.patch_size)
        coordinates = get_patches_center_coordinates(
            height // patch_height,
            width // patch_width,
            dtype=torch.float32,
            device=pixel_values.device,
        )
        if self.training:
            coordinates = augment_patches_center_coordinates(
                coordinates,
                shift=self.config.pos_embed_shift,
                jitter=self.config.pos_embed_jitter,
                rescale=self.config.pos_embed_rescale,
            )
        cos, sin = rotation_at(coordinates[None], self.inv_freq)
        rotation = Rotation(cos[0, 0].to(pixel_values.dtype), sin[0, 0].to(pixel_values.dtype))
        return Rotary(rotation, coordinates, self.inv_freq)


@strict
class MCTFDINOv3ViTConfig(
    AnySizeConfigMixin, EncoderConfigMixin, RotaryConfigMixin, DINOv3ViTConfig
):
    """Configuration of a DINOv3 that fuses tokens.

    All fields of :class:`transformers.DINOv3ViTConfig`, of
    :class:`~.configuration_mctf.FusionConfigMixin` and of
    :class:`~.configuration_mctf.RotaryConfigMixin`.
    """

    model_type = "mctf_dinov3_vit"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "modeling_mctf_dinov3_vit.MCTFDINOv3ViTConfig",
        "AutoModel": "modeling_mctf_dinov3_vit.MCTFDINOv3ViTModel",
        "AutoModelForImageClassification": (
            "modeling_mctf_dinov3_vit.MCTFDINOv3ViTForImageClassification"
        ),
    }
    plain_types: ClassVar[dict[str, str]] = {"dinov3_vit": "DINOv3 ViT"}
    further_settings: ClassVar = ("rope_positions",)
    class_token: ClassVar[bool] = True

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class and register tokens, which come before the patches."""
        return 1 + self.num_register_tokens


class MCTFDINOv3ViTModel(MCTFEncoderMixin, DINOv3ViTModel):
    """DINOv3 with token fusion; see :class:`~.modeling_mctf_encoder.MCTFEncoderMixin`."""

    config: MCTFDINOv3ViTConfig
    config_class = MCTFDINOv3ViTConfig
    names = DINO
    layers_path = "model.layer"
    base_model_prefix = "dinov3_vit"  # not "model", where the layers are

    def __init__(self, config: MCTFDINOv3ViTConfig):
        super().__init__(config)
        rotary = self.rope_embeddings
        exchange_class(rotary, fused_class(FusedRotaryEmbedding, type(rotary)))

    def embed(self, pixel_values: Tensor, **options: Any) -> dict[str, Any]:
        embedded = super().embed(pixel_values, **options)
        return {**embedded, "rotary": self.rope_embeddings(pixel_values.to(self.dtype))}

    def final_norm(self, hidden_states: Tensor) -> Tensor:
        return self.norm(hidden_states)


class MCTFDINOv3ViTForImageClassification(MCTFEncoderClassifierMixin, DINOv3ViTPreTrainedModel):
    """DINOv3 with token fusion and a linear head on class token and mean of the patch tokens."""

    config: MCTFDINOv3ViTConfig
    config_class = MCTFDINOv3ViTConfig
    backbone_class: ClassVar[type[Any]] = MCTFDINOv3ViTModel
    pretrained_class: ClassVar[type[Any]] = DINOv3ViTPreTrainedModel
    base_model_prefix = "dinov3_vit"
