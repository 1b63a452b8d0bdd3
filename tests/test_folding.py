"""Encoders of other families against plain ViTs of the same function, and the written method."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from mctf_hf import MCTFViTConfig, MCTFViTModel, fuse_tokens
from tests import literal
from tests.tiny_models import SIZE, tiny

CLOSE = {"atol": 1e-5, "rtol": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "approximate": {"r": 7},
    "precise": {"r": 7, "one_step_ahead": "precise"},
    "past": {"r": 7, "one_step_ahead": "past", "fusion_layers": [0, 1, 2, 3]},
    "present": {"r": 7, "one_step_ahead": "present", "key_share": 0.3, "class_share": 0.5},
    "maximum": {"r": 7, "pooling": "max"},
    "one direction": {"r": 7, "bidirectional": False, "proportional_attention": False},
    "fraction": {"r": 0.4, "min_tokens": 20},
    "tome": {"reduction": "tome", "r": (7, -1)},
    "pitome": {"reduction": "pitome", "r": 7},
    "diffrate": {"reduction": "diffrate", "r": 7},
    "evit": {"reduction": "evit"},
    "token_mergence": {"reduction": "token_mergence", "keep_rate": 0.6},
}
# What scales the branches of a layer, and what a ViT calls the rest.
SCALES = {
    "dinov2": ("layer_scale1.lambda1", "layer_scale2.lambda1"),
    "dinov2 registers": ("layer_scale1.lambda1", "layer_scale2.lambda1"),
    "beit class": ("lambda_1", "lambda_2"),
}
NAMES = {
    r"^encoder\.layer\.": "layers.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
}


def renamed(name: str) -> str:
    for pattern, new in NAMES.items():
        name = re.sub(pattern, new, name)
    return name


def folded(model: PreTrainedModel, scales: tuple[str, str], **settings: Any) -> MCTFViTModel:
    """The plain ViT that computes what a model does: its scales are in the weights."""
    config = MCTFViTConfig(
        **SIZE,
        layer_norm_eps=model.config.layer_norm_eps,
        num_register_tokens=getattr(model.config, "num_register_tokens", 0),
        restore=True,
        **settings,
    )
    vit = MCTFViTModel(config, add_pooling_layer=False).eval().double()
    weights = {renamed(name): weight.clone() for name, weight in model.state_dict().items()}
    for layer in range(4):
        for scale, last in zip(scales, ("attention.o_proj", "mlp.fc2"), strict=True):
            factor = weights.pop(f"layers.{layer}.{scale}")
            weights[f"layers.{layer}.{last}.weight"] *= factor[:, None]
            weights[f"layers.{layer}.{last}.bias"] *= factor
        weights.setdefault(f"layers.{layer}.attention.k_proj.bias", torch.zeros(24))  # BEiT's
    weights.pop("embeddings.mask_token", None)
    vit.load_state_dict(weights)
    return vit


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", SCALES)
@torch.no_grad()
def test_scaled_branches_are_those_of_scaled_weights(
    name: str, settings: str, attention: str
) -> None:
    model, inputs = tiny(name)
    model.set_attn_implementation(attention)
    inputs = {"pixel_values": inputs["pixel_values"].double()}
    vit = folded(model.double(), SCALES[name], **SETTINGS[settings])
    torch.testing.assert_close(vit(**inputs, r=0)[0], model(**inputs)[0], **CLOSE)
    fuse_tokens(model, **SETTINGS[settings])
    asked = {"output_hidden_states": True, "output_fusion": True}
    found, expected = model(**inputs, **asked), vit(**inputs, **asked)
    assert torch.equal(found.assignment, expected.assignment)
    torch.testing.assert_close(found.token_sizes, expected.token_sizes)
    assert found.token_sizes.shape[1] < 55
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, **CLOSE)
    assert len(found.hidden_states) == len(expected.hidden_states) == 5
    for state, same in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, same, **CLOSE)


# Prefix tokens of encoders, and what comes after their layers.
PLAIN = {
    "clip": (1, "", "post_layernorm"),
    "metaclip2": (1, "", "post_layernorm"),
    "siglip": (0, "post_layernorm", "head"),
    "aimv2": (0, "rms_norm", "head"),
    "vit": (1, "layernorm", "pooler"),
    "deit": (2, "layernorm", "pooler"),
    "ast": (2, "layernorm", ""),
    "mae": (1, "layernorm", ""),
    "ijepa": (0, "layernorm", ""),
    "beit": (1, "layernorm", "pooler"),
    "internvl norms": (1, "layernorm", ""),
    "idefics3": (0, "post_layernorm", ""),
    "smolvlm": (0, "post_layernorm", ""),
}
PARTS = (
    ("layer_norm1", "self_attn", "layer_norm2", "mlp"),
    ("rms_norm1", "attention", "rms_norm2", "ffn"),
    ("layernorm_before", "attention", "layernorm_after", "mlp"),
)
# With an odd and an even number of tokens before each fusion, and one layer without any.
COUNTS = [[5, 0, 12, 1], [0, 7, 6, 9]]


def literal_layers(model: PreTrainedModel) -> list[literal.Layer]:
    layers = next(part for part in model.modules() if isinstance(part, nn.ModuleList))
    names = next(names for names in PARTS if hasattr(layers[0], names[0]))
    return [
        literal.Layer(
            *(getattr(layer, name) for name in names),
            scales=(getattr(layer, "lambda_1", 1.0), getattr(layer, "lambda_2", 1.0)),
        )
        for layer in layers
    ]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("method", literal.METHODS)
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_fusion_is_that_of_the_papers(name: str, method: str, counts: list[int]) -> None:
    prefix, norm, pool = PLAIN[name]
    model, inputs = tiny(name)
    exact = copy.deepcopy(model).double()
    doubled = {key: value.double() for key, value in inputs.items()}
    embedded = exact(**doubled, output_hidden_states=True).hidden_states[0]
    images = literal.encode(literal_layers(exact), embedded, method, counts, prefix)
    rows = torch.stack([image.tokens[image.source] for image in images])
    rows = exact.get_submodule(norm)(rows) if norm else rows
    pooled = rows[:, 0] if pool == "post_layernorm" else rows

    plain = model(**inputs).last_hidden_state
    fuse_tokens(model, **literal.SETTINGS[method], r=counts)
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        found = model(**inputs, output_fusion=True)
        assert found.assignment.tolist() == [image.source for image in images]
        assert found.token_sizes.tolist() == [image.sizes.tolist() for image in images]
        torch.testing.assert_close(found.last_hidden_state.double(), rows, atol=1e-5, rtol=1e-5)
        if pool:
            expected = exact.get_submodule(pool)(pooled)
            torch.testing.assert_close(found.pooler_output.double(), expected, **CLOSE)
        assert (found.last_hidden_state - plain).abs().max() > 1e-2
