"""A token reduction as data: which token goes where, and with which weight.

Every method of this library ends in the same small value, a :class:`Reduction`. It says of each
token the index of the new token that it becomes part of, and how much it counts there. Fusing is
then one weighted scatter, broadcasting back one gather, and two reductions compose by gathering
one assignment with the other.

Shapes: ``b`` images, ``n`` tokens before and ``m`` tokens after the reduction, ``d`` channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Reduction(NamedTuple):
    """How ``n`` tokens become ``num_tokens``.

    Attributes:
        assignment: (b, n) int64, the index in [0, num_tokens) of the new token that a token joins.
        weights: (b, n), the coefficient of each token in its new token. Mean pooling has weights
            that sum to 1 over the members of a new token. ``None`` stands for elementwise maximum.
        num_tokens: how many tokens are left.
    """

    assignment: Tensor
    weights: Tensor | None
    num_tokens: int


def _rows(assignment: Tensor, num_tokens: int) -> Tensor:
    """Row of each token's new token in the flattened (b * num_tokens, …) result: (b * n,)."""
    offsets = torch.arange(assignment.shape[0], device=assignment.device) * num_tokens
    return (assignment + offsets[:, None]).flatten()


def sum_by_assignment(x: Tensor, assignment: Tensor, num_tokens: int) -> Tensor:
    """Add up the rows that share a new token: (b, n, …) -> (b, num_tokens, …)."""
    total = x.new_zeros(x.shape[0] * num_tokens, *x.shape[2:])
    total = total.index_add(0, _rows(assignment, num_tokens), x.flatten(0, 1))
    return total.unflatten(0, (x.shape[0], num_tokens))


def fuse(x: Tensor, reduction: Reduction) -> Tensor:
    """Pool the members of each new token: (b, n, d) -> (b, m, d)."""
    if reduction.weights is None:
        index = reduction.assignment[:, :, None].expand_as(x)
        empty = x.new_zeros(x.shape[0], reduction.num_tokens, x.shape[2])
        return empty.scatter_reduce(1, index, x, "amax", include_self=False)
    weighted = x * reduction.weights[:, :, None].to(x.dtype)
    return sum_by_assignment(weighted, reduction.assignment, reduction.num_tokens)


def unfuse(x: Tensor, reduction: Reduction) -> Tensor:
    """Give every old position its new token's row: (b, m, d) -> (b, n, d)."""
    rows = x.flatten(0, 1).index_select(0, _rows(reduction.assignment, reduction.num_tokens))
    return rows.unflatten(0, reduction.assignment.shape)


def fuse_sizes(sizes: Tensor, reduction: Reduction) -> Tensor:
    """Sizes add up: (b, n) -> (b, m)."""
    return sum_by_assignment(sizes, reduction.assignment, reduction.num_tokens)


def fuse_attention(attention: Tensor, reduction: Reduction) -> Tensor:
    """Attention map of the fused tokens, approximated from the map of the old ones.

    Columns of fused tokens are summed, rows are pooled like the tokens: ``R A C`` of MCTF
    (arXiv 2403.10030, section 3.3). No layer needs it to compute its output, see
    :meth:`FusionAttentionMixin.forward`; it serves ``output_attentions`` and maximum pooling.

    Args:
        attention: (b, h, n, n).

    Returns:
        (b, h, m, m).
    """
    heads = attention.shape[1]
    by_head = Reduction(
        reduction.assignment.repeat_interleave(heads, 0),
        None if reduction.weights is None else reduction.weights.repeat_interleave(heads, 0),
        reduction.num_tokens,
    )
    columns = sum_by_assignment(attention.flatten(0, 1).mT, by_head.assignment, by_head.num_tokens)
    return fuse(columns.mT, by_head).unflatten(0, attention.shape[:2])


def compose(first: Tensor, then: Tensor) -> Tensor:
    """Assignment of two reductions in a row: (b, n) and (b, m) -> (b, n)."""
    return then.gather(1, first)
