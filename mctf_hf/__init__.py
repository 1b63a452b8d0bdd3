"""Multi-criteria Token Fusion for Vision Transformers of the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .apply import from_pretrained, fuse_tokens, fusion_of, supported, unfuse_tokens
from .modeling_mctf_lv_vit import (
    MCTFLVViTConfig,
    MCTFLVViTForImageClassification,
    MCTFLVViTModel,
)
from .modeling_mctf_t2t_vit import (
    MCTFT2TViTConfig,
    MCTFT2TViTForImageClassification,
    MCTFT2TViTModel,
)
from .modeling_mctf_vit import MCTFViTConfig, MCTFViTForImageClassification, MCTFViTModel

for _config, _model, _classifier in (
    (MCTFViTConfig, MCTFViTModel, MCTFViTForImageClassification),
    (MCTFT2TViTConfig, MCTFT2TViTModel, MCTFT2TViTForImageClassification),
    (MCTFLVViTConfig, MCTFLVViTModel, MCTFLVViTForImageClassification),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForImageClassification.register(_config, _classifier)

__all__ = [
    "MCTFLVViTConfig",
    "MCTFLVViTForImageClassification",
    "MCTFLVViTModel",
    "MCTFT2TViTConfig",
    "MCTFT2TViTForImageClassification",
    "MCTFT2TViTModel",
    "MCTFViTConfig",
    "MCTFViTForImageClassification",
    "MCTFViTModel",
    "from_pretrained",
    "fuse_tokens",
    "fusion_of",
    "supported",
    "unfuse_tokens",
]
