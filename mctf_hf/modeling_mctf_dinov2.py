"""DINOv2 (arXiv 2304.07193) with token fusion, with and without registers (arXiv 2309.16588)."""

from .dependencies import OLDEST as OLDEST  # first, to report releases that are too old

# isort: split

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Dinov2Config, Dinov2WithRegistersConfig
from transformers.models.dinov2 import modeling_dinov2
from transformers.models.dinov2.modeling_dinov2 import (
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2PreTrainedModel,
)
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    Dinov2WithRegistersPreTrainedModel,
)

from .anatomy import DINO
from .configuration_mctf import AnySizeConfigMixin, EncoderConfigMixin
from .modeling_mctf import take_over_names
from .modeling_mctf_encoder import MCTFEncoderClassifierMixin, MCTFEncoderMixin

# Releases before 5.18 name attention weights as old checkpoints do, so there is no mapping.
if not hasattr(modeling_dinov2, "Dinov2SelfAttention"):
    take_over_names(("MCTFDinov2Model", "MCTFDinov2ForImageClassification"), "Dinov2Model")
    take_over_names(
        ("MCTFDinov2WithRegistersModel", "MCTFDinov2WithRegistersForImageClassification"),
        "Dinov2WithRegistersModel",
    )


@strict
class MCTFDinov2Config(AnySizeConfigMixin, EncoderConfigMixin, Dinov2Config):
    """Configuration of a DINOv2 that fuses tokens.

    All fields of :class:`transformers.Dinov2Config` and of
    :class:`~.configuration_mctf.FusionConfigMixin`.
    """

    model_type = "mctf_dinov2"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "modeling_mctf_dinov2.MCTFDinov2Config",
        "AutoModel": "modeling_mctf_dinov2.MCTFDinov2Model",
        "AutoModelForImageClassification": "modeling_mctf_dinov2.MCTFDinov2ForImageClassification",
    }
    plain_types: ClassVar[dict[str, str]] = {"dinov2": "DINOv2"}
    class_token: ClassVar[bool] = True

    @property
    def num_prefix_tokens(self) -> int:
        """One: the class token, before the patches."""
        return 1


@strict
class MCTFDinov2WithRegistersConfig(
    AnySizeConfigMixin, EncoderConfigMixin, Dinov2WithRegistersConfig
):
    """Configuration of a DINOv2 with registers that fuses tokens.

    All fields of :class:`transformers.Dinov2WithRegistersConfig` and of
    :class:`~.configuration_mctf.FusionConfigMixin`.
    """

    model_type = "mctf_dinov2_with_registers"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "modeling_mctf_dinov2.MCTFDinov2WithRegistersConfig",
        "AutoModel": "modeling_mctf_dinov2.MCTFDinov2WithRegistersModel",
        "AutoModelForImageClassification": (
            "modeling_mctf_dinov2.MCTFDinov2WithRegistersForImageClassification"
        ),
    }
    plain_types: ClassVar[dict[str, str]] = {"dinov2_with_registers": "DINOv2 with registers"}
    class_token: ClassVar[bool] = True

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class and register tokens, which come before the patches."""
        return 1 + self.num_register_tokens


class MCTFDinov2Model(MCTFEncoderMixin, Dinov2Model):
    """DINOv2 with token fusion; see :class:`~.modeling_mctf_encoder.MCTFEncoderMixin`."""

    config: MCTFDinov2Config
    config_class = MCTFDinov2Config
    names = DINO
    layers_path = "encoder.layer"


class MCTFDinov2ForImageClassification(MCTFEncoderClassifierMixin, Dinov2ForImageClassification):
    """DINOv2 with token fusion and a linear head on class token and mean of the patch tokens."""

    config: MCTFDinov2Config
    config_class = MCTFDinov2Config
    backbone_class: ClassVar[type[Any]] = MCTFDinov2Model
    pretrained_class: ClassVar[type[Any]] = Dinov2PreTrainedModel
    base_model_prefix = "dinov2"


class MCTFDinov2WithRegistersModel(MCTFEncoderMixin, Dinov2WithRegistersModel):
    """DINOv2 with registers and token fusion; see :class:`MCTFDinov2Model`."""

    config: MCTFDinov2WithRegistersConfig
    config_class = MCTFDinov2WithRegistersConfig
    names = DINO
    layers_path = "encoder.layer"


class MCTFDinov2WithRegistersForImageClassification(
    MCTFEncoderClassifierMixin, Dinov2WithRegistersForImageClassification
):
    """DINOv2 with registers and a head; see :class:`MCTFDinov2ForImageClassification`."""

    config: MCTFDinov2WithRegistersConfig
    config_class = MCTFDinov2WithRegistersConfig
    backbone_class: ClassVar[type[Any]] = MCTFDinov2WithRegistersModel
    pretrained_class: ClassVar[type[Any]] = Dinov2WithRegistersPreTrainedModel
    base_model_prefix = "dinov2_with_registers"
