"""The backbones of this library, by the type that their configurations name."""

import os

from transformers import PreTrainedConfig

from .configuration_mctf import MCTFViTConfig
from .modeling_mctf_lv_vit import MCTFLVViTForImageClassification
from .modeling_mctf_t2t_vit import MCTFT2TViTForImageClassification
from .modeling_mctf_vit import MCTFViTForImageClassification

CLASSIFIERS: dict[str, type[MCTFViTForImageClassification]] = {
    classifier.config_class.model_type: classifier
    for classifier in (
        MCTFViTForImageClassification,
        MCTFT2TViTForImageClassification,
        MCTFLVViTForImageClassification,
    )
}


def classifier_of(name: str | os.PathLike) -> type[MCTFViTForImageClassification]:
    """The class that loads a folder or Hub id: for all that is not of this library, the ViT's.

    Raises:
        OSError: if there is no such model.
    """
    stored, _ = PreTrainedConfig.get_config_dict(name)
    return CLASSIFIERS.get(str(stored.get("model_type")), MCTFViTForImageClassification)


def build(config: MCTFViTConfig) -> MCTFViTForImageClassification:
    """A classifier of a configuration, with random weights."""
    return CLASSIFIERS[config.model_type](config)
