"""Triton kernels for attention and the attention that each token receives, without storing a map.

As in FlashAttention (arXiv 2205.14135), each program of the first kernel processes one block of
queries against all keys. For each row of the map it keeps the largest score and the sum of the
exponentials, and stores the logarithm of that sum, the row's normaliser, with the output. Each
program of the second kernel processes one block of keys against all queries and uses the
normalisers to sum the columns of the map. Programs never add to the same memory, so results are the
same in each run. Triton comes with torch for GPUs; without Triton, this module has no kernels.

Shapes: ``b`` images, ``n`` tokens, ``h`` heads, ``d`` channels.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None

ROWS = COLUMNS = 64  # block size of the map
LOG2_E = 1.4426950408889634  # the kernels use exponentials of base 2


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention output, and attention that each token receives, mean over heads and queries.

    There is no gradient. Scores and sums are in float32.

    Args:
        query, key, value: (b, h, n, d / h) each.
        bias: (b or 1, 1, 1, n), finite, added to the scores; ``None`` for none.
        scaling: factor of the query-key products.

    Returns:
        The output (b, h, n, d / h), and the attention received (b, n) in float32.
    """
    batch, heads, num_tokens, channels = value.shape
    output = value.new_empty(batch, num_tokens, heads, channels).transpose(1, 2)
    return output, _run(query, key, value, output, bias, scaling)


def attention_received(query: Tensor, key: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """The attention that each token receives, (b, n), as in :func:`attend`, without the output."""
    return _run(query, key, None, None, bias, scaling)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    output: Tensor | None,
    bias: Tensor | None,
    scaling: float,
) -> Tensor:
    batch, heads, num_tokens, channels = query.shape
    query, key = _with_rows(query), _with_rows(key)
    value = key if value is None else _with_rows(value)
    size = (batch, heads, num_tokens)
    normalizers, sums = query.new_empty((2, *size), dtype=torch.float32)
    biases = normalizers if bias is None else bias[:, 0, 0].contiguous()
    common: dict[str, Any] = {
        "heads": heads,
        "num_tokens": num_tokens,
        "channels": channels,
        "scale": scaling * LOG2_E,
        "HAS_BIAS": bias is not None,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "CHANNELS": max(16, triton.next_power_of_2(channels)),
    }
    biased = biases, biases.stride(0) if biases.shape[0] > 1 else 0
    given = *_at(query), *_at(key), *biased, normalizers
    with torch.cuda.device_of(query):
        _attend[batch * heads * triton.cdiv(num_tokens, ROWS),](
            *given,
            *_at(value),
            *_at(value if output is None else output),
            APPLIED=output is not None,
            **common,
        )
        _receive[batch * heads * triton.cdiv(num_tokens, COLUMNS),](*given, sums, **common)
    return sums.mean(1) / num_tokens


def _with_rows(x: Tensor) -> Tensor:
    """The same tensor, with the channels of each token contiguous."""
    return x if x.stride(3) == 1 else x.contiguous()


def _at(x: Tensor) -> tuple[Any, ...]:
    """A tensor (b, h, n, d / h) and its strides between images, heads and tokens."""
    return x, *x.stride()[:3]


if triton is not None:

    @triton.jit
    def _block(num_tokens, heads, SIZE: tl.constexpr):
        """The image, the head and the tokens that this program processes."""
        blocks = tl.cdiv(num_tokens, SIZE)
        which = tl.program_id(0)
        image = (which // blocks // heads).to(tl.int64)
        tokens = which % blocks * SIZE + tl.arange(0, SIZE)
        return image, which // blocks % heads, tokens

    @triton.jit
    def _load(start, apart, tokens, num_tokens, channels, CHANNELS: tl.constexpr):
        """Load some tokens of a head: [tokens, CHANNELS], 0 outside of the tensor."""
        channel = tl.arange(0, CHANNELS)
        inside = (tokens[:, None] < num_tokens) & (channel[None, :] < channels)
        at = start + tokens[:, None] * apart + channel[None, :]
        return tl.load(at, mask=inside, other=0.0)

    @triton.jit
    def _scores(queries, keys, bias, columns, num_tokens, scale, HAS_BIAS: tl.constexpr):
        """Scores as exponents of base 2: [rows, columns], -inf beyond the last key."""
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        inside = columns < num_tokens
        if HAS_BIAS:
            biases = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
            scores += biases[None, :] * 1.4426950408889634
        return tl.where(inside[None, :], scores, -float("inf"))

    @triton.jit(do_not_specialize=["num_tokens"])  # it differs between layers
    def _attend(
        query,
        query_b,
        query_h,
        query_n,
        key,
        key_b,
        key_h,
        key_n,
        bias,
        bias_b,
        normalizers,
        value,
        value_b,
        value_h,
        value_n,
        output,
        output_b,
        output_h,
        output_n,
        heads,
        num_tokens,
        channels,
        scale,
        APPLIED: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        """Process a block of rows of the map: store normalisers and, if ``APPLIED``, the output."""
        image, head, rows = _block(num_tokens, heads, ROWS)
        query += image * query_b + head * query_h
        key += image * key_b + head * key_h
        value += image * value_b + head * value_h
        bias += image * bias_b
        queries = _load(query, query_n, rows, num_tokens, channels, CHANNELS)
        largest = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        pooled = tl.zeros([ROWS, CHANNELS], tl.float32)
        for start in range(0, num_tokens, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            keys = _load(key, key_n, columns, num_tokens, channels, CHANNELS)
            scores = _scores(queries, keys, bias, columns, num_tokens, scale, HAS_BIAS)
            larger = tl.maximum(largest, tl.max(scores, 1))
            before = tl.exp2(largest - larger)
            weights = tl.exp2(scores - larger[:, None])
            total = total * before + tl.sum(weights, 1)
            if APPLIED:
                values = _load(value, value_n, columns, num_tokens, channels, CHANNELS)
                weighted = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
                pooled = pooled * before[:, None] + weighted
            largest = larger
        inside = rows < num_tokens
        normalizers += (image * heads + head) * num_tokens
        tl.store(normalizers + rows, largest + tl.log2(total), mask=inside)
        if APPLIED:
            channel = tl.arange(0, CHANNELS)
            output += image * output_b + head * output_h
            at = output + rows[:, None] * output_n + channel[None, :]
            inside = inside[:, None] & (channel[None, :] < channels)
            pooled = pooled / total[:, None]
            tl.store(at, pooled.to(output.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["num_tokens"])  # it differs between layers
    def _receive(
        query,
        query_b,
        query_h,
        query_n,
        key,
        key_b,
        key_h,
        key_n,
        bias,
        bias_b,
        normalizers,
        sums,
        heads,
        num_tokens,
        channels,
        scale,
        HAS_BIAS: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        """Sum a block of columns of the map, using the normalisers of its rows."""
        image, head, columns = _block(num_tokens, heads, COLUMNS)
        query += image * query_b + head * query_h
        key += image * key_b + head * key_h
        bias += image * bias_b
        first = (image * heads + head) * num_tokens
        keys = _load(key, key_n, columns, num_tokens, channels, CHANNELS)
        total = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, num_tokens, ROWS):
            rows = start + tl.arange(0, ROWS)
            queries = _load(query, query_n, rows, num_tokens, channels, CHANNELS)
            scores = _scores(queries, keys, bias, columns, num_tokens, scale, HAS_BIAS)
            at = normalizers + first + rows
            normalizer = tl.load(at, mask=rows < num_tokens, other=float("inf"))
            total += tl.sum(tl.exp2(scores - normalizer[:, None]), 0)
        tl.store(sums + first + columns, total, mask=columns < num_tokens)
