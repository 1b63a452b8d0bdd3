"""A token reduction as data: which token goes where, and with which weight.

Every method of this library ends in the same small value, a :class:`Reduction`. It says of each
token the index of the new token that it becomes part of, and how much it counts there. Fusing is
then one weighted scatter, broadcasting back one gather, and two reductions compose by gathering
one assignment with the other.

Shapes: ``b`` images, ``n`` tokens before and ``m`` tokens after the reduction, ``d`` channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Reduction:
    """How ``n`` tokens become ``num_tokens``.

    Attributes:
        assignment: (b, n) int64, the index in [0, num_tokens) of the new token that a token joins.
        weights: (b, n), the coefficient of each token in its new token. ``None`` stands for
            elementwise maximum. See :meth:`normalize_weights` for means.
        num_tokens: how many tokens are left.
        rows: (b * n,) int64, the assignment as rows of the flattened (b * num_tokens, …) result.
            It is made here once, for all that is fused by this reduction.
    """

    assignment: Tensor
    weights: Tensor | None
    num_tokens: int

    def __post_init__(self) -> None:
        first = torch.arange(
            0,
            self.assignment.shape[0] * self.num_tokens,
            self.num_tokens,
            device=self.assignment.device,
        )
        self.rows = (self.assignment + first[:, None]).flatten()

    def normalize_weights(self) -> None:
        """Let the weights of each new token's members sum to 1, so that fusing is a mean."""
        if self.weights is not None:
            total = sum_members(self.weights, self)
            self.weights = self.weights / unfuse(total, self)


def sum_members(x: Tensor, reduction: Reduction) -> Tensor:
    """Add up the rows that share a new token: (b, n, …) -> (b, m, …)."""
    total = x.new_zeros(x.shape[0] * reduction.num_tokens, *x.shape[2:])
    total.index_add_(0, reduction.rows, x.flatten(0, 1))
    return total.view(x.shape[0], reduction.num_tokens, *x.shape[2:])


def fuse(x: Tensor, reduction: Reduction) -> Tensor:
    """Pool the members of each new token: (b, n, d) -> (b, m, d)."""
    if reduction.weights is None:
        index = reduction.assignment[:, :, None].expand_as(x)
        empty = x.new_zeros(x.shape[0], reduction.num_tokens, x.shape[2])
        return empty.scatter_reduce(1, index, x, "amax", include_self=False)
    return sum_members(x * reduction.weights[:, :, None].to(x.dtype), reduction)


def unfuse(x: Tensor, reduction: Reduction) -> Tensor:
    """Give every old position its new token's row: (b, m, …) -> (b, n, …)."""
    rows = x.flatten(0, 1).index_select(0, reduction.rows)
    return rows.view(*reduction.assignment.shape, *x.shape[2:])


def fuse_sizes(sizes: Tensor, reduction: Reduction) -> Tensor:
    """Sizes add up: (b, n) -> (b, m)."""
    return sum_members(sizes, reduction)


def fuse_attention(attention: Tensor, reduction: Reduction) -> Tensor:
    """Attention map of the fused tokens, approximated from the map of the old ones.

    Columns of fused tokens are summed, rows are pooled like the tokens: ``R A C`` of MCTF
    (arXiv 2403.10030, section 3.3). No layer needs it to compute its output, see
    :meth:`~.attention.FusionAttentionMixin.forward`; it serves ``output_attentions`` and maximum
    pooling.

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
    columns = sum_members(attention.flatten(0, 1).mT, by_head)
    return fuse(columns.mT, by_head).unflatten(0, attention.shape[:2])


def compose(first: Tensor, then: Tensor) -> Tensor:
    """Assignment of two reductions in a row: (b, n) and (b, m) -> (b, n)."""
    return then.gather(1, first)
