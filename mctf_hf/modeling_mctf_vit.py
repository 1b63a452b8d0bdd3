"""Vision Transformers (ViT, DeiT) with token fusion.

The classes subclass those of ``transformers.models.vit`` and have the same weights and names. The
layers fuse tokens (:mod:`.fused_layer`, :mod:`.fused_encoder`). Shapes: ``b`` images, ``n`` tokens
before and ``m`` tokens after all fusion, ``d`` channels.
"""

from .dependencies import OLDEST as OLDEST  # first, to report releases that are too old

# isort: split

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any, ClassVar, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import ViTConfig
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.vit.modeling_vit import (
    ViTEmbeddings,
    ViTForImageClassification,
    ViTLayer,
    ViTModel,
    ViTPooler,
    ViTPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .anatomy import VIT, LayerNames
from .configuration_mctf import EncoderConfigMixin, as_pair, number
from .fused_encoder import FusedLayerList, fuse_layers, goes_in_slices
from .fused_layer import FusedLayer
from .modeling_mctf import (
    MCTFImageClassifierOutput,
    MCTFModelOutput,
    MCTFPreTrainedMixin,
    check_options,
    mean_patches,
    num_read,
    take_over_names,
)
from .records import replace
from .schedule import KeepRate, TokensFused

# Largest feature map that a front end computes at once on a CPU, in bytes.
FRONT_END_BYTES = 8 * 2**20

# In 5.10, the classifier needs a mapping of its own to load a backbone's checkpoint.
take_over_names(("MCTFViTModel", "MCTFViTForImageClassification"), "ViTModel")


# Weight names of transformers' DeiT, and those of ViT.
_DEIT_NAMES = {r"^deit\.": "vit.", r"^cls_classifier\.": "classifier."}


def _check_multi_scale(value: list[int] | None) -> None:
    if value is not None and (
        not value or len(set(value)) != len(value) or any(scale < 2 for scale in value)
    ):
        raise ValueError(
            f"multi_scale={value!r} is not allowed: it must list different whole numbers of at "
            "least 2, how many patches high and wide the coarser ones are"
        )


@strict
class MCTFViTConfig(EncoderConfigMixin, ViTConfig):
    """Configuration of a Vision Transformer (ViT, DeiT) that fuses tokens.

    All fields of :class:`transformers.ViTConfig` and of
    :class:`~.configuration_mctf.FusionConfigMixin`, and:

    Args:
        restore: as in the mixin, but off by default: the model outputs the remaining tokens.
        class_token: whether there is a class token, which the head reads. Without it the head reads
            the mean of the patch tokens, weighted by their sizes.
        distillation_token: whether there is a second prefix token, with its own position embedding
            (DeiT, arXiv 2012.12877, section 5).
        distillation_head: whether a second head reads that token; the logits are averaged.
        num_register_tokens: number of prefix tokens without position embedding, which no head reads
            (Vision Transformers Need Registers, arXiv 2309.16588).
        drop_path_rate: probability of skipping a residual branch in training, rising linearly
            from 0 in the first layer to this in the last (stochastic depth, arXiv 1603.09382).
        multi_scale: sizes of coarse patches, in patches. Each one's embedding is added to the
            patches that it covers (arXiv 2306.04897). It changes nothing before it is trained.
    """

    model_type = "mctf_vit"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "modeling_mctf_vit.MCTFViTConfig",
        "AutoModel": "modeling_mctf_vit.MCTFViTModel",
        "AutoModelForImageClassification": "modeling_mctf_vit.MCTFViTForImageClassification",
    }
    plain_types: ClassVar[dict[str, str]] = {
        "vit": "ViT, DeiT without distillation token",
        "deit": "DeiT with distillation token",
    }
    further_settings: ClassVar = ("drop_path_rate", "multi_scale")
    attention_scale: ClassVar[str] = "head_dim"
    skip_lambda: ClassVar[float | int] = 1

    restore: bool = False
    class_token: bool = True
    distillation_token: bool = False
    distillation_head: bool = False
    num_register_tokens: int = field(default=0, metadata=number("num_register_tokens", 0))
    drop_path_rate: float | int = field(
        default=0.0, metadata=number("drop_path_rate", 0, 1, below=True)
    )
    multi_scale: list[int] | None = field(default=None, metadata={"validator": _check_multi_scale})

    @classmethod
    def of_plain(cls, model_type: str, settings: dict[str, Any]) -> dict[str, Any]:
        if model_type == "deit":
            settings["distillation_token"] = True
            architectures = settings.get("architectures") or []
            settings["distillation_head"] = any("WithTeacher" in name for name in architectures)
        return settings

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class, distillation and register tokens, which come before the patches."""
        return self.class_token + self.distillation_token + self.num_register_tokens

    def validate_distillation(self) -> None:
        """Check that a distillation head has its token, and that token a class token."""
        if self.distillation_token and not self.class_token:
            raise ValueError(
                f"distillation_token={self.distillation_token!r} is not allowed without "
                "class_token=True, which comes before it"
            )
        if self.distillation_head and not self.distillation_token:
            raise ValueError(
                f"distillation_head={self.distillation_head!r} is not allowed without "
                "distillation_token=True, which it reads"
            )

    def validate_patches(self) -> None:
        """Check that the patches divide the image."""
        sides = zip(as_pair(self.image_size), as_pair(self.patch_size), strict=True)
        if any(image % patch for image, patch in sides):
            raise ValueError(
                f"image_size={self.image_size!r} is not allowed: it is no multiple of "
                f"patch_size={self.patch_size!r}"
            )


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Set each image's branch to 0 with probability ``rate``, and scale up the others.

    (b, …) -> (b, …). Stochastic depth, arXiv 1603.09382.
    """
    if not rate:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - rate)
    return x * keep / (1 - rate)


class MCTFViTLayer(FusedLayer, ViTLayer):
    """ViT's layer with stochastic depth and a divisor of the residual branches."""

    names: ClassVar[LayerNames] = VIT
    runs_as_host: ClassVar[bool] = False

    def __init__(self, config: MCTFViTConfig, layer_idx: int = 0):
        super().__init__(config)
        if config.attention_scale == "hidden_size":
            self.attention.scaling = config.hidden_size**-0.5
        self.skip_lambda = config.skip_lambda
        self.drop_path_rate = (
            config.drop_path_rate * layer_idx / max(1, config.num_hidden_layers - 1)
        )

    def add(self, residual: Tensor, branch: Tensor, through: tuple[str, ...]) -> Tensor:
        if self.training:
            branch = drop_path(self.dropout(branch), self.drop_path_rate)
        return torch.add(residual, branch, alpha=1 / self.skip_lambda)


class ZeroLinear(nn.Linear):
    """A linear layer without bias whose weights start at zero."""

    def __init__(self, width: int):
        super().__init__(width, width, bias=False)


class CoarsePatchEmbeddings(nn.Module):
    """Embeddings of larger patches, each shared by the patches that it covers.

    Multi-scale features of token mergence (arXiv 2306.04897). Their contribution starts at zero.

    Args:
        scale: height and width of a larger patch, in patches. Larger patches that reach beyond the
            right or lower edge of the image are padded with zeros.
    """

    def __init__(self, config: MCTFViTConfig, scale: int):
        super().__init__()
        height, width = as_pair(config.patch_size)
        self.scale = scale
        self.patch_size = (height * scale, width * scale)
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, self.patch_size, stride=self.patch_size
        )
        self.fusion = ZeroLinear(config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(b, channels, height, width) -> (b, patches, d), to be added to the patches."""
        (height, width), (patch_height, patch_width) = pixel_values.shape[-2:], self.patch_size
        beyond = (0, -width % patch_width, 0, -height % patch_height)
        coarse = self.projection(nn.functional.pad(pixel_values, beyond))
        coarse = self.fusion(nn.functional.gelu(coarse.permute(0, 2, 3, 1)))
        rows, columns = height * self.scale // patch_height, width * self.scale // patch_width
        shared = coarse.repeat_interleave(self.scale, 1)[:, :rows]
        return shared.repeat_interleave(self.scale, 2)[:, :, :columns].flatten(1, 2)


class MCTFViTEmbeddings(ViTEmbeddings):
    """Embeddings of images: optional class, distillation and register tokens, then the patches.

    Registers have no position embedding. Only ``patch_embeddings`` differs between backbones. Its
    ``numbers_per_pixel`` is the size of its largest feature map, if larger than the patches.
    """

    def __init__(
        self,
        config: MCTFViTConfig,
        use_mask_token: bool = False,
        patch_embeddings: nn.Module | None = None,
    ):
        super().__init__(config, use_mask_token=use_mask_token)
        width = config.hidden_size
        self.grid = tuple(
            image // patch
            for image, patch in zip(as_pair(self.image_size), as_pair(self.patch_size), strict=True)
        )
        if patch_embeddings is not None:
            self.patch_embeddings = patch_embeddings
        self.coarse_patch_embeddings = nn.ModuleList(
            [CoarsePatchEmbeddings(config, scale) for scale in config.multi_scale or ()]
        )
        self.distillation_token = self.register_tokens = None
        if config.distillation_token:
            self.distillation_token = nn.Parameter(torch.zeros(1, 1, width))
        if not config.class_token:
            self.cls_token = None
        positions = math.prod(self.grid) + config.class_token + config.distillation_token
        if positions != self.position_embeddings.shape[1]:
            self.position_embeddings = nn.Parameter(torch.zeros(1, positions, width))
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, width))

    def init_weights(self, std: float) -> None:
        """Initialise position embeddings and prefix tokens randomly, and the mask token with 0."""
        tokens = (self.cls_token, self.distillation_token, self.register_tokens)
        for drawn in (self.position_embeddings, *tokens):
            if drawn is not None:
                init.trunc_normal_(drawn, mean=0.0, std=std)
        if self.mask_token is not None:
            init.zeros_(self.mask_token)

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> Tensor:
        """Embed images: (b, channels, height, width) -> (b, n, d).

        Raises:
            ValueError: for images of another size without ``interpolate_pos_encoding``.
        """
        tokens = self._patches(pixel_values)
        for coarse in self.coarse_patch_embeddings:
            tokens = tokens + coarse(pixel_values)
        if bool_masked_pos is not None:
            assert self.mask_token is not None
            masked = bool_masked_pos[:, :, None].type_as(tokens)
            tokens = tokens * (1 - masked) + self.mask_token * masked
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding and (height, width) != as_pair(self.image_size):
            expected = "*".join(map(str, as_pair(self.image_size)))
            raise ValueError(
                f"Input image size ({height}*{width}) doesn't match model ({expected})."
            )
        positions = self.interpolate_pos_encoding(tokens, height, width)
        prefix = [token for token in (self.cls_token, self.distillation_token) if token is not None]
        prefix = [token.expand(tokens.shape[0], -1, -1) for token in prefix]
        tokens = torch.cat([*prefix, tokens], dim=1) + positions
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(tokens.shape[0], -1, -1)
            first, patches = tokens[:, : len(prefix)], tokens[:, len(prefix) :]
            tokens = torch.cat([first, registers, patches], dim=1)
        return self.dropout(tokens)

    def _patches(self, pixel_values: Tensor) -> Tensor:
        """Embed patches, in slices of the batch if the front end's maps would exceed the cache."""
        wide = getattr(self.patch_embeddings, "numbers_per_pixel", 0)
        if not wide or self.training or not goes_in_slices(pixel_values):
            return self.patch_embeddings(pixel_values)
        height, width = pixel_values.shape[-2:]
        size = int(FRONT_END_BYTES / (height * width * wide * pixel_values.element_size()))
        parts = [self.patch_embeddings(part) for part in pixel_values.split(max(1, size))]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings of class, distillation and patch tokens: (1, positions, d).

        Args:
            embeddings: not used; the method of transformers has this argument.
        """
        if (height, width) == as_pair(self.image_size):
            return self.position_embeddings
        patch_height, patch_width = as_pair(self.patch_size)
        num_prefix = self.position_embeddings.shape[1] - math.prod(self.grid)
        prefix, patches = self.position_embeddings.split([num_prefix, math.prod(self.grid)], dim=1)
        patches = nn.functional.interpolate(
            patches.unflatten(1, self.grid).permute(0, 3, 1, 2),
            size=(height // patch_height, width // patch_width),
            mode="bicubic",
            align_corners=False,
        )
        return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)


class MCTFViTModel(MCTFPreTrainedMixin, ViTModel):
    """ViT encoder with token fusion, which outputs hidden states after the final LayerNorm.

    ``model(pixel_values, r=…)`` overrides the configuration's ``r`` for one call, and
    ``output_fusion=True`` adds the sizes and the assignments of tokens to the output.
    """

    config: MCTFViTConfig
    config_class = MCTFViTConfig
    renamed = _DEIT_NAMES
    _auto_class = "AutoModel"
    _no_split_modules: ClassVar = ["MCTFViTEmbeddings", "MCTFViTLayer"]

    def __init__(
        self, config: MCTFViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False
    ):
        config.validate()  # from_pretrained sets fields one by one and does not check them together
        # Not the __init__ of ViTModel, which would build plain layers only to replace them.
        ViTPreTrainedModel.__init__(self, config)
        self.embeddings = self._make_embeddings(config, use_mask_token)
        self.layers = nn.ModuleList(
            [MCTFViTLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        fuse_layers(self.layers, VIT, config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()

    @property
    def fused_layers(self) -> FusedLayerList:
        """The list of layers."""
        return self.layers  # type: ignore[return-value]

    def embed(self, pixel_values: Tensor, **options: Any) -> dict[str, Any]:
        """Embed images; the result replaces ``pixel_values`` in the arguments of a call.

        Several passes over the same images can share the result.
        """
        return {"inputs_embeds": self.embeddings(pixel_values.to(self.dtype), **options)}

    def _make_embeddings(self, config: MCTFViTConfig, use_mask_token: bool) -> nn.Module:
        return MCTFViTEmbeddings(config, use_mask_token=use_mask_token)

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(self, module, super()._init_weights)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        r: TokensFused | None = None,
        output_fusion: bool = False,
        inputs_embeds: Tensor | None = None,
        keep_rate: KeepRate | None = None,
        num_read_tokens: int | None = None,
        **kwargs: Any,
    ) -> MCTFModelOutput:
        """Encode images.

        Args:
            pixel_values: (b, channels, height, width).
            bool_masked_pos: (b, patches), patches to replace by the mask token.
            interpolate_pos_encoding: whether to accept images of another size than configured.
            attention_mask: (b, n), only without fusion.
            r: tokens to fuse per layer in this call, in any form that the configuration accepts.
            output_fusion: whether to fill ``token_sizes``, ``assignment`` and ``assignments``.
            inputs_embeds: (b, n, d), output of ``model.embeddings``, instead of ``pixel_values``;
                for several passes over the same images.
            keep_rate: fraction of the patch tokens to keep in this call, instead of ``r``, for a
                method with keep rates.
            num_read_tokens: number of prefix tokens to output; the last layer computes no other
                tokens. See ``skip_unread`` of the configuration.

        Raises:
            ValueError: for images of another size, an ``r`` or ``keep_rate`` that is not allowed,
                an ``attention_mask`` where tokens are fused, or unless exactly one of
                ``pixel_values`` and ``inputs_embeds`` is given.
            TypeError: for an unknown argument.
        """
        check_options(self, kwargs)
        if (pixel_values is None) == (inputs_embeds is None):
            raise ValueError("give either pixel_values or inputs_embeds")
        if inputs_embeds is None:
            assert pixel_values is not None
            inputs_embeds = self.embed(
                pixel_values,
                bool_masked_pos=bool_masked_pos,
                interpolate_pos_encoding=interpolate_pos_encoding,
            )["inputs_embeds"]
        # Asked for in this call or always.
        kwargs.setdefault("output_attentions", getattr(self.config, "output_attentions", False))
        mask: Any = None
        if attention_mask is not None:  # with None, an export would get an empty mask
            mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
            )
        pools_patches = self.pooler is not None and not self.config.class_token
        tokens = self.fused_layers.encode(
            inputs_embeds,
            settings=self.config,
            r=r,
            keep_rate=keep_rate,
            track=pools_patches,
            history=output_fusion,
            mask=mask,
            keeps_all=self.config.restore,
            num_read=num_read(self, num_read_tokens),
            **kwargs,
        )
        tokens = replace(tokens, hidden_states=self.layernorm(tokens.hidden_states))
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(summary(self.config, *tokens[:2])[:, None])
        return MCTFModelOutput(
            last_hidden_state=tokens.restored() if self.config.restore else tokens.hidden_states,
            pooler_output=pooled,
            token_sizes=tokens.sizes if output_fusion else None,
            assignment=tokens.assignment() if output_fusion else None,
            assignments=tokens.assignments,
        )


@torch.no_grad()
def _init_weights(model: Any, module: nn.Module, otherwise: Callable[[nn.Module], None]) -> None:
    if isinstance(module, MCTFViTEmbeddings):
        module.init_weights(model.config.initializer_range)
    elif isinstance(module, ZeroLinear):
        init.zeros_(module.weight)
    else:
        otherwise(module)


def summary(
    config: MCTFViTConfig, hidden_states: Tensor, token_sizes: Tensor | None = None
) -> Tensor:
    """Representation of the whole image: (b, m, d), (b, m) -> (b, d).

    This is the class token or, without one, the mean of the patch tokens, weighted by size.
    """
    if config.class_token:
        return hidden_states[:, 0]
    return mean_patches(hidden_states, token_sizes, config.num_prefix_tokens)


def make_head(config: MCTFViTConfig) -> nn.Module:
    if not config.num_labels:
        return nn.Identity()
    return nn.Linear(config.hidden_size, config.num_labels)


class HeadLogits(NamedTuple):
    """Logits (b, labels) of a classifier's heads.

    Attributes:
        logits: logits of all heads together.
        label_logits: logits of the heads that learn the labels.
        distillation_logits: logits of the distillation head; ``None`` without one.
    """

    logits: Tensor
    label_logits: Tensor
    distillation_logits: Tensor | None = None


class MCTFViTForImageClassification(MCTFPreTrainedMixin, ViTForImageClassification):
    """ViT with token fusion and a linear head on the class token or the mean of the patches."""

    config: MCTFViTConfig
    config_class = MCTFViTConfig
    renamed = _DEIT_NAMES
    _auto_class = "AutoModelForImageClassification"
    _no_split_modules: ClassVar = MCTFViTModel._no_split_modules
    backbone_class: ClassVar[type[MCTFViTModel]] = MCTFViTModel

    def __init__(self, config: MCTFViTConfig):
        config.validate()
        ViTPreTrainedModel.__init__(self, config)  # as in MCTFViTModel
        self.num_labels = config.num_labels
        self.vit = self.backbone_class(config, add_pooling_layer=False)
        self._make_heads(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        _init_weights(self, module, super()._init_weights)

    def embed(self, pixel_values: Tensor, **options: Any) -> dict[str, Any]:
        """See :meth:`MCTFViTModel.embed`."""
        return self.vit.embed(pixel_values, **options)  # type: ignore[operator]

    def _make_heads(self, config: MCTFViTConfig) -> None:
        self.classifier = make_head(config)
        self.distillation_classifier = make_head(config) if config.distillation_head else None

    def _classify(self, hidden_states: Tensor, features: Tensor) -> HeadLogits:
        """Logits of the heads, from the backbone's tokens (b, m, d) and their summary (b, d)."""
        by_label = self.classifier(features)
        if self.distillation_classifier is None:
            return HeadLogits(by_label, by_label)
        by_guide = self.distillation_classifier(hidden_states[:, 1])
        return HeadLogits((by_label + by_guide) / 2, by_label, by_guide)

    @property
    def num_read_tokens(self) -> int | None:
        if self.config.skip_unread is False or not self.config.class_token:
            return None
        return 1 + self.config.distillation_head

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        r: TokensFused | None = None,
        output_fusion: bool = False,
        inputs_embeds: Tensor | None = None,
        keep_rate: KeepRate | None = None,
        output_features: bool = False,
        **kwargs: Any,
    ) -> MCTFImageClassifierOutput:
        """Classify images; for other arguments, see :meth:`MCTFViTModel.forward`.

        Args:
            labels: (b,), for the cross-entropy loss (mean squared error if there is one label).
            output_features: whether to fill ``features`` and the logits of single heads.
        """
        output_features = output_features or output_fusion
        outputs = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            r=r,
            output_fusion=output_fusion or not (self.config.class_token or self.config.restore),
            inputs_embeds=inputs_embeds,
            keep_rate=keep_rate,
            num_read_tokens=self.num_read_tokens,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        token_sizes = None if self.config.restore else outputs.token_sizes
        features = summary(self.config, hidden_states, token_sizes)
        logits, by_label, by_guide = self._classify(hidden_states, features)
        several_heads = output_features and by_guide is not None
        return MCTFImageClassifierOutput(
            loss=None
            if labels is None
            else self.loss_function(labels, logits, self.config, **kwargs),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_sizes=outputs.token_sizes if output_fusion else None,
            assignment=outputs.assignment if output_fusion else None,
            assignments=outputs.assignments if output_fusion else None,
            features=features if output_features else None,
            label_logits=by_label if several_heads else None,
            distillation_logits=by_guide if several_heads else None,
        )
