"""DINOv3's Vision Transformer (arXiv 2508.10104), which fuses tokens as it goes."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.models.dinov3_vit.modeling_dinov3_vit import (
    augment_patches_center_coordinates,
    get_patches_center_coordinates,
)

from .attention import Rotation
from .configuration_mctf import as_pair
from .fused_encoder import Rotary
from .fused_layer import rotation_at


class FusedRotaryEmbedding:
    """Rotary positions that come with their coordinates; before the class of transformers."""

    if TYPE_CHECKING:
        config: Any
        training: bool
        inv_freq: Tensor

    def forward(self, pixel_values: Tensor) -> Rotary:
        """Positions of the patches of images, (b, channels, height, width)."""
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
