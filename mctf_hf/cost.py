"""Multiply-accumulates of a configuration, in closed form.

What is counted, as the papers' "FLOPs" are: convolutions, linear layers, matrix products, and five
operations per element of a LayerNorm; softmax, activations and index arithmetic are not. It is
what this library executes: attention is applied to the values of all n old positions, where the
official code applies an n' x n' map, and the similarity of the tokens counts too.
"""

from .configuration_mctf import MCTFViTConfig, TokensFused, as_pair

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
    patch_height, patch_width = as_pair(config.patch_size)
    tokens, width = config.num_tokens(image_size), config.hidden_size
    patches = tokens - config.num_prefix_tokens
    total = patches * width * config.num_channels * patch_height * patch_width
    for fused in config.tokens_fused(tokens, r):
        total += _layer(config, tokens, fused)
        tokens -= fused
    return total + _LAYERNORM * tokens * width + width * (config.num_labels or 0)


def _layer(config: MCTFViTConfig, tokens: int, fused: int) -> int:
    """One layer in which ``tokens`` become ``tokens - fused``."""
    width = config.hidden_size
    projection, score, norm = width * width, tokens * tokens * width, _LAYERNORM * width
    if not fused:
        return tokens * (4 * projection + 2 * norm) + 2 * score + _mlp(config, tokens)
    patches = tokens - config.num_prefix_tokens
    alpha = patches // 2
    matching = alpha * (patches - alpha) * width if config.tau_sim else 0
    left = tokens - fused
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
