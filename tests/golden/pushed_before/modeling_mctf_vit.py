"""Vision Transformers (ViT, DeiT) that fuse tokens as they go.

The classes subclass those of ``transformers.models.vit``; weights and their names are the same.
What is new is in the layer: attend, fuse if this layer fuses, MLP. Shapes: ``b`` images, ``n``
tokens before and ``m`` after a layer's fusion, ``d`` channels, ``h`` heads.
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.dynamic_module_utils import get_relative_import_files
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

from .attention import Attention, FusionAttentionMixin
from .configuration_mctf import KeepRate, MCTFViTConfig, TokensFused, as_pair
from .downloads import checked_downloads
from .fusion import Reduction, compose, fuse, fuse_sizes, images_rows
from .own_reducers import own_code
from .reducers import REDUCERS, Observation, Stage, build_reducer

# The widest activation of the images that a CPU takes through the layers at once.
SLICE_BYTES = 12 * 2**20
# The same of the maps that a front end makes patches of.
FRONT_END_BYTES = 8 * 2**20

# Old checkpoints name their weights differently; transformers renames them by class name. The name
# of the backbone within the classifier is not enough for a backbone's checkpoint in 5.10.
for _class in ("MCTFViTModel", "MCTFViTForImageClassification"):
    register_checkpoint_conversion_mapping(
        _class, get_checkpoint_conversion_mapping("ViTModel"), overwrite=True
    )


# What transformers' DeiT calls what ViT has, too.
_DEIT_NAMES = {r"^deit\.": "vit.", r"^cls_classifier\.": "classifier."}


@dataclass
class MCTFModelOutput(BaseModelOutputWithPooling):
    """Output of a backbone; the last two fields are filled by ``output_fusion=True``.

    Attributes:
        token_sizes: (b, m), how many of the embedded tokens each final token stands for.
        assignment: (b, n) int64, index of the final token that each embedded token became part of,
            -1 where it was dropped.
    """

    token_sizes: Tensor | None = None
    assignment: Tensor | None = None


@dataclass
class MCTFImageClassifierOutput(ImageClassifierOutput):
    """Output of a classifier; the last three fields are filled by ``output_fusion=True``.

    Attributes:
        token_sizes: (b, m), how many of the embedded tokens each final token stands for.
        assignment: (b, n) int64, index of the final token that each embedded token became part of,
            -1 where it was dropped.
        class_token: (b, d), what the head sees: the class token after the final LayerNorm, or the
            mean of the patch tokens in a model without class token.
    """

    token_sizes: Tensor | None = None
    assignment: Tensor | None = None
    class_token: Tensor | None = None


class MCTFViTAttention(FusionAttentionMixin, ViTAttention):
    """ViT's self-attention, with or without fusion."""

    def __init__(self, config: MCTFViTConfig):
        super().__init__(config)
        if config.attention_scale == "hidden_size":
            self.scaling = config.hidden_size**-0.5


def goes_in_slices(x: Tensor) -> bool:
    """Whether a batch may be taken apart: on a CPU, where no graph is recorded or traced."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.is_cpu and not recorded


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Zero whole images' branches with probability ``rate``, scaling up the rest: (b, …) -> (b, …).

    Stochastic depth, arXiv 1603.09382.
    """
    if not rate:
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
        self.has_class_token = config.class_token
        self.proportional_attention = config.proportional_attention and (
            self.reducer is None or self.reducer.biases_attention
        )
        self.skip_lambda = config.skip_lambda
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
            fused so far, and the new row of each token in the flattened (b * m, …), a tensor
            (b * n,) with -1 for what was dropped, ``None`` where this layer fuses nothing.
        """
        stage = self.reducer.stage if self.reducer is not None and r else None
        shown = self.reducer is not None and bool(kwargs.get("output_attentions"))
        normed = self.layernorm_before(hidden_states)
        bias = self._size_bias(token_sizes, attention_mask, normed.dtype)
        attention = reduction = reassigned = None
        if stage is not None or shown:
            # Where it only ranks tokens, or belongs to all of them, no gradient flows through it.
            with torch.set_grad_enabled(torch.is_grad_enabled() and stage is not Stage.RECOMPUTE):
                attention = self.attention.look_ahead(
                    normed, bias, hold_map=shown or self._holds_map(normed, stage)
                )

        if stage in (Stage.REUSE, Stage.RECOMPUTE):
            hidden_states, token_sizes, reduction = self._reduce(
                hidden_states, attention, token_sizes, r
            )
            reassigned = reduction
            normed = self.layernorm_before(hidden_states)
        if stage is Stage.RECOMPUTE:
            bias = self._size_bias(token_sizes, None, normed.dtype)
            attention = reduction = None
            if shown:
                attention = self.attention.look_ahead(normed, bias, hold_map=True)

        output, _ = self.attention(normed, bias, attention=attention, reduction=reduction, **kwargs)
        hidden_states = self._add(hidden_states, output)
        if stage is Stage.AFTER_ATTENTION:
            hidden_states, token_sizes, reassigned = self._reduce(
                hidden_states, attention, token_sizes, r
            )
        hidden_states = self._add(hidden_states, self.mlp(self.layernorm_after(hidden_states)))
        if stage is Stage.AFTER_MLP:
            hidden_states, token_sizes, reassigned = self._reduce(
                hidden_states, attention, token_sizes, r
            )
        return hidden_states, token_sizes, None if reassigned is None else reassigned.rows

    def _holds_map(self, normed: Tensor, stage: Stage | None) -> bool:
        """Whether attention's map is computed as such, once."""
        if self.attention.config._attn_implementation == "eager":
            return True
        if self.reducer is None or stage is None:
            return False
        needs = self.reducer.needs
        fuses_map = stage is Stage.REUSE and not self.reducer.pools_linearly
        if fuses_map or "attention" in needs:
            return True
        all_rows = "attention_received" in needs or (
            "class_attention" in needs and not self.has_class_token
        )
        return all_rows and self.attention.holds_map(normed)

    def _add(self, residual: Tensor, branch: Tensor) -> Tensor:
        if self.training:
            branch = drop_path(self.dropout(branch), self.drop_path_rate)
        return torch.add(residual, branch, alpha=1 / self.skip_lambda)

    def _size_bias(
        self, token_sizes: Tensor | None, attention_mask: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """Proportional attention: the logarithm of each key's size, (b, 1, 1, n)."""
        if token_sizes is None or not self.proportional_attention:
            return attention_mask
        return token_sizes.log().to(dtype)[:, None, None, :]

    def _reduce(
        self, hidden_states: Tensor, attention: Attention | None, token_sizes: Tensor | None, r: int
    ) -> tuple[Tensor, Tensor, Reduction]:
        assert attention is not None
        reduction = self._choose(hidden_states, attention, token_sizes, r)
        if not torch.compiler.is_compiling():
            self._check(reduction, hidden_states.shape[1] - r)
        if token_sizes is None:
            precision = torch.promote_types(hidden_states.dtype, torch.float32)
            token_sizes = hidden_states.new_ones(hidden_states.shape[:2], dtype=precision)
        return fuse(hidden_states, reduction), fuse_sizes(token_sizes, reduction), reduction

    def _check(self, reduction: Reduction, num_tokens: int) -> None:
        """Raise ValueError for a reduction that is not what was asked for."""
        found = reduction.kept.shape[0] // max(1, reduction.batch)
        if found != num_tokens:
            raise ValueError(
                f"{type(self.reducer).__qualname__} left {found} tokens, where there are to be "
                f"{num_tokens}"
            )
        linear = self.reducer is None or self.reducer.pools_linearly
        if linear and reduction.kept_weights is None:
            raise ValueError(
                f"{type(self.reducer).__qualname__} returned a reduction without weights: call its "
                "weigh(), or set pools_linearly=False for elementwise maximum"
            )

    @torch.no_grad()
    def _choose(
        self, hidden_states: Tensor, attention: Attention, token_sizes: Tensor | None, r: int
    ) -> Reduction:
        assert self.reducer is not None
        of_class = attention.from_class if self.has_class_token else attention.received
        observable = {
            "keys": attention.mean_keys,
            "attention": lambda: attention.map,
            "attention_received": attention.received,
            "class_attention": of_class,
        }
        needed = {need: observable[need]() for need in self.reducer.needs}
        seen = Observation(hidden_states, token_sizes, self.num_prefix_tokens, **needed)
        return self.reducer(seen, r)


class MCTFPreTrainedMixin:
    """What all models of this library share; goes before a model class of transformers."""

    config: MCTFViTConfig
    config_class = MCTFViTConfig
    _no_split_modules: ClassVar = ["MCTFViTEmbeddings", "MCTFViTLayer"]
    # Proportional attention adds a number to the scores, which these kernels cannot.
    _supports_flash_attn = False
    _supports_flex_attn = False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load as every transformers model does; weights that are downloaded are checked.

        Raises:
            OSError: for weights that arrived damaged, besides what transformers raises.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)
        kwargs["key_mapping"] = _DEIT_NAMES | (kwargs.get("key_mapping") or {})
        with checked_downloads(pretrained_model_name_or_path, kwargs.get("cache_dir")):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MCTFViTEmbeddings):
            module.init_weights(self.config.initializer_range)
        elif isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save as every transformers model does, along with the code that a stranger needs.

        ``auto_map`` names all classes of the family, so that what one of them saved loads as any
        of them with ``trust_remote_code=True``. A reducer that somebody registered goes along.

        Raises:
            ValueError: for a reducer of one's own that cannot, see :func:`.own_reducers.own_code`.
        """
        classes = dict(self.config.auto_classes)
        # Not the configuration's word for it, which may come from another copy of this library.
        source = Path(str(sys.modules[type(self).__module__].__file__))
        modules = {Path(str(file)).stem for file in (source, *get_relative_import_files(source))}
        files, auto_map = own_code(REDUCERS.get(self.config.reduction), classes, modules)
        if files and kwargs.get("push_to_hub"):
            raise ValueError(
                f"push_to_hub=True is not allowed with reduction={self.config.reduction!r}, which "
                "is not of this library: save the model, then use its push_to_hub()"
            )
        self.config.auto_map = classes
        # Not by the names that the weights were loaded by, which may be those of another class.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, **kwargs)
        if files and kwargs.get("is_main_process", True):
            for name, content in files.items():
                Path(save_directory, name).write_text(content, encoding="utf-8")
            config = Path(save_directory, "config.json")
            settings = json.loads(config.read_text(encoding="utf-8"))
            config.write_text(json.dumps({**settings, "auto_map": auto_map}, indent=2) + "\n")


class ZeroLinear(nn.Linear):
    """A linear layer without bias whose weights start at zero."""

    def __init__(self, width: int):
        super().__init__(width, width, bias=False)


class CoarsePatchEmbeddings(nn.Module):
    """Larger patches of the same image, each shared by the patches that it covers.

    Multi-scale features of token mergence (arXiv 2306.04897). What they add starts at zero.

    Args:
        scale: a larger patch is as high and as wide as so many patches. Those at the right and
            lower edge reach beyond the image where they do not divide it, into zeros.
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
    """Images as tokens: class, distillation and register tokens where wanted, then the patches.

    Registers have no position. Backbones differ in ``patch_embeddings`` alone, which tells as
    ``numbers_per_pixel`` how wide its widest map is, if it makes any larger than the patches.
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
        """Draw positions and tokens anew, as every Vision Transformer does."""
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
            ValueError: for images of another size unless ``interpolate_pos_encoding``.
        """
        tokens = self._patches(pixel_values)
        for coarse in self.coarse_patch_embeddings:
            tokens = tokens + coarse(pixel_values)
        if bool_masked_pos is not None:
            assert self.mask_token is not None
            masked = bool_masked_pos[:, :, None].type_as(tokens)
            tokens = tokens * (1 - masked) + self.mask_token * masked
        height, width = pixel_values.shape[-2:]
        positions = self._positions(height, width, bool(interpolate_pos_encoding))
        prefix = [token for token in (self.cls_token, self.distillation_token) if token is not None]
        prefix = [token.expand(tokens.shape[0], -1, -1) for token in prefix]
        tokens = torch.cat([*prefix, tokens], dim=1) + positions
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(tokens.shape[0], -1, -1)
            with_position = [tokens[:, : len(prefix)], tokens[:, len(prefix) :]]
            tokens = torch.cat([with_position[0], registers, with_position[1]], dim=1)
        return self.dropout(tokens)

    def _patches(self, pixel_values: Tensor) -> Tensor:
        """Patches by the front end, in slices of the batch where its maps outgrow a cache."""
        wide = getattr(self.patch_embeddings, "numbers_per_pixel", 0)
        if not wide or self.training or not goes_in_slices(pixel_values):
            return self.patch_embeddings(pixel_values)
        height, width = pixel_values.shape[-2:]
        size = int(FRONT_END_BYTES / (height * width * wide * pixel_values.element_size()))
        parts = [self.patch_embeddings(part) for part in pixel_values.split(max(1, size))]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _positions(self, height: int, width: int, interpolate: bool) -> Tensor:
        """Position embeddings of an image's class, distillation and patch tokens."""
        if (height, width) == as_pair(self.image_size):
            return self.position_embeddings
        if not interpolate:
            expected = "*".join(map(str, as_pair(self.image_size)))
            raise ValueError(
                f"Input image size ({height}*{width}) doesn't match model ({expected})."
            )
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
        self.embeddings = self._make_embeddings(config, use_mask_token)
        self.layers = nn.ModuleList(
            [MCTFViTLayer(config, i) for i in range(config.num_hidden_layers)]
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()

    def _make_embeddings(self, config: MCTFViTConfig, use_mask_token: bool) -> nn.Module:
        return MCTFViTEmbeddings(config, use_mask_token=use_mask_token)

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
            inputs_embeds: (b, n, d), what ``model.embeddings`` makes of images, instead of
                ``pixel_values``; for several passes over the same images.
            keep_rate: part of the patch tokens to keep in this call, instead of ``r``, with a
                method that goes by it.

        Raises:
            ValueError: for images of another size, an ``r`` or ``keep_rate`` that is not allowed,
                an ``attention_mask`` where tokens are fused, or unless exactly one of
                ``pixel_values`` and ``inputs_embeds`` is given.
        """
        if (pixel_values is None) == (inputs_embeds is None):
            raise ValueError("give either pixel_values or inputs_embeds")
        if inputs_embeds is None:
            assert pixel_values is not None
            inputs_embeds = self.embeddings(
                pixel_values.to(self.dtype),
                bool_masked_pos=bool_masked_pos,
                interpolate_pos_encoding=interpolate_pos_encoding,
            )
        for shown in ("output_attentions", "output_hidden_states"):  # asked for here or always
            kwargs.setdefault(shown, getattr(self.config, shown, False))
        fused_by_layer = self.config.tokens_fused(inputs_embeds.shape[1], r, keep_rate)
        pools_patches = self.pooler is not None and not self.config.class_token
        hidden_states, token_sizes, assignment = self._encode(
            inputs_embeds, attention_mask, fused_by_layer, output_fusion or pools_patches, **kwargs
        )
        hidden_states = self.layernorm(hidden_states)
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(summary(self.config, hidden_states, token_sizes)[:, None])
        return MCTFModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=pooled,
            token_sizes=token_sizes if output_fusion else None,
            assignment=assignment if output_fusion else None,
        )

    def _encode(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        fused_by_layer: tuple[int, ...],
        output_fusion: bool,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run all layers: (b, n, d) -> (b, m, d), sizes and assignment if ``output_fusion``."""
        if attention_mask is not None and any(fused_by_layer):
            raise ValueError(
                "attention_mask is not allowed where tokens are fused: leave it out, or set r=0 "
                "or reduction='none'"
            )
        mask: Any = None
        if attention_mask is not None:  # of none, an export would make one that masks nothing
            mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
            )
        if not torch.compiler.is_compiling():
            self._check_reducers()
        size = self._slice_size(hidden_states, mask, kwargs)
        if size == hidden_states.shape[0]:
            return self._run_layers(hidden_states, mask, fused_by_layer, output_fusion, **kwargs)
        slices = [
            self._run_layers(images, mask, fused_by_layer, output_fusion, **kwargs)
            for images in hidden_states.split(size)
        ]
        hidden_states, token_sizes, assignment = (
            None if parts[0] is None else torch.cat(parts) for parts in zip(*slices, strict=True)
        )
        return hidden_states, token_sizes, assignment

    def _check_reducers(self) -> None:
        """Raise ValueError if the configuration has changed since the layers were made."""
        wanted, found = build_reducer(self.config), self.layers[0].reducer
        comparable = type(wanted).__eq__ is not object.__eq__
        if type(wanted) is not type(found) or (comparable and wanted != found):
            raise ValueError(
                f"the layers reduce by {found}, and the configuration now says {wanted}: set "
                "reduction and what it is made of with from_pretrained() or a new model; only how "
                "much is reduced (r, keep_rate, fusion_layers, …) may change later"
            )

    def _slice_size(
        self, hidden_states: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> int:
        """How many images go through all layers at once.

        On a CPU, activations that outgrow its cache cost more than they save, and allocating them
        anew in each layer costs most. So a batch goes through in slices, if nothing but the final
        hidden states is asked for and no graph is recorded.
        """
        batch, num_tokens = hidden_states.shape[:2]
        whole = (
            not goes_in_slices(hidden_states)
            or mask is not None
            or any(kwargs.get(f"output_{name}") for name in ("attentions", "hidden_states"))
        )
        if whole or not batch:
            return batch
        widest = num_tokens * self.config.intermediate_size * hidden_states.element_size()
        slices = math.ceil(batch * widest / SLICE_BYTES)
        return math.ceil(batch / min(slices, batch))

    def _run_layers(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        fused_by_layer: tuple[int, ...],
        output_fusion: bool,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        token_sizes = rows = None
        if output_fusion:
            batch, num_tokens = hidden_states.shape[:2]
            rows = torch.arange(batch * num_tokens, device=hidden_states.device)
        for layer, fused in zip(self.layers, fused_by_layer, strict=True):
            hidden_states, token_sizes, reassigned = layer(
                hidden_states, mask, token_sizes, fused, **kwargs
            )
            if rows is not None and reassigned is not None:
                rows = compose(rows, reassigned)
        if rows is None:
            return hidden_states, None, None
        assignment = images_rows(rows, *hidden_states.shape[:2])
        if token_sizes is None:
            token_sizes = torch.ones_like(assignment, dtype=torch.float32)
        return hidden_states, token_sizes, assignment


def summary(config: MCTFViTConfig, hidden_states: Tensor, token_sizes: Tensor | None) -> Tensor:
    """What stands for the whole image: (b, m, d), (b, m) -> (b, d).

    The class token; without one, the mean of the patch tokens, each counting as many times as it
    has patches.
    """
    if config.class_token:
        return hidden_states[:, 0]
    assert token_sizes is not None
    first = config.num_prefix_tokens
    weights = token_sizes[:, first:, None].to(hidden_states.dtype)
    return (hidden_states[:, first:] * weights).sum(1) / weights.sum(1)


def make_head(config: MCTFViTConfig) -> nn.Module:
    if not config.num_labels:
        return nn.Identity()
    return nn.Linear(config.hidden_size, config.num_labels)


class MCTFViTForImageClassification(MCTFPreTrainedMixin, ViTForImageClassification):
    """ViT with token fusion and a linear head on the class token, or the mean of the patches."""

    _auto_class = "AutoModelForImageClassification"
    backbone_class: ClassVar[type[MCTFViTModel]] = MCTFViTModel

    def __init__(self, config: MCTFViTConfig):
        config.validate()
        ViTPreTrainedModel.__init__(self, config)  # as in MCTFViTModel
        self.num_labels = config.num_labels
        self.vit = self.backbone_class(config, add_pooling_layer=False)
        self._make_heads(config)
        self.post_init()

    def _make_heads(self, config: MCTFViTConfig) -> None:
        self.classifier = make_head(config)
        self.distillation_classifier = make_head(config) if config.distillation_head else None

    def _classify(self, hidden_states: Tensor, class_token: Tensor) -> Tensor:
        """Logits (b, labels) of what the backbone returns, (b, m, d) and its summary (b, d)."""
        logits = self.classifier(class_token)
        if self.distillation_classifier is None:
            return logits
        return (logits + self.distillation_classifier(hidden_states[:, 1])) / 2

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
            output_fusion=output_fusion or not self.config.class_token,
            inputs_embeds=inputs_embeds,
            keep_rate=keep_rate,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        class_token = summary(self.config, hidden_states, outputs.token_sizes)
        logits = self._classify(hidden_states, class_token)
        return MCTFImageClassifierOutput(
            loss=None
            if labels is None
            else self.loss_function(labels, logits, self.config, **kwargs),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            token_sizes=outputs.token_sizes if output_fusion else None,
            assignment=outputs.assignment if output_fusion else None,
            class_token=class_token if output_fusion else None,
        )
