"""Base classes for the encoders that are transformers encoders with fused layers.

The module of each family defines its layer names, its embedding of images and its pooled output.
Shapes: ``b`` images, ``n`` tokens before and ``m`` tokens after all fusion, ``d`` channels.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .anatomy import LayerNames
from .fused_encoder import FusedLayerList, Rotary, fuse_layers
from .modeling_mctf import (
    MCTFImageClassifierOutput,
    MCTFModelOutput,
    MCTFPreTrainedMixin,
    check_options,
    check_reads_class_token,
    mean_patches,
    num_read,
)
from .records import replace
from .reducers import build_reducer
from .schedule import KeepRate, TokensFused


class MCTFEncoderMixin(MCTFPreTrainedMixin):
    """An encoder whose layers fuse tokens; mixed in before a transformers model class.

    Attributes:
        names: names of the parts of a layer.
        layers_path: path of the submodule that is the list of layers.
        layer_arguments: positional arguments of a transformers layer after the hidden states.
    """

    names: ClassVar[LayerNames]
    layers_path: ClassVar[str]
    layer_arguments: ClassVar[tuple[Any, ...]] = ()
    _auto_class = "AutoModel"

    def __init__(self, config: Any):
        config.validate()  # from_pretrained sets fields one by one and does not check them together
        super().__init__(config)  # type: ignore[call-arg]
        fuse_layers(self.fused_layers, self.names, config)

    @property
    def fused_layers(self) -> FusedLayerList:
        """The list of layers."""
        return self.get_submodule(self.layers_path)  # type: ignore[attr-defined]

    def embed(self, pixel_values: Tensor, **options: Any) -> dict[str, Any]:
        """Embed images; the result replaces ``pixel_values`` in the arguments of a call.

        Several passes over the same images can share the result.

        Args:
            pixel_values: (b, channels, height, width).
            options: keyword arguments of the embeddings.
        """
        embedded = self.embeddings(pixel_values.to(self.dtype), **options)  # type: ignore[attr-defined]
        return {"inputs_embeds": embedded}

    def final_norm(self, hidden_states: Tensor) -> Tensor:
        """Apply the final norm: (b, m, d) -> (b, m, d)."""
        return self.layernorm(hidden_states)  # type: ignore[attr-defined]

    def pool(self, hidden_states: Tensor) -> Tensor | None:
        """The pooled output, from tokens after the final norm: (b, n, d) -> (b, d)."""
        return hidden_states[:, 0]

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        r: TokensFused | None = None,
        output_fusion: bool = False,
        inputs_embeds: Tensor | None = None,
        keep_rate: KeepRate | None = None,
        rotary: Rotary | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        num_read_tokens: int | None = None,
        **kwargs: Any,
    ) -> MCTFModelOutput:
        """Encode images.

        Args:
            pixel_values: (b, channels, height, width).
            r: tokens to fuse per layer in this call, in any form that the configuration accepts.
            output_fusion: whether to fill ``token_sizes``, ``assignment`` and ``assignments``.
            inputs_embeds, rotary: results of :meth:`embed`, instead of ``pixel_values``.
            keep_rate: fraction of the patch tokens to keep in this call, instead of ``r``, for a
                method with keep rates.
            bool_masked_pos: (b, patches), patches to replace by the mask token, if there is one.
            interpolate_pos_encoding: whether to accept images of another size than the
                configuration's, in families that do not always accept them.
            num_read_tokens: number of prefix tokens to output; the last layer computes no other
                tokens. See ``skip_unread`` of the configuration.

        Returns:
            The hidden states after the final norm, at all n positions or, with ``restore=False``,
            of the m remaining tokens; and the pooled output.

        Raises:
            ValueError: for images of another size, an ``r`` or ``keep_rate`` that is not allowed,
                an ``attention_mask``, or unless exactly one of ``pixel_values`` and
                ``inputs_embeds`` is given.
            TypeError: for an unknown argument.
        """
        if kwargs.pop("attention_mask", None) is not None:
            raise ValueError(f"attention_mask is not allowed in {type(self).__name__}")
        check_options(self, kwargs)
        if (pixel_values is None) == (inputs_embeds is None):
            raise ValueError("give either pixel_values or inputs_embeds")
        config = self.config
        if inputs_embeds is None:
            assert pixel_values is not None
            options: dict[str, Any] = {"bool_masked_pos": bool_masked_pos}
            if not config.any_size:
                options["interpolate_pos_encoding"] = interpolate_pos_encoding
            given = {name: value for name, value in options.items() if value is not None}
            embedded = self.embed(pixel_values, **given)
            inputs_embeds, rotary = embedded["inputs_embeds"], embedded.get("rotary")
        assert inputs_embeds is not None
        # Asked for in this call or always.
        kwargs.setdefault("output_attentions", getattr(config, "output_attentions", False))
        reducer = build_reducer(config)
        drops = reducer is not None and reducer.drops_tokens
        tokens = self.fused_layers.encode(
            inputs_embeds,
            *self.layer_arguments,
            settings=config,
            r=r,
            keep_rate=keep_rate,
            track=drops,
            history=output_fusion,
            rotary=rotary,
            keeps_all=not drops,
            num_read=num_read(self, num_read_tokens),
            **kwargs,
        )
        tokens = replace(tokens, hidden_states=self.final_norm(tokens.hidden_states))
        whole = tokens.hidden_states if drops else tokens.restored()
        return MCTFModelOutput(
            last_hidden_state=whole if config.restore else tokens.hidden_states,
            pooler_output=self.pool(whole),
            token_sizes=tokens.sizes if output_fusion else None,
            assignment=tokens.assignment() if output_fusion else None,
            assignments=tokens.assignments,
        )


class MCTFEncoderClassifierMixin(MCTFPreTrainedMixin):
    """An encoder with a linear head on its tokens; mixed in before a transformers class.

    Attributes:
        backbone_class: class of the encoder.
        pretrained_class: transformers base class of all models of the family.
        reads_class_token: whether the head reads the class token.
        reads_patches: whether the head reads the mean of the patch tokens, weighted by size.
    """

    backbone_class: ClassVar[type[Any]]
    pretrained_class: ClassVar[type[Any]]
    base_model_prefix: ClassVar[str]
    reads_class_token: ClassVar[bool] = True
    reads_patches: ClassVar[bool] = True
    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: Any):
        config.validate()
        # Not the __init__ of the transformers model, which would build another backbone.
        self.pretrained_class.__init__(self, config)
        if self.reads_patches:
            check_reads_class_token(self)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.backbone_class(config))
        width = config.hidden_size * (self.reads_class_token + self.reads_patches)
        self.classifier = (
            nn.Linear(width, config.num_labels) if config.num_labels else nn.Identity()
        )
        self.post_init()  # type: ignore[attr-defined]

    def embed(self, pixel_values: Tensor, **options: Any) -> dict[str, Any]:
        """See :meth:`MCTFEncoderMixin.embed`."""
        return self.base_model.embed(pixel_values, **options)  # type: ignore[attr-defined]

    def _read(self, hidden_states: Tensor, token_sizes: Tensor | None) -> Tensor:
        """Input of the head, from tokens (b, m, d) and sizes, or from restored tokens (b, n, d)."""
        mean = mean_patches(hidden_states, token_sizes, self.config.num_prefix_tokens)
        parts = [hidden_states[:, 0]] if self.reads_class_token else []
        return torch.cat([*parts, mean], 1) if parts else mean

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_fusion: bool = False,
        output_features: bool = False,
        **kwargs: Any,
    ) -> MCTFImageClassifierOutput:
        """Classify images; for other arguments, see :meth:`MCTFEncoderMixin.forward`.

        Args:
            labels: (b,), for the cross-entropy loss (mean squared error if there is one label).
            output_features: whether to fill ``features``, the input of the head.
        """
        outputs = self.base_model(  # type: ignore[attr-defined]
            pixel_values,
            output_fusion=output_fusion or not self.config.restore,
            return_dict=True,
            **kwargs,
        )
        sizes = None if self.config.restore else outputs.token_sizes
        features = self._read(outputs.last_hidden_state, sizes)
        logits = self.classifier(features)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config)  # type: ignore[attr-defined]
        return MCTFImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_sizes=outputs.token_sizes if output_fusion else None,
            assignment=outputs.assignment if output_fusion else None,
            assignments=outputs.assignments if output_fusion else None,
            features=features if output_features or output_fusion else None,
        )
