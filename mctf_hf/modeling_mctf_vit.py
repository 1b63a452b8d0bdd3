"""Vision Transformers (ViT, DeiT) that fuse tokens as they go.

The classes subclass those of ``transformers.models.vit``; weights and their names are the same.
What is new is in the layer: attend, fuse if this layer fuses, MLP. Shapes: ``b`` images, ``n``
tokens before and ``m`` after a layer's fusion, ``d`` channels, ``h`` heads.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTEmbeddings,
    ViTForImageClassification,
    ViTLayer,
    ViTModel,
    ViTPooler,
    ViTPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mctf import MCTFViTConfig, TokensFused
from .fusion import Reduction, compose, fuse, fuse_attention, fuse_sizes, unfuse
from .reducers import Stage, build_reducer

# Old checkpoints name their weights differently; transformers renames them by class name.
register_checkpoint_conversion_mapping(
    "MCTFViTModel", get_checkpoint_conversion_mapping("ViTModel"), overwrite=True
)


@dataclass
class MCTFModelOutput(BaseModelOutputWithPooling):
    """Output of a backbone; the last two fields are filled by ``output_fusion=True``.

    Attributes:
        token_sizes: (b, m), how many of the embedded tokens each final token stands for.
        assignment: (b, n) int64, index of the final token that each embedded token became part of.
    """

    token_sizes: Tensor | None = None
    assignment: Tensor | None = None


@dataclass
class MCTFImageClassifierOutput(ImageClassifierOutput):
    """Output of a classifier; the last three fields are filled by ``output_fusion=True``.

    Attributes:
        token_sizes: (b, m), how many of the embedded tokens each final token stands for.
        assignment: (b, n) int64, index of the final token that each embedded token became part of.
        class_token: (b, d), the class token after the final LayerNorm, which the head sees.
    """

    token_sizes: Tensor | None = None
    assignment: Tensor | None = None
    class_token: Tensor | None = None


class FusionAttentionMixin:
    """Self-attention whose map can be had before the tokens it will be applied to.

    Goes before any attention class of transformers that has ``q_proj``, ``k_proj``, ``v_proj``,
    ``o_proj`` or ``out_proj``, ``scaling``, ``num_attention_heads`` and ``attention_dropout``.
    """

    if TYPE_CHECKING:
        q_proj: nn.Linear
        k_proj: nn.Linear
        v_proj: nn.Linear
        o_proj: nn.Linear
        out_proj: nn.Linear
        scaling: float
        num_attention_heads: int
        attention_dropout: float
        training: bool

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)  # [b, h, n, d / h]

    def attention_map(self, hidden_states: Tensor, attention_bias: Tensor | None) -> Tensor:
        """Softmax attention map: (b, n, d) and a bias (b, 1, 1 or n, n) on scores -> (b, h, n, n).

        A boolean bias is a mask: it is true where there is to be attention.
        """
        query = self._heads(self.q_proj(hidden_states)) * self.scaling
        key = self._heads(self.k_proj(hidden_states))
        scores = query @ key.mT
        if attention_bias is not None and attention_bias.dtype == torch.bool:
            scores = scores.masked_fill(~attention_bias, -torch.inf)
        elif attention_bias is not None:
            scores = scores + attention_bias
        precision = torch.promote_types(scores.dtype, torch.float32)
        return scores.softmax(-1, dtype=precision).to(scores.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        attention_map: Tensor | None = None,
        reduction: Reduction | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend among ``hidden_states``, (b, n, d), by the backend that the model is set to.

        With an ``attention_map``, (b, h, n, n), that map is applied instead. If a ``reduction``
        has turned the n tokens that it is about into the m tokens of ``hidden_states``, the map is
        reduced too, to ``R A C`` with ``C`` summing columns and ``R`` pooling rows (MCTF, section
        3.3). As ``(R A C) V = R (A (C V))`` and ``C V`` only repeats the rows of ``V`` at the old
        positions, no map is fused but for maximum pooling, which is not linear.

        Returns:
            The attention output (b, m, d), and the map (b, h, m, m) if ``output_attentions``.
        """
        if attention_map is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        value = self.v_proj(hidden_states)  # [b, m, d]
        if reduction is None:
            output = self._attend(attention_map, value)
        elif reduction.weights is None:
            attention_map = fuse_attention(attention_map, reduction)
            output = self._attend(attention_map, value)
        else:
            output = fuse(self._attend(attention_map, unfuse(value, reduction)), reduction)
            if kwargs.get("output_attentions"):
                attention_map = fuse_attention(attention_map, reduction)
        project = self.o_proj if hasattr(self, "o_proj") else self.out_proj
        return project(output), attention_map

    def _attend(self, attention_map: Tensor, value: Tensor) -> Tensor:
        attention_map = F.dropout(attention_map, self.attention_dropout, self.training)
        return (attention_map @ self._heads(value)).transpose(1, 2).flatten(2)


class MCTFViTAttention(FusionAttentionMixin, ViTAttention):
    """ViT's self-attention, with or without fusion."""


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zero whole images' branches with probability ``rate``, scaling up the rest: (b, …) -> (b, …).

    Stochastic depth, arXiv 1603.09382.
    """
    if not training or not rate:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - rate)
    return x * keep / (1 - rate)


class MCTFViTLayer(ViTLayer):
    """ViT's layer: attention and MLP, with a fusion of tokens where the reducer wants it."""

    attention: MCTFViTAttention

    def __init__(self, config: MCTFViTConfig, layer_idx: int = 0):
        super().__init__(config)
        self.attention = MCTFViTAttention(config)
        self.reducer = build_reducer(config)
        self.num_prefix_tokens = config.num_prefix_tokens
        self.proportional_attention = config.proportional_attention
        self.drop_path_rate = (
            config.drop_path_rate * layer_idx / max(1, config.num_hidden_layers - 1)
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        token_sizes: Tensor | None = None,
        r: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the layer on ``hidden_states``, (b, n, d), and fuse ``r`` of its n tokens.

        Args:
            token_sizes: (b, n), how many patches each token stands for; ``None`` if one each.

        Returns:
            The hidden states (b, m, d), the sizes (b, m), still ``None`` where nothing has been
            fused so far, and the assignment (b, n), ``None`` where this layer fuses nothing.
        """
        stage = self.reducer.stage if self.reducer is not None and r else None
        reduction = assignment = attention_map = None

        normed = self.layernorm_before(hidden_states)
        bias = self._size_bias(token_sizes, attention_mask, normed.dtype)
        if stage is not None or self._shows_attention(kwargs):
            with torch.set_grad_enabled(torch.is_grad_enabled() and stage is not Stage.RECOMPUTE):
                attention_map = self.attention.attention_map(normed, bias)
        if stage in (Stage.REUSE, Stage.RECOMPUTE):
            hidden_states, token_sizes, reduction = self._reduce(
                hidden_states, attention_map, token_sizes, r
            )
            assignment = reduction.assignment
            normed = self.layernorm_before(hidden_states)
        if stage is Stage.RECOMPUTE:
            bias = self._size_bias(token_sizes, None, normed.dtype)
            reduction = attention_map = None
            if self._shows_attention(kwargs):
                attention_map = self.attention.attention_map(normed, bias)

        output, _ = self.attention(
            normed, bias, attention_map=attention_map, reduction=reduction, **kwargs
        )
        hidden_states = self._add(hidden_states, output)
        output = self.mlp(self.layernorm_after(hidden_states))
        hidden_states = self._add(hidden_states, output)

        if stage is Stage.AFTER_MLP:
            hidden_states, token_sizes, reduction = self._reduce(
                hidden_states, attention_map, token_sizes, r
            )
            assignment = reduction.assignment
        return hidden_states, token_sizes, assignment

    def _shows_attention(self, kwargs: dict[str, Any]) -> bool:
        """Whether the map is asked for, which the fast attention kernels do not give."""
        return self.reducer is not None and bool(kwargs.get("output_attentions"))

    def _add(self, residual: Tensor, branch: Tensor) -> Tensor:
        return residual + drop_path(self.dropout(branch), self.drop_path_rate, self.training)

    def _size_bias(
        self, token_sizes: Tensor | None, attention_mask: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """Proportional attention: the logarithm of each key's size, (b, 1, 1, n)."""
        if token_sizes is None or not self.proportional_attention:
            return attention_mask
        return token_sizes.log().to(dtype)[:, None, None, :]

    def _reduce(
        self,
        hidden_states: Tensor,
        attention_map: Tensor | None,
        token_sizes: Tensor | None,
        r: int,
    ) -> tuple[Tensor, Tensor, Reduction]:
        assert self.reducer is not None and attention_map is not None
        reduction = self.reducer(
            hidden_states, attention_map, token_sizes, r=r, num_prefix_tokens=self.num_prefix_tokens
        )
        if token_sizes is None:
            precision = torch.promote_types(hidden_states.dtype, torch.float32)
            token_sizes = hidden_states.new_ones(hidden_states.shape[:2], dtype=precision)
        return fuse(hidden_states, reduction), fuse_sizes(token_sizes, reduction), reduction


class MCTFPreTrainedMixin:
    """What all models of this library share; goes before a model class of transformers."""

    config: MCTFViTConfig
    config_class = MCTFViTConfig
    _no_split_modules: ClassVar = ["ViTEmbeddings", "MCTFViTLayer"]
    # Proportional attention adds a number to the scores, which these kernels cannot.
    _supports_flash_attn = False
    _supports_flex_attn = False

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save as every transformers model does, along with the code that a stranger needs.

        ``auto_map`` names all classes of the family, so that what one of them saved loads as any
        of them with ``trust_remote_code=True``.
        """
        self.config.auto_map = dict(self.config.auto_classes)
        super().save_pretrained(save_directory, **kwargs)


class MCTFViTModel(MCTFPreTrainedMixin, ViTModel):
    """ViT encoder with token fusion: hidden states out, the final LayerNorm applied.

    ``model(pixel_values, r=…)`` overrides the configuration's ``r`` for one call, and
    ``output_fusion=True`` tells what has become of each token.
    """

    _auto_class = "AutoModel"

    def __init__(
        self, config: MCTFViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False
    ):
        config.validate()  # from_pretrained sets what it was given one by one, unaware of the rest
        # Not ViTModel's: it would build and initialise plain layers only for them to be replaced.
        ViTPreTrainedModel.__init__(self, config)
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList(
            [MCTFViTLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        r: TokensFused | None = None,
        output_fusion: bool = False,
        **kwargs: Any,
    ) -> MCTFModelOutput:
        """Encode images.

        Args:
            pixel_values: (b, channels, height, width).
            bool_masked_pos: (b, patches), patches to replace by the mask token.
            interpolate_pos_encoding: allow images of another size than the configuration's.
            attention_mask: (b, n), only without fusion.
            r: tokens to fuse per layer in this call, in any form that the configuration takes.
            output_fusion: fill ``token_sizes`` and ``assignment``.

        Raises:
            ValueError: for images of another size, an ``r`` that is not allowed, or an
                ``attention_mask`` where tokens are fused.
        """
        embedded = self.embeddings(
            pixel_values.to(self.dtype),
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        hidden_states, token_sizes, assignment = self._encode(
            embedded, attention_mask, r, output_fusion, **kwargs
        )
        hidden_states = self.layernorm(hidden_states)
        return MCTFModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=None if self.pooler is None else self.pooler(hidden_states),
            token_sizes=token_sizes,
            assignment=assignment,
        )

    def _encode(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        r: TokensFused | None,
        output_fusion: bool,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run all layers: (b, n, d) -> (b, m, d), sizes and assignment if ``output_fusion``."""
        fused_by_layer = self.config.tokens_fused(hidden_states.shape[1], r)
        if attention_mask is not None and any(fused_by_layer):
            raise ValueError(
                "attention_mask is not allowed where tokens are fused: leave it out, or set r=0 "
                "or reduction='none'"
            )
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        token_sizes = assignment = None
        if output_fusion:
            batch, num_tokens = hidden_states.shape[:2]
            assignment = torch.arange(num_tokens, device=hidden_states.device).repeat(batch, 1)
        for layer, fused in zip(self.layers, fused_by_layer, strict=True):
            hidden_states, token_sizes, reassigned = layer(
                hidden_states, mask, token_sizes, fused, **kwargs
            )
            if assignment is not None and reassigned is not None:
                assignment = compose(assignment, reassigned)
        if assignment is None:
            return hidden_states, None, None
        if token_sizes is None:
            token_sizes = torch.ones_like(assignment, dtype=torch.float32)
        return hidden_states, token_sizes, assignment


class MCTFViTForImageClassification(MCTFPreTrainedMixin, ViTForImageClassification):
    """ViT with token fusion and a linear head on the class token."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: MCTFViTConfig):
        config.validate()
        ViTPreTrainedModel.__init__(self, config)  # as in MCTFViTModel
        self.num_labels = config.num_labels
        self.vit = MCTFViTModel(config, add_pooling_layer=False)
        self.classifier = (
            nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        r: TokensFused | None = None,
        output_fusion: bool = False,
        **kwargs: Any,
    ) -> MCTFImageClassifierOutput:
        """Classify images; arguments as of :meth:`MCTFViTModel.forward`.

        Args:
            labels: (b,), for the cross-entropy loss (mean squared error if there is one label).
        """
        outputs = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            r=r,
            output_fusion=output_fusion,
            **kwargs,
        )
        class_token = outputs.last_hidden_state[:, 0]
        logits = self.classifier(class_token)
        return MCTFImageClassifierOutput(
            loss=None
            if labels is None
            else self.loss_function(labels, logits, self.config, **kwargs),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_sizes=outputs.token_sizes,
            assignment=outputs.assignment,
            class_token=class_token if output_fusion else None,
        )
