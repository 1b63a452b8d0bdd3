"""The methods of token reduction behind one contract: EViT, token mergence, ToMe's schedule."""

import math
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from mctf_hf import MCTFViTConfig, MCTFViTModel, attention
from mctf_hf.conversion import convert_state_dict
from mctf_hf.cost import (
    describe,
    keep_rate_for_budget,
    multiply_accumulates,
    r_for_budget,
    resolve_budget,
)
from mctf_hf.fusion import Reduction, compose, fuse, fuse_sizes, images_rows
from mctf_hf.pairing import energy, merge_within_ranking, pair_highest
from mctf_hf.presets import preset
from mctf_hf.reducers import REDUCERS, Observation, Reducer, Stage, build_reducer, register
from mctf_hf.selection import drop_and_merge, keep_most_important, merge_into_most_important
from tests.helpers import TINY, Golden, tiny_model
from tests.tiny_models import BACKBONES, pixels, small_backbone

EVIT = Golden("evit")
EXACT = {"atol": 1e-5, "rtol": 0}
RATES = {"evit": {"fuse_token": True}, "token_mergence": {}}


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["evit_fuse", "evit_drop"])
@torch.no_grad()
def test_evit_equals_the_official_one(name: str, kernel: str) -> None:
    case = EVIT.cases[name]
    model = tiny_model(
        reduction="evit",
        keep_rate=case["keep_rate"],
        fuse_token=case["fuse_token"],
        attn_implementation=kernel,
    )
    weights = EVIT.weights(f"{name}/model.") or EVIT.weights("evit/model.")
    model.load_state_dict(convert_state_dict(weights, source="timm"))
    output = model(EVIT[f"{name}/pixel_values"], output_fusion=True)
    torch.testing.assert_close(output.logits, EVIT[f"{name}/logits"], **EXACT)
    patches = output.assignment[:, 1:]
    if case["fuse_token"]:  # 64 -> 45 + 1 -> 33 + 1
        assert output.token_sizes.shape[1] == 1 + 34
        assert torch.equal(output.token_sizes.sum(1), torch.full((2,), 65.0))
        assert patches.min() >= 1
        assert ((patches == 34).sum(1) == output.token_sizes[:, -1]).all()
    else:  # 64 -> 45 -> 32
        assert output.token_sizes.shape[1] == 1 + 32
        assert torch.equal(output.token_sizes, torch.ones(2, 33))
        assert ((patches == -1).sum(1) == 32).all()
    assert all(set(range(1, output.token_sizes.shape[1])) <= set(row.tolist()) for row in patches)


def test_which_layers_reduce_and_how_much() -> None:
    for reduction, added in (("evit", 1), ("token_mergence", 0)):
        config = MCTFViTConfig(reduction=reduction)
        # 196 patches; 0.7 of them is 137.2, of 138 (139 with EViT's own token) 96.6 (97.3), …
        fused = config.tokens_fused(197)
        assert [layer for layer, count in enumerate(fused) if count] == [3, 6, 9]
        left = 196
        for count in (fused[3], fused[6], fused[9]):
            kept = -(-left * 7 // 10)
            assert count == left - kept - added
            left -= count
        assert config.tokens_fused(197, r=0) == config.tokens_fused(197, keep_rate=1) == (0,) * 12
        assert config.tokens_fused(197, keep_rate=0.9)[3] == 196 - 177 - added
        assert config.tokens_fused(197, r=5) == tuple(5 * (i in (3, 6, 9)) for i in range(12))
        by_layer = [1.0, 0.5, *[1.0] * 10]
        assert config.tokens_fused(197, keep_rate=by_layer) == (0, 98 - added, *[0] * 10)
    assert MCTFViTConfig(reduction="evit", fuse_token=False).tokens_fused(197)[3] == 58
    rate = {"reduction": "token_mergence", "keep_rate": 0.55, "fusion_layers": [0]}
    assert MCTFViTConfig(**rate).tokens_fused(101)[0] == 45  # though 0.55 * 100 > 55
    sixteen = MCTFViTConfig(reduction="evit", num_hidden_layers=16).tokens_fused(197)
    assert [layer for layer, count in enumerate(sixteen) if count] == [4, 8, 12]


KEEPING = {"reduction": "evit"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep_rate": 0}, "keep_rate=0 is not allowed: it must be above 0 and at most 1"),
        ({"keep_rate": 1.2}, "keep_rate=1.2 is not allowed"),
        (KEEPING | {"keep_rate": [0.7] * 3}, r"\[0.7, 0.7, 0.7\] has 3 entries: .* 12 layers"),
        ({"inflection": 2}, "inflection=2 is not allowed: it must be a number from -1 to 1"),
        ({"r": (8, -3)}, "inflection=-3 is not allowed"),
        ({"r": 0.2, "inflection": 1}, "inflection=1 is not allowed with r=0.2"),
        ({"multi_scale": [1]}, r"multi_scale=\[1\] is not allowed"),
        ({"multi_scale": []}, r"multi_scale=\[\] is not allowed"),
        ({"multi_scale": [2, 2]}, r"multi_scale=\[2, 2\] is not allowed"),
        ({"class_token": False, "distillation_token": True}, "without class_token=True"),
    ],
)
def test_settings_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        MCTFViTConfig(**given)


def test_what_a_method_does_not_go_by_is_not_in_its_way() -> None:
    config = MCTFViTConfig(**KEEPING, r=[1] * 12, fusion_layers=[3])
    assert sum(count > 0 for count in config.tokens_fused(197)) == 1
    assert sum(MCTFViTConfig(keep_rate=[0.5] * 3, r=1).tokens_fused(197)) == 11


def test_amounts_of_one_call_are_checked() -> None:
    config = MCTFViTConfig(reduction="evit")
    with pytest.raises(ValueError, match=r"r=4 and keep_rate=0\.7: give one of them"):
        config.tokens_fused(197, r=4, keep_rate=0.7)
    with pytest.raises(ValueError, match="keep_rate=2 is not allowed"):
        config.tokens_fused(197, keep_rate=2)
    for other in ("mctf", "tome", "none"):
        with pytest.raises(ValueError, match=f"keep_rate=0.5 has no effect with .*{other}"):
            MCTFViTConfig(reduction=other).tokens_fused(197, keep_rate=0.5)


@pytest.mark.parametrize("reduction", ["tome", "mctf"])
def test_r_may_rise_or_fall_from_layer_to_layer(reduction: str) -> None:
    falling = MCTFViTConfig(reduction=reduction, r=(8, -1.0))
    assert (falling.r, falling.inflection) == (8, -1.0)
    expected = [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]  # 16 - 16 / 11 per layer, rounded down
    if reduction == "mctf":
        expected[0] = 0
    assert list(falling.tokens_fused(197)) == expected
    rising = MCTFViTConfig(reduction=reduction, r=8, inflection=1)
    assert list(rising.tokens_fused(197)) == [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]
    assert MCTFViTConfig(reduction=reduction).tokens_fused(197, (8, -1.0)) == tuple(expected)
    again = MCTFViTConfig(**{k: falling.to_dict()[k] for k in ("reduction", "r", "inflection")})
    assert again.tokens_fused(197) == tuple(expected)
    falling.r = (4, 0.5)
    assert (falling.r, falling.inflection) == (4, 0.5)


def test_token_mergence_by_hand() -> None:
    """A class token and five patches, of which 0.6 are kept: three crucial ones.

    Importance of the patches is 0.1, 0.3, 0.2, 0.05, 0.25. So positions 2, 5 and 3 are crucial, in
    their old order 2, 3, 5; positions 1 and 4 are merged.

    Tokens:  1: (1, 1)   2: (2, 0)   3: (0, 5)   4: (-1, 1)   5: (-3, 0)

    Cosines of 1: with 2  2 / (√2 · 2) = 0.707, with 3  0.707, with 5  -0.707. A tie would prove
    nothing, so 1 is (2, 1): with 2  4 / (√5 · 2) = 0.894, with 3  5 / (√5 · 5) = 0.447.
    Cosines of 4, which is (-2, 1): with 2  -0.894, with 3  0.447, with 5  6 / (√5 · 3) = 0.894.

    New tokens: 2 with 1  (0.3 · (2, 0) + 0.1 · (2, 1)) / 0.4 = (2, 0.25)
                3         (0, 5)
                5 with 4  (0.25 · (-3, 0) + 0.05 · (-2, 1)) / 0.3 = (-0.85, 0.05) / 0.3
    """
    tokens = torch.tensor(
        [[[9.0, 9.0], [2.0, 1.0], [2.0, 0.0], [0.0, 5.0], [-2.0, 1.0], [-3.0, 0.0]]]
    )
    importance = torch.tensor([[0.1, 0.1, 0.3, 0.2, 0.05, 0.25]])
    reduction = merge_into_most_important(tokens, importance, 2, num_prefix_tokens=1)
    assert reduction.assignment.tolist() == [[0, 1, 1, 2, 3, 3]]
    torch.testing.assert_close(
        fuse(tokens, reduction),
        torch.tensor([[[9.0, 9.0], [2.0, 0.25], [0.0, 5.0], [-0.85 / 0.3, 0.05 / 0.3]]]),
    )
    sizes = fuse_sizes(torch.tensor([[1.0, 1.0, 1.0, 2.0, 3.0, 1.0]]), reduction)
    assert sizes.tolist() == [[1, 2, 2, 4]]


def test_evit_by_hand() -> None:
    """Of four patches two are kept, the more important one first; the others are summed."""
    tokens = torch.tensor([[[7.0], [10.0], [20.0], [30.0], [40.0]]])
    importance = torch.tensor([[0.3, 0.1, 0.15, 0.2, 0.25]])
    fused = keep_most_important(importance, 1, num_prefix_tokens=1, fuse_token=True)
    assert fused.assignment.tolist() == [[0, 3, 3, 2, 1]]
    torch.testing.assert_close(
        fuse(tokens, fused), torch.tensor([[[7.0], [40.0], [30.0], [0.15 * 20 + 0.1 * 10]]])
    )
    dropped = keep_most_important(importance, 2, num_prefix_tokens=1, fuse_token=False)
    assert dropped.assignment.tolist() == [[0, -1, -1, 2, 1]]
    assert fuse(tokens, dropped).flatten().tolist() == [7, 40, 30]
    assert fuse_sizes(torch.ones(1, 5), dropped).tolist() == [[1, 1, 1]]


def test_energy_by_hand() -> None:
    """Of four patches, three are alike; the margin is 1/2.

    Cosines of the first three with one another are 1, those with the last 0; with itself 1. So
    their energy is (3 · ELU(1/2) + ELU(-1/2)) / 4, the last one's (ELU(1/2) + 3 · ELU(-1/2)) / 4,
    with ELU(1/2) = 1/2 and ELU(-1/2) = 1 / √e - 1.
    """
    cosines = torch.ones(1, 4, 4)
    cosines[0, 3, :3] = cosines[0, :3, 3] = 0
    low = math.exp(-0.5) - 1
    expected = torch.tensor([[(1.5 + low) / 4] * 3 + [(0.5 + 3 * low) / 4]])
    torch.testing.assert_close(energy(cosines, 0.5), expected)


def test_pitome_by_hand() -> None:
    """A class token and five patches, of which two are to go; the ranking is 4, 0, 3, 1, 2.

    In pairs, ranks 0 and 2 (patches 4 and 3) join one of ranks 1 and 3 (patches 0 and 1); patch 2
    is left alone and comes first. Within the ranking, ranks 0, 2, 4 (patches 4, 3, 2) may join 0 or
    1: their best cosines are 0.9, 0.5 and 0.7, so 4 and 2 leave.
    """
    cosines = torch.zeros(1, 5, 5)
    for leaving, staying, cosine in ((4, 1, 0.9), (4, 0, 0.8), (3, 0, 0.5), (2, 1, 0.7)):
        cosines[0, leaving, staying] = cosines[0, staying, leaving] = cosine
    order = torch.tensor([[4, 0, 3, 1, 2]])
    pairs = pair_highest(cosines, order, 2, num_prefix_tokens=1)
    # Class token, patch 2, patch 0 with 3, patch 1 with 4.
    assert pairs.assignment.tolist() == [[0, 2, 3, 1, 2, 3]]
    ranking = merge_within_ranking(cosines, order, 2, num_prefix_tokens=1)
    # Class token, patch 3, patch 0, patch 1 with 2 and 4.
    assert ranking.assignment.tolist() == [[0, 2, 3, 3, 1, 3]]


def test_diffrate_by_hand() -> None:
    """Of five patches one is dropped, the next one is merged, and three stay.

    Importance is 0.1, 0.3, 0.05, 0.2, 0.25, so patch 3 is dropped and patch 1 is merged. Its
    cosines with 2, 5 and 4 are 1 / √2, 0 and -1 / √2: it joins 2, whose size grows by 3 / √2.
    """
    tokens = torch.tensor(
        [[[9.0, 9.0], [1.0, 1.0], [2.0, 0.0], [7.0, 7.0], [0.0, -2.0], [1.0, -1.0]]]
    )
    importance = torch.tensor([[0.1, 0.1, 0.3, 0.05, 0.2, 0.25]])
    reduction = drop_and_merge(tokens, importance, 2, 1, num_prefix_tokens=1)
    assert reduction.assignment.tolist() == [[0, 1, 1, -1, 3, 2]]
    expected = torch.tensor([[[9.0, 9.0], [1.5, 0.5], [1.0, -1.0], [0.0, -2.0]]])
    torch.testing.assert_close(fuse(tokens, reduction), expected)
    sizes = fuse_sizes(torch.tensor([[1.0, 3.0, 1.0, 1.0, 2.0, 1.0]]), reduction)
    torch.testing.assert_close(sizes, torch.tensor([[1.0, 1 + 3 / 2**0.5, 1.0, 2.0]]))


def test_a_token_that_is_merged_into_its_opposite_has_no_size() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]])
    reduction = drop_and_merge(tokens, torch.tensor([[0.0, 9.0, 1.0]]), 1, 0, num_prefix_tokens=1)
    assert fuse_sizes(torch.tensor([[1.0, 1.0, 3.0]]), reduction).tolist() == [[1.0, 1.0]]


@given(
    seed=st.integers(0, 2**16),
    patches=st.integers(2, 30),
    prefix=st.sampled_from([0, 1, 2, 5]),
    layer=st.integers(0, 11),
    data=st.data(),
)
def test_pitome_discards_nothing(
    seed: int, patches: int, prefix: int, layer: int, data: st.DataObject
) -> None:
    r, n = data.draw(st.integers(1, patches // 2)), prefix + patches
    torch.manual_seed(seed)
    tokens, sizes = torch.randn(2, n, 6), torch.randint(1, 5, (2, n)).float()
    reducer = build_reducer(MCTFViTConfig(reduction="pitome"))
    assert reducer is not None
    seen = Observation(tokens, sizes, prefix, keys=tokens)
    reduction = reducer.for_layer(layer, 12)(seen, r)
    for image in reduction.assignment:
        assert image[:prefix].tolist() == list(range(prefix))
        assert set(image.tolist()) == set(range(n - r))
    assert torch.equal(fuse_sizes(sizes, reduction).sum(1), sizes.sum(1))
    mass = fuse(tokens, reduction) * fuse_sizes(sizes, reduction)[:, :, None]
    torch.testing.assert_close(mass.sum(1), (tokens * sizes[:, :, None]).sum(1))
    single = fuse_sizes(torch.ones(2, n), reduction) == 1
    for image in range(2):
        kept = reduction.kept.view(2, -1)[image] - image * n
        same = fuse(tokens, reduction)[image][single[image]]
        torch.testing.assert_close(same, tokens[image][kept[single[image]]])


@given(
    seed=st.integers(0, 2**16),
    patches=st.integers(2, 30),
    prefix=st.sampled_from([0, 1, 2, 5]),
    data=st.data(),
)
def test_diffrate_drops_and_merges_so_many(
    seed: int, patches: int, prefix: int, data: st.DataObject
) -> None:
    r, n = data.draw(st.integers(1, patches - 1)), prefix + patches
    dropped = data.draw(st.integers(0, r))
    torch.manual_seed(seed)
    tokens, importance = torch.randn(2, n, 6), torch.rand(2, n)
    config = MCTFViTConfig(reduction="diffrate", dropped=dropped, restore=False)
    reducer = build_reducer(config)
    assert reducer is not None
    reduction = reducer(Observation(tokens, None, prefix, class_attention=importance), r)
    for image, weight in zip(reduction.assignment, importance, strict=True):
        ranked = weight[prefix:].argsort(descending=True) + prefix
        assert image[:prefix].tolist() == list(range(prefix))
        assert image[ranked[: patches - r]].tolist() == list(range(prefix, n - r))
        merged = image[ranked[patches - r : patches - dropped]]
        assert ((merged >= prefix) & (merged < n - r)).all()
        assert (image[ranked[patches - dropped :]] == -1).all()


@given(
    seed=st.integers(0, 2**16),
    patches=st.integers(2, 30),
    rate=st.floats(0.05, 1),
    prefix=st.sampled_from([0, 1, 2, 5]),
)
def test_token_mergence_discards_nothing(seed: int, patches: int, rate: float, prefix: int) -> None:
    torch.manual_seed(seed)
    n = prefix + patches
    r = min(patches - 1, int(patches * (1 - rate)))
    tokens, importance, sizes = torch.randn(2, n, 6), torch.rand(2, n), torch.ones(2, n)
    reducer = build_reducer(MCTFViTConfig(reduction="token_mergence"))
    assert reducer is not None
    seen = Observation(tokens, sizes, prefix, class_attention=importance)
    reduction = reducer(seen, r)
    new, new_sizes = fuse(tokens, reduction), fuse_sizes(sizes, reduction)
    assert new.shape[1] == n - r
    assert torch.equal(new_sizes.sum(1), torch.full((2,), float(n)))
    assert reduction.assignment.min() == 0
    for image in range(2):
        ranked = importance[image, prefix:].argsort(descending=True) + prefix
        crucial = sorted(ranked[: patches - r].tolist())
        kept = [*range(prefix), *crucial]
        assert reduction.assignment[image, kept].tolist() == list(range(n - r))  # order
        for position, old in enumerate(kept):  # identity
            if new_sizes[image, position] == 1:
                assert torch.equal(new[image, position], tokens[image, old])
        assert torch.equal(new_sizes[image, :prefix], torch.ones(prefix))
        others = sorted(set(range(n)) - set(kept))
        cosine = torch.nn.functional.cosine_similarity(
            tokens[image, others, None], tokens[image, None, crucial], dim=2
        )
        chosen = cosine.gather(1, reduction.assignment[image, others, None] - prefix)
        torch.testing.assert_close(chosen[:, 0], cosine.amax(1) if others else cosine.sum(1))


@pytest.mark.parametrize("reduction", RATES)
@torch.no_grad()
def test_keep_rate_one_is_the_unreduced_model(reduction: str, images: Tensor) -> None:
    torch.manual_seed(0)
    plain = ViTForImageClassification(ViTConfig(**TINY)).eval()
    model = tiny_model(reduction=reduction, keep_rate=1, skip_unread=False)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(images).logits, plain(images).logits)
    reducing = tiny_model(reduction=reduction, keep_rate=0.5, skip_unread=False)
    reducing.load_state_dict(plain.state_dict())
    assert torch.equal(reducing(images, keep_rate=1).logits, plain(images).logits)
    assert torch.equal(reducing(images, r=0).logits, plain(images).logits)
    assert not torch.equal(reducing(images).logits, plain(images).logits)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", ["t2t transformer", "t2t performer", "lv", "vit"])
@settings(max_examples=4, deadline=None)
@given(
    reduction=st.sampled_from(["mctf", "tome", "pitome", "evit", "token_mergence"]),
    r=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_prefix_tokens_stay_on_every_backbone(
    kind: str, prefix: int, reduction: str, r: int, seed: int
) -> None:
    own: dict[str, Any] = {"class_token": prefix > 0, "distillation_token": prefix == 2}
    if prefix == 5:
        own["num_register_tokens"] = 4
    if kind == "vit":
        own["patch_size"] = 16
    model = small_backbone(
        kind, **own, r=r, reduction=reduction, min_tokens=1, fusion_layers=[0, 2]
    )
    assert model.config.num_prefix_tokens == prefix
    torch.manual_seed(seed)
    output = model(torch.randn(2, 3, 96, 96), r=r, output_fusion=True)
    n = 36 + prefix
    assert output.assignment.shape == (2, n)
    assert output.assignment[:, :prefix].tolist() == [list(range(prefix))] * 2
    assert (output.assignment[:, prefix:] >= prefix).all()
    assert torch.equal(output.token_sizes[:, :prefix], torch.ones(2, prefix))
    assert torch.equal(output.token_sizes.sum(1), torch.full((2,), float(n)))
    assert output.logits.isfinite().all()


@torch.no_grad()
def test_without_class_token_the_head_reads_the_mean_of_all_patches() -> None:
    model = small_backbone("vit", class_token=False, patch_size=16, r=6)
    output = model(pixels(), output_fusion=True, output_hidden_states=True)
    last = model.vit.layernorm(output.hidden_states[-1])
    assert last.shape[1] == output.token_sizes.shape[1] < 36
    spread = last.gather(1, output.assignment[:, :, None].expand(-1, -1, last.shape[2]))
    torch.testing.assert_close(output.features, spread.mean(1))
    torch.testing.assert_close(output.logits, model.classifier(output.features))
    backbone = MCTFViTModel(model.config).eval()
    assert backbone(pixels()).pooler_output.shape == (2, 24)
    assert "token_sizes" not in backbone(pixels())


@torch.no_grad()
def test_without_class_token_importance_is_the_attention_received(images: Tensor) -> None:
    """The layer shows what its eager attention map says."""
    for class_token in (True, False):
        config = {"reduction": "evit", "keep_rate": 0.5, "fusion_layers": [0], "fuse_token": False}
        model = tiny_model(**config, class_token=class_token, attn_implementation="eager")
        output = model(images, output_fusion=True, output_attentions=True)
        shown = output.attentions[0].mean(1)
        importance = shown[:, 0, 1:] if class_token else shown.mean(1)
        kept = importance.argsort(1, descending=True)[:, :32]
        patches = output.assignment[:, class_token:]
        assert torch.equal(patches.gather(1, kept), torch.arange(32).expand(3, -1) + class_token)


@pytest.mark.parametrize("reduction", RATES)
@torch.no_grad()
def test_reductions_compose_and_compile(reduction: str, images: Tensor) -> None:
    model = tiny_model(reduction=reduction, keep_rate=0.6, fusion_layers=[0, 2, 3])
    output = model(images, output_fusion=True, output_hidden_states=True)
    assert [h.shape[1] for h in output.hidden_states[1:-1]] == [
        65 - sum(model.config.tokens_fused(65)[: i + 1]) for i in range(4)
    ]
    counted = torch.zeros(3, output.token_sizes.shape[1]).scatter_add(
        1, output.assignment, torch.ones(3, 65)
    )
    assert torch.equal(counted, output.token_sizes)
    small = tiny_model(
        reduction=reduction, keep_rate=0.6, fusion_layers=[0, 2], num_hidden_layers=3
    )
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).logits, small(images).logits, **EXACT)


def test_dropped_tokens_stay_dropped() -> None:
    first = Reduction.from_assignment(torch.tensor([[0, -1, 1, 2], [2, 1, -1, 0]]), 3, 1)
    then = Reduction.from_assignment(torch.tensor([[0, -1, 1], [1, 0, -1]]), 2, 1)
    whole = images_rows(compose(first.rows, then.rows), 2, 2)
    assert whole.tolist() == [[0, -1, -1, 1], [-1, 0, -1, 1]]


@pytest.mark.parametrize("scales", [[2], [2, 4]])
def test_multi_scale_begins_as_the_identity_and_learns(scales: list[int], images: Tensor) -> None:
    settings = {"reduction": "token_mergence", "keep_rate": 0.7}
    plain = tiny_model(**settings)
    model = tiny_model(**settings, multi_scale=scales)
    report = model.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[2] for name in report.missing_keys} == {"coarse_patch_embeddings"}
    assert torch.equal(model(images).logits, plain(images).logits)
    larger = torch.randn(2, 3, 44, 36)  # 11 x 9 patches, which no coarse patch divides
    wide = {"interpolate_pos_encoding": True}
    assert torch.equal(model(larger, **wide).logits, plain(larger, **wide).logits)

    before = model(images).logits
    optimizer = torch.optim.SGD(model.vit.embeddings.coarse_patch_embeddings.parameters(), lr=1.0)
    model(images, labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    assert not torch.equal(model(images).logits, before)
    assert not torch.equal(model(larger, **wide).logits, plain(larger, **wide).logits)
    model(images, labels=torch.tensor([0, 1, 2])).loss.backward()
    for coarse in model.vit.embeddings.coarse_patch_embeddings:
        assert coarse.projection.weight.grad.abs().max() > 0


@torch.no_grad()
def test_coarse_patches_are_shared_by_the_patches_that_they_cover() -> None:
    model = tiny_model(multi_scale=[4])
    (coarse,) = model.vit.embeddings.coarse_patch_embeddings
    torch.nn.init.normal_(coarse.fusion.weight)
    image = torch.zeros(1, 3, 32, 24)
    image[:, :, 16:, :16] = torch.randn(3, 16, 16)  # the lower left of 2 x 2 coarse patches
    added = (coarse(image) - coarse(torch.zeros_like(image))).view(8, 6, -1)
    assert (added[4:, :4] == added[4, 0]).all() and added[4, 0].abs().max() > 0
    assert (added[:4] == 0).all() and (added[4:, 4:] == 0).all()


@pytest.mark.parametrize("kind", BACKBONES)
@torch.no_grad()
def test_multi_scale_on_every_backbone(kind: str) -> None:
    plain, model = small_backbone(kind), small_backbone(kind, multi_scale=[2])
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model(pixels()).logits, plain(pixels()).logits)


def test_published_cost_of_token_mergence() -> None:
    config = preset("deit_s", reduction="token_mergence", multi_scale=[2])
    base = describe(preset("deit_s")).unfused
    cost = multiply_accumulates(config)
    assert cost / 1e9 <= 3.1 and cost / base < 0.67
    evit = multiply_accumulates(preset("deit_s", reduction="evit", skip_unread=False))
    assert abs(evit / 1e9 - 3.0) < 0.05  # EViT, table 1


@pytest.mark.parametrize("reduction", RATES)
def test_a_keep_rate_can_be_a_budget(reduction: str) -> None:
    config = preset("deit_s", reduction=reduction)
    base = describe(config).unfused
    for fraction in (0.9, 0.6):
        rate = keep_rate_for_budget(config, fraction)
        assert multiply_accumulates(config, keep_rate=rate) <= fraction * base
        assert multiply_accumulates(config, keep_rate=rate + 0.01) > fraction * base
        assert resolve_budget(config, "keep_rate", f"auto:{fraction}") == rate
    with pytest.raises(ValueError, match="meets a budget by its keep_rate, not by r: set"):
        resolve_budget(config, "r", "auto:0.5")
    with pytest.raises(ValueError, match="meets a budget by its r, not by keep_rate"):
        resolve_budget(preset("deit_s"), "keep_rate", "auto:0.5")
    with pytest.raises(ValueError, match=r"budget 0.01 is not allowed: with keep_rate=0.001"):
        resolve_budget(config, "keep_rate", "auto:0.01")


class Everything(Reducer):
    """Merges the last tokens into the first patch, and looks at all there is."""

    stage = Stage.AFTER_MLP
    needs = ("keys", "attention", "attention_received", "class_attention")
    seen: Observation

    def __call__(self, seen: Observation, r: int) -> Reduction:
        type(self).seen = seen
        batch, n, _ = seen.tokens.shape
        assignment = torch.arange(n).expand(batch, -1).clone()
        assignment[:, n - r :] = seen.num_prefix_tokens
        reduction = Reduction.from_assignment(assignment, n - r)
        reduction.weigh(torch.ones(batch, n))
        return reduction


@pytest.fixture
def everything() -> Any:
    register("everything")(Everything)
    yield Everything
    del REDUCERS["everything"]


@torch.no_grad()
def test_a_reducer_sees_what_it_needs(everything: type[Everything], images: Tensor) -> None:
    model = tiny_model(reduction="everything", r=4, fusion_layers=[2])
    output = model(images, output_fusion=True)
    assert output.token_sizes.shape == (3, 61)
    assert torch.equal(output.token_sizes[:, 1], torch.full((3,), 5.0))
    seen = everything.seen
    assert seen.attention is not None and seen.attention.shape == (3, 2, 65, 65)
    assert seen.keys is not None and seen.keys.shape == (3, 65, 12)
    torch.testing.assert_close(seen.attention_received, seen.attention.mean((1, 2)))
    torch.testing.assert_close(seen.class_attention, seen.attention.mean(1)[:, 0])
    assert seen.sizes is None and seen.num_prefix_tokens == 1


def test_names_and_needs_of_reducers_are_checked(everything: type[Everything]) -> None:
    register("everything")(Everything)  # again, as when a module is imported anew
    with pytest.raises(
        ValueError, match="reduction 'mctf' .*: mctf_hf.reducers.MCTFReducer has this"
    ):
        register("mctf")(Everything)
    with pytest.raises(ValueError, match="reduction 'none' cannot be registered"):
        register("none")(Everything)
    wrong = type("Wrong", (Everything,), {"needs": ("queries",)})
    with pytest.raises(ValueError, match=r"needs=\('queries',\).* are not allowed: .*keys, atten"):
        register("wrong")(wrong)
    with pytest.raises(ValueError, match="Aimless has no stage: it must be one of Stage.REUSE, "):
        register("wrong")(type("Aimless", (Reducer,), {}))
    assert "wrong" not in REDUCERS


@torch.no_grad()
def test_what_a_reducer_returns_is_checked(everything: Any, images: Tensor) -> None:
    class Greedy(everything):
        def __call__(self, seen: Observation, r: int) -> Reduction:
            return super().__call__(seen, r + 1)

    class Careless(everything):
        def __call__(self, seen: Observation, r: int) -> Reduction:
            reduction = super().__call__(seen, r)
            reduction.kept_weights = reduction.merged_weights = None
            return reduction

    class Contrary(everything):
        def __call__(self, seen: Observation, r: int) -> Reduction:
            reduction = super().__call__(seen, r)
            reduction.maximum = True
            return reduction

    for wrong, message in (
        (Greedy, "Greedy left 60 tokens, where there are to be 61"),
        (Careless, r"Careless returned a reduction without weights: call its weigh\(\)"),
        (Contrary, "Contrary returned a reduction with maximum=True, where its pools_linearly is"),
    ):
        REDUCERS["everything"] = wrong
        model = tiny_model(reduction="everything", r=4, fusion_layers=[2])
        with pytest.raises(ValueError, match=message):
            model(images)
    Contrary.pools_linearly = False
    tiny_model(reduction="everything", r=4, fusion_layers=[2])(images)


@torch.no_grad()
def test_the_method_of_a_model_may_change(images: Tensor) -> None:
    model = tiny_model(r=8)
    for changed in ({"reduction": "token_mergence"}, {"reduction": "none"}, {"tau_sim": 2.0}):
        other = tiny_model(r=8, **changed)
        other.load_state_dict(model.state_dict())
        (name, value), before = next(iter(changed.items())), model.config.to_dict()
        setattr(model.config, name, value)
        assert torch.equal(model(images).logits, other(images).logits)
        setattr(model.config, name, before[name])
        assert not torch.equal(model(images).logits, other(images).logits)


@torch.no_grad()
def test_what_is_seen_does_not_depend_on_how_attention_is_computed(
    everything: type[Everything], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {}
    for name, kernel, budget, needs in (
        ("map", "eager", attention.MAP_BYTES, Everything.needs),
        ("row", "sdpa", attention.MAP_BYTES, ("class_attention", "keys")),
        ("blocks", "sdpa", 0, ("class_attention", "attention_received")),
    ):
        monkeypatch.setattr(attention, "MAP_BYTES", budget)
        monkeypatch.setattr(Everything, "needs", needs)
        tiny_model(reduction="everything", r=4, fusion_layers=[2], attn_implementation=kernel)(
            images
        )
        shown[name] = Everything.seen
    assert shown["row"].attention is None and shown["row"].attention_received is None
    for name, field in (
        ("row", "class_attention"),
        ("blocks", "class_attention"),
        ("blocks", "attention_received"),
        ("row", "keys"),
    ):
        torch.testing.assert_close(getattr(shown[name], field), getattr(shown["map"], field))


def test_a_budget_holds_with_an_inflection() -> None:
    config = preset("deit_s", reduction="tome", r=6, inflection=-1)
    base = describe(config).unfused
    for fraction in (0.9, 0.6):
        bent, schedule = r_for_budget(config, fraction)
        assert multiply_accumulates(config, r=bent) <= fraction * base
        assert multiply_accumulates(config, r=bent - 1) > fraction * base
        assert fraction * base * 0.99 < multiply_accumulates(config, r=schedule) <= fraction * base
        assert schedule[0] > schedule[-1]


@pytest.mark.parametrize("reduction", RATES)
def test_half_precision_slices_and_checkpoints_of_the_graph(
    reduction: str, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(reduction=reduction, keep_rate=0.6)
    with torch.inference_mode():
        whole = model(images).logits
        monkeypatch.setattr("mctf_hf.fused_encoder.SLICE_BYTES", 1)
        torch.testing.assert_close(model(images).logits, whole)
        half = tiny_model(reduction=reduction, keep_rate=0.6).bfloat16()
        torch.testing.assert_close(half(images.bfloat16()).logits.float(), whole, atol=0.05, rtol=0)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(reduction=reduction, keep_rate=0.6).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(images, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
