"""Attraction between tokens, and bipartite soft matching of the tokens with the most attraction.

Multi-criteria Token Fusion (MCTF, CVPR 2024, arXiv 2403.10030), sections 3.1 and 3.2. The
patch tokens are split by the parity of their position into alpha (even) and beta (odd); prefix
tokens (class, distillation, registers) take no part.

Shapes: ``b`` images, ``n`` tokens of which the first ``p`` are prefix tokens, ``d`` channels,
``n_alpha`` and ``n_beta`` patch tokens on the two sides.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .fusion import Reduction


def bipartition(num_prefix_tokens: int) -> tuple[slice, slice]:
    """Positions of the alpha (even) and beta (odd) tokens, without the prefix tokens."""
    odd = num_prefix_tokens % 2
    return slice(num_prefix_tokens + odd, None, 2), slice(num_prefix_tokens + 1 - odd, None, 2)


def similarity(tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """Cosine similarity of alpha to beta tokens, in [0, 1]: (b, n, d) -> (b, n_alpha, n_beta).

    In float32 or more, also under autocast, because half precision cannot separate similar tokens.
    """
    alpha, beta = bipartition(num_prefix_tokens)
    unit = unit_vectors(tokens)
    half = unit.new_full((1, 1, 1), 0.5)
    with full_precision(unit):
        return torch.baddbmm(half, unit[:, alpha], unit[:, beta].mT, alpha=0.5)


def cosine_similarity(tokens: Tensor) -> Tensor:
    """Cosine similarity of all pairs, in [-1, 1], in float32 or more: (b, n, d) -> (b, n, n)."""
    unit = unit_vectors(tokens)
    with full_precision(unit):
        return unit @ unit.mT


def unit_vectors(tokens: Tensor) -> Tensor:
    """Tokens scaled to length 1, in float32 or more: (b, n, d) -> (b, n, d)."""
    tokens = tokens.to(_precision(tokens))
    return tokens / torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp_(min=1e-12)


def full_precision(x: Tensor) -> AbstractContextManager:
    """Context manager that switches autocast off for matrix products."""
    if x.is_cpu and not torch.is_autocast_enabled("cpu"):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def attraction(
    tokens: Tensor,
    informativeness: Tensor,
    sizes: Tensor | None,
    *,
    num_prefix_tokens: int,
    tau_sim: float,
    tau_info: float,
    tau_size: float,
    keys: Tensor | None = None,
    key_share: float = 0.0,
) -> Tensor:
    """Product of the three criteria of MCTF (equations 4 to 7), each to the power 1 / tau.

    Attraction is high between similar, uninformative and small tokens. A temperature of 0 switches
    a criterion off. Informativeness and size are one factor per token, so no pairwise map of them
    is needed. Informativeness is relative to the least informative token of the image.

    Args:
        tokens: (b, n, d), the layer's input.
        informativeness: (b, n), positive; attention that each token receives.
        sizes: (b, n), number of patches per token, at least 1; ``None`` if all are 1.
        keys: (b, n, d'), keys of the attention, used with a ``key_share`` above 0.
        key_share: weight of the key similarity in its geometric mean with the token similarity.

    Returns:
        (b, n_alpha, n_beta), in float32, or in the tokens' dtype if that is more precise.
    """
    alpha, beta = bipartition(num_prefix_tokens)
    if tau_sim:
        scores = _joint_similarity(tokens, keys, key_share, num_prefix_tokens)
        if tau_sim != 1:
            scores = scores.clamp_(min=0).pow_(1 / tau_sim)
    else:
        sides = tokens[:, alpha].shape[1], tokens[:, beta].shape[1]
        scores = tokens.new_ones(tokens.shape[0], *sides, dtype=_precision(tokens))
    factor = None
    if tau_info:
        relative = informativeness / informativeness.amin(1, keepdim=True)
        factor = relative.pow(-1 / tau_info)
    if tau_size and sizes is not None:
        small = sizes.pow(-1 / tau_size)
        factor = small if factor is None else factor * small
    if factor is not None:
        factor = factor.to(scores.dtype)
        scores = scores.mul_(factor[:, alpha, None]).mul_(factor[:, None, beta])
    return scores


def _joint_similarity(
    tokens: Tensor, keys: Tensor | None, key_share: float, num_prefix_tokens: int
) -> Tensor:
    """Geometric mean of the token similarity and the key similarity: (b, n_alpha, n_beta)."""
    if keys is None or not key_share:
        return similarity(tokens, num_prefix_tokens)
    of_keys = similarity(keys, num_prefix_tokens)
    if key_share == 1:
        return of_keys
    of_tokens = similarity(tokens, num_prefix_tokens)
    return of_tokens.clamp_(min=0).pow_(1 - key_share).mul_(of_keys.clamp_(min=0).pow_(key_share))


def _precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def bipartite_soft_matching(
    scores: Tensor, r: int, *, num_prefix_tokens: int, bidirectional: bool = True
) -> Reduction:
    """Merge the ``r`` tokens with the most attraction into the tokens that attract them most.

    In the forward step, ``r // 2`` alpha tokens join their best beta token. In the backward step,
    ``r - r // 2`` beta tokens, with the alpha tokens that joined them, join their best remaining
    alpha token (MCTF, section 3.2). One-directional matching, as in ToMe (arXiv 2210.09461), fuses
    all ``r`` tokens in the forward step.

    The new order is: prefix tokens; remaining alpha tokens by position (without prefix tokens: by
    descending score); remaining beta tokens by descending score of the backward step (without it:
    by position). The order is part of the method, because the next layer splits by position.

    Args:
        scores: (b, n_alpha, n_beta), from :func:`attraction`; they are overwritten.
        r: number of tokens to fuse, at most half of the ``n_alpha + n_beta`` patch tokens.

    Returns:
        The reduction, without weights.
    """
    batch, num_alpha, num_beta = scores.shape
    num_tokens = num_prefix_tokens + num_alpha + num_beta
    forward, backward = (r // 2, r - r // 2) if bidirectional else (r, 0)
    rows = torch.arange(batch * num_tokens, device=scores.device)
    tokens = rows.view(batch, num_tokens)
    alpha, beta = (tokens[:, side] for side in bipartition(num_prefix_tokens))

    best, partner_of_alpha = scores.max(2)  # [b, n_alpha]
    order = best.argsort(1, descending=True)
    leaving, alphas = order[:, :forward], alpha.gather(1, order)
    staying = alphas[:, forward:]
    if num_prefix_tokens:
        staying = staying.sort(1).values
    merged = alphas[:, :forward]
    partners = beta.gather(1, partner_of_alpha.gather(1, leaving))
    betas = beta
    if backward:
        gone = leaving[:, :, None].expand(-1, -1, num_beta)
        best, partner_of_beta = scores.scatter_(1, gone, -torch.inf).max(1)  # [b, n_beta]
        order = best.argsort(1, descending=True)
        betas = beta.gather(1, order)
        merged = torch.cat([merged, betas[:, :backward]], 1)
        back = alpha.gather(1, partner_of_beta.gather(1, order[:, :backward]))
        partners = torch.cat([partners, back], 1)
    kept = torch.cat([tokens[:, :num_prefix_tokens], staying, betas[:, backward:]], 1).flatten()
    merged, partners = merged.flatten(), partners.flatten()

    new = torch.zeros_like(rows).scatter_(0, kept, rows[: kept.shape[0]])
    for _ in range(1 + bidirectional):  # an alpha's partner may join another alpha
        destination = new.index_select(0, partners)
        new.scatter_(0, merged, destination)
    return Reduction(batch, new, kept, merged, destination)
