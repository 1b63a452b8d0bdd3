"""Reductions that keep the most important tokens.

Importance is one number per token, such as the attention from the class token. Shapes: ``b``
images, ``n`` tokens of which the first ``p`` are prefix tokens, ``d`` channels.
"""

import torch
from torch import Tensor

from .fusion import Reduction
from .matching import full_precision, unit_vectors


def keep_most_important(
    importance: Tensor, r: int, *, num_prefix_tokens: int, fuse_token: bool
) -> Reduction:
    """Keep prefix tokens and the most important of the other tokens, in descending order.

    Token reorganization of EViT (arXiv 2202.07800, section 3.2).

    Args:
        importance: (b, n).
        r: number of tokens by which the total decreases.
        fuse_token: whether to sum the other tokens, each times its importance, into one additional
            last token; else they are dropped. The sum is not divided by the importances.
    """
    kept, others = _by_importance(importance, r + fuse_token, num_prefix_tokens)
    weights = torch.ones_like(kept, dtype=importance.dtype)
    merged = others[:, :0]
    if fuse_token:
        merged = others[:, 1:]
        weights = torch.cat([weights, importance.gather(1, others[:, :1])], 1)
        kept = torch.cat([kept, others[:, :1]], 1)
    last = torch.full_like(merged, kept.shape[1] - 1)
    reduction = Reduction.from_positions(kept, merged, last, importance.shape[1])
    reduction.kept_weights = weights.view(-1, 1)
    reduction.merged_weights = importance.gather(1, merged).view(-1, 1)
    return reduction


def merge_into_most_important(
    tokens: Tensor, importance: Tensor, r: int, *, num_prefix_tokens: int
) -> Reduction:
    """Merge each of the ``r`` least important tokens into the most similar of the others.

    Token mergence (arXiv 2306.04897). Similarity is the cosine; merged tokens are means weighted by
    importance. The remaining tokens keep their order. Prefix tokens take no part.

    Args:
        tokens: (b, n, d).
        importance: (b, n), not negative.
        r: number of tokens to merge, less than the n - p patch tokens.
    """
    kept, others = _by_importance(importance, r, num_prefix_tokens)
    kept = kept.sort(1).values
    unit = unit_vectors(tokens)
    crucial = _at(unit, kept[:, num_prefix_tokens:])
    with full_precision(unit):
        partner = (_at(unit, others) @ crucial.mT).argmax(2)  # [b, r]
    reduction = Reduction.from_positions(
        kept, others, partner + num_prefix_tokens, importance.shape[1]
    )
    reduction.weigh(importance.clamp(min=torch.finfo(importance.dtype).tiny))
    return reduction


def drop_and_merge(
    tokens: Tensor, importance: Tensor, r: int, dropped: int, *, num_prefix_tokens: int
) -> Reduction:
    """Drop the least important tokens, and merge the next ones into those that stay.

    DiffRate (arXiv 2305.17997, section 3). Each merged token joins the token of highest cosine, in
    a plain mean; its size counts times that cosine, or not at all if that is negative. The new
    order is by descending importance.

    Args:
        tokens: (b, n, d).
        importance: (b, n).
        r: number of tokens to remove, less than the n - p patch tokens.
        dropped: number of these that are dropped.
    """
    kept, others = _by_importance(importance, r, num_prefix_tokens)
    merged = others[:, : r - dropped]
    unit = unit_vectors(tokens)
    with full_precision(unit):
        cosines = _at(unit, merged) @ _at(unit, kept[:, num_prefix_tokens:]).mT
    likeness, partner = cosines.max(2)  # [b, r - dropped]
    reduction = Reduction.from_positions(
        kept, merged, partner + num_prefix_tokens, importance.shape[1]
    )
    reduction.weigh(torch.ones_like(importance))
    reduction.size_factors = likeness.clamp(min=0).flatten()  # sizes have logarithms
    return reduction


def _by_importance(importance: Tensor, fewer: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Positions of prefix and most important tokens, and of the ``fewer`` least important ones."""
    order = importance[:, num_prefix_tokens:].argsort(1, descending=True) + num_prefix_tokens
    prefix = torch.arange(num_prefix_tokens, device=order.device).expand(order.shape[0], -1)
    left = order.shape[1] - fewer
    return torch.cat([prefix, order[:, :left]], 1), order[:, left:]


def _at(tokens: Tensor, positions: Tensor) -> Tensor:
    """(b, n, d) at (b, m) -> (b, m, d)."""
    return tokens.gather(1, positions[:, :, None].expand(-1, -1, tokens.shape[2]))
