"""Self-attention that is computed first and applied later.

Token fusion uses a layer's own attention to choose the tokens to fuse, and then applies the same
attention to the fused tokens. So attention has two steps: :meth:`FusionAttention.look_ahead`
returns an :class:`Attention`, and ``forward`` applies it, if need be to the fused tokens.

Shapes: ``b`` images, ``n`` tokens, ``d`` channels, ``h`` heads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .anatomy import AttentionNames
from .fusion import Reduction, fuse, fuse_attention, unfuse
from .records import replace

# Largest attention map of one image that is held. For a larger map, the received attention is
# computed in blocks of rows that fit a CPU's cache, and a kernel without a map applies attention.
MAP_BYTES = 8 * 2**20
BLOCK_BYTES = 4 * 2**20

# Limits within which three plain operators are faster on a CPU than the kernel without a map:
# (largest bytes of the maps of all images, least number of queries) by type of numbers. Measured by
# benchmarks/attention.py. Types without an entry use the kernel.
FASTER_BY_MAP = {torch.float32: (15 * 2**18, 16), torch.bfloat16: (24 * 2**20, 48)}

# Types of numbers, by type of device, for which the bias of the keys becomes one more channel of
# queries and keys, so that kernels without a bias can be used. See :func:`with_bias_as_channel`.
# With no types, kernels that support a bias are used. Not measured.
BIAS_AS_CHANNEL: dict[str, tuple[torch.dtype, ...]] = {"cuda": (torch.float16, torch.bfloat16)}

# Types of numbers, by type of device, for which :mod:`.kernels` computes the received attention
# without a map, if Triton is installed. With no types, plain operators are used. Not measured. In
# float32 these kernels could not use tensor cores.
BY_TRITON: dict[str, tuple[torch.dtype, ...]] = {"cuda": (torch.float16, torch.bfloat16)}


@dataclass(eq=False)
class ColumnMeans:
    """Storage for the column means of attention that is applied without a map.

    Attributes:
        means: (b, n), see :meth:`Attention.received`; ``None`` until attention is applied.
    """

    means: Tensor | None = None


class Attention(NamedTuple):
    """Attention of one layer, before it is applied to values.

    Attributes:
        query: (b, h, n, d / h).
        key: (b, h, n, d / h).
        bias: (b or 1, 1, 1 or n, n), added to the scores; ``None`` for no bias.
        scaling: factor of the products of queries and keys.
        map: (b, h, n, n), each row sums to 1; ``None`` if it is too large to hold or not needed.
        columns: storage for the column means when attention is applied without a map; ``None``
            unless a reduction after attention needs them.
    """

    query: Tensor
    key: Tensor
    bias: Tensor | None
    scaling: float
    map: Tensor | None = None
    columns: ColumnMeans | None = None

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
        # Softmax kernels compute in float32 for every type of input and output.
        return scores.softmax(-1).view(batch, heads, num_rows, key.shape[2])

    def first(self, num_queries: int | None) -> "Attention":
        """The attention of the first ``num_queries`` queries; of all queries for ``None``."""
        if num_queries is None:
            return self
        query, key, bias, scaling, held, _ = self
        if bias is not None:
            bias = bias[:, :, :num_queries]
        held = None if held is None else held[:, :, :num_queries]
        return Attention(query[:, :, :num_queries], key, bias, scaling, held)

    def received(self) -> Tensor:
        """Attention that each token receives, mean over heads and queries: (b, n), float32 or more.

        It is the informativeness of MCTF (arXiv 2403.10030, section 3.1).
        """
        if self.map is not None:
            return self.map.mean((1, 2), dtype=_precision(self.map))
        if self.columns is not None and self.columns.means is not None:
            return self.columns.means
        if self._is_for_kernels():
            from .kernels import attention_received

            return attention_received(*self[:4])
        sums = [block.sum((1, 2), dtype=_precision(self.key)) for block in self.blocks()]
        return self._column_means(sums)

    def blocks(self) -> Iterator[Tensor]:
        """Blocks of rows of the map, each small enough for a CPU's cache: (b, h, rows, n)."""
        batch, heads, num_tokens = self.key.shape[:3]
        row = batch * heads * num_tokens * self.key.element_size()
        rows = max(1, BLOCK_BYTES // row)
        for start in range(0, num_tokens, rows):
            yield self.rows(start, start + rows)

    def applied_with_columns(self, value: Tensor) -> Tensor:
        """Apply attention to values (b, h, n, d / h), and fill ``columns`` in the same pass."""
        assert self.columns is not None
        if self._is_for_kernels():
            from .kernels import attend

            output, self.columns.means = attend(self.query, self.key, value, *self[2:4])
            return output
        outputs, sums, flat = [], [], value.flatten(0, 1)
        for block in self.blocks():
            outputs.append(torch.bmm(block.flatten(0, 1), flat))
            sums.append(block.sum((1, 2), dtype=_precision(block)))
        self.columns.means = self._column_means(sums)
        return torch.cat(outputs, 1).view_as(value)

    def _is_for_kernels(self) -> bool:
        return (self.bias is None or self.bias.shape[2] == 1) and has_kernels(self.query)

    def _column_means(self, sums: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(sums)).sum(0) / (self.key.shape[1] * self.key.shape[2])

    def from_class(self) -> Tensor:
        """Attention from the first token, mean over heads: (b, n), float32 or more."""
        row = self.rows(0, 1)[:, :, 0] if self.map is None else self.map[:, :, 0]
        return row.mean(1, dtype=_precision(row))

    def mean_keys(self) -> Tensor:
        """Keys, mean over heads: (b, n, d / h)."""
        return self.key.mean(1)


def _precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def is_faster_by_map(heads: int, num_queries: int, x: Tensor) -> bool:
    """Whether attention among tokens ``x`` (b, n, d) is faster with a map than with a kernel.

    True on CPUs, within the limits of :data:`FASTER_BY_MAP`, which may be changed, if no graph is
    recorded or traced. In float32 the limit is the size of a cache.
    """
    if not x.is_cpu or x.dtype not in FASTER_BY_MAP or is_recorded():
        return False
    batch, num_tokens, _ = x.shape
    most, fewest = FASTER_BY_MAP[x.dtype]
    size = batch * heads * num_queries * num_tokens * x.element_size()
    return size <= most and num_queries >= fewest


def has_kernels(x: Tensor) -> bool:
    """Whether :mod:`.kernels` are used for the device and type of ``x``, see :data:`BY_TRITON`.

    They have no gradient, so they are not used while a graph is recorded or traced.
    """
    if x.dtype not in BY_TRITON.get(x.device.type, ()) or is_recorded():
        return False
    from .kernels import triton

    return triton is not None


def is_recorded() -> bool:
    """Whether a graph is recorded, traced or compiled."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()


def goes_as_channel(attention: Attention) -> bool:
    """Whether the bias of the keys becomes a channel, see :data:`BIAS_AS_CHANNEL`."""
    query, bias = attention.query, attention.bias
    if bias is None or bias.shape[2] > 1:
        return False
    return query.dtype in BIAS_AS_CHANNEL.get(query.device.type, ())


def with_bias_as_channel(attention: Attention, value: Tensor) -> tuple[Attention, Tensor]:
    """The same attention without bias, and values (b, h, n, d / h), each with more channels.

    As ``[q, 1] [k, bias / scaling] = q k + bias / scaling``, one more channel replaces the bias.
    Kernels such as FlashAttention (arXiv 2205.14135) support no bias. They need queries, keys and
    values with the same number of channels, a multiple of 8, so further channels are filled with 0.
    The caller removes the additional channels from the output.

    Args:
        attention: attention with a bias (b or 1, 1, 1, n).
    """
    query, key, bias, scaling = attention[:4]
    assert bias is not None
    further = 8 - query.shape[3] % 8
    ones = F.pad(query.new_ones(1), (0, further - 1))
    biases = F.pad((bias / scaling).to(key.dtype).mT, (0, further - 1))  # [b, 1, n, further]
    query = torch.cat([query, ones.expand(*query.shape[:3], -1)], 3)
    key = torch.cat([key, biases.expand(*key.shape[:3], -1)], 3)
    return Attention(query, key, None, scaling), F.pad(value, (0, further))


def apply_by_kernel(attention: Attention, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Apply attention to values with a kernel that holds no map: both (b, h, n, d / h)."""
    channels = value.shape[3]
    widened = goes_as_channel(attention)
    if widened:
        attention, value = with_bias_as_channel(attention, value)
    output = F.scaled_dot_product_attention(
        attention.query,
        attention.key,
        value,
        attn_mask=attention.bias,
        dropout_p=dropout,
        scale=attention.scaling,
    )
    return output[..., :channels] if widened else output


class Rotation(NamedTuple):
    """Rotation of the channels of queries and keys (RoPE, arXiv 2104.09864).

    Attributes:
        cos: (b or 1, 1, n, d / h).
        sin: (b or 1, 1, n, d / h).
    """

    cos: Tensor
    sin: Tensor

    def first(self, count: int | None) -> "Rotation":
        """The rotation of the first ``count`` tokens; of all tokens for ``None``."""
        if count is None:
            return self
        return Rotation(self.cos[:, :, :count], self.sin[:, :, :count])

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate (b, h, n, d / h); the two halves of the channels are the two coordinates."""
        first, second = x.chunk(2, -1)
        return x * self.cos.to(x.dtype) + torch.cat((-second, first), -1) * self.sin.to(x.dtype)


class FusionAttention:
    """Mixin for an attention class of transformers: self-attention in two steps.

    Attributes:
        names: names of its parts, see :func:`.anatomy.attention_names`.
    """

    names: AttentionNames

    if TYPE_CHECKING:
        config: Any
        training: bool
        _forward_hooks: dict[int, Any]

    def _part(self, name: str | None) -> Any:
        return None if name is None else getattr(self, name)

    def _heads(self, x: Tensor) -> Tensor:
        batch, num_tokens, _ = x.shape
        return x.view(batch, num_tokens, self._part(self.names.heads), -1).transpose(1, 2)

    def queries_keys(
        self,
        hidden_states: Tensor,
        rotation: Rotation | None = None,
        num_queries: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys of ``hidden_states``, (b, n, d): both (b, h, n, d / h).

        Args:
            num_queries: number of first tokens to compute queries of; ``None`` for all tokens.
        """
        made = []
        for project, norm, count in (
            (self.names.query, self.names.query_norm, num_queries),
            (self.names.key, self.names.key_norm, None),
        ):
            x = self._part(project)(hidden_states if count is None else hidden_states[:, :count])
            x = self._heads(x if norm is None else self._part(norm)(x))
            made.append(x if rotation is None else rotation.first(count).rotate(x))
        return made[0], made[1]

    def look_ahead(
        self,
        hidden_states: Tensor,
        bias: Tensor | None,
        *,
        hold_map: bool,
        rotation: Rotation | None = None,
        num_queries: int | None = None,
    ) -> Attention:
        """Compute the attention among ``hidden_states``, (b, n, d), with its map if ``hold_map``.

        Args:
            bias: (b or 1, 1, 1 or n, n), added to the scores. A boolean bias is a mask that is
                true where attention is allowed.
            rotation: rotation of queries and keys.
            num_queries: number of first tokens to compute queries of; ``None`` for all tokens.
        """
        if bias is not None and bias.dtype == torch.bool:
            mask = hidden_states.new_zeros(bias.shape)
            bias = mask.masked_fill(~bias, -torch.inf)
        query, key = self.queries_keys(hidden_states, rotation, num_queries)
        attention = Attention(query, key, bias, self._part(self.names.scaling))
        attention = attention.first(num_queries)
        return replace(attention, map=attention.rows()) if hold_map else attention

    def holds_map(self, hidden_states: Tensor) -> bool:
        """Whether to hold the map among tokens (b, n, d) to compute the received attention.

        True if one image's map fits ``MAP_BYTES`` and no Triton kernel is used.
        """
        if not self.training and has_kernels(hidden_states):
            return False
        entries = self._part(self.names.heads) * hidden_states.shape[1] ** 2
        return entries * hidden_states.element_size() <= MAP_BYTES

    def is_faster_by_map(self, hidden_states: Tensor, num_queries: int | None = None) -> bool:
        """See :func:`is_faster_by_map`; with ``num_queries`` for the first queries only."""
        queries = hidden_states.shape[1] if num_queries is None else num_queries
        return is_faster_by_map(self._part(self.names.heads), queries, hidden_states)

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        attention: Attention | None = None,
        reduction: Reduction | None = None,
        num_queries: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend among ``hidden_states``, (b, n, d), as transformers does.

        A given ``attention`` among n tokens is applied instead. If a ``reduction`` has turned these
        n tokens into the m tokens of ``hidden_states``, the map is reduced too, to ``R A C``: ``C``
        sums columns and ``R`` pools rows (MCTF, section 3.3). ``(R A C) V = R (A (C V))``, and
        ``C V`` only repeats the rows of ``V`` at the old positions. So the map itself is fused only
        for maximum pooling, which is not linear, or if the caller or a hook needs it.

        With ``num_queries``, only the first tokens are computed. They are prefix tokens, which a
        reduction does not change.

        Returns:
            The attention output (b, m, d), or (b, num_queries, d); and the map if it is held. With
            ``output_attentions`` it is always held, and is (b, h, m, m).
        """
        if attention is None:
            return super().forward(hidden_states, *args, **kwargs)
        value = self._part(self.names.value)(hidden_states)  # [b, m, d]
        shown = attention.map
        if reduction is None:
            output = self._attend(attention.first(num_queries), value)
        elif reduction.maximum:
            assert attention.map is not None
            shown = fuse_attention(attention.map, reduction)
            output = self._attend(replace(attention, map=shown).first(num_queries), value)
        elif num_queries is not None:
            output = self._attend(attention.first(num_queries), unfuse(value, reduction))
        else:
            output = fuse(self._attend(attention, unfuse(value, reduction)), reduction)
            if shown is not None and (kwargs.get("output_attentions") or self._forward_hooks):
                shown = fuse_attention(shown, reduction)
        for part in (self.names.output, self.names.output_dropout):
            output = output if part is None else self._part(part)(output)
        return output, shown

    def _attend(self, attention: Attention, value: Tensor) -> Tensor:
        value = self._heads(value)
        dropout = self._part(self.names.dropout) or 0.0
        dropout = dropout if self.training else 0.0
        if attention.map is None and attention.columns is not None:
            output = attention.applied_with_columns(value)
        elif attention.map is None:
            output = apply_by_kernel(attention, value, dropout)
        else:
            attention_map = F.dropout(attention.map, dropout) if dropout else attention.map
            output = torch.bmm(attention_map.flatten(0, 1), value.flatten(0, 1))
            output = output.view(*attention_map.shape[:2], *output.shape[1:])
        return output.transpose(1, 2).flatten(2)
