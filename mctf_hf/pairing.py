"""Merging by energy: tokens that are similar to many others are merged first.

PiToMe (NeurIPS 2024, arXiv 2405.16148). Shapes: ``b`` images, ``n`` tokens of which the first
``p`` are prefix tokens, which are never merged, and ``k = n - p`` patch tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .fusion import Reduction


def energy(cosines: Tensor, margin: float) -> Tensor:
    """Energy of each token, high if many tokens are similar: (b, k, k) -> (b, k) (equation 4).

    It is the mean of ``ELU(cosine - margin)`` over all tokens.
    """
    return F.elu(cosines - margin).mean(2)


def pair_highest(cosines: Tensor, order: Tensor, r: int, *, num_prefix_tokens: int) -> Reduction:
    """Merge the first ``2 r`` tokens of a ranking in pairs (algorithm 1).

    Tokens on even ranks join the most similar token on an odd rank. In the new order, the tokens
    outside of the first ``2 r`` come first, by rank, and then those on odd ranks.

    Args:
        cosines: (b, k, k).
        order: (b, k), tokens by descending energy.
        r: number of tokens to merge, at most k / 2.
    """
    leaving, staying = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2]
    partner = _between(cosines, leaving, staying).argmax(2)
    alone = order[:, 2 * r :]
    return _join(alone, staying, leaving, partner, cosines.shape[1], num_prefix_tokens)


def merge_within_ranking(
    cosines: Tensor, order: Tensor, r: int, *, num_prefix_tokens: int
) -> Reduction:
    """Merge the ``r`` tokens on even ranks that are most similar to a token on an odd rank.

    In the new order, the other tokens on even ranks come first, by descending cosine, and then
    those on odd ranks.

    Args:
        cosines, order, r: see :func:`pair_highest`.
    """
    even, odd = order[:, ::2], order[:, 1::2]
    best, partner = _between(cosines, even, odd).max(2)
    nearest = best.argsort(1, descending=True)
    leaving, alone = (even.gather(1, rank) for rank in (nearest[:, :r], nearest[:, r:]))
    partner = partner.gather(1, nearest[:, :r])
    return _join(alone, odd, leaving, partner, cosines.shape[1], num_prefix_tokens)


def _between(cosines: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Cosines at some rows and columns: (b, k, k) at (b, i) and (b, j) -> (b, i, j)."""
    picked = cosines.gather(1, rows[:, :, None].expand(-1, -1, cosines.shape[2]))
    return picked.gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))


def _join(
    alone: Tensor,
    staying: Tensor,
    leaving: Tensor,
    partner: Tensor,
    num_patches: int,
    num_prefix_tokens: int,
) -> Reduction:
    """Reduction with prefix tokens first, then ``alone``, then ``staying``.

    Args:
        alone, staying: (b, …), positions of the kept tokens among the patches.
        leaving: (b, r), positions of the patches that join one of ``staying``.
        partner: (b, r), index of that token in ``staying``.
    """
    prefix = torch.arange(num_prefix_tokens, device=alone.device).expand(alone.shape[0], -1)
    patches = torch.cat([alone, staying], 1) + num_prefix_tokens
    return Reduction.from_positions(
        torch.cat([prefix, patches], 1),
        leaving + num_prefix_tokens,
        partner + num_prefix_tokens + alone.shape[1],
        num_prefix_tokens + num_patches,
    )
