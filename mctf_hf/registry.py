"""The backbones of this library, with one entry each.

Loading, conversion, costs, presets, saving and the command line find a backbone's classes here.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PreTrainedConfig,
    SiglipVisionModel,
    ViTForImageClassification,
    ViTModel,
)

from .configuration_mctf import EncoderConfigMixin, FusionConfigMixin, reading_config
from .files import read_object
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


@dataclass(frozen=True)
class Backbone:
    """Classes and costs of a backbone.

    Attributes:
        config: class of the configuration.
        model: class of the encoder.
        classifier: class of the encoder with a head for image classification.
        further: other model classes; the first one outputs image embeddings.
        plain: transformers classes that load the same checkpoints, by class of this library.
        norms_all_tokens: whether the final norm is applied to all remaining tokens.
        read_per_token: function from a configuration that does not restore tokens to the
            multiply-accumulates of the heads per remaining token.
    """

    config: type[Any]
    model: type[Any]
    classifier: type[Any]
    further: tuple[type[Any], ...] = ()
    plain: Mapping[type[Any], type[Any]] = field(default_factory=dict)
    norms_all_tokens: bool = True
    read_per_token: Callable[[Any], int] = lambda config: 0

    @property
    def classifies(self) -> bool:
        """Whether its models are mainly classifiers, and not encoders."""
        return issubclass(self.config, MCTFViTConfig)


def _auxiliary_head(config: MCTFLVViTConfig) -> int:
    return config.hidden_size * int(config.num_labels or 0) if config.auxiliary_weight else 0


BACKBONES: dict[str, Backbone] = {
    entry.config.model_type: entry
    for entry in (
        Backbone(
            MCTFViTConfig,
            MCTFViTModel,
            MCTFViTForImageClassification,
            plain={
                MCTFViTModel: ViTModel,
                MCTFViTForImageClassification: ViTForImageClassification,
            },
        ),
        Backbone(MCTFT2TViTConfig, MCTFT2TViTModel, MCTFT2TViTForImageClassification),
        Backbone(
            MCTFLVViTConfig,
            MCTFLVViTModel,
            MCTFLVViTForImageClassification,
            read_per_token=_auxiliary_head,
        ),
        Backbone(
            MCTFDinov2Config,
            MCTFDinov2Model,
            MCTFDinov2ForImageClassification,
            plain={
                MCTFDinov2Model: Dinov2Model,
                MCTFDinov2ForImageClassification: Dinov2ForImageClassification,
            },
        ),
        Backbone(
            MCTFDinov2WithRegistersConfig,
            MCTFDinov2WithRegistersModel,
            MCTFDinov2WithRegistersForImageClassification,
            plain={
                MCTFDinov2WithRegistersModel: Dinov2WithRegistersModel,
                MCTFDinov2WithRegistersForImageClassification: (
                    Dinov2WithRegistersForImageClassification
                ),
            },
        ),
        Backbone(
            MCTFCLIPVisionConfig,
            MCTFCLIPVisionModel,
            MCTFCLIPVisionForImageClassification,
            (MCTFCLIPVisionModelWithProjection,),
            {
                MCTFCLIPVisionModel: CLIPVisionModel,
                MCTFCLIPVisionModelWithProjection: CLIPVisionModelWithProjection,
            },
            norms_all_tokens=False,
        ),
        Backbone(
            MCTFSiglipVisionConfig,
            MCTFSiglipVisionModel,
            MCTFSiglipVisionForImageClassification,
            plain={MCTFSiglipVisionModel: SiglipVisionModel},
        ),
        Backbone(
            MCTFDINOv3ViTConfig,
            MCTFDINOv3ViTModel,
            MCTFDINOv3ViTForImageClassification,
            plain={MCTFDINOv3ViTModel: DINOv3ViTModel},
        ),
    )
}

# Names of the fusion settings of all backbones.
FUSION_SETTINGS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [field.name for field in fields(FusionConfigMixin)]
        + [name for entry in BACKBONES.values() for name in entry.config.further_settings]
    )
)

NO_FUSION: dict[str, Any] = {"r": 0}  # fuses nothing with any method


def only_if_asked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for a plain model, without fusion unless one of them is a fusion setting.

    ``restore`` and ``skip_unread`` do not count as such here.
    """
    fusing = {field.name for field in fields(FusionConfigMixin)} - {"restore", "skip_unread"}
    asked = settings.keys() & fusing
    return dict(settings) if asked else {**settings, **NO_FUSION}


def settings_for(name: str | os.PathLike, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for loading a folder or Hub id, with a checkpoint of this library or a plain one.

    A plain checkpoint loads without fusion unless one of the settings is a fusion setting. A
    checkpoint of this library fuses as its configuration says.

    Raises:
        OSError: if there is no such model.
    """
    stored, _ = PreTrainedConfig.get_config_dict(name)
    own = str(stored.get("model_type")) in BACKBONES
    return dict(settings) if own else only_if_asked(settings)


def backbone_of(name: str | os.PathLike) -> Backbone:
    """The backbone that loads a folder or Hub id; the ViT for unknown model types.

    Raises:
        OSError: if there is no such model.
    """
    stored = stored_config(name)
    return backbone_of_type(str(stored.get("model_type"))) or BACKBONES[MCTFViTConfig.model_type]


def stored_config(name: str | os.PathLike) -> dict[str, Any]:
    """Contents of the config.json of a folder or Hub id.

    Raises:
        OSError: if there is no such model.
        ValueError: if the file does not contain settings by name.
    """
    if Path(name, "config.json").exists():
        read_object(Path(name, "config.json"))
    with reading_config(name):
        stored, _ = PreTrainedConfig.get_config_dict(name)
        architectures = stored.get("architectures") or ()
        if not all(isinstance(name, str) for name in architectures):
            raise TypeError(f"architectures={architectures!r}")
        return dict(stored.items())


def backbone_of_type(model_type: str) -> Backbone | None:
    """The backbone that loads a model type of this library or of transformers, if any."""
    return next((entry for entry in BACKBONES.values() if model_type in types_of(entry)), None)


def types_of(entry: Backbone) -> tuple[str, ...]:
    """The model types that a backbone loads: this library's own, and those of transformers."""
    config = entry.config
    return (config.model_type, *config.plain_types, *config.plain_parts)


def class_of(name: str | os.PathLike) -> type[Any]:
    """The class of this library that loads a folder or Hub id, by the class that it was saved as.

    Without a head, this is the classifier for backbones that are mainly classifiers, else the
    encoder; for a whole CLIP, the encoder with projection.

    Raises:
        OSError: if there is no such model.
    """
    stored = stored_config(name)
    model_type = str(stored.get("model_type"))
    entry = backbone_of_type(model_type) or BACKBONES[MCTFViTConfig.model_type]
    saved_as = next(iter(stored.get("architectures") or ()), "")
    if "Classification" in saved_as or entry.classifies:
        return entry.classifier
    embeds = "WithProjection" in saved_as or model_type in entry.config.plain_parts
    return entry.further[0] if entry.further and embeds else entry.model


def plain_class(own: type[Any], config: Any) -> type[Any] | None:
    """The transformers class with the same weights as a class of this library, if any.

    A ViT has none if its configuration has other tokens before the patches than a class token, or
    coarser patches.
    """
    if isinstance(config, MCTFViTConfig) and (
        not config.class_token or config.num_prefix_tokens != 1 or config.multi_scale
    ):
        return None
    return next((entry.plain[own] for entry in BACKBONES.values() if own in entry.plain), None)


def plain_config(own: type[Any], config: Any) -> Any:
    """The configuration of the plain model of a class, from a configuration of this library."""
    plain = plain_class(own, config)
    assert plain is not None
    known = {one.name for one in fields(plain.config_class)}
    kept = {name: value for name, value in config.to_dict().items() if name in known}
    return plain.config_class(**kept)


def output_of(model: Any) -> str:
    """The name of the main field of a model's output."""
    entry = BACKBONES[model.config.model_type]
    if isinstance(model, entry.classifier):
        return "logits"
    return "image_embeds" if isinstance(model, entry.further) else "last_hidden_state"


def build(config: EncoderConfigMixin) -> Any:
    """A classifier with a configuration and random weights."""
    return BACKBONES[config.model_type].classifier(config)
