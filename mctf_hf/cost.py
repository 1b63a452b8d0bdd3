"""Multiply-accumulates of a configuration or a model, in closed form.

Like the papers' "FLOPs", the count includes convolutions, linear layers, matrix products and five
operations per element of a LayerNorm. It excludes softmax, activations and index arithmetic.
It counts what this library executes: attention is applied to the values of all n old positions,
where the official code applies an n' x n' map, and the similarity of the tokens is included.

A formula gives the cost of the layers. The rest of the model, from the patches to the heads, is
counted by running the model once without fusion, on tensors without values.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .anatomy import attention_core, attention_names
from .apply import fusion_of
from .configuration_mctf import FusionConfigMixin, as_pair
from .families import find_encoders
from .fused_encoder import FusedLayerList
from .fused_models import FusedModel
from .hosted_layers import HostedLayerList
from .reducers import Reducer, Stage, build_reducer
from .registry import BACKBONES
from .schedule import KeepRate, TokensFused

_LAYERNORM = 5


@dataclass(frozen=True)
class LayerCost:
    """Multiply-accumulates of the parts of a layer, per token.

    Attributes:
        width: channels of all heads together.
        heads: number of attention heads.
        query, key, value, output: cost of each projection of attention.
        norms: cost of the norm before attention, and of the norm before the MLP.
        mlp: cost of the linear layers of the MLP.
        mlp_width: largest number of channels in the MLP.
    """

    width: int
    heads: int
    query: int
    key: int
    value: int
    output: int
    norms: tuple[int, int]
    mlp: int
    mlp_width: int

    @property
    def after(self) -> int:
        """Cost of everything after attention: output projection, norm and MLP."""
        return self.output + self.norms[1] + self.mlp

    @classmethod
    def of(cls, layers: FusedLayerList) -> "LayerCost":
        """The cost of the first layer; all layers are alike."""
        layer, names = layers[0], layers.names
        attention = getattr(layer, names.attention)
        core = attention_core(attention)
        parts = attention_names(core)
        query = getattr(core, parts.query)
        entering = [_linear(getattr(core, name)) for name in (parts.query, parts.key, parts.value)]
        mlp = getattr(layer, names.mlp)
        return cls(
            width=query.out_features,
            heads=getattr(core, parts.heads),
            query=entering[0],
            key=entering[1],
            value=entering[2],
            output=_linear(attention) - sum(entering),
            norms=(
                _norm(getattr(layer, names.norm_attention)),
                _norm(getattr(layer, names.norm_mlp)),
            ),
            mlp=_linear(mlp),
            mlp_width=max(m.out_features for m in mlp.modules() if isinstance(m, nn.Linear)),
        )


def _linear(module: nn.Module) -> int:
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def _norm(norm: nn.Module) -> int:
    return _LAYERNORM * norm.weight.numel() if isinstance(norm, nn.LayerNorm) else 0


@dataclass(frozen=True)
class Description:
    """The cost of a model, as a function of the numbers of tokens that its layers fuse.

    Attributes:
        num_tokens: number of tokens that enter the first layer, prefix tokens included.
        num_layers: number of layers of the encoder.
        layer: cost of one layer.
        around: multiply-accumulates outside of the layers, without fusion.
        per_token: part of ``around`` for each token that leaves the last layer.
        num_read: number of prefix tokens the last layer outputs; ``None`` for all tokens.
    """

    num_tokens: int
    num_layers: int
    layer: LayerCost
    around: int
    per_token: int
    num_read: int | None = None

    @property
    def unfused(self) -> int:
        """Multiply-accumulates of one image without fusion, with all tokens in every layer.

        This is the cost of the model in transformers, and budgets are fractions of it.
        """
        return self.around + self.num_layers * _plain_layer(self.layer, self.num_tokens)

    def cost(self, settings: FusionConfigMixin, fused_by_layer: Sequence[int]) -> int:
        """Multiply-accumulates of one image, for the number of tokens that each layer fuses."""
        tokens, total, prefix = self.num_tokens, self.around, settings.num_prefix_tokens
        reducer = build_reducer(settings)
        for index, fused in enumerate(fused_by_layer):
            read = self.num_read if index == len(fused_by_layer) - 1 else None
            here = None
            if fused and reducer is not None:
                here = reducer.for_layer(index, len(fused_by_layer))
            if here is None or not (read is None or here.stage.ahead):
                total += _plain_layer(self.layer, tokens, read)
            else:
                total += _layer(self.layer, here, prefix, tokens, fused, read)
            tokens = tokens - fused if read is None else read
        return total - self.per_token * (self.num_tokens - tokens)

    def of(self, settings: FusionConfigMixin, **amount: Any) -> int:
        """Multiply-accumulates of one image for an ``r`` or ``keep_rate``, or for the settings."""
        return self.cost(settings, settings.tokens_fused(self.num_tokens, **amount))


def multiply_accumulates(
    model: Any,
    *,
    r: TokensFused | None = None,
    keep_rate: KeepRate | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> int:
    """Multiply-accumulates of one forward pass on one image.

    Args:
        model: configuration of this library, for its classifier; model of this library; or model
            that :func:`.apply.fuse_tokens` was applied to, of which the vision encoder is counted.
        r, keep_rate: amount of fusion instead of the configuration's; at most one of them.
        image_size: height and width in pixels; by default those of the configuration.

    Raises:
        ValueError: if ``r`` or ``keep_rate`` is not allowed.
    """
    return describe(model, image_size).of(fusion_config_of(model), r=r, keep_rate=keep_rate)


def fusion_config_of(model: Any) -> FusionConfigMixin:
    """The current settings of fusion of a model or a configuration."""
    if isinstance(model, FusedModel):
        return model.fused_layers[0].active().settings
    return getattr(model, "config", model)


def describe(model: Any, image_size: int | tuple[int, int] | None = None) -> Description:
    """Compute the cost description of a model; see :func:`multiply_accumulates`."""
    if isinstance(model, FusedModel):
        return _count_hosted(model, image_size)
    config: Any = fusion_config_of(model)
    size = config.usual_size if image_size is None else as_pair(image_size)
    if model is config:
        left_out = set(FusionConfigMixin.__dataclass_fields__) - {"restore", "skip_unread"}
        kept = {name: value for name, value in config.to_dict().items() if name not in left_out}
        own: Any = type(config)
        return _described(own, json.dumps(kept, sort_keys=True, default=str), size)
    return _count(model, config, size)


@functools.lru_cache(maxsize=64)
def _described(config_class: Any, settings: str, size: tuple[int, int]) -> Description:
    config = config_class.from_dict(json.loads(settings))
    with torch.device("meta"):
        model = BACKBONES[config.model_type].classifier(config)
    return _count(model.eval(), config, size)


def _count(model: Any, config: Any, size: tuple[int, int]) -> Description:
    layers = next(m for m in model.modules() if isinstance(m, FusedLayerList))
    channels = config.num_channels
    options: dict[str, Any] = {}
    if size != as_pair(config.image_size):
        options["interpolate_pos_encoding"] = True
    layer, num_tokens, num_layers = LayerCost.of(layers), config.num_tokens(size), len(layers)
    given = torch.empty(1, channels, *size)
    total = counted(model, given, r=0, output_fusion=True, **options)  # computes all tokens
    in_layers = num_layers * _plain_layer(layer, num_tokens)
    entry = BACKBONES[config.model_type]
    per_token = _LAYERNORM * config.hidden_size if entry.norms_all_tokens else 0
    if not config.restore:
        per_token += entry.read_per_token(config)
    around, read = total - in_layers, model.num_read_tokens
    return Description(num_tokens, num_layers, layer, around, per_token, read)


def _count_hosted(model: Any, image_size: int | tuple[int, int] | None) -> Description:
    """Count the vision encoder in a model of transformers."""
    encoder = find_encoders(model)[0]
    inputs, options = encoder.family.example(encoder.owner, image_size)
    layers, seen = encoder.layers, []
    assert isinstance(layers, HostedLayerList)
    hook = layers.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    try:
        with fusion_of(model, reduction="none"):
            total = counted(encoder.owner, inputs, **options)
    finally:
        hook.remove()
    layer = LayerCost.of(layers)
    around = total - len(layers) * _plain_layer(layer, seen[0])
    read = layers.active().settings.num_read_tokens
    return Description(seen[0], len(layers), layer, around, 0, read)


@torch.no_grad()
def counted(model: nn.Module, *inputs: Tensor, **options: Any) -> int:
    """Multiply-accumulates of a call; only the shapes of its tensors are used."""
    state = {
        name: torch.empty_like(value, device="meta") if value.device.type != "meta" else value
        for name, value in (*model.named_parameters(), *model.named_buffers())
    }
    with FlopCounterMode(display=False, custom_mapping=_NORMS) as counter:
        on_meta = tuple(x.to("meta", _dtype(model)) for x in inputs)
        torch.func.functional_call(model, state, on_meta, options)
    return counter.get_total_flops() // 2


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _layernorm_flops(shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * _LAYERNORM * torch.Size(shape).numel()


_NORMS: dict[Any, Callable[..., int]] = {torch.ops.aten.native_layer_norm: _layernorm_flops}


def _plain_layer(layer: LayerCost, tokens: int, read: int | None = None) -> int:
    """Cost of a layer that fuses nothing, and outputs ``read`` tokens, or all for ``None``."""
    queries = tokens if read is None else read
    looked_at = tokens * (layer.norms[0] + layer.key + layer.value)
    return looked_at + queries * (layer.query + 2 * tokens * layer.width + layer.after)


def _layer(
    layer: LayerCost, reducer: Reducer, prefix: int, tokens: int, fused: int, read: int | None
) -> int:
    """Cost of a layer that reduces ``tokens``, prefix included, to ``tokens - fused``."""
    score, (first, second) = tokens * tokens * layer.width, layer.norms
    left = tokens - fused
    choice = reducer.multiply_accumulates(tokens - prefix, fused, layer.width, layer.heads)
    if reducer.stage is Stage.AFTER_ATTENTION:
        saved = fused * (second + layer.mlp)
        return choice + _plain_layer(layer, tokens) - saved
    if reducer.stage is Stage.AFTER_MLP:
        return choice + _plain_layer(layer, tokens)
    before = tokens * (layer.query + layer.key + first) + score  # the map of all tokens
    if reducer.stage is Stage.RECOMPUTE:
        return choice + before + _plain_layer(layer, left, read)
    rows = left if read is None else read
    # Linear pooling applies the attention rows of all tokens, and then fuses the outputs.
    applied = (tokens if read is None else read, tokens) if reducer.pools_linearly else (rows, left)
    after = left * (first + layer.value) + rows * layer.after
    return choice + before + after + math.prod(applied) * layer.width


def r_for_budget(
    model: Any, fraction: float, *, image_size: int | None = None
) -> tuple[int, list[int | float]]:
    """Find the smallest r whose multiply-accumulates stay within a budget.

    Args:
        model: see :func:`multiply_accumulates`.
        fraction: budget as a fraction of the model's cost without fusion.
        image_size: height and width in pixels; by default those of the configuration.

    Returns:
        The r, constant or with the configuration's inflection; and a list with one r per layer
        that costs closer to the budget. The list starts from the r and fuses less, first layers
        first, as long as the budget allows.

    Raises:
        ValueError: if the fraction is not in (0, 1], no r meets the budget, or the method does not
            use ``r``.
    """
    settings = fusion_config_of(model)
    _check_budget(settings, fraction, "r")
    described = describe(model, image_size)
    tokens = described.num_tokens

    def cost(r: TokensFused) -> int:
        return described.of(settings, r=r)

    budget = fraction * described.unfused
    most = max(1, (tokens - settings.num_prefix_tokens) // 2)
    fitting = (r for r in range(most + 1) if cost(r) <= budget)
    constant = next(fitting, None)
    if constant is None:
        raise _too_small(fraction, f"r={most}", cost(most) / described.unfused)
    schedule: list[int | float] = list(settings.tokens_fused(tokens, constant))
    changed = True
    while changed:
        changed = False
        for layer, fused in enumerate(schedule):
            less = [*schedule[:layer], fused - 1, *schedule[layer + 1 :]]
            if fused and cost(less) <= budget:
                schedule, changed = list(settings.tokens_fused(tokens, less)), True
    return constant, schedule


def keep_rate_for_budget(model: Any, fraction: float, *, image_size: int | None = None) -> float:
    """Find the largest keep rate, in steps of 0.001, that stays within a budget.

    Args:
        model: see :func:`multiply_accumulates`.
        fraction: budget as a fraction of the model's cost without fusion.
        image_size: height and width in pixels; by default those of the configuration.

    Raises:
        ValueError: if the fraction is not in (0, 1], no rate meets the budget, or the method does
            not use ``keep_rate``.
    """
    settings = fusion_config_of(model)
    _check_budget(settings, fraction, "keep_rate")
    described = describe(model, image_size)

    def cost(thousandths: int) -> int:
        return described.of(settings, keep_rate=thousandths / 1000)

    budget = fraction * described.unfused
    fitting = (rate for rate in range(1000, 0, -1) if cost(rate) <= budget)
    found = next(fitting, None)
    if found is None:
        raise _too_small(fraction, "keep_rate=0.001", cost(1) / described.unfused)
    return found / 1000


def _check_budget(settings: FusionConfigMixin, fraction: float, amount: str) -> None:
    if isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise ValueError(f"budget {fraction!r} is not allowed: it must be above 0 and at most 1")
    reducer = settings.reducer_class
    if reducer is None:
        raise ValueError("reduction='none' meets no budget: choose a reduction")
    if reducer.amount != amount:
        raise ValueError(
            f"reduction={settings.reduction!r} meets a budget by its {reducer.amount}, not by "
            f"{amount}: set {reducer.amount}=auto:{fraction}"
        )


def _too_small(fraction: float, least: str, left: float) -> ValueError:
    return ValueError(
        f"budget {fraction!r} is not allowed: with {least}, the most that these settings can "
        f"fuse, {left:.3f} of the cost remain"
    )


def resolve_budget(model: Any, setting: str, value: Any, *, image_size: int | None = None) -> Any:
    """Replace text such as ``"auto:0.56"`` by the amount for that budget; return other values.

    Args:
        model: see :func:`multiply_accumulates`.
        setting: ``"r"``, for the list of :func:`r_for_budget`, or ``"keep_rate"``, for
            :func:`keep_rate_for_budget`.

    Raises:
        ValueError: if the text has another form, or as these two functions raise.
    """
    if not isinstance(value, str):
        return value
    kind, _, fraction = value.partition(":")
    try:
        if kind != "auto":
            raise ValueError
        budget = float(fraction)
    except ValueError:
        raise ValueError(
            f"{setting}={value!r} is not allowed: it must be a number, a list of numbers with one "
            "per layer, or auto:FRACTION, such as auto:0.56 for what leaves 56% of the "
            "multiply-accumulates"
        ) from None
    if setting == "keep_rate":
        return keep_rate_for_budget(model, budget, image_size=image_size)
    return r_for_budget(model, budget, image_size=image_size)[1]
