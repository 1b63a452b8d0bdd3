"""Attention together with what each token receives of it, by kernels that hold no map.

As FlashAttention (arXiv 2205.14135) does, a program takes a block of queries past all keys, and
keeps of each row of the map its largest score and the sum of its exponentials. Their logarithm, the
row's normaliser, is written beside the output. With that, a second kernel takes a block of keys
past all queries, and sums the columns of the map. Nobody adds to what another has written, so
results are the same in each run.

They are written in Triton, which comes with torch for GPUs. Without it this module has none.

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

ROWS = COLUMNS = 64  # of the map, by which it is gone through
LOG2_E = 1.4426950408889634  # exponentials are of base 2


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention applied to values, and what each token receives, mean over heads and queries.

    There is no gradient. Scores and sums are in float32.

    Args:
        query, key, value: (b, h, n, d / h) each.
        bias: (b or 1, 1, 1, n), finite, added to the scores; ``None`` for none.
        scaling: factor of the products of queries and keys.

    Returns:
        (b, h, n, d / h), and (b, n) in float32.
    """
    batch, heads, num_tokens, channels = value.shape
    output = value.new_empty(batch, num_tokens, heads, channels).transpose(1, 2)
    return output, _run(query, key, value, output, bias, scaling)


def attention_received(query: Tensor, key: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """What :func:`attend` gives beside its output, (b, n), applied to nothing."""
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
    """The same, with the channels of a token side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


def _at(x: Tensor) -> tuple[Any, ...]:
    """(b, h, n, d / h), and by how much its images, heads and tokens lie apart."""
    return x, *x.stride()[:3]


if triton is not None:

    @triton.jit
    def _block(num_tokens, heads, SIZE: tl.constexpr):
        """The image, the head and the tokens of this program."""
        blocks = tl.cdiv(num_tokens, SIZE)
        which = tl.program_id(0)
        image = (which // blocks // heads).to(tl.int64)
        tokens = which % blocks * SIZE + tl.arange(0, SIZE)
        return image, which // blocks % heads, tokens

    @triton.jit
    def _load(start, apart, tokens, num_tokens, channels, CHANNELS: tl.constexpr):
        """Some tokens of a head: [tokens, CHANNELS], 0 beyond what there is."""
        channel = tl.arange(0, CHANNELS)
        inside = (tokens[:, None] < num_tokens) & (channel[None, :] < channels)
        at = start + tokens[:, None] * apart + channel[None, :]
        return tl.load(at, mask=inside, other=0.0)

    @triton.jit
    def _scores(queries, keys, bias, columns, num_tokens, scale, HAS_BIAS: tl.constexpr):
        """Scores as exponents of 2: [rows, columns], -inf beyond the last key."""
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        inside = columns < num_tokens
        if HAS_BIAS:
            biases = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
            scores += biases[None, :] * 1.4426950408889634
        return tl.where(inside[None, :], scores, -float("inf"))

    @triton.jit(do_not_specialize=["num_tokens"])  # which differs from layer to layer
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
        """A block of rows of the map: their normalisers and, if it is applied, their output."""
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

    @triton.jit(do_not_specialize=["num_tokens"])  # which differs from layer to layer
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
        """The sums of a block of columns of the map, whose rows' normalisers are known."""
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
