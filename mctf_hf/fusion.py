"""Token reductions as data: the destination and the weight of each token.

Every method of this library returns the same small value, a :class:`Reduction`. Each new token
starts from one kept old token. Every other old token is merged into a new one, or dropped. So
fusing is a gather of the kept tokens and a weighted scatter of the merged ones, restoring is a
gather, and two reductions compose by gathering one assignment with the other.

Shapes: ``b`` images, ``n`` tokens before and ``m`` tokens after the reduction, ``d`` channels.
Tokens are addressed by their row in the flattened (b * n, …) and (b * m, …) tensors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Reduction:
    """A reduction of ``n`` tokens to ``m``.

    Attributes:
        batch: number of images.
        rows: (b * n,) int64, the new row that contains each old row, -1 for dropped rows.
        kept: (b * m,) int64, the old row that each new row starts from.
        merged: (b * k,) int64, the merged old rows; without drops, k is n - m.
        destination: (b * k,) int64, the new row that each merged row joins.
        kept_weights: (b * m, 1), coefficients of the kept rows in their new rows. See
            :meth:`weigh`.
        merged_weights: (b * k, 1), coefficients of the merged rows.
        size_factors: (b * k,), factors of the sizes of the merged rows; ``None`` for 1.
        maximum: whether fusing is the elementwise maximum, without weights.
    """

    batch: int
    rows: Tensor
    kept: Tensor
    merged: Tensor
    destination: Tensor
    kept_weights: Tensor | None = None
    merged_weights: Tensor | None = None
    size_factors: Tensor | None = None
    maximum: bool = False

    @classmethod
    def from_positions(
        cls, kept: Tensor, merged: Tensor, destination: Tensor, num_tokens: int
    ) -> "Reduction":
        """Create a reduction of ``num_tokens`` tokens from positions within each image.

        Args:
            kept: (b, m), old positions that the new tokens start from, in their new order.
            merged: (b, k), old positions to merge; positions neither kept nor merged are dropped.
            destination: (b, k), new positions that the merged tokens join.
        """
        batch, num_new = kept.shape
        image = torch.arange(batch, device=kept.device)[:, None]
        old, new = image * num_tokens, image * num_new
        rows = kept.new_full((batch, num_tokens), -1)
        rows = rows.scatter(1, kept, torch.arange(num_new, device=kept.device) + new)
        rows = rows.scatter(1, merged, destination + new)
        return cls(
            batch,
            rows.flatten(),
            (kept + old).flatten(),
            (merged + old).flatten(),
            (destination + new).flatten(),
        )

    @classmethod
    def from_assignment(cls, assignment: Tensor, num_new: int, num_dropped: int = 0) -> "Reduction":
        """Create a reduction to ``num_new`` tokens from the new position (b, n) of each token.

        Each new position occurs at least once. Each image has ``num_dropped`` entries of -1.
        """
        batch, num_old = assignment.shape
        positions = torch.arange(num_old, device=assignment.device).expand(batch, -1)
        dropped = assignment < 0
        slots = assignment.masked_fill(dropped, num_new)
        kept = positions.new_full((batch, num_new + 1), num_old)
        kept = kept.scatter_reduce(1, slots, positions, "amin")[:, :num_new]
        rank = dropped.long().scatter(1, kept, 2)  # merged, dropped, kept
        merged = rank.argsort(dim=1, stable=True)[:, : num_old - num_new - num_dropped]
        return cls.from_positions(kept, merged, assignment.gather(1, merged), num_old)

    @property
    def assignment(self) -> Tensor:
        """(b, n) int64, index in [0, m) of each token's new token, -1 if it was dropped."""
        return images_rows(self.rows, self.batch, self.kept.shape[0] // self.batch)

    def weigh(self, weights: Tensor) -> None:
        """Make fusing the mean with the given weights, (b, n), positive."""
        flat = weights.view(-1, 1)
        kept, merged = flat.index_select(0, self.kept), flat.index_select(0, self.merged)
        total = kept.index_add(0, self.destination, merged)
        self.kept_weights = kept / total
        self.merged_weights = merged / total.index_select(0, self.destination)


def images_rows(rows: Tensor, batch: int, num_tokens: int) -> Tensor:
    """Convert rows of a flattened (b * num_tokens, …) to rows within images: (b * n,) -> (b, n).

    The -1 of dropped tokens stays.
    """
    first = torch.arange(0, batch * num_tokens, num_tokens, device=rows.device)
    own = rows.view(batch, -1)
    return torch.where(own < 0, own, own - first[:, None])


def fuse_sizes(sizes: Tensor, reduction: Reduction) -> Tensor:
    """The sizes of the new tokens: (b, n) -> (b, m)."""
    return add_up(sizes, reduction, reduction.size_factors)


def add_up(x: Tensor, reduction: Reduction, factors: Tensor | None = None) -> Tensor:
    """Sum the members of each new token: (b, n, …) -> (b, m, …).

    Args:
        factors: (b * k,), factors of the merged rows; ``x`` must have two axes then.
    """
    flat = x.flatten(0, 1)
    merged = flat.index_select(0, reduction.merged)
    if factors is not None:
        merged = merged * factors
    total = flat.index_select(0, reduction.kept)
    total = total.index_add_(0, reduction.destination, merged)
    return total.view(x.shape[0], -1, *x.shape[2:])


def fuse(x: Tensor, reduction: Reduction) -> Tensor:
    """Pool the members of each new token: (b, n, d) -> (b, m, d).

    Raises:
        ValueError: if the reduction has no weights and ``maximum`` is not set.
    """
    flat = x.flatten(0, 1)
    kept = flat.index_select(0, reduction.kept)
    merged = flat.index_select(0, reduction.merged)
    if reduction.maximum:
        into = reduction.destination[:, None].expand_as(merged)
        fused = kept.scatter_reduce(0, into, merged, "amax")
    elif reduction.kept_weights is None or reduction.merged_weights is None:
        raise ValueError("a reduction has no weights: call its weigh(), or set its maximum")
    else:
        fused = kept.mul_(reduction.kept_weights.to(x.dtype))
        merged.mul_(reduction.merged_weights.to(x.dtype))
        fused.index_add_(0, reduction.destination, merged)
    return fused.view(x.shape[0], -1, x.shape[2])


def unfuse(x: Tensor, reduction: Reduction) -> Tensor:
    """Copy each new token's row to its old positions: (b, m, …) -> (b, n, …); none is dropped."""
    rows = x.flatten(0, 1).index_select(0, reduction.rows)
    return rows.view(x.shape[0], -1, *x.shape[2:])


def fuse_attention(attention: Tensor, reduction: Reduction) -> Tensor:
    """Approximate the attention map of the fused tokens from the map of the old tokens.

    Columns of fused tokens are summed, rows are pooled like the tokens: ``R A C`` of MCTF
    (arXiv 2403.10030, section 3.3). It is needed only for ``output_attentions``, hooks and maximum
    pooling, see :meth:`~.attention.FusionAttention.forward`.

    Args:
        attention: (b, h, n, n).

    Returns:
        (b, h, m, m).
    """
    rows_last = attention.permute(0, 3, 1, 2).contiguous()  # [b, n keys, h, n queries]
    columns = add_up(rows_last, reduction)  # [b, m, h, n]
    by_query = columns.permute(0, 3, 2, 1).flatten(2)  # [b, n, h * m]
    fused = fuse(by_query, reduction)  # [b, m, h * m]
    return fused.unflatten(2, (attention.shape[1], -1)).transpose(1, 2)


def compose(first: Tensor, then: Tensor) -> Tensor:
    """New rows after two successive reductions: (b * n,) and (b * m,) -> (b * n,)."""
    return torch.where(first < 0, first, then.index_select(0, first.clamp(min=0)))
