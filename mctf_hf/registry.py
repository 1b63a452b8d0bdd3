"""The backbones of this library: one entry each, which all that is not a model reads.

Loading, conversion, costs, presets, saving and the command line find a backbone's classes here.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedConfig

from .configuration_mctf import EncoderConfigMixin, FusionConfigMixin
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
from .modeling_mctf_lv_vit import (
    MCTFLVViTConfig,
    MCTFLVViTForImageClassification,
    MCTFLVViTModel,
)
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


@dataclass(frozen=True)
class Backbone:
    """What a backbone is to the rest of the library.

    Attributes:
        config: its configuration.
        model: the encoder alone.
        classifier: the encoder with a head for image classification.
        further: other classes of its own.
        read_per_token: multiply-accumulates of the heads per token that is left, where a
            configuration does not restore tokens.
    """

    config: type[Any]
    model: type[Any]
    classifier: type[Any]
    further: tuple[type[Any], ...] = ()
    read_per_token: Callable[[Any], int] = lambda config: 0


def _auxiliary_head(config: MCTFLVViTConfig) -> int:
    return config.hidden_size * config.num_labels if config.auxiliary_weight else 0


BACKBONES: dict[str, Backbone] = {
    entry.config.model_type: entry
    for entry in (
        Backbone(MCTFViTConfig, MCTFViTModel, MCTFViTForImageClassification),
        Backbone(MCTFT2TViTConfig, MCTFT2TViTModel, MCTFT2TViTForImageClassification),
        Backbone(
            MCTFLVViTConfig,
            MCTFLVViTModel,
            MCTFLVViTForImageClassification,
            read_per_token=_auxiliary_head,
        ),
        Backbone(MCTFDinov2Config, MCTFDinov2Model, MCTFDinov2ForImageClassification),
        Backbone(
            MCTFDinov2WithRegistersConfig,
            MCTFDinov2WithRegistersModel,
            MCTFDinov2WithRegistersForImageClassification,
        ),
        Backbone(
            MCTFCLIPVisionConfig,
            MCTFCLIPVisionModel,
            MCTFCLIPVisionForImageClassification,
            (MCTFCLIPVisionModelWithProjection,),
        ),
        Backbone(
            MCTFSiglipVisionConfig,
            MCTFSiglipVisionModel,
            MCTFSiglipVisionForImageClassification,
        ),
        Backbone(MCTFDINOv3ViTConfig, MCTFDINOv3ViTModel, MCTFDINOv3ViTForImageClassification),
    )
}

# Names of all settings of fusion, of whatever backbone.
FUSION_SETTINGS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [field.name for field in fields(FusionConfigMixin)]
        + [name for entry in BACKBONES.values() for name in entry.config.further_settings]
    )
)


def backbone_of(name: str | os.PathLike) -> Backbone:
    """The backbone that loads a folder or Hub id: for all that is of none, the ViT.

    Raises:
        OSError: if there is no such model.
    """
    stored, _ = PreTrainedConfig.get_config_dict(name)
    return backbone_of_type(str(stored.get("model_type"))) or BACKBONES[MCTFViTConfig.model_type]


def backbone_of_type(model_type: str) -> Backbone | None:
    """The backbone that loads models of a type, of this library's or of transformers'."""
    for entry in BACKBONES.values():
        config = entry.config
        if model_type in (config.model_type, *config.plain_types, *config.plain_parts):
            return entry
    return None


def build(config: EncoderConfigMixin) -> Any:
    """A classifier of a configuration, with random weights."""
    return BACKBONES[config.model_type].classifier(config)
