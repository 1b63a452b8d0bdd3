"""The model against the official implementation, against plain ViT, and on its own."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import mctf_hf.attention
from mctf_hf import (
    MCTFViTConfig,
    MCTFViTForImageClassification,
    MCTFViTModel,
    fused_encoder,
)
from mctf_hf.conversion import convert_state_dict
from mctf_hf.modeling_mctf_vit import drop_path
from mctf_hf.reducers import REDUCERS, Observation
from tests.helpers import TINY, Golden, tiny_model

GOLDEN = Golden("deit")
TOME, PITOME, DIFFRATE = Golden("tome"), Golden("pitome"), Golden("diffrate")
FUSION = (
    "tau_sim", "tau_info", "tau_size", "bidirectional", "one_step_ahead", "pooling",
    "proportional_attention", "r",
)  # fmt: skip
EXACT = {"atol": 1e-5, "rtol": 0}


def golden_model(case: dict[str, Any], **settings: Any) -> MCTFViTForImageClassification:
    layers = [layer for layer in case["layers"] if layer < case["depth"]]
    fusion = {name: case[name] for name in FUSION}
    model = tiny_model(fusion_layers=layers, **fusion, **settings)
    model.load_state_dict(convert_state_dict(GOLDEN.weights("deit/model."), source="timm"))
    return model


def test_all_reference_cases_are_there() -> None:
    files = (GOLDEN, TOME, PITOME, DIFFRATE, Golden("fusion"), Golden("train"))
    assert [len(file.cases) for file in files] == [13, 3, 3, 3, 48, 3]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", GOLDEN.cases)
@torch.no_grad()
def test_output_equals_the_official_one(name: str, attention: str) -> None:
    case = GOLDEN.cases[name]
    model = golden_model(case, attn_implementation=attention)
    output = model(GOLDEN[f"{name}/pixel_values"], output_fusion=True, output_hidden_states=True)
    torch.testing.assert_close(output.logits, GOLDEN[f"{name}/logits"], **EXACT)
    torch.testing.assert_close(output.hidden_states[-1], GOLDEN[f"{name}/last_hidden"], **EXACT)
    assert [h.shape[1] for h in output.hidden_states[1:]] == case["tokens_after_layer"]
    if case["r"]:
        torch.testing.assert_close(output.token_sizes, GOLDEN[f"{name}/token_size"], **EXACT)
        assert torch.equal(output.assignment, GOLDEN[f"{name}/source"])


def peer_settings(case: dict[str, Any]) -> dict[str, Any]:
    """The settings of a case of ToMe, PiToMe or DiffRate."""
    settings: dict[str, Any] = {
        "reduction": case["kind"],
        "proportional_attention": case["proportional_attention"],
        "min_tokens": 1,
        "restore": False,
    }
    if case["kind"] == "pitome":
        ratios = case["kept_ratio_by_layer"]
        return settings | {"r": [round(1 - ratio, 9) for ratio in ratios]}
    if case["kind"] == "diffrate":
        left = case["kept_after_merging_by_layer"]
        entering = [65, *left[:-1]]
        dropped = zip(entering, case["kept_after_dropping_by_layer"], strict=True)
        return settings | {
            "r": [before - after for before, after in zip(entering, left, strict=True)],
            "dropped": [before - after for before, after in dropped],
        }
    return settings | {"r": case["r"]}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("golden", "name"),
    [(golden, name) for golden in (TOME, PITOME, DIFFRATE) for name in golden.cases],
)
@torch.no_grad()
def test_peers_equal_their_authors_code(golden: Golden, name: str, attention: str) -> None:
    case = golden.cases[name]
    model = tiny_model(**peer_settings(case), attn_implementation=attention)
    weights = golden.weights(f"{case['kind']}/model.")
    model.load_state_dict(convert_state_dict(weights, source="timm"))
    images = golden[f"{name}/pixel_values"]
    output = model(images, output_fusion=True, output_hidden_states=True)
    torch.testing.assert_close(output.logits, golden[f"{name}/logits"], **EXACT)
    torch.testing.assert_close(output.token_sizes, golden[f"{name}/token_size"], atol=1e-4, rtol=0)
    assert torch.equal(output.assignment, golden[f"{name}/source"])
    if "tokens_after_layer" in case:
        assert [h.shape[1] for h in output.hidden_states[1:]] == case["tokens_after_layer"]
    if f"{name}/last_hidden" in golden.names:
        last = model.vit(images).last_hidden_state
        torch.testing.assert_close(last, golden[f"{name}/last_hidden"], **EXACT)


def test_tome_fuses_in_all_layers_by_default() -> None:
    assert MCTFViTConfig(r=8, reduction="tome").tokens_fused(197) == (8,) * 12


@pytest.mark.parametrize("settings", [{"reduction": "none"}, {"r": 0}])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_without_fusion_it_is_exactly_vit(
    settings: dict[str, Any], attention: str, images: Tensor
) -> None:
    torch.manual_seed(0)
    plain = ViTForImageClassification(ViTConfig(**TINY, attn_implementation=attention)).eval()
    model = tiny_model(**settings, attn_implementation=attention, skip_unread=False)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(images).logits, plain(images).logits)
    larger = torch.randn(2, 3, 48, 48)
    assert torch.equal(
        model(larger, interpolate_pos_encoding=True).logits,
        plain(larger, interpolate_pos_encoding=True).logits,
    )


@torch.no_grad()
def test_an_attention_mask_is_for_models_that_do_not_fuse(images: Tensor) -> None:
    mask = torch.ones(3, 65, dtype=torch.long)
    mask[:, 60:] = 0
    torch.manual_seed(0)
    plain = ViTForImageClassification(ViTConfig(**TINY)).eval()
    model = tiny_model(r=4)
    model.load_state_dict(plain.state_dict())
    expected = plain(images, attention_mask=mask).logits
    torch.testing.assert_close(model(images, attention_mask=mask, r=0).logits, expected)
    shown = model(images, attention_mask=mask, r=0, output_attentions=True)
    torch.testing.assert_close(shown.logits, expected)
    assert all((attention[..., 60:] == 0).all() for attention in shown.attentions)
    with pytest.raises(ValueError, match="attention_mask is not allowed where tokens are fused"):
        model(images, attention_mask=mask)


@torch.no_grad()
def test_r_of_one_call_equals_a_model_made_with_it(images: Tensor) -> None:
    model, other = tiny_model(r=2), tiny_model(r=9)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(images, r=9).logits, other(images).logits)
    assert not torch.equal(model(images).logits, other(images).logits)
    assert model.config.r == 2
    with pytest.raises(ValueError, match="r=-3 is not allowed"):
        model(images, r=-3)


@torch.no_grad()
def test_output_is_an_ordinary_one_unless_asked(images: Tensor) -> None:
    model = tiny_model(r=4)
    assert list(model(images)) == ["logits"]
    assert list(model(images, labels=torch.tensor([0, 1, 2]))) == ["loss", "logits"]
    assert isinstance(model(images, return_dict=False), tuple)
    asked = model(images, output_fusion=True)
    fields = ["logits", "token_sizes", "assignment", "features", "assignments"]
    assert list(asked) == fields
    torch.testing.assert_close(model.classifier(asked.features), asked.logits)


@torch.no_grad()
def test_hidden_states_and_attentions_shrink(images: Tensor) -> None:
    for step, attended in {
        "approximate": [65, 57, 49, 41, 33],
        "precise": [65, 57, 49, 41, 33],
        "past": [65, 65, 57, 49, 41],
    }.items():
        model = tiny_model(r=8, one_step_ahead=step)
        output = model(images, output_hidden_states=True, output_attentions=True)
        assert [h.shape for h in output.hidden_states] == [
            (3, n, 24) for n in (65, 65, 57, 49, 41, 33)
        ]
        assert [a.shape for a in output.attentions] == [(3, 2, n, n) for n in attended]
        for attention in output.attentions:
            torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
        torch.testing.assert_close(output.logits, model(images).logits)


@torch.no_grad()
def test_sizes_count_the_assigned_tokens(images: Tensor) -> None:
    for r in (8, 0):
        output = tiny_model()(images, r=r, output_fusion=True)
        counted = torch.stack([a.bincount() for a in output.assignment])
        assert torch.equal(counted.float(), output.token_sizes)


@torch.no_grad()
def test_an_image_is_classified_alike_alone_and_in_a_batch(images: Tensor) -> None:
    model = tiny_model(r=8)
    alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(model(images).logits, alone)
    torch.testing.assert_close(model(images.flip(0)).logits.flip(0), alone)


@torch.no_grad()
def test_images_of_another_size(images: Tensor) -> None:
    model = tiny_model(r=8)
    larger = torch.randn(2, 3, 48, 64)
    output = model(larger, interpolate_pos_encoding=True, output_fusion=True)
    assert output.token_sizes.sum(1).tolist() == [193, 193]
    with pytest.raises(ValueError, match="doesn't match model"):
        model(larger)


def test_gradient_checkpointing_changes_no_gradient(images: Tensor) -> None:
    for step in ("approximate", "precise", "past"):
        gradients = []
        for checkpointing in (False, True):
            model = tiny_model(r=8, one_step_ahead=step).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            model(images, labels=torch.tensor([0, 1, 2])).loss.backward()
            gradients.append([p.grad for p in model.parameters()])
        for plain, checkpointed in zip(*gradients, strict=True):
            assert plain is not None
            torch.testing.assert_close(checkpointed, plain)


def test_all_weights_get_gradients_through_fusion(images: Tensor) -> None:
    model = tiny_model(r=8).train()
    model(images, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_drop_path_skips_whole_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 3)
    dropped = drop_path(x, 0.25)
    values = dropped[:, 0, 0]
    assert sorted(set(values.tolist())) == pytest.approx([0, 4 / 3])
    assert (dropped == values[:, None, None]).all()
    assert values.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop_path(x, 0), x)


def test_drop_path_rises_with_depth_and_acts_in_training_only(images: Tensor) -> None:
    model = tiny_model(r=8, drop_path_rate=0.4)
    rates = [layer.drop_path_rate for layer in model.vit.layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert torch.equal(model(images).logits, model(images).logits)
    model.train()
    assert not torch.equal(model(images).logits, model(images).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_precisions(dtype: torch.dtype, images: Tensor) -> None:
    for settings in ({}, {"one_step_ahead": "precise"}, {"r": 0.3, "fusion_layers": [1, 3]}):
        model = tiny_model(**{"r": 8, **settings})
        expected = model(images).logits
        logits = model.to(dtype)(images).logits
        assert logits.dtype == dtype
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(logits.float(), expected, atol=tolerance, rtol=0)


@torch.no_grad()
def test_bfloat16_errs_no_more_than_without_fusion_if_the_same_tokens_fuse(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []

    class Remembering(REDUCERS["mctf"]):
        """In bfloat16 what was chosen before, in order."""

        def __call__(self, seen: Observation, amount: Any) -> Any:
            if seen.tokens.dtype == torch.bfloat16:
                return chosen.pop(0)
            chosen.append(super().__call__(seen, amount))
            return chosen[-1]

    monkeypatch.setitem(REDUCERS, "mctf", Remembering)
    model, errors = tiny_model().to(torch.bfloat16), []
    for r in (0, 8):
        expected = model.float()(images, r=r).logits
        logits = model.to(torch.bfloat16)(images, r=r).logits
        errors.append((logits.float() - expected).abs().mean().item())
    assert 0 < errors[1] < 1.5 * errors[0]
    assert not chosen


@torch.no_grad()
def test_under_autocast_the_same_tokens_fuse(images: Tensor) -> None:
    model = tiny_model(r=8, fusion_layers=[1])
    expected = model(images, output_fusion=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, output_fusion=True)
    agreeing = (output.assignment == expected.assignment).float().mean()
    assert agreeing > 0.9
    torch.testing.assert_close(output.logits.float(), expected.logits, atol=0.05, rtol=0)


@torch.no_grad()
def test_one_model_serves_many_threads(images: Tensor) -> None:
    model = tiny_model(r=8)
    expected = {r: model(images, r=r).logits for r in range(8)}
    results: dict[int, Tensor] = {}

    def classify(r: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                results[r] = model(images, r=r).logits

    threads = [threading.Thread(target=classify, args=(r,)) for r in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[r], expected[r]) for r in expected)


@torch.no_grad()
def test_the_bare_encoder(images: Tensor) -> None:
    model = MCTFViTModel(MCTFViTConfig(**TINY, r=8)).eval()
    output = model(images, output_fusion=True)
    assert output.last_hidden_state.shape == (3, 33, 24)
    assert output.pooler_output.shape == (3, 24)
    assert output.assignment.shape == (3, 65)
    masked = MCTFViTModel(MCTFViTConfig(**TINY, r=8), use_mask_token=True).eval()
    hidden = masked(images, bool_masked_pos=torch.ones(3, 64).bool()).last_hidden_state
    torch.testing.assert_close(hidden[0], hidden[1])


def test_attention_kernels_without_a_bias_are_refused() -> None:
    with pytest.raises(ValueError, match="flex"):
        tiny_model(attn_implementation="flex_attention")


VARIANTS = (
    {"r": 8},
    {"r": 8, "one_step_ahead": "precise"},
    {"r": 8, "one_step_ahead": "past"},
    {"r": 8, "pooling": "max"},
    {"r": 0.3, "fusion_layers": [1, 3]},
    {"r": 8, "one_step_ahead": "present", "key_share": 0.2, "class_share": 0.5},
    {"r": 8, "reduction": "tome"},
    {"r": 8, "reduction": "pitome"},
    {"r": 8, "reduction": "diffrate", "dropped": 0.5, "restore": False},
    {"reduction": "none"},
)


@pytest.mark.parametrize("settings", VARIANTS)
@torch.no_grad()
def test_slices_of_a_batch_change_nothing(
    settings: dict[str, Any], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = tiny_model(**settings), []
    expected = model(images.repeat(3, 1, 1, 1), output_fusion=True)
    model.vit.layers[0].register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    monkeypatch.setattr(fused_encoder, "SLICE_BYTES", 65 * 96 * 4 * 2)  # two images'
    output = model(images.repeat(3, 1, 1, 1), output_fusion=True)
    assert sizes == [2, 2, 2, 2, 1]
    torch.testing.assert_close(tuple(output.values()), tuple(expected.values()))
    assert model(images).keys() == {"logits"}
    sizes.clear()
    assert len(model(images, output_hidden_states=True).hidden_states) == 6
    with torch.enable_grad():
        model(images)
    model.config.output_hidden_states = True
    assert len(model(images).hidden_states) == 6
    assert sizes == [3, 3, 3]


@torch.no_grad()
def test_attentions_asked_for_by_the_configuration_are_those_of_the_call(images: Tensor) -> None:
    model = tiny_model(r=8, attn_implementation="eager")
    expected = model(images, output_attentions=True).attentions
    model.config.output_attentions = True
    torch.testing.assert_close(model(images).attentions, expected)


@pytest.mark.parametrize("settings", VARIANTS)
def test_maps_too_large_to_be_held_change_nothing(
    settings: dict[str, Any], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for held in (True, False):
        if not held:
            monkeypatch.setattr(mctf_hf.attention, "MAP_BYTES", 0)
            monkeypatch.setattr(mctf_hf.attention, "BLOCK_BYTES", 2 * 65 * 4 * 10)  # ten rows
        model = tiny_model(**settings).train()
        output = model(images, labels=torch.tensor([0, 1, 2]), output_fusion=True)
        output.loss.backward()
        gradients = [p.grad for p in model.parameters()]
        results.append((output.logits, output.assignment, gradients))
    torch.testing.assert_close(results[1], results[0])


def test_two_passes_can_share_their_embedding(images: Tensor) -> None:
    model = tiny_model(r=8)
    embedded = model.vit.embeddings(images)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(images).logits)
    for given in ({}, {"pixel_values": images, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="either pixel_values or inputs_embeds"):
            model(**given)


@torch.no_grad()
def test_a_batch_of_another_size_recompiles_nothing(images: Tensor) -> None:
    torch._dynamo.reset()
    model = tiny_model(r=8, num_hidden_layers=3)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 3, 7, 3):
        pixels = images[:1].repeat(batch, 1, 1, 1)
        torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits)
    assert len(graphs) == 1


@torch.no_grad()
def test_what_is_compiled_computes_the_same(images: Tensor) -> None:
    torch._dynamo.reset()
    model = tiny_model(r=8, num_hidden_layers=2)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images).logits, model(images).logits)
