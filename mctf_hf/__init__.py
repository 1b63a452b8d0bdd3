"""Multi-criteria Token Fusion for Vision Transformers of the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_mctf import MCTFViTConfig
from .modeling_mctf_vit import MCTFViTForImageClassification, MCTFViTModel

AutoConfig.register(MCTFViTConfig.model_type, MCTFViTConfig)
AutoModel.register(MCTFViTConfig, MCTFViTModel)
AutoModelForImageClassification.register(MCTFViTConfig, MCTFViTForImageClassification)

__all__ = ["MCTFViTConfig", "MCTFViTForImageClassification", "MCTFViTModel"]
