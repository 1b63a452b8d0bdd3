"""Token fusion for Vision Transformers of the Hugging Face ecosystem."""

from importlib.metadata import version

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .apply import from_pretrained, fuse_tokens, fusion_of, supported, unfuse_tokens
from .modeling_mctf_clip import (
    MCTFCLIPVisionConfig,
    MCTFCLIPVisionForImageClassification,
    MCTFCLIPVisionModel,
    MCTFCLIPVisionModelWithProjection,
)
from .modeling_mctf_dinov2 import (
    MCTFDinov2Config,
    MCTFDinov2ForImageClassification,
    MCTFDinov2Model,
    MCTFDinov2WithRegistersConfig,
    MCTFDinov2WithRegistersForImageClassification,
    MCTFDinov2WithRegistersModel,
)
from .modeling_mctf_dinov3_vit import (
    MCTFDINOv3ViTConfig,
    MCTFDINOv3ViTForImageClassification,
    MCTFDINOv3ViTModel,
)
from .modeling_mctf_lv_vit import MCTFLVViTConfig, MCTFLVViTForImageClassification, MCTFLVViTModel
from .modeling_mctf_siglip import (
    MCTFSiglipVisionConfig,
    MCTFSiglipVisionForImageClassification,
    MCTFSiglipVisionModel,
)
from .modeling_mctf_t2t_vit import (
    MCTFT2TViTConfig,
    MCTFT2TViTForImageClassification,
    MCTFT2TViTModel,
)
from .modeling_mctf_vit import MCTFViTConfig, MCTFViTForImageClassification, MCTFViTModel
from .registry import BACKBONES

__version__ = version("mctf-hf")

for _backbone in BACKBONES.values():
    AutoConfig.register(_backbone.config.model_type, _backbone.config)
    AutoModel.register(_backbone.config, _backbone.model)
    AutoModelForImageClassification.register(_backbone.config, _backbone.classifier)

__all__ = [
    "MCTFCLIPVisionConfig",
    "MCTFCLIPVisionForImageClassification",
    "MCTFCLIPVisionModel",
    "MCTFCLIPVisionModelWithProjection",
    "MCTFDINOv3ViTConfig",
    "MCTFDINOv3ViTForImageClassification",
    "MCTFDINOv3ViTModel",
    "MCTFDinov2Config",
    "MCTFDinov2ForImageClassification",
    "MCTFDinov2Model",
    "MCTFDinov2WithRegistersConfig",
    "MCTFDinov2WithRegistersForImageClassification",
    "MCTFDinov2WithRegistersModel",
    "MCTFLVViTConfig",
    "MCTFLVViTForImageClassification",
    "MCTFLVViTModel",
    "MCTFSiglipVisionConfig",
    "MCTFSiglipVisionForImageClassification",
    "MCTFSiglipVisionModel",
    "MCTFT2TViTConfig",
    "MCTFT2TViTForImageClassification",
    "MCTFT2TViTModel",
    "MCTFViTConfig",
    "MCTFViTForImageClassification",
    "MCTFViTModel",
    "__version__",
    "from_pretrained",
    "fuse_tokens",
    "fusion_of",
    "supported",
    "unfuse_tokens",
]
