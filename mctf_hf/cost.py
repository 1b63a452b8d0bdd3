"""Multiply-accumulates of a configuration, in closed form.

What is counted, as the papers' "FLOPs" are: convolutions, linear layers, matrix products, and five
operations per element of a LayerNorm; softmax, activations and index arithmetic are not. It is
what this library executes: attention is applied to the values of all n old positions, where the
official code applies an n' x n' map, and the similarity of the tokens counts too.
"""

from typing import Any

from .configuration_mctf import (
    MCTFLVViTConfig,
    MCTFT2TViTConfig,
    MCTFViTConfig,
    TokensFused,
    as_pair,
)

_LAYERNORM = 5


def multiply_accumulates(
    config: MCTFViTConfig, *, r: TokensFused | None = None, image_size: int | None = None
) -> int:
    """Multiply-accumulates of one forward pass of the classifier on one image.

    Args:
        r: used instead of the configuration's own.
        image_size: height and width in pixels, instead of the configuration's own.

    Raises:
        ValueError: for an ``r`` that is not allowed.
    """
    height, width = as_pair(config.image_size if image_size is None else image_size)
    tokens = config.num_tokens((height, width))
    total = _patches(config, height, width)
    for fused in config.tokens_fused(tokens, r):
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
        The constant r; and a list with one r per layer, which comes nearer: starting from the
        constant r it fuses less, first layers first, for as long as the budget allows.

    Raises:
        ValueError: for a fraction outside (0, 1], a budget that no r meets, or a configuration
            that reduces nothing.
    """
    if isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise ValueError(f"budget {fraction!r} is not allowed: it is above 0 and at most 1")
    if config.reduction == "none":
        raise ValueError("reduction='none' meets no budget: choose a reduction")
    tokens = config.num_tokens(image_size)
    budget = fraction * multiply_accumulates(config, r=0, image_size=image_size)

    def cost(r: TokensFused) -> int:
        return multiply_accumulates(config, r=r, image_size=image_size)

    most = max(1, (tokens - config.num_prefix_tokens) // 2)
    fitting = (r for r in range(most + 1) if cost(r) <= budget)
    constant = next(fitting, None)
    if constant is None:
        least = cost(most) / cost(0)
        raise ValueError(
            f"budget {fraction!r} is not allowed: with r={most}, the most that these settings can "
            f"fuse, {least:.3f} of the cost remain"
        )
    schedule: list[int | float] = list(config.tokens_fused(tokens, constant))
    changed = True
    while changed:
        changed = False
        for layer, fused in enumerate(schedule):
            less = [*schedule[:layer], fused - 1, *schedule[layer + 1 :]]
            if fused and cost(less) <= budget:
                schedule, changed = list(config.tokens_fused(tokens, less)), True
    return constant, schedule


def resolve_r(config: MCTFViTConfig, r: Any, *, image_size: int | None = None) -> Any:
    """Turn ``"auto:0.56"`` into the schedule of :func:`r_for_budget`; leave any other r alone.

    Raises:
        ValueError: for text of another form, and as :func:`r_for_budget`.
    """
    if not isinstance(r, str):
        return r
    kind, _, fraction = r.partition(":")
    try:
        if kind != "auto":
            raise ValueError
        budget = float(fraction)
    except ValueError:
        raise ValueError(
            f"r={r!r} is not allowed: r is a count, a fraction, a list of these, or auto:FRACTION, "
            "such as auto:0.56 for what leaves 56% of the multiply-accumulates"
        ) from None
    return r_for_budget(config, budget, image_size=image_size)[1]


def _layer(config: MCTFViTConfig, tokens: int, fused: int) -> int:
    """One layer in which ``tokens`` become ``tokens - fused``."""
    width = config.hidden_size
    projection, score, norm = width * width, tokens * tokens * width, _LAYERNORM * width
    if not fused:
        return tokens * (4 * projection + 2 * norm) + 2 * score + _mlp(config, tokens)
    patches = tokens - config.num_prefix_tokens
    alpha = patches // 2
    compares = config.tau_sim or config.reduction != "mctf"
    matching = alpha * (patches - alpha) * width if compares else 0
    left = tokens - fused
    if config.reduction == "tome":
        matching //= config.num_attention_heads  # keys, mean over heads, instead of tokens
        attention = tokens * (4 * projection + norm) + 2 * score
        return attention + matching + left * norm + _mlp(config, left)
    if config.one_step_ahead == "past":
        return matching + _layer(config, tokens, 0)
    before = 2 * tokens * projection + score + tokens * norm  # queries, keys, map of all tokens
    if config.one_step_ahead == "precise":
        return matching + before + _layer(config, left, 0)
    applied = left * left * width if config.pooling == "max" else score
    after = 2 * left * projection + applied + 2 * left * norm
    return matching + before + after + _mlp(config, left)


def _mlp(config: MCTFViTConfig, tokens: int) -> int:
    return 2 * tokens * config.hidden_size * config.intermediate_size
