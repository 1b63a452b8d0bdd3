"""Configurations: the settings of token fusion, and one configuration per backbone."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

TokensFused = int | float | list[int | float]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_tokens_fused(value: TokensFused) -> None:
    """Raise ValueError unless every entry of ``r`` is a whole count or a fraction in (0, 1)."""
    for entry in value if isinstance(value, (list, tuple)) else [value]:
        if not _is_number(entry) or entry < 0 or (entry >= 1 and entry != int(entry)):
            raise ValueError(
                f"r={value!r} is not allowed: r is a count of tokens (0, 1, 2, …), a fraction of "
                "them between 0 and 1, or a list with one of these for each layer"
            )


def _check_layers(value: list[int] | None) -> None:
    if value is not None and len(set(value)) != len(value):
        raise ValueError(f"fusion_layers={value!r} is not allowed: it names a layer twice")


def _one_of(name: str, *allowed: str) -> Any:
    def check(value: str) -> None:
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not allowed: it is one of {', '.join(allowed)}")

    return {"validator": check}


def _number(name: str, low: float, high: float = math.inf, *, below: bool = False) -> Any:
    def check(value: float) -> None:
        if not _is_number(value) or value < low or value > high or (below and value == high):
            limit = "" if high == math.inf else f" and {'below' if below else 'at most'} {high:g}"
            raise ValueError(
                f"{name}={value!r} is not allowed: it is a number of at least {low:g}{limit}"
            )

    return {"validator": check}


@dataclass(kw_only=True)
class FusionConfigMixin:
    """Settings of token fusion, shared by the configurations of all backbones.

    Args:
        reduction: which method reduces the tokens: ``"mctf"``, ``"tome"`` (Token Merging, arXiv
            2210.09461), or ``"none"`` for the plain model.
        r: how many tokens a fusing layer fuses away: a count (1, 2, …), a fraction in (0, 1) of
            the patch tokens that reach the layer, 0 for none, or a list of these with one entry
            per layer.
        fusion_layers: zero-based indices of the layers that fuse. ``None``: all but the first (all
            for ``"tome"``), or those with an entry above 0 where ``r`` is a list.
        tau_sim: temperature of the similarity criterion; 0 switches it off. This and the settings
            down to ``pooling`` are those of ``"mctf"``.
        tau_info: temperature of the informativeness criterion; 0 switches it off.
        tau_size: temperature of the size criterion; 0 switches it off.
        bidirectional: fuse half of the tokens forward and half backward, or all forward.
        one_step_ahead: the attention that informativeness is judged by: ``"approximate"`` (the
            layer's own, reused for the fused tokens), ``"precise"`` (the layer's own, computed
            again after fusion) or ``"past"`` (fuse after the layer, by the attention it used).
        pooling: weight of a token in its pool: ``"attention_size"`` (attention received times
            size), ``"size"``, ``"mean"`` (all the same), or ``"max"`` (elementwise maximum).
        proportional_attention: add the logarithm of each token's size to its attention scores.
        min_tokens: no layer leaves fewer tokens than this, prefix tokens included.
        drop_path_rate: probability of skipping a residual branch in training, rising linearly
            from 0 in the first layer to this in the last (stochastic depth, arXiv 1603.09382).

    Raises:
        huggingface_hub.errors.StrictDataclassError: for a value outside of what is allowed; the
            message names the setting, the value and the values allowed.
    """

    reduction: str = field(default="mctf", metadata=_one_of("reduction", "mctf", "tome", "none"))
    r: int | float | list[int | float] = field(
        default=16, metadata={"validator": _check_tokens_fused}
    )
    fusion_layers: list[int] | None = field(default=None, metadata={"validator": _check_layers})
    tau_sim: float | int = field(default=1.0, metadata=_number("tau_sim", 0))
    tau_info: float | int = field(default=20.0, metadata=_number("tau_info", 0))
    tau_size: float | int = field(default=40.0, metadata=_number("tau_size", 0))
    bidirectional: bool = True
    one_step_ahead: str = field(
        default="approximate",
        metadata=_one_of("one_step_ahead", "approximate", "precise", "past"),
    )
    pooling: str = field(
        default="attention_size",
        metadata=_one_of("pooling", "attention_size", "size", "mean", "max"),
    )
    proportional_attention: bool = True
    min_tokens: int = field(default=10, metadata=_number("min_tokens", 1))
    drop_path_rate: float | int = field(
        default=0.0, metadata=_number("drop_path_rate", 0, 1, below=True)
    )

    if TYPE_CHECKING:
        num_hidden_layers: int
        num_prefix_tokens: int

    def tokens_fused(self, num_tokens: int, r: TokensFused | None = None) -> tuple[int, ...]:
        """How many tokens each layer fuses away, by the settings and the input's length alone.

        Args:
            num_tokens: tokens that enter the first layer, prefix tokens included.
            r: used instead of the configuration's own ``r``.

        Returns:
            One count per layer. A fraction takes that part of the patch tokens, rounded down; no
            layer fuses more than half of its patch tokens or leaves fewer than ``min_tokens``.

        Raises:
            ValueError: if ``r`` is not allowed, or is not 0 where ``reduction`` is ``"none"``.
        """
        if r is not None:
            _check_tokens_fused(r)
        if self.reduction == "none":
            if r and r != [0] * self.num_hidden_layers:
                raise ValueError(f"r={r!r} has no effect with reduction='none': choose a reduction")
            return (0,) * self.num_hidden_layers
        wanted = self._wanted_by_layer(self.r if r is None else r)
        counts = []
        for want in wanted:
            patches = num_tokens - self.num_prefix_tokens
            count = int(patches * want) if 0 < want < 1 else int(want)
            count = max(0, min(count, patches // 2, num_tokens - self.min_tokens))
            counts.append(count)
            num_tokens -= count
        return tuple(counts)

    def _wanted_by_layer(self, r: TokensFused) -> Sequence[int | float]:
        layers = range(self.num_hidden_layers)
        if not isinstance(r, (list, tuple)):
            default = layers if self.reduction == "tome" else layers[1:]
            fusing = default if self.fusion_layers is None else self.fusion_layers
            return [r if layer in fusing else 0 for layer in layers]
        if len(r) != len(layers):
            raise ValueError(
                f"r={r!r} has {len(r)} entries: a list has one for each of the {len(layers)} layers"
            )
        allowed = layers if self.fusion_layers is None else self.fusion_layers
        outside = [layer for layer in layers if r[layer] and layer not in allowed]
        if outside:
            raise ValueError(
                f"r={r!r} fuses in layers {outside}, which fusion_layers={self.fusion_layers!r} "
                "leaves out: leave fusion_layers unset or let the list be 0 there"
            )
        return r

    def validate_fusion_layers(self) -> None:
        """Check what concerns several settings at once."""
        wrong = [i for i in self.fusion_layers or () if not 0 <= i < self.num_hidden_layers]
        if wrong:
            raise ValueError(
                f"fusion_layers={self.fusion_layers!r} is not allowed: {wrong} are not among the "
                f"layers 0 to {self.num_hidden_layers - 1}"
            )
        self._wanted_by_layer(self.r)


def as_pair(value: Any) -> tuple[int, int]:
    """Height and width of a size given as one number or as two."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


# What transformers writes to a config.json beside the fields of the configuration.
_NOT_FIELDS = {
    "attn_implementation",
    "auto_map",
    "model_type",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
    "use_cache",
}


@strict
class MCTFViTConfig(FusionConfigMixin, ViTConfig):
    """Configuration of a Vision Transformer (ViT, DeiT) that fuses tokens.

    All fields of :class:`transformers.ViTConfig` and of :class:`FusionConfigMixin`.

    Args:
        distillation_token: a second prefix token with a position of its own (DeiT, arXiv
            2012.12877, section 5).
        distillation_head: a second head, on that token; the two heads' logits are averaged.
        num_register_tokens: prefix tokens without position that nothing is read from (Vision
            Transformers Need Registers, arXiv 2309.16588).
    """

    model_type = "mctf_vit"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_mctf.MCTFViTConfig",
        "AutoModel": "modeling_mctf_vit.MCTFViTModel",
        "AutoModelForImageClassification": "modeling_mctf_vit.MCTFViTForImageClassification",
    }
    _auto_class = "AutoConfig"
    # Types of plain models whose checkpoints this one loads, and what else they are called.
    plain_types: ClassVar[dict[str, str]] = {
        "vit": "ViT, DeiT without distillation token",
        "deit": "DeiT with distillation token",
    }
    attention_scale: ClassVar[str] = "head_dim"
    skip_lambda: ClassVar[float | int] = 1

    distillation_token: bool = False
    distillation_head: bool = False
    num_register_tokens: int = field(default=0, metadata=_number("num_register_tokens", 0))

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a checkpoint's configuration; a plain ViT's counts as this one's.

        Raises:
            ValueError: for the checkpoint of another architecture.
        """
        settings, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = settings.get("model_type", next(iter(cls.plain_types), None))
        if model_type not in (*cls.plain_types, cls.model_type):
            plain = "".join(f"{name!r} ({meaning}), " for name, meaning in cls.plain_types.items())
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {model_type!r}: "
                f"{cls.__name__} loads the types {plain}{cls.model_type!r}"
            )
        if model_type == "deit":
            settings["distillation_token"] = True
            architectures = settings.get("architectures") or []
            settings["distillation_head"] = any("WithTeacher" in name for name in architectures)
        known = {field.name for field in fields(cls)} | _NOT_FIELDS
        unknown = sorted(name for name in set(settings) - known if not name.startswith("_"))
        if model_type != cls.model_type:  # what older releases left there
            settings = {name: settings[name] for name in settings if name not in unknown}
        elif unknown:
            logger.warning_once(
                f"{pretrained_model_name_or_path} has settings that this version does not know "
                f"and that have no effect: {', '.join(unknown)}. Perhaps a newer one wrote it"
            )
        return {**settings, "model_type": cls.model_type}, kwargs

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens, which come before the patches."""
        return 1 + self.distillation_token + self.num_register_tokens

    def num_tokens(self, image_size: int | tuple[int, int] | None = None) -> int:
        """Tokens of an image, prefix tokens included; of the configured size unless given."""
        height, width = as_pair(self.image_size if image_size is None else image_size)
        patch_height, patch_width = as_pair(self.patch_size)
        return (height // patch_height) * (width // patch_width) + self.num_prefix_tokens

    def validate_distillation(self) -> None:
        """Check that a second head has its token."""
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


@strict
class MCTFT2TViTConfig(MCTFViTConfig):
    """Configuration of a T2T-ViT (arXiv 2101.11986) that fuses tokens.

    All fields of :class:`MCTFViTConfig`, with the defaults of T2T-ViT_t-14, and:

    Args:
        tokens_type: how the two token transformers of the front end attend: ``"transformer"``
            (softmax, one head) or ``"performer"`` (positive random features, arXiv 2009.14794).
        token_dim: channels of the front end.
        attention_scale: the layers' scores are divided by the root of the channels of a head
            (``"head_dim"``) or of all (``"hidden_size"``), as the published weights want it.
    """

    model_type = "mctf_t2t_vit"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_mctf.MCTFT2TViTConfig",
        "AutoModel": "modeling_mctf_t2t_vit.MCTFT2TViTModel",
        "AutoModelForImageClassification": (
            "modeling_mctf_t2t_vit.MCTFT2TViTForImageClassification"
        ),
    }
    plain_types: ClassVar[dict[str, str]] = {}

    hidden_size: int = 384
    num_hidden_layers: int = 14
    num_attention_heads: int = 6
    intermediate_size: int = 1152
    qkv_bias: bool = False
    layer_norm_eps: float = 1e-5
    tokens_type: str = field(
        default="transformer", metadata=_one_of("tokens_type", "transformer", "performer")
    )
    token_dim: int = field(default=64, metadata=_number("token_dim", 2))
    attention_scale: str = field(
        default="head_dim", metadata=_one_of("attention_scale", "head_dim", "hidden_size")
    )

    def validate_stride(self) -> None:
        """Check that patches have the size that the front end makes."""
        if as_pair(self.patch_size) != (16, 16):
            raise ValueError(f"patch_size={self.patch_size!r} is not allowed: a T2T-ViT's is 16")


@strict
class MCTFLVViTConfig(MCTFViTConfig):
    """Configuration of an LV-ViT (arXiv 2104.10858) that fuses tokens.

    All fields of :class:`MCTFViTConfig`, with the defaults of LV-ViT-S, and:

    Args:
        skip_lambda: what is added to a residual stream is divided by this.
        stem_channels: channels of the convolutions before the patches.
        auxiliary_weight: of the auxiliary head's largest logit of each class over all tokens, which
            is added to the class token's; 0 leaves it out.
    """

    model_type = "mctf_lv_vit"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_mctf.MCTFLVViTConfig",
        "AutoModel": "modeling_mctf_lv_vit.MCTFLVViTModel",
        "AutoModelForImageClassification": "modeling_mctf_lv_vit.MCTFLVViTForImageClassification",
    }
    plain_types: ClassVar[dict[str, str]] = {}

    hidden_size: int = 384
    num_hidden_layers: int = 16
    num_attention_heads: int = 6
    intermediate_size: int = 1152
    qkv_bias: bool = False
    layer_norm_eps: float = 1e-5
    skip_lambda: float | int = field(default=2.0, metadata=_number("skip_lambda", 1))
    stem_channels: int = field(default=64, metadata=_number("stem_channels", 1))
    auxiliary_weight: float | int = field(default=0.5, metadata=_number("auxiliary_weight", 0))

    def validate_even(self) -> None:
        """Check that patches can be halved, as the stem does."""
        if any(side % 2 for side in as_pair(self.patch_size)):
            raise ValueError(f"patch_size={self.patch_size!r} is not allowed: an LV-ViT's is even")
