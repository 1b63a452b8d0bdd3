"""Attentions and activations of fused tokens, back on the grid of the patches."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mctf_hf import fuse_tokens, fusion_of
from mctf_hf.explaining import Explained, attention_rollout
from tests.helpers import tiny_model
from tests.tiny_models import tiny

METHODS: dict[str, dict[str, Any]] = {
    "mctf": {"r": 9},
    "precise": {"r": 9, "one_step_ahead": "precise"},
    "past": {"r": 9, "one_step_ahead": "past"},
    "tome": {"r": 9, "reduction": "tome"},
    "evit": {"reduction": "evit"},
    "evit drops": {"reduction": "evit", "fuse_token": False},
}


def eager(**settings: Any) -> Any:
    model = tiny_model(**settings)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_every_layer_tells_where_each_token_went(method: str, images: Tensor) -> None:
    model = tiny_model(**METHODS[method])
    output = model(images, output_fusion=True)
    counts = [int(assignment.max()) + 1 for assignment in output.assignments]
    left, expected = 65, []
    for fewer in model.config.tokens_fused(65):
        left -= fewer
        expected.append(left)
    assert counts == expected
    assert torch.equal(output.assignments[-1], output.assignment)
    for before, after in zip(output.assignments, output.assignments[1:], strict=False):
        for image in range(len(images)):  # who is together stays together, or goes together
            pairs = set(zip(before[image].tolist(), after[image].tolist(), strict=True))
            assert len(pairs) == int(before[image].max()) + 1 + int((before[image] < 0).any())
    assert model(images).assignments is None
    one_by_one = [model(image[None], output_fusion=True).assignments for image in images]
    for layer, assignment in enumerate(output.assignments):
        assert torch.equal(assignment, torch.cat([found[layer] for found in one_by_one]))


@torch.no_grad()
def test_without_fusion_the_rollout_is_the_published_one(images: Tensor) -> None:
    output = eager()(images, r=0, output_attentions=True, output_fusion=True)
    expected = torch.eye(65)
    for attention in output.attentions:
        expected = (attention.mean(1) + torch.eye(65)) / 2 @ expected
    torch.testing.assert_close(attention_rollout(output.attentions, output.assignments), expected)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_rollout_distributes_one_over_the_patches(method: str, images: Tensor) -> None:
    output = eager(**METHODS[method])(images, output_attentions=True, output_fusion=True)
    rollout = attention_rollout(output.attentions, output.assignments)
    assert rollout.shape == (3, output.token_sizes.shape[1], 65)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(rollout.shape[:2]))
    with pytest.raises(ValueError, match="5 attentions and 4 assignments are not allowed"):
        attention_rollout(output.attentions, output.assignments[1:])
    with pytest.raises(ValueError, match=r"attentions\[0\] of .* tokens are not allowed"):
        attention_rollout(output.attentions[::-1], output.assignments)


@torch.no_grad()
def test_equal_tokens_fuse_without_changing_the_rollout() -> None:
    """Two tokens that fuse before attention draw as one what each of them would have drawn."""
    attention = torch.rand(1, 2, 4, 4)
    attention[:, :, 3] = attention[:, :, 2]
    attention /= attention.sum(-1, keepdim=True)
    fused = attention[:, :, :3].clone()
    fused[..., 2] += fused[..., 3]
    whole = attention_rollout([attention], [torch.tensor([[0, 1, 2, 3]])])
    joined = attention_rollout([fused[..., :3]], [torch.tensor([[0, 1, 2, 2]])])
    torch.testing.assert_close(joined.sum(1)[:, :2], (whole[:, :3].sum(1))[:, :2])


def activations(explained: Explained, module: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """What pytorch-grad-cam sees of a module: its output in a call, and the gradient of that."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = explained(images)
    handle.remove()
    (output,) = seen
    return output, torch.autograd.grad(logits[:, 0].sum(), output)[0]


@pytest.mark.parametrize("name", ["mlp", "layernorm_after"])
def test_activations_and_gradients_go_back_to_the_grid(name: str, images: Tensor) -> None:
    model = tiny_model(r=9)
    explained = Explained(model)
    with pytest.raises(ValueError, match="call the model first"):
        explained.reshape_transform(torch.zeros(3, 65, 24))
    found = activations(explained, getattr(model.vit.layers[-2], name), images)
    assignment = model(images, output_fusion=True).assignments[-2]
    for tokens in found:
        grid = explained.reshape_transform(tokens)
        assert grid.shape == (3, 24, 8, 8) and grid.abs().sum() > 0
        for image, row, column in ((0, 0, 0), (1, 3, 7), (2, 7, 7)):
            token = assignment[image, 1 + 8 * row + column]
            assert torch.equal(grid[image, :, row, column], tokens[image, token])
    with pytest.raises(ValueError, match="7 tokens are not allowed: there are 65, 56, 47, 38, 29"):
        explained.reshape_transform(torch.zeros(3, 7, 24))


@torch.no_grad()
def test_dropped_patches_are_dark(images: Tensor) -> None:
    model = tiny_model(reduction="evit", fuse_token=False)
    explained = Explained(model)
    explained(images)
    output = model(images, output_fusion=True)
    grid = explained.reshape_transform(torch.ones(3, output.token_sizes.shape[1], 24))
    assert torch.equal(grid[:, 0].flatten(1) > 0, output.assignment[:, 1:] >= 0)


@torch.no_grad()
def test_models_that_were_given_fusion_tell_it_too() -> None:
    model, inputs = tiny("dinov2")
    fuse_tokens(model, r=6)
    output = model(**inputs, output_fusion=True)
    assert [int(one.max()) + 1 for one in output.assignments] == [65, 59, 53, 47]
    assert torch.equal(output.assignments[-1], output.assignment)
    plain = model(**inputs, r=0, output_fusion=True)
    assert [int(one.max()) + 1 for one in plain.assignments] == [65] * 4
    with fusion_of(model, r=3) as record:
        model(**inputs)
    assert [int(one.max()) + 1 for one in record.assignments] == [65, 62, 59, 56]

    classifier, inputs = tiny("DINOv2 classifier")
    explained = Explained(fuse_tokens(classifier, r=6))
    assert explained(**inputs).shape == (2, classifier.num_labels)
    assert explained.reshape_transform(torch.rand(2, 47, 24)).shape == (2, 24, 8, 8)
