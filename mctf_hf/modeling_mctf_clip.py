"""CLIP's vision encoder (arXiv 2103.00020) with token fusion, with and without projection."""

from .dependencies import OLDEST as OLDEST  # first, to report releases that are too old

# isort: split

from dataclasses import dataclass
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import (
    CLIPPreTrainedModel,
    CLIPVisionModel,
    CLIPVisionModelOutput,
    CLIPVisionModelWithProjection,
)
from transformers.utils.generic import can_return_tuple

from .anatomy import CLIP
from .configuration_mctf import EncoderConfigMixin
from .modeling_mctf import MCTFPreTrainedMixin, take_over_names
from .modeling_mctf_encoder import MCTFEncoderClassifierMixin, MCTFEncoderMixin

take_over_names(("MCTFCLIPVisionModel",), "CLIPVisionModel")

# Weights of a whole CLIP that are not in its vision encoder.
_OF_TEXT = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]


@strict
class MCTFCLIPVisionConfig(EncoderConfigMixin, CLIPVisionConfig):
    """Configuration of a CLIP vision encoder that fuses tokens.

    All fields of :class:`transformers.CLIPVisionConfig` and of
    :class:`~.configuration_mctf.FusionConfigMixin`.
    """

    model_type = "mctf_clip_vision"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "modeling_mctf_clip.MCTFCLIPVisionConfig",
        "AutoModel": "modeling_mctf_clip.MCTFCLIPVisionModel",
        "AutoModelForImageClassification": (
            "modeling_mctf_clip.MCTFCLIPVisionForImageClassification"
        ),
    }
    plain_types: ClassVar[dict[str, str]] = {"clip_vision_model": "CLIP's vision encoder"}
    plain_parts: ClassVar[dict[str, str]] = {"clip": "vision_config"}
    class_token: ClassVar[bool] = True

    @property
    def num_prefix_tokens(self) -> int:
        """One: the class token, before the patches."""
        return 1


class MCTFCLIPVisionModel(MCTFEncoderMixin, CLIPVisionModel):
    """CLIP's vision encoder with token fusion.

    See :class:`~.modeling_mctf_encoder.MCTFEncoderMixin`. As in transformers, the final norm is
    applied only to the pooled output.
    """

    config: MCTFCLIPVisionConfig
    config_class = MCTFCLIPVisionConfig
    names = CLIP
    layers_path = "encoder.layers"
    layer_arguments: ClassVar[tuple[Any, ...]] = (None,)
    _keys_to_ignore_on_load_unexpected: ClassVar = [
        *_OF_TEXT,
        r"^visual_projection\.",
        "classifier",
    ]

    def embed(self, pixel_values: Tensor, **options: Any) -> dict[str, Any]:
        embedded = self.embeddings(pixel_values, **options)
        return {"inputs_embeds": self.pre_layrnorm(embedded)}

    def final_norm(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def pool(self, hidden_states: Tensor) -> Tensor:
        return self.post_layernorm(hidden_states[:, 0])


@dataclass
class MCTFCLIPVisionModelOutput(CLIPVisionModelOutput):
    """Output with image embeddings; the last three fields are filled by ``output_fusion=True``.

    Attributes:
        token_sizes: (b, m), number of embedded tokens in each final token.
        assignment: (b, n) int64, index of the final token that each embedded token is part of, -1
            for dropped tokens.
        assignments: one (b, n) assignment per layer, to the output tokens of that layer.
    """

    token_sizes: Tensor | None = None
    assignment: Tensor | None = None
    assignments: tuple[Tensor, ...] | None = None


class MCTFCLIPVisionModelWithProjection(MCTFPreTrainedMixin, CLIPVisionModelWithProjection):
    """CLIP's vision encoder with token fusion, and its projection to the text space."""

    config: MCTFCLIPVisionConfig
    config_class = MCTFCLIPVisionConfig
    _keys_to_ignore_on_load_unexpected: ClassVar = [*_OF_TEXT, r"^classifier\."]

    def __init__(self, config: MCTFCLIPVisionConfig):
        config.validate()
        # Not the __init__ of the transformers model, which would build another encoder.
        CLIPPreTrainedModel.__init__(self, config)
        self.vision_model = MCTFCLIPVisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, **kwargs: Any
    ) -> MCTFCLIPVisionModelOutput:
        """Embed images; see :meth:`~.modeling_mctf_encoder.MCTFEncoderMixin.forward`."""
        outputs = self.vision_model(pixel_values, return_dict=True, **kwargs)
        return MCTFCLIPVisionModelOutput(
            image_embeds=self.visual_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_sizes=outputs.token_sizes,
            assignment=outputs.assignment,
            assignments=outputs.assignments,
        )


class MCTFCLIPVisionForImageClassification(MCTFEncoderClassifierMixin, CLIPPreTrainedModel):
    """CLIP's vision encoder with token fusion and a linear head on the mean of the patches."""

    config: MCTFCLIPVisionConfig
    config_class = MCTFCLIPVisionConfig
    main_input_name = "pixel_values"
    backbone_class: ClassVar[type[Any]] = MCTFCLIPVisionModel
    pretrained_class: ClassVar[type[Any]] = CLIPPreTrainedModel
    base_model_prefix = "vision_model"
    reads_class_token: ClassVar[bool] = False
    _keys_to_ignore_on_load_unexpected: ClassVar = [*_OF_TEXT, r"^visual_projection\."]
