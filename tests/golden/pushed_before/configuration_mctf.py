"""Configurations: the settings of token fusion, and one configuration per backbone."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig
from transformers.utils import logging

from .reducers import REDUCERS, Reducer

logger = logging.get_logger(__name__)

# A count or fraction of tokens, one of these by layer, or (r, inflection).
TokensFused = int | float | list[int | float] | tuple[int | float, int | float]
KeepRate = int | float | list[int | float]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_tokens_fused(value: TokensFused) -> None:
    """Raise ValueError unless every entry of ``r`` is a whole count or a fraction in (0, 1)."""
    if isinstance(value, tuple) and len(value) == 2:
        value, inflection = value
        _check_inflection(inflection)
    for entry in value if isinstance(value, list) else [value]:
        if not _is_number(entry) or entry < 0 or (entry >= 1 and entry != int(entry)):
            raise ValueError(
                f"r={value!r} is not allowed: r is a count of tokens (0, 1, 2, …), a fraction of "
                "them between 0 and 1, a list with one of these for each layer, or a count and an "
                "inflection: (r, inflection)"
            )


def _check_inflection(value: float) -> None:
    if not _is_number(value) or not -1 <= value <= 1:
        raise ValueError(f"inflection={value!r} is not allowed: it is a number from -1 to 1")


def _check_keep_rate(value: KeepRate) -> None:
    for entry in value if isinstance(value, list) else [value]:
        if not _is_number(entry) or not 0 < entry <= 1:
            raise ValueError(
                f"keep_rate={value!r} is not allowed: it is above 0 and at most 1, or a list with "
                "one such number for each layer"
            )


def _check_reduction(value: str) -> None:
    if value != "none" and value not in REDUCERS:
        raise ValueError(
            f"reduction={value!r} is not allowed: it is one of {', '.join(REDUCERS)}, none. (One "
            "of your own is known once its module is imported; a model that brings one along loads "
            "with trust_remote_code=True where this library is not imported.)"
        )


def _check_multi_scale(value: list[int] | None) -> None:
    if value is not None and (
        not value or len(set(value)) != len(value) or any(scale < 2 for scale in value)
    ):
        raise ValueError(
            f"multi_scale={value!r} is not allowed: it lists different whole numbers of at least "
            "2, how many patches high and wide the coarser ones are"
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
            2210.09461), ``"evit"`` (arXiv 2202.07800), ``"token_mergence"`` (arXiv 2306.04897),
            one that :func:`.reducers.register` made known, or ``"none"`` for the plain model.
        inflection: how ``r`` changes from layer to layer, as in ToMe: linearly about a mean of
            ``r``, from 0 up to twice as much (1), down to 0 (-1), or not at all (0).
            ``r=(8, -1)`` sets both.
        r: how many tokens a fusing layer fuses away: a count (1, 2, …), a fraction in (0, 1) of
            the patch tokens that reach the layer, 0 for none, or a list of these with one entry
            per layer. Not of ``"evit"`` and ``"token_mergence"``, which go by ``keep_rate``.
        keep_rate: part of the patch tokens that a layer keeps, or a list with one such number per
            layer.
        fuse_token: ``"evit"`` sums up the tokens that are not kept in one more token; or it drops
            them.
        fusion_layers: zero-based indices of the layers that fuse. ``None``: the method's own (all
            but the first for ``"mctf"``, all for ``"tome"``, the 4th, 7th and 10th of 12 for the
            others), or those that an ``r`` or ``keep_rate`` with one entry per layer says.
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
        proportional_attention: add the logarithm of each token's size to its attention scores;
            ``"evit"`` never does.
        min_tokens: no layer leaves fewer tokens than this, prefix tokens included.
        drop_path_rate: probability of skipping a residual branch in training, rising linearly
            from 0 in the first layer to this in the last (stochastic depth, arXiv 1603.09382).
        multi_scale: embed patches that are so many times as high and wide, too, and add each to the
            patches that it covers (arXiv 2306.04897). It changes nothing before it is trained.

    Raises:
        huggingface_hub.errors.StrictDataclassError: for a value outside of what is allowed; the
            message names the setting, the value and the values allowed.
    """

    reduction: str = field(default="mctf", metadata={"validator": _check_reduction})
    inflection: float | int = field(default=0.0, metadata={"validator": _check_inflection})
    # After inflection, which (r, inflection) replaces.
    r: int | float | list[int | float] | tuple[int | float, int | float] = field(
        default=16, metadata={"validator": _check_tokens_fused}
    )
    keep_rate: float | int | list[int | float] = field(
        default=0.7, metadata={"validator": _check_keep_rate}
    )
    fuse_token: bool = True
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
    multi_scale: list[int] | None = field(default=None, metadata={"validator": _check_multi_scale})

    if TYPE_CHECKING:
        num_hidden_layers: int
        num_prefix_tokens: int

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "r" and isinstance(value, tuple) and len(value) == 2:
            value, self.inflection = value
        super().__setattr__(name, value)

    @property
    def reducer_class(self) -> type[Reducer] | None:
        """The method of reduction; ``None`` for none."""
        return None if self.reduction == "none" else REDUCERS[self.reduction]

    def tokens_fused(
        self, num_tokens: int, r: TokensFused | None = None, keep_rate: KeepRate | None = None
    ) -> tuple[int, ...]:
        """How many tokens fewer leave each layer, by the settings and the input's length alone.

        Args:
            num_tokens: tokens that enter the first layer, prefix tokens included.
            r: counts, of whatever method, instead of what the configuration says.
            keep_rate: rates, of a method that keeps tokens by rate, likewise.

        Returns:
            One count per layer. A fraction takes that part of the patch tokens, rounded down; a
            rate keeps that part, rounded up. No layer loses more than its method allows (half of
            the patch tokens where tokens are matched) or leaves fewer than ``min_tokens``.

        Raises:
            ValueError: if ``r`` or ``keep_rate`` is not allowed, both are given, or one has no
                effect on the method.
        """
        reducer = self.reducer_class
        if r is not None and keep_rate is not None:
            raise ValueError(f"r={r!r} and keep_rate={keep_rate!r}: give one of them")
        by_rate = reducer is not None and reducer.amount == "keep_rate"
        self.check_effect({"keep_rate": keep_rate})
        if reducer is None:
            if r is not None:
                _check_tokens_fused(r)
            if r and r != [0] * self.num_hidden_layers:
                self.check_effect({"r": r})
            return (0,) * self.num_hidden_layers
        if by_rate and r is None:
            rates = self.kept_by_layer(keep_rate)
            added = reducer.tokens_added(self)
            fewer = [partial(_fewer_by_rate, rate=rate, added=added) for rate in rates]
        else:
            wanted = self._wanted_by_layer(self.r if r is None else r)
            fewer = [partial(_fewer_by_count, want=want) for want in wanted]
        counts = []
        for count_of in fewer:
            patches = num_tokens - self.num_prefix_tokens
            most = min(reducer.most(patches), num_tokens - self.min_tokens)
            counts.append(max(0, min(count_of(patches), most)))
            num_tokens -= counts[-1]
        return tuple(counts)

    def check_effect(self, given: Mapping[str, Any]) -> None:
        """Check that settings which somebody chose are those of this method.

        Raises:
            ValueError: for an ``r`` or a ``keep_rate`` that it does not go by, an ``inflection``
                without a single ``r``, or a setting of another method.
        """
        amount = None if self.reducer_class is None else self.reducer_class.amount
        for name, nothing in (("r", 0), ("keep_rate", 1)):
            if given.get(name) not in (None, nothing) and name != amount:
                raise ValueError(
                    f"{name}={given[name]!r} has no effect with reduction={self.reduction!r}, "
                    + ("which reduces nothing" if amount is None else f"which goes by {amount}")
                    + f": choose another reduction, or leave {name} unset"
                )
        if given.get("inflection") and (amount != "r" or isinstance(self.r, list)):
            raise ValueError(
                f"inflection={given['inflection']!r} has no effect with "
                f"reduction={self.reduction!r}, r={self.r!r}: it bends a single r"
            )
        own = () if self.reducer_class is None else self.reducer_class.settings
        others = {name: key for key, method in REDUCERS.items() for name in method.settings}
        defaults = {setting.name: setting.default for setting in fields(self)}
        for name, value in given.items():
            if name in others and name not in own and value != defaults[name]:
                raise ValueError(
                    f"{name}={value!r} has no effect with reduction={self.reduction!r}: it is a "
                    f"setting of {others[name]}"
                )

    def own_amount(self) -> dict[str, Any]:
        """How much is reduced, as an argument of the model: its ``r`` or its ``keep_rate``."""
        if self.reducer_class is None:
            return {"r": 0}
        return {self.reducer_class.amount: getattr(self, self.reducer_class.amount)}

    def _wanted_by_layer(self, r: TokensFused) -> Sequence[int | float]:
        """What each layer is to fuse."""
        _check_tokens_fused(r)
        r, inflection = r if isinstance(r, tuple) else (r, self.inflection)
        if inflection and not isinstance(r, list):
            if 0 < r < 1:
                raise ValueError(
                    f"inflection={inflection!r} is not allowed with r={r!r}: it takes a count"
                )
            first, steps = int(r * (1 - inflection)), max(1, self.num_hidden_layers - 1)
            rise = 2 * (r - first) / steps
            rising = [int(first + rise * layer) for layer in range(self.num_hidden_layers)]
            return self._in_fusing_layers(rising, 0)
        return self._by_layer("r", r, 0)

    def kept_by_layer(self, keep_rate: KeepRate | None = None) -> Sequence[int | float]:
        """What part of its patch tokens each layer is to keep, by the configuration unless given.

        Raises:
            ValueError: for rates that are not allowed.
        """
        keep_rate = self.keep_rate if keep_rate is None else keep_rate
        _check_keep_rate(keep_rate)
        return self._by_layer("keep_rate", keep_rate, 1)

    def _in_fusing_layers(
        self, amounts: Sequence[int | float], nothing: int
    ) -> Sequence[int | float]:
        """These in the layers that fuse, and ``nothing`` in the others."""
        layers = range(self.num_hidden_layers)
        fusing = self.fusion_layers
        if fusing is None and self.reducer_class is not None:
            fusing = list(self.reducer_class.default_layers(len(layers)))
        return [amounts[layer] if layer in (fusing or ()) else nothing for layer in layers]

    def _by_layer(
        self, name: str, amount: int | float | list[int | float], nothing: int
    ) -> Sequence[int | float]:
        """One amount per layer; ``nothing`` is the one that leaves the tokens as they are."""
        layers = range(self.num_hidden_layers)
        if not isinstance(amount, list):
            return self._in_fusing_layers([amount] * len(layers), nothing)
        if len(amount) != len(layers):
            raise ValueError(
                f"{name}={amount!r} has {len(amount)} entries: a list has one for each of the "
                f"{len(layers)} layers"
            )
        allowed = layers if self.fusion_layers is None else self.fusion_layers
        outside = [i for i in layers if amount[i] != nothing and i not in allowed]
        if outside:
            raise ValueError(
                f"{name}={amount!r} fuses in layers {outside}, which fusion_layers="
                f"{self.fusion_layers!r} leaves out: leave fusion_layers unset or let the list be "
                f"{nothing} there"
            )
        return amount

    def validate_fusion_layers(self) -> None:
        """Check what concerns several settings at once."""
        wrong = [i for i in self.fusion_layers or () if not 0 <= i < self.num_hidden_layers]
        if wrong:
            raise ValueError(
                f"fusion_layers={self.fusion_layers!r} is not allowed: {wrong} are not among the "
                f"layers 0 to {self.num_hidden_layers - 1}"
            )
        if self.reducer_class is not None and self.reducer_class.amount == "keep_rate":
            self.kept_by_layer()
        else:
            self._wanted_by_layer(self.r)


def _fewer_by_count(patches: int, want: int | float) -> int:
    return int(patches * want) if 0 < want < 1 else int(want)


def _fewer_by_rate(patches: int, rate: int | float, added: int) -> int:
    return patches - math.ceil(patches * rate - 1e-9) - added  # 0.55 * 100 is a little above 55


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
        class_token: the first token, which the head reads. Without it the head reads the mean of
            the patch tokens, weighted by their sizes.
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

    class_token: bool = True
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
        return self.class_token + self.distillation_token + self.num_register_tokens

    def num_tokens(self, image_size: int | tuple[int, int] | None = None) -> int:
        """Tokens of an image, prefix tokens included; of the configured size unless given."""
        height, width = as_pair(self.image_size if image_size is None else image_size)
        patch_height, patch_width = as_pair(self.patch_size)
        return (height // patch_height) * (width // patch_width) + self.num_prefix_tokens

    def validate_distillation(self) -> None:
        """Check that a second head has its token, which comes second."""
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
