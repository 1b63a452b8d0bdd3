"""What the encoders share that are those of transformers with other layers.

A family's own file names its layers, how it embeds images, and what is read from its tokens.
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
    num_read,
)
from .reducers import build_reducer
from .schedule import KeepRate, TokensFused


class MCTFEncoderMixin(MCTFPreTrainedMixin):
    """An encoder whose layers fuse tokens; before a model class of transformers.

    Attributes:
        names: of the parts of a layer.
        layers_path: where the list of layers is.
        layer_arguments: positional ones that a layer of transformers wants after hidden states.
    """

    names: ClassVar[LayerNames]
    layers_path: ClassVar[str]
    layer_arguments: ClassVar[tuple[Any, ...]] = ()
    _auto_class = "AutoModel"

    def __init__(self, config: Any):
        config.validate()  # from_pretrained sets what it was given one by one, unaware of the rest
        super().__init__(config)  # type: ignore[call-arg]
        fuse_layers(self.fused_layers, self.names, config)

    @property
    def fused_layers(self) -> FusedLayerList:
        """The list of layers."""
        return self.get_submodule(self.layers_path)  # type: ignore[attr-defined]

    def embed(self, pixel_values: Tensor, **options: Any) -> dict[str, Any]:
        """What images are to the layers, as arguments of a call instead of ``pixel_values``.

        Several passes over the same images can share them.

        Args:
            pixel_values: (b, channels, height, width).
            options: of the embeddings.
        """
        embedded = self.embeddings(pixel_values.to(self.dtype), **options)  # type: ignore[attr-defined]
        return {"inputs_embeds": embedded}

    def final_norm(self, hidden_states: Tensor) -> Tensor:
        """The last norm: (b, m, d) -> (b, m, d)."""
        return self.layernorm(hidden_states)  # type: ignore[attr-defined]

    def pool(self, hidden_states: Tensor) -> Tensor | None:
        """What stands for an image, (b, d), of its tokens after the last norm, (b, n, d)."""
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
            r: tokens to fuse per layer in this call, in any form that the configuration takes.
            output_fusion: fill ``token_sizes``, ``assignment`` and ``assignments``.
            inputs_embeds, rotary: what :meth:`embed` gives, instead of ``pixel_values``.
            keep_rate: part of the patch tokens to keep in this call, instead of ``r``, with a
                method that goes by it.
            bool_masked_pos: (b, patches), patches to replace by the mask token, where the family
                has one.
            interpolate_pos_encoding: allow images of another size than the configuration's, in
                families that refuse them otherwise; the others always do.
            num_read_tokens: hand out the first so many tokens alone, which are prefix tokens, and
                compute no others in the last layer; see ``skip_unread`` of the configuration.

        Returns:
            Hidden states after the last norm, at all n places or, with ``restore=False``, of the m
            tokens that are left; and what the family reads from them.

        Raises:
            ValueError: for images of another size, an ``r`` or ``keep_rate`` that is not allowed,
                an ``attention_mask``, or unless exactly one of ``pixel_values`` and
                ``inputs_embeds`` is given.
            TypeError: for an argument that is none of these and none of all models'.
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
        for shown in ("output_attentions", "output_hidden_states"):  # asked for here or always
            kwargs.setdefault(shown, getattr(config, shown, False))
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
        tokens = tokens._replace(hidden_states=self.final_norm(tokens.hidden_states))
        whole = tokens.hidden_states if drops else tokens.restored()
        return MCTFModelOutput(
            last_hidden_state=whole if config.restore else tokens.hidden_states,
            pooler_output=self.pool(whole),
            token_sizes=tokens.sizes if output_fusion else None,
            assignment=tokens.assignment() if output_fusion else None,
            assignments=tokens.assignments,
        )


class MCTFEncoderClassifierMixin(MCTFPreTrainedMixin):
    """A linear head on what is read from an encoder's tokens; before a class of transformers.

    Attributes:
        backbone_class: the encoder.
        pretrained_class: what all models of the family in transformers derive from.
        reads_class_token: whether the head reads the class token.
        reads_patches: whether it sees the mean of the patches, after that. Each token counts as
            often as it has patches.
    """

    backbone_class: ClassVar[type[Any]]
    pretrained_class: ClassVar[type[Any]]
    base_model_prefix: ClassVar[str]
    reads_class_token: ClassVar[bool] = True
    reads_patches: ClassVar[bool] = True
    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: Any):
        config.validate()
        # Not the model's of transformers, which would build its own backbone.
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
        """What the head reads of tokens, (b, m, d), or of all places, (b, n, d), without sizes."""
        first = self.config.num_prefix_tokens
        patches = hidden_states[:, first:]
        if token_sizes is None:
            mean = patches.mean(1)
        else:
            weights = token_sizes[:, first:, None].to(patches.dtype)
            mean = (patches * weights).sum(1) / weights.sum(1)
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
        """Classify images; arguments as of :meth:`MCTFEncoderMixin.forward`.

        Args:
            labels: (b,), for the cross-entropy loss (mean squared error if there is one label).
            output_features: fill ``features``, which is what the head reads.
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
