"""Reductions as data: pooling, broadcasting back, composing."""

from dataclasses import replace

import pytest
import torch

from mctf_hf.fusion import (
    Reduction,
    compose,
    fuse,
    fuse_attention,
    fuse_sizes,
    images_rows,
    unfuse,
)


def example(batch: int = 2, n: int = 9, m: int = 5, weighted: bool = True) -> Reduction:
    generator = torch.Generator().manual_seed(0)
    assignment = torch.stack(
        [
            torch.cat([torch.arange(m), torch.randint(m, (n - m,), generator=generator)])[
                torch.randperm(n, generator=generator)
            ]
            for _ in range(batch)
        ]
    )
    reduction = Reduction.from_assignment(assignment, m)
    assert torch.equal(reduction.assignment, assignment)
    reduction.maximum = not weighted
    reduction.weigh(torch.rand(batch, n, generator=generator))
    return reduction


def as_matrix(reduction: Reduction) -> torch.Tensor:
    """(b, m, n): one where a token joins a new token."""
    joins = reduction.assignment[:, None] == torch.arange(5)[None, :, None]
    return joins.float()


def test_fusing_by_hand() -> None:
    x = torch.tensor([[[1.0], [10.0], [100.0]]])
    assignment = torch.tensor([[1, 0, 1]])
    mean = Reduction.from_assignment(assignment, 2)
    mean.weigh(torch.tensor([[1.0, 7.0, 3.0]]))
    assert fuse(x, mean).tolist() == [[[10.0], [75.25]]]
    assert fuse(x, replace(mean, maximum=True)).tolist() == [[[10.0], [100.0]]]
    assert fuse_sizes(torch.tensor([[1.0, 2.0, 3.0]]), mean).tolist() == [[2.0, 4.0]]
    assert unfuse(torch.tensor([[[5.0], [7.0]]]), mean).tolist() == [[[7.0], [5.0], [7.0]]]


def test_fusing_is_a_matrix_product() -> None:
    reduction, x = example(), torch.randn(2, 9, 3)
    weights = torch.rand(2, 9)
    reduction.weigh(weights)
    rows = as_matrix(reduction) * weights[:, None]
    rows = rows / rows.sum(2, keepdim=True)
    torch.testing.assert_close(fuse(x, reduction), rows @ x)


def test_no_map_need_be_fused_to_apply_a_fused_map() -> None:
    reduction = example()
    attention, value = torch.rand(2, 4, 9, 9).softmax(-1), torch.randn(2, 5, 6)
    fused = fuse_attention(attention, reduction)
    expected = fused[:, 0] @ value
    torch.testing.assert_close(
        fuse(attention[:, 0] @ unfuse(value, reduction), reduction), expected
    )


def test_fused_attention_rows_still_sum_to_one() -> None:
    attention = fuse_attention(torch.rand(2, 4, 9, 9).softmax(-1), example())
    assert attention.shape == (2, 4, 5, 5)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 5))


def test_fusing_twice_equals_the_composition() -> None:
    first, then = example(n=9, m=5), example(n=5, m=2)
    sizes = torch.ones(2, 9)
    twice = fuse_sizes(fuse_sizes(sizes, first), then)
    rows = images_rows(compose(first.rows, then.rows), 2, 2)
    assert torch.equal(twice, fuse_sizes(sizes, Reduction.from_assignment(rows, 2)))


@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_flow_through_fusing(weighted: bool) -> None:
    reduction = example(weighted=weighted)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fuse(x, reduction), x)
