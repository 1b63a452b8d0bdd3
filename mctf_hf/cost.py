"""Multiply-accumulates of a configuration, in closed form.

What is counted, as the papers' "FLOPs" are: convolutions, linear layers, matrix products, and five
operations per element of a LayerNorm; softmax, activations and index arithmetic are not. It is
what this library executes: attention is applied to the values of all n old positions, where the
official code applies an n' x n' map, and the similarity of the tokens counts too.
"""

import math
from typing import Any

from .configuration_mctf import (
    KeepRate,
    MCTFLVViTConfig,
    MCTFT2TViTConfig,
    MCTFViTConfig,
    TokensFused,
    as_pair,
)
from .reducers import Stage, build_reducer

_LAYERNORM = 5


def multiply_accumulates(
    config: MCTFViTConfig,
    *,
    r: TokensFused | None = None,
    keep_rate: KeepRate | None = None,
    image_size: int | None = None,
) -> int:
    """Multiply-accumulates of one forward pass of the classifier on one image.

    Args:
        r, keep_rate: one of them may be used instead of the configuration's own.
        image_size: height and width in pixels, instead of the configuration's own.

    Raises:
        ValueError: for an ``r`` or a ``keep_rate`` that is not allowed.
    """
    height, width = as_pair(config.image_size if image_size is None else image_size)
    tokens = config.num_tokens((height, width))
    total = _patches(config, height, width) + _coarse_patches(config, height, width)
    for fused in config.tokens_fused(tokens, r, keep_rate):
        total += _layer(config, tokens, fused)
        tokens -= fused
    read = 1 + config.distillation_head  # tokens that heads read
    if isinstance(config, MCTFLVViTConfig) and config.auxiliary_weight:
        read += tokens - config.num_prefix_tokens
    heads = read * config.hidden_size * (config.num_labels or 0)
    return total + _LAYERNORM * tokens * config.hidden_size + heads


def _patches(config: MCTFViTConfig, height: int, width: int) -> int:
    """Making the patches of an image of ``height`` x ``width`` pixels."""
    patch_height, patch_width = as_pair(config.patch_size)
    pixels, patches = height * width, (height // patch_height) * (width // patch_width)
    if isinstance(config, MCTFT2TViTConfig):
        dims = (49 * config.num_channels, 9 * config.token_dim)  # of windows
        steps = zip(dims, (pixels // 16, pixels // 64), strict=True)
        transformers = sum(_token_transformer(config, *step) for step in steps)
        return transformers + patches * 9 * config.token_dim * config.hidden_size
    if isinstance(config, MCTFLVViTConfig):
        channels = config.stem_channels
        stem = (49 * config.num_channels + 2 * 9 * channels) * channels
        projection = (patch_height // 2) * (patch_width // 2) * channels * config.hidden_size
        return pixels // 4 * stem + patches * projection
    return patches * config.hidden_size * config.num_channels * patch_height * patch_width


def _coarse_patches(config: MCTFViTConfig, height: int, width: int) -> int:
    """Embedding the coarser patches of all scales and mixing them in."""
    patch_height, patch_width = as_pair(config.patch_size)
    total = 0
    for scale in config.multi_scale or ():
        patches = math.ceil(height / patch_height / scale) * math.ceil(width / patch_width / scale)
        pixels = scale * patch_height * scale * patch_width * config.num_channels
        total += patches * config.hidden_size * (pixels + config.hidden_size)
    return total


def _token_transformer(config: MCTFT2TViTConfig, dim: int, tokens: int) -> int:
    """One of the transformers in T2T-ViT's front end, from ``dim`` to ``token_dim`` channels."""
    width = config.token_dim
    linear = 3 * dim * width + 3 * width * width + _LAYERNORM * (dim + width)
    if config.tokens_type == "transformer":
        return tokens * (linear + 2 * tokens * width)
    features = width // 2  # of keys and queries, their products, and the products with values
    return tokens * (linear + 4 * features * width)


def r_for_budget(
    config: MCTFViTConfig, fraction: float, *, image_size: int | None = None
) -> tuple[int, list[int | float]]:
    """The r that brings the multiply-accumulates nearest to a budget, from below.

    Args:
        fraction: the budget, as a part of what the model costs without fusion.
        image_size: height and width in pixels, instead of the configuration's own.

    Returns:
        The r, constant or with the configuration's inflection; and a list with one r per layer,
        which comes nearer: starting from that r it fuses less, first layers first, for as long as
        the budget allows.

    Raises:
        ValueError: for a fraction outside (0, 1], a budget that no r meets, or a configuration
            that reduces nothing, or by ``keep_rate``.
    """
    _check_budget(config, fraction, "r")
    tokens = config.num_tokens(image_size)
    budget = fraction * multiply_accumulates(config, r=0, image_size=image_size)

    def cost(r: TokensFused) -> int:
        return multiply_accumulates(config, r=r, image_size=image_size)

    most = max(1, (tokens - config.num_prefix_tokens) // 2)
    fitting = (r for r in range(most + 1) if cost(r) <= budget)
    constant = next(fitting, None)
    if constant is None:
        raise _too_small(fraction, f"r={most}", cost(most) / cost(0))
    schedule: list[int | float] = list(config.tokens_fused(tokens, constant))
    changed = True
    while changed:
        changed = False
        for layer, fused in enumerate(schedule):
            less = [*schedule[:layer], fused - 1, *schedule[layer + 1 :]]
            if fused and cost(less) <= budget:
                schedule, changed = list(config.tokens_fused(tokens, less)), True
    return constant, schedule


def keep_rate_for_budget(
    config: MCTFViTConfig, fraction: float, *, image_size: int | None = None
) -> float:
    """The largest keep rate, in thousandths, whose multiply-accumulates stay within a budget.

    Args:
        fraction: the budget, as a part of what the model costs without fusion.
        image_size: height and width in pixels, instead of the configuration's own.

    Raises:
        ValueError: for a fraction outside (0, 1], a budget that no rate meets, or a configuration
            that reduces nothing, or by ``r``.
    """
    _check_budget(config, fraction, "keep_rate")
    budget = fraction * multiply_accumulates(config, r=0, image_size=image_size)

    def cost(thousandths: int) -> int:
        return multiply_accumulates(config, keep_rate=thousandths / 1000, image_size=image_size)

    fitting = (rate for rate in range(1000, 0, -1) if cost(rate) <= budget)
    found = next(fitting, None)
    if found is None:
        raise _too_small(fraction, "keep_rate=0.001", cost(1) / cost(1000))
    return found / 1000


def _check_budget(config: MCTFViTConfig, fraction: float, amount: str) -> None:
    if isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise ValueError(f"budget {fraction!r} is not allowed: it is above 0 and at most 1")
    reducer = config.reducer_class
    if reducer is None:
        raise ValueError("reduction='none' meets no budget: choose a reduction")
    if reducer.amount != amount:
        raise ValueError(
            f"reduction={config.reduction!r} meets a budget by its {reducer.amount}, not by "
            f"{amount}: set {reducer.amount}=auto:{fraction}"
        )


def _too_small(fraction: float, least: str, left: float) -> ValueError:
    return ValueError(
        f"budget {fraction!r} is not allowed: with {least}, the most that these settings can "
        f"fuse, {left:.3f} of the cost remain"
    )


def resolve_budget(
    config: MCTFViTConfig, setting: str, value: Any, *, image_size: int | None = None
) -> Any:
    """Turn ``"auto:0.56"`` into what costs as much; leave any other value alone.

    Args:
        setting: ``"r"``, for :func:`r_for_budget`'s list, or ``"keep_rate"``, for
            :func:`keep_rate_for_budget`.

    Raises:
        ValueError: for text of another form, and as these two.
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
            f"{setting}={value!r} is not allowed: it is a number, a list of numbers with one per "
            "layer, or auto:FRACTION, such as auto:0.56 for what leaves 56% of the "
            "multiply-accumulates"
        ) from None
    if setting == "keep_rate":
        return keep_rate_for_budget(config, budget, image_size=image_size)
    return r_for_budget(config, budget, image_size=image_size)[1]


def _layer(config: MCTFViTConfig, tokens: int, fused: int) -> int:
    """One layer in which ``tokens`` become ``tokens - fused``."""
    width = config.hidden_size
    projection, score, norm = width * width, tokens * tokens * width, _LAYERNORM * width
    reducer = build_reducer(config)
    if not fused or reducer is None:
        return tokens * (4 * projection + 2 * norm) + 2 * score + _mlp(config, tokens)
    patches, left = tokens - config.num_prefix_tokens, tokens - fused
    choice = reducer.multiply_accumulates(patches, fused, width, config.num_attention_heads)
    if reducer.stage is Stage.AFTER_ATTENTION:
        attention = tokens * (4 * projection + norm) + 2 * score
        return attention + choice + left * norm + _mlp(config, left)
    if reducer.stage is Stage.AFTER_MLP:
        return choice + _layer(config, tokens, 0)
    before = 2 * tokens * projection + score + tokens * norm  # queries, keys, map of all tokens
    if reducer.stage is Stage.RECOMPUTE:
        return choice + before + _layer(config, left, 0)
    applied = score if reducer.pools_linearly else left * left * width
    after = 2 * left * projection + applied + 2 * left * norm
    return choice + before + after + _mlp(config, left)


def _mlp(config: MCTFViTConfig, tokens: int) -> int:
    return 2 * tokens * config.hidden_size * config.intermediate_size
