"""SigLIP's vision encoder (arXiv 2303.15343, SigLIP 2: arXiv 2502.14786) with token fusion."""

from .dependencies import OLDEST as OLDEST  # first, to report releases that are too old

# isort: split

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipPreTrainedModel, SiglipVisionModel

from .anatomy import CLIP
from .configuration_mctf import EncoderConfigMixin
from .modeling_mctf import take_over_names
from .modeling_mctf_encoder import MCTFEncoderClassifierMixin, MCTFEncoderMixin

take_over_names(("MCTFSiglipVisionModel",), "SiglipVisionModel")

# Weights of a whole SigLIP that are not in its vision encoder.
_OF_TEXT = [r"^text_model\.", r"^logit_scale$", r"^logit_bias$"]


@strict
class MCTFSiglipVisionConfig(EncoderConfigMixin, SiglipVisionConfig):
    """Configuration of a SigLIP vision encoder that fuses tokens.

    All fields of :class:`transformers.SiglipVisionConfig` and of
    :class:`~.configuration_mctf.FusionConfigMixin`.
    """

    model_type = "mctf_siglip_vision"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "modeling_mctf_siglip.MCTFSiglipVisionConfig",
        "AutoModel": "modeling_mctf_siglip.MCTFSiglipVisionModel",
        "AutoModelForImageClassification": (
            "modeling_mctf_siglip.MCTFSiglipVisionForImageClassification"
        ),
    }
    plain_types: ClassVar[dict[str, str]] = {"siglip_vision_model": "SigLIP's vision encoder"}
    plain_parts: ClassVar[dict[str, str]] = {"siglip": "vision_config"}
    class_token: ClassVar[bool] = False

    @property
    def num_prefix_tokens(self) -> int:
        """Zero: all tokens are patch tokens."""
        return 0


class MCTFSiglipVisionModel(MCTFEncoderMixin, SiglipVisionModel):
    """SigLIP's vision encoder with token fusion; its pooling head reads the restored tokens.

    See :class:`~.modeling_mctf_encoder.MCTFEncoderMixin`.
    """

    config: MCTFSiglipVisionConfig
    config_class = MCTFSiglipVisionConfig
    names = CLIP
    layers_path = "encoder.layers"
    layer_arguments: ClassVar[tuple[Any, ...]] = (None,)
    _keys_to_ignore_on_load_unexpected: ClassVar = [*_OF_TEXT, r"^classifier\."]

    def final_norm(self, hidden_states: Tensor) -> Tensor:
        return self.post_layernorm(hidden_states)

    def pool(self, hidden_states: Tensor) -> Tensor | None:
        return self.head(hidden_states) if self.use_head else None


class MCTFSiglipVisionForImageClassification(MCTFEncoderClassifierMixin, SiglipPreTrainedModel):
    """SigLIP's vision encoder with token fusion and a linear head on the mean of the patches."""

    config: MCTFSiglipVisionConfig
    config_class = MCTFSiglipVisionConfig
    main_input_name = "pixel_values"
    backbone_class: ClassVar[type[Any]] = MCTFSiglipVisionModel
    pretrained_class: ClassVar[type[Any]] = SiglipPreTrainedModel
    base_model_prefix = "vision_model"
    reads_class_token: ClassVar[bool] = False
    _keys_to_ignore_on_load_unexpected: ClassVar = _OF_TEXT
