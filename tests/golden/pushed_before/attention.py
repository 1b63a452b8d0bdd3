"""Self-attention that can be looked at before it is applied.

Token fusion is informed by a layer's own attention, and applies it to tokens that do not exist yet
when it is computed. So attention comes in two steps here: :meth:`FusionAttentionMixin.look_ahead`
gives an :class:`Attention`, and ``forward`` applies it, to other tokens if need be.

Shapes: ``b`` images, ``n`` tokens, ``d`` channels, ``h`` heads.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fusion import Reduction, fuse, fuse_attention, unfuse

# One image's attention map is held up to this size. A larger one is gone through in blocks of rows,
# small enough for a CPU's cache, and once more by a kernel that needs no map when it is applied.
MAP_BYTES = 8 * 2**20
BLOCK_BYTES = 4 * 2**20


class Attention(NamedTuple):
    """Attention of one layer, not applied to any values yet.

    Attributes:
        query: (b, h, n, d / h).
        key: (b, h, n, d / h).
        bias: (b or 1, 1, 1 or n, n), added to the scores; ``None`` for none.
        scaling: factor of the products of queries and keys.
        map: (b, h, n, n), every row summing to 1; ``None`` where it is too large to be held or
            nobody needs it.
    """

    query: Tensor
    key: Tensor
    bias: Tensor | None
    scaling: float
    map: Tensor | None = None

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of the attention map: (b, h, stop - start, n)."""
        query, key = self.query, self.key
        if (start, stop) != (0, None):
            query = query[:, :, start:stop]
        batch, heads, num_rows = query.shape[:3]
        if self.bias is None:
            bias = query.new_zeros(1, 1, 1)
        else:
            bias = self.bias[:, :, start:stop] if self.bias.shape[2] > 1 else self.bias
            bias = bias.expand(batch, heads, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(bias, query.flatten(0, 1), key.flatten(0, 1).mT, alpha=self.scaling)
        # Kernels of softmax compute in float32 whatever they read and write.
        return scores.softmax(-1).view(batch, heads, num_rows, key.shape[2])

    def received(self) -> Tensor:
        """Attention that each token receives, mean over heads and queries: (b, n), float32 or more.

        Informativeness in MCTF (arXiv 2403.10030, section 3.1).
        """
        if self.map is not None:
            return self.map.mean((1, 2), dtype=_precision(self.map))
        heads, num_tokens = self.key.shape[1:3]
        rows = max(1, BLOCK_BYTES // (heads * num_tokens * self.key.element_size()))
        blocks = [
            self.rows(start, start + rows).sum((1, 2), dtype=_precision(self.key))
            for start in range(0, num_tokens, rows)
        ]
        return torch.stack(blocks).sum(0) / (heads * num_tokens)

    def from_class(self) -> Tensor:
        """Attention from the first token, mean over heads: (b, n), float32 or more."""
        row = self.rows(0, 1)[:, :, 0] if self.map is None else self.map[:, :, 0]
        return row.mean(1, dtype=_precision(row))

    def mean_keys(self) -> Tensor:
        """Keys, mean over heads: (b, n, d / h)."""
        return self.key.mean(1)


def _precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class FusionAttentionMixin:
    """Self-attention in two steps.

    Goes before any attention class of transformers that has ``q_proj``, ``k_proj``, ``v_proj``,
    ``o_proj`` or ``out_proj``, ``scaling``, ``num_attention_heads`` and ``attention_dropout``.
    """

    if TYPE_CHECKING:
        q_proj: nn.Linear
        k_proj: nn.Linear
        v_proj: nn.Linear
        o_proj: nn.Linear
        out_proj: nn.Linear
        config: Any
        scaling: float
        num_attention_heads: int
        attention_dropout: float
        training: bool

    def _heads(self, x: Tensor) -> Tensor:
        batch, num_tokens, _ = x.shape
        return x.view(batch, num_tokens, self.num_attention_heads, -1).transpose(1, 2)

    def look_ahead(
        self, hidden_states: Tensor, bias: Tensor | None, *, hold_map: bool
    ) -> Attention:
        """Attention among ``hidden_states``, (b, n, d), with its map if ``hold_map``.

        Args:
            bias: (b or 1, 1, 1 or n, n), added to the scores. If boolean, a mask that is true
                where there is to be attention.
        """
        if bias is not None and bias.dtype == torch.bool:
            mask = hidden_states.new_zeros(bias.shape)
            bias = mask.masked_fill(~bias, -torch.inf)
        query = self._heads(self.q_proj(hidden_states))
        key = self._heads(self.k_proj(hidden_states))
        attention = Attention(query, key, bias, self.scaling)
        return attention._replace(map=attention.rows()) if hold_map else attention

    def holds_map(self, hidden_states: Tensor) -> bool:
        """Whether the attention map among so many tokens, (b, n, d), is small enough to be held."""
        entries = self.num_attention_heads * hidden_states.shape[1] ** 2
        return entries * hidden_states.element_size() <= MAP_BYTES

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        attention: Attention | None = None,
        reduction: Reduction | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend among ``hidden_states``, (b, n, d), by the backend that the model is set to.

        With an ``attention`` among n tokens, that one is applied instead. If a ``reduction`` has
        turned those n tokens into the m tokens of ``hidden_states``, the map is reduced too, to
        ``R A C`` with ``C`` summing columns and ``R`` pooling rows (MCTF, section 3.3). As
        ``(R A C) V = R (A (C V))`` and ``C V`` only repeats the rows of ``V`` at the old positions,
        no map is fused but for maximum pooling, which is not linear.

        Returns:
            The attention output (b, m, d), and the map (b, h, m, m) if ``output_attentions``.
        """
        if attention is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        value = self.v_proj(hidden_states)  # [b, m, d]
        shown = attention.map
        if reduction is None:
            output = self._attend(attention, value)
        elif reduction.kept_weights is None:
            assert attention.map is not None
            shown = fuse_attention(attention.map, reduction)
            output = self._attend(attention._replace(map=shown), value)
        else:
            output = fuse(self._attend(attention, unfuse(value, reduction)), reduction)
            if kwargs.get("output_attentions"):
                assert attention.map is not None
                shown = fuse_attention(attention.map, reduction)
        project = self.o_proj if hasattr(self, "o_proj") else self.out_proj
        return project(output), shown

    def _attend(self, attention: Attention, value: Tensor) -> Tensor:
        value = self._heads(value)
        dropout = self.attention_dropout if self.training else 0.0
        if attention.map is None:
            output = F.scaled_dot_product_attention(
                attention.query,
                attention.key,
                value,
                attn_mask=attention.bias,
                dropout_p=dropout,
                scale=attention.scaling,
            )
        else:
            attention_map = F.dropout(attention.map, dropout) if dropout else attention.map
            output = torch.bmm(attention_map.flatten(0, 1), value.flatten(0, 1))
            output = output.view(*attention_map.shape[:2], *output.shape[1:])
        return output.transpose(1, 2).flatten(2)
