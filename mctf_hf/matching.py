"""Which tokens attract each other, and bipartite soft matching of those that attract most.

Multi-criteria Token Fusion (MCTF, CVPR 2024, arXiv 2403.10030), sections 3.1 and 3.2. The
patch tokens are split by the parity of their position into alpha (even) and beta (odd); prefix
tokens (class, distillation, registers) take no part.

Shapes: ``b`` images, ``n`` tokens of which the first ``p`` are prefix tokens, ``d`` channels,
``n_alpha`` and ``n_beta`` patch tokens on the two sides.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def bipartition(num_prefix_tokens: int) -> tuple[slice, slice]:
    """Positions of the alpha and of the beta tokens: the even and the odd ones after the prefix."""
    odd = num_prefix_tokens % 2
    return slice(num_prefix_tokens + odd, None, 2), slice(num_prefix_tokens + 1 - odd, None, 2)


def similarity(tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """Cosine similarity of alpha to beta tokens, in [0, 1]: (b, n, d) -> (b, n_alpha, n_beta).

    At least in float32, also under autocast: half precision could not tell similar tokens apart.
    """
    alpha, beta = bipartition(num_prefix_tokens)
    with torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1)
        return (unit[:, alpha] @ unit[:, beta].mT + 1) / 2


def attraction(
    tokens: Tensor,
    informativeness: Tensor,
    sizes: Tensor | None,
    *,
    num_prefix_tokens: int,
    tau_sim: float,
    tau_info: float,
    tau_size: float,
) -> Tensor:
    """Product of the three criteria of MCTF (equations 4 to 7), each to the power 1 / tau.

    Similar tokens attract, so do uninformative ones and small ones. A temperature of 0 switches a
    criterion off. Informativeness and size enter relative to the image's least informative and
    smallest token, as a product of one factor per token, so no pairwise map of them is built.

    Args:
        tokens: (b, n, d), the layer's input.
        informativeness: (b, n), positive; how much attention each token receives.
        sizes: (b, n), how many patches each token stands for; ``None`` if all stand for one.

    Returns:
        (b, n_alpha, n_beta), in float32 or the tokens' own precision where that is higher.
    """
    precision = torch.promote_types(tokens.dtype, torch.float32)
    alpha, beta = bipartition(num_prefix_tokens)
    if tau_sim:
        scores = similarity(tokens, num_prefix_tokens)
        scores = scores if tau_sim == 1 else scores.clamp(min=0).pow(1 / tau_sim)
    else:
        sides = tokens[:, alpha].shape[1], tokens[:, beta].shape[1]
        scores = tokens.new_ones(tokens.shape[0], *sides, dtype=precision)
    for quantity, tau in ((informativeness, tau_info), (sizes, tau_size)):
        if tau and quantity is not None:
            inverse = quantity.to(precision).reciprocal()
            factor = (inverse / inverse.amax(1, keepdim=True)).pow(1 / tau)
            scores = scores * factor[:, alpha, None] * factor[:, None, beta]
    return scores


def _descending_rank(scores: Tensor) -> Tensor:
    """Place of each score, the highest at 0: (b, n) -> (b, n) int64."""
    order = scores.argsort(1, descending=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def bipartite_soft_matching(
    scores: Tensor, r: int, *, num_prefix_tokens: int, bidirectional: bool = True
) -> tuple[Tensor, int]:
    """Let the ``r`` most attracted tokens join the token they are attracted to most.

    Forward, ``r // 2`` alpha tokens join their best beta token. Backward, the remaining beta
    tokens join their best alpha token among those still there, together with all that they have
    received (MCTF, section 3.2). One-directional matching, as in ToMe (arXiv 2210.09461), fuses
    all ``r`` forward.

    The new order is: prefix tokens, the alpha tokens left by position (without prefix tokens: by
    descending score), the beta tokens left by descending score of the backward step (by position
    if there is none). It is part of the method, for the next layer splits by position.

    Args:
        scores: (b, n_alpha, n_beta), from :func:`attraction`.
        r: how many tokens to fuse, at most half of the ``n_alpha + n_beta`` patch tokens.

    Returns:
        The assignment (b, n) of every token to its new index, and the number of tokens left.
    """
    batch, num_alpha, num_beta = scores.shape
    device = scores.device
    forward, backward = (r // 2, r - r // 2) if bidirectional else (r, 0)
    first_beta = num_prefix_tokens + num_alpha - forward

    best, partner_of_alpha = scores.max(2)  # [b, n_alpha]
    if num_prefix_tokens:
        leaving = torch.zeros_like(best, dtype=torch.bool)
        leaving = leaving.scatter(1, best.topk(forward, sorted=False).indices, True)
        alpha_index = num_prefix_tokens - 1 + (~leaving).cumsum(1)
    else:
        rank = _descending_rank(best)
        leaving = rank < forward
        alpha_index = rank - forward

    if backward:
        best, partner_of_beta = scores.masked_fill(leaving[:, :, None], -torch.inf).max(1)
        rank = _descending_rank(best)
        beta_index = torch.where(
            rank < backward, alpha_index.gather(1, partner_of_beta), first_beta - backward + rank
        )
    else:
        beta_index = first_beta + torch.arange(num_beta, device=device).expand(batch, -1)
    alpha_index = torch.where(leaving, beta_index.gather(1, partner_of_alpha), alpha_index)

    alpha, beta = bipartition(num_prefix_tokens)
    num_tokens = num_prefix_tokens + num_alpha + num_beta
    assignment = torch.arange(num_tokens, device=device).repeat(batch, 1)
    assignment[:, alpha] = alpha_index
    assignment[:, beta] = beta_index
    return assignment, num_tokens - r
