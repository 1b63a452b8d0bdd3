"""Matching against the official implementation, and what must hold for any input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mctf_hf import MCTFViTConfig
from mctf_hf.fusion import Reduction, fuse, fuse_attention, fuse_sizes
from mctf_hf.matching import attraction, bipartite_soft_matching, bipartition, similarity
from mctf_hf.reducers import Observation, Stage, build_reducer
from tests.helpers import Golden

GOLDEN = Golden("fusion")
POOLINGS = ("attention_size", "size", "mean", "max")


def reduce(
    tokens: Tensor, attention: Tensor, sizes: Tensor | None, r: int, prefix: int, **fusion: object
) -> Reduction:
    reducer = build_reducer(MCTFViTConfig(**fusion))
    assert reducer is not None
    precision = torch.promote_types(tokens.dtype, torch.float32)
    seen = Observation(
        tokens,
        sizes,
        prefix,
        keys=tokens[:, :, : max(1, tokens.shape[2] // 2)],
        attention_received=attention.mean((1, 2), dtype=precision),
        class_attention=attention[:, :, 0].mean(1, dtype=precision),
    )
    return reducer(seen, r)


@pytest.mark.parametrize("case", GOLDEN.cases)
def test_fusion_equals_the_official_one(case: str) -> None:
    fusion = dict(GOLDEN.cases[case])
    fusion.pop("kind")
    r, prefix = fusion.pop("r"), fusion.pop("num_protected")
    tokens, attention = GOLDEN[f"{case}/x"], GOLDEN[f"{case}/attn"]
    sizes = GOLDEN[f"{case}/size"].squeeze(-1)

    reduction = reduce(tokens, attention, sizes, r, prefix, **fusion)

    assert torch.equal(reduction.assignment, GOLDEN[f"{case}/assignment"])
    exact = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(fuse(tokens, reduction), GOLDEN[f"{case}/fused_x"], **exact)
    torch.testing.assert_close(
        fuse_sizes(sizes, reduction), GOLDEN[f"{case}/fused_size"].squeeze(-1), **exact
    )
    torch.testing.assert_close(
        fuse_attention(attention, reduction), GOLDEN[f"{case}/fused_attn"], **exact
    )


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, int, dict[str, object]]:
    """One layer's tensors, how many tokens to fuse, how many to protect, and settings."""
    prefix = draw(st.integers(0, 5))
    patches = draw(st.integers(2, 40))
    batch, width, heads = draw(st.integers(1, 3)), draw(st.integers(1, 16)), draw(st.integers(1, 3))
    r = draw(st.integers(1, patches // 2))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = prefix + patches
    tokens = torch.randn(batch, n, width, generator=generator).to(dtype)
    attention = torch.randn(batch, heads, n, n, generator=generator).softmax(-1).to(dtype)
    if draw(st.booleans()):  # a token that nothing attends to
        attention[..., draw(st.integers(0, n - 1))] = 0
    sizes = torch.randint(1, 9, (batch, n), generator=generator).to(
        torch.promote_types(dtype, torch.float32)
    )
    fusion = {
        "bidirectional": draw(st.booleans()),
        "pooling": draw(st.sampled_from(POOLINGS)),
        "tau_sim": draw(st.sampled_from([0, 1, 2.5])),
        "tau_info": draw(st.sampled_from([0, 1, 20])),
        "tau_size": draw(st.sampled_from([0, 1, 40])),
        "key_share": draw(st.sampled_from([0, 0.3, 1])),
        "class_share": draw(st.sampled_from([0, 0.5, 1])),
    }
    return tokens, attention, sizes, r, prefix, fusion


@given(layers())
@settings(max_examples=150, deadline=None)
def test_every_token_has_one_destination_and_sizes_add_up(layer: tuple) -> None:
    tokens, attention, sizes, r, prefix, fusion = layer
    reduction = reduce(tokens, attention, sizes, r, prefix, **fusion)
    n = tokens.shape[1]
    assert fuse(tokens, reduction).shape[1] == n - r
    assert reduction.assignment.shape == (len(tokens), n)
    for image in reduction.assignment:
        assert set(image.tolist()) == set(range(n - r))
    fused_sizes = fuse_sizes(sizes, reduction)
    assert torch.equal(fused_sizes.sum(1), sizes.sum(1))
    assert fuse(tokens, reduction).dtype == tokens.dtype
    assert torch.isfinite(fuse(tokens, reduction)).all()


@given(layers())
@settings(max_examples=150, deadline=None)
def test_prefix_tokens_stay_alone_and_in_place(layer: tuple) -> None:
    tokens, attention, sizes, r, prefix, fusion = layer
    reduction = reduce(tokens, attention, sizes, r, prefix, **fusion)
    assert torch.equal(
        reduction.assignment[:, :prefix], torch.arange(prefix).expand(len(tokens), -1)
    )
    assert (reduction.assignment[:, prefix:] >= prefix).all()
    torch.testing.assert_close(fuse(tokens, reduction)[:, :prefix], tokens[:, :prefix])


@given(layers())
@settings(max_examples=100, deadline=None)
def test_equal_tokens_fuse_to_that_token(layer: tuple) -> None:
    tokens, attention, sizes, r, prefix, fusion = layer
    same = tokens[:, :1].expand_as(tokens)
    fused = fuse(same, reduce(same, attention, sizes, r, prefix, **fusion))
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if tokens.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(fused, same[:, : fused.shape[1]], **tolerance)


@given(layers())
@settings(max_examples=100, deadline=None)
def test_images_do_not_influence_one_another(layer: tuple) -> None:
    tokens, attention, sizes, r, prefix, fusion = layer
    together = reduce(tokens, attention, sizes, r, prefix, **fusion).assignment
    backwards = reduce(
        tokens.flip(0), attention.flip(0), sizes.flip(0), r, prefix, **fusion
    ).assignment
    assert torch.equal(backwards.flip(0), together)
    for i in range(len(tokens)):
        one = slice(i, i + 1)
        alone = reduce(tokens[one], attention[one], sizes[one], r, prefix, **fusion).assignment
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize("prefix", range(6))
def test_the_two_sides_are_the_parities_of_the_positions_after_the_prefix(prefix: int) -> None:
    alpha, beta = (list(range(20))[side] for side in bipartition(prefix))
    assert alpha == [i for i in range(prefix, 20) if i % 2 == 0]
    assert beta == [i for i in range(prefix, 20) if i % 2 == 1]


def test_matching_by_hand() -> None:
    # One class token; alpha are positions 2 and 4, beta are 1, 3 and 5. Of 4 tokens to fuse ... 2:
    # forward 1: alpha 4 has the highest best score, 0.9 with beta 3, and joins it.
    # backward 1: only alpha 2 is left; of the betas, 5 scores highest with it (0.8) and joins it.
    scores = torch.tensor([[[0.1, 0.5, 0.8], [0.2, 0.9, 0.3]]])
    assignment = bipartite_soft_matching(scores, 2, num_prefix_tokens=1).assignment
    # New order: class token, alpha 2, then betas by their score with alpha 2: 3 (0.5), 1 (0.1).
    assert assignment.tolist() == [[0, 3, 1, 2, 2, 1]]


def test_what_a_beta_token_received_goes_where_it_goes() -> None:
    # Alpha 2 joins beta 1 (0.9); beta 1 then scores highest with alpha 4 (0.7) and takes it along.
    scores = torch.tensor([[[0.9, 0.1], [0.7, 0.2]]])
    assignment = bipartite_soft_matching(scores, 2, num_prefix_tokens=1).assignment
    assert assignment.tolist() == [[0, 1, 1, 2, 1]]


def test_criteria_by_hand() -> None:
    tokens = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]]])  # class token, beta 1, alpha 2
    informativeness = torch.tensor([[0.25, 0.5, 1.0]])
    sizes = torch.tensor([[1.0, 2.0, 4.0]])

    # Cosine 0 -> 1/2. u = (1, 1/2, 1/4), z = (1, 1/2, 1/4) relative to the class token's 4 and 1.
    def scores(sim: float, info: float, size: float) -> float:
        return attraction(
            tokens,
            informativeness,
            sizes,
            num_prefix_tokens=1,
            tau_sim=sim,
            tau_info=info,
            tau_size=size,
        ).item()

    assert scores(1, 0, 0) == pytest.approx(1 / 2)
    assert scores(2, 0, 0) == pytest.approx((1 / 2) ** 0.5)
    assert scores(0, 1, 0) == pytest.approx(1 / 8)
    assert scores(0, 3, 0) == pytest.approx(1 / 2)
    assert scores(0, 0, 1) == pytest.approx(1 / 8)
    assert scores(0, 0, 0) == 1
    assert scores(1, 3, 3) == pytest.approx(1 / 8)


def test_shares_by_hand() -> None:
    """Geometric means: of tokens' and keys' similarity, of attention from all and from the class.

    Tokens 1 (beta) and 2 (alpha) are orthogonal, similarity 1/2; their keys are opposite by 60°,
    cosine -1/2, similarity 1/4. All attend to them 0.25 and 0.5, the class token 0.04 and 0.09.
    """
    tokens = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 2.0]]])
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 3**0.5]]])
    none = {"tau_info": 0, "tau_size": 0, "num_prefix_tokens": 1}

    def similar(share: float, sim: float = 1) -> float:
        received = torch.ones(1, 3)
        scores = attraction(tokens, received, None, tau_sim=sim, keys=keys, key_share=share, **none)
        return scores.item()

    assert similar(0) == 0.5
    assert similar(1) == pytest.approx(1 / 4)
    assert similar(0.5) == pytest.approx((1 / 2 * 1 / 4) ** 0.5)
    assert similar(0.25, sim=2) == pytest.approx(((1 / 2) ** 0.75 * (1 / 4) ** 0.25) ** 0.5)

    received = torch.tensor([[0.25, 0.25, 0.5]])
    from_class = torch.tensor([[0.87, 0.04, 0.09]])
    for share, first, second in ((0, 0.25, 0.5), (1, 0.04, 0.09), (0.5, 0.1, 0.045**0.5)):
        reducer = build_reducer(MCTFViTConfig(one_step_ahead="present", class_share=share))
        assert reducer is not None and reducer.stage is Stage.AFTER_ATTENTION
        seen = Observation(tokens, None, 1, attention_received=received, class_attention=from_class)
        fused = fuse(tokens, reducer(seen, 1))  # the beta token joins the alpha token
        total = first + second
        expected = torch.tensor([[[9.0, 9.0], [first / total, 2 * second / total]]])
        torch.testing.assert_close(fused, expected)


def test_similarity_tells_similar_tokens_apart_under_autocast() -> None:
    tokens = 1 + 0.02 * torch.randn(1, 21, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        scores = similarity(tokens, num_prefix_tokens=1)
    torch.testing.assert_close(scores, similarity(tokens, num_prefix_tokens=1))
    assert scores.unique().numel() > 50
