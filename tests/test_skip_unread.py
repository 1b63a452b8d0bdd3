"""The last layer computes what is read behind it, and no more."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mctf_hf import (
    MCTFCLIPVisionConfig,
    MCTFCLIPVisionModelWithProjection,
    MCTFDinov2Config,
    MCTFDinov2ForImageClassification,
    MCTFDinov2Model,
    fuse_tokens,
    fusion_of,
)
from mctf_hf.cost import describe, multiply_accumulates
from mctf_hf.presets import preset
from tests.helpers import tiny_model
from tests.tiny_models import pixels, small_backbone, tiny

SETTINGS: list[dict[str, Any]] = [
    {"r": 0},
    {"r": 6},
    {"r": 6, "one_step_ahead": "precise"},
    {"r": 6, "one_step_ahead": "present"},
    {"r": 6, "one_step_ahead": "past"},
    {"r": 6, "pooling": "max"},
    {"r": 6, "reduction": "tome"},
    {"r": 6, "reduction": "pitome", "restore": True},
    {"r": 6, "dropped": 2, "reduction": "diffrate"},
    {"keep_rate": 0.6, "reduction": "evit"},
    {"keep_rate": 0.6, "reduction": "token_mergence"},
]
CLASS_TOKEN = {"skip_unread": True, "r": 4}
DINO: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 4, "layerscale_value": 0.7,
}  # fmt: skip


def flops(model: nn.Module, *inputs: Tensor, **options: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs, **options)
    return counter.get_total_flops()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", SETTINGS)
@torch.no_grad()
def test_logits_are_the_same(settings: dict[str, Any], attention: str, images: Tensor) -> None:
    model = tiny_model(**settings, attn_implementation=attention)
    found = model(images).logits
    cost, work = multiply_accumulates(model), flops(model, images)
    model.config.skip_unread = False
    torch.testing.assert_close(found, model(images).logits, atol=1e-6, rtol=0)
    assert cost < multiply_accumulates(model)
    if attention == "eager":  # the counter does not see all of the other's products
        assert work < flops(model, images)


@pytest.mark.parametrize("kind", ["distilled", "t2t transformer", "lv"])
@torch.no_grad()
def test_all_classifiers(kind: str) -> None:
    model = small_backbone(kind, r=4).eval()
    found = model(pixels()).logits
    skips = model.num_read_tokens
    assert skips == {"distilled": 2, "t2t transformer": 1, "lv": None}[kind]
    model.config.skip_unread = False
    whole = model(pixels()).logits
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)
    assert model.num_read_tokens is None


def test_deit_s_costs_less() -> None:
    config = preset("deit_s", r=0)
    assert round(multiply_accumulates(config) / 1e9, 2) == 4.29
    assert round(describe(config).unfused / 1e9, 3) == 4.608
    assert (
        multiply_accumulates(preset("deit_s", r=0, skip_unread=False)) == describe(config).unfused
    )


def test_gradients_are_the_same(images: Tensor) -> None:
    grads = []
    for skip_unread in (None, False):
        model = tiny_model(r=4, skip_unread=skip_unread).train()
        loss = model(images, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_whoever_looks_at_all_tokens_sees_them(images: Tensor) -> None:
    model = tiny_model(r=4, attn_implementation="eager")
    left = 65 - 4 * 4
    output = model(images, output_hidden_states=True, output_attentions=True)
    assert output.hidden_states[-1].shape[1] == left and output.attentions[-1].shape[-1] == left
    assert model(images, output_fusion=True).token_sizes.shape == (3, left)
    seen: list[tuple[int, ...]] = []
    for module in (model.vit.layers[-1].mlp, model.vit.layernorm, model.vit):
        hook = module.register_forward_hook(lambda _, args, out: seen.append(out[0].shape))
        model(images)
        hook.remove()
    assert [shape[-2] for shape in seen] == [left, left, left]
    # The hooks that transformers has left behind look at nothing.
    assert flops(model, images) < flops(model, images, output_fusion=True)


@torch.no_grad()
def test_programs_skip_too(images: Tensor) -> None:
    model = tiny_model(r=4, attn_implementation="eager", num_hidden_layers=3)
    work = flops(model, images)
    exported = torch.export.export(model, (images,), strict=False).module()
    assert flops(exported, images) == work
    torch.compiler.reset()
    made = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        made.append((graph, inputs))
        return graph

    torch.compile(model, backend=backend, fullgraph=True)(images)
    ((graph, inputs),) = made
    assert flops(graph, *inputs) == work


@torch.no_grad()
def test_encoders_skip_on_request() -> None:
    torch.manual_seed(0)
    model = MCTFDinov2Model(MCTFDinov2Config(**DINO, r=4)).eval()
    images = torch.randn(2, 3, 32, 32)
    whole = model(images)
    assert whole.last_hidden_state.shape == (2, 65, 24)
    cost = multiply_accumulates(model)
    asked = model(images, num_read_tokens=1)
    model.config.skip_unread = True
    for output in (asked, model(images)):
        assert output.last_hidden_state.shape == (2, 1, 24)
        torch.testing.assert_close(output.pooler_output, whole.pooler_output, atol=1e-6, rtol=0)
    assert multiply_accumulates(model) < cost
    assert model(images, output_fusion=True).last_hidden_state.shape == (2, 65, 24)
    for wrong in (0, 2):
        with pytest.raises(ValueError, match=rf"num_read_tokens={wrong} is not allowed in MCTFD"):
            model(images, num_read_tokens=wrong)


@torch.no_grad()
def test_image_embeddings_of_clip() -> None:
    torch.manual_seed(0)
    settings = {k: v for k, v in DINO.items() if k != "layerscale_value"}
    config = MCTFCLIPVisionConfig(**settings, intermediate_size=96, projection_dim=8, r=4)
    model = MCTFCLIPVisionModelWithProjection(config).eval()
    images = torch.randn(2, 3, 32, 32)
    whole = model(images).image_embeds
    model.config.skip_unread = True
    found = model(images)
    torch.testing.assert_close(found.image_embeds, whole, atol=1e-6, rtol=0)
    assert found.last_hidden_state.shape == (2, 1, 24)


@torch.no_grad()
def test_a_mask_counts_where_nothing_is_fused() -> None:
    model, inputs = tiny("vit")
    masked = inputs | {"attention_mask": torch.arange(65).lt(40).expand(2, -1)}
    expected = model(**masked).last_hidden_state[:, :1]
    fuse_tokens(model, r=4, skip_unread=True)
    torch.testing.assert_close(model(**masked, r=0).last_hidden_state, expected)
    assert not torch.allclose(model(**inputs, r=0).last_hidden_state, expected, atol=1e-3)


POOLED = ["dinov2", "dinov2 registers", "clip", "metaclip2", "dinov3", "vit", "deit", "ast"]


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("r", [0, 4])
@torch.no_grad()
def test_encoders_of_transformers(name: str, r: int) -> None:
    model, inputs = tiny(name)
    fuse_tokens(model, r=r)
    whole, cost = model(**inputs), multiply_accumulates(model)
    with fusion_of(model, skip_unread=True):
        assert multiply_accumulates(model) < cost
        told = model(**inputs)  # all tokens, as the block's record tells of them
    assert told.last_hidden_state.shape == whole.last_hidden_state.shape
    model, inputs = tiny(name)
    fuse_tokens(model, r=r, skip_unread=True)
    found = model(**inputs)
    assert found.last_hidden_state.shape[1] <= 2
    torch.testing.assert_close(found.pooler_output, whole.pooler_output, atol=2e-6, rtol=1e-5)
    shown = model(**inputs, output_hidden_states=True)
    assert shown.hidden_states[-1].shape == whole.last_hidden_state.shape


AROUND = {
    "CLIP": "logits_per_image",
    "CLIP projection": "image_embeds",
    "ViT classifier": "logits",
    "DeiT classifier": "logits",
    "DeiT two heads": "logits",
    "AST classifier": "logits",
}


@pytest.mark.parametrize(("name", "field"), AROUND.items())
@torch.no_grad()
def test_models_around_encoders_of_transformers(name: str, field: str) -> None:
    outputs = []
    for settings in ({}, {"skip_unread": True}):
        model, inputs = tiny(name)
        outputs.append(fuse_tokens(model, r=4, **settings)(**inputs)[field])
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_what_reads_all_tokens_is_refused() -> None:
    message = "skip_unread=True is not allowed in MCTFDinov2ForImageClassification, which reads all"
    with pytest.raises(ValueError, match=message):
        MCTFDinov2ForImageClassification(MCTFDinov2Config(**DINO, **CLASS_TOKEN))
    with pytest.raises(ValueError, match=r"skip_unread=True is not allowed in MCTFLVViT"):
        small_backbone("lv", skip_unread=True)
    with pytest.raises(StrictDataclassError, match=r"skip_unread=True is not allowed in a model"):
        tiny_model(class_token=False, skip_unread=True)
    message = "skip_unread=True is not allowed with Dinov2ForImageClassification, which reads all"
    with pytest.raises(ValueError, match=message):
        fuse_tokens(Dinov2ForImageClassification(Dinov2Config(**DINO)), **CLASS_TOKEN)
    siglip = SiglipVisionConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4,
        intermediate_size=48,
    )  # fmt: skip
    with pytest.raises(StrictDataclassError, match=r"skip_unread=True is not allowed in a model"):
        fuse_tokens(SiglipVisionModel(siglip), **CLASS_TOKEN)
    message = r"with CLIPVisionModelWithProjection, which hands out all with restore=False"
    clip = MCTFCLIPVisionConfig(**{k: v for k, v in DINO.items() if k != "layerscale_value"})
    plain = CLIPVisionModelWithProjection(clip)
    with pytest.raises(ValueError, match=message):
        fuse_tokens(plain, **CLASS_TOKEN, restore=False)
