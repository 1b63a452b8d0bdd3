"""What cannot be fused is refused by an error that says why, and is what it was afterwards."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from mctf_hf import (
    MCTFDinov2Config,
    MCTFDinov2Model,
    MCTFViTConfig,
    MCTFViTModel,
    fuse_tokens,
    fusion_of,
    unfuse_tokens,
)
from mctf_hf.families import UNSUPPORTED
from mctf_hf.fusion import Reduction
from mctf_hf.reducers import REDUCERS, Observation, Reducer, Stage, register
from tests.tiny_models import BEIT, DINO, ENCODERS, SIZE, TEXT, Tiny, build, tiny

PATCHES = {key: value for key, value in SIZE.items() if key != "image_size"}
QUERIES = {"num_upscale_blocks": 1, "num_blocks": 2, "num_queries": 4, "num_labels": 3}
PACKED = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 6}
OUT = {"out_hidden_size": 16, "intermediate_size": 32}
SAM = {**SIZE, "output_channels": 8, "window_size": 4, "global_attn_indexes": [1]}
SAM |= {"mlp_dim": 48, "num_pos_feats": 4}
VIDEO = {**PATCHES, "num_frames": 4, "image_size": 48}
PREDICTED = {"crop_size": 48, "frames_per_clip": 4, "mlp_ratio": 2.0, "pred_hidden_size": 24}
PREDICTED |= {"pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}

# Encoders that are known and cannot be fused yet, by the name of the class in families.UNSUPPORTED.
KNOWN = {
    "Siglip2VisionModel": Tiny("Siglip2VisionModel", {**PATCHES, "num_patches": 64}),
    "VideoMAEModel": Tiny("VideoMAEModel", VIDEO),
    "VJEPA2Model": Tiny("VJEPA2Model", {**PATCHES, **PREDICTED}),
    "PixtralVisionModel": Tiny("PixtralVisionModel", {**SIZE, "head_dim": 12}),
    "Qwen2VisionTransformerPretrainedModel": Tiny(
        "models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        {**PACKED, "embed_dim": 16},
    ),
    "Qwen2_5_VisionTransformerPretrainedModel": Tiny(
        "models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        {**PACKED, **OUT},
    ),
    "Qwen3VLVisionModel": Tiny(
        "Qwen3VLVisionModel", {**PACKED, **OUT, "deepstack_visual_indexes": [1]}
    ),
    "SamVisionEncoder": Tiny("SamVisionModel", SAM),
    "EomtForUniversalSegmentation": Tiny("EomtForUniversalSegmentation", {**SIZE, **QUERIES}),
    "EomtDinov3ForUniversalSegmentation": Tiny(
        "EomtDinov3ForUniversalSegmentation", {**SIZE, **QUERIES}
    ),
}

# Layers of other forms, of texts, and of images in classes that nobody has looked at.
UNKNOWN = {
    "SwinStage has no ": Tiny(
        "SwinModel",
        {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32, "patch_size": 4},
    ),
    "ResNetStage has no ": Tiny(
        "ResNetModel", {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    ),
    "BertLayer has no ": Tiny(
        "BertModel", {key: TEXT[key] for key in TEXT if key != "num_key_value_heads"}
    ),
    "LlamaDecoderLayer has no ": Tiny("LlamaModel", TEXT),
    "CLIPEncoderLayer: they are of no known encoder for images": Tiny("CLIPTextModel", TEXT),
    "SiglipEncoderLayer: they are of no known encoder for images": Tiny(
        "SiglipTextModel", {**TEXT, "projection_size": 16}
    ),
    "AltCLIPEncoderLayer: they are of no known encoder for images": Tiny(
        "AltCLIPVisionModel", SIZE
    ),
    "YolosLayer has no ": Tiny("YolosModel", {**SIZE, "image_size": [48, 48]}),
}


def state(model: nn.Module) -> dict[str, Any]:
    """Of which classes a model's modules are, and what they hold."""
    return {name: (type(one), sorted(vars(one))) for name, one in model.named_modules()}


def assert_refused(model: nn.Module, message: str, **settings: Any) -> None:
    before = state(model)
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        fuse_tokens(model, **settings)
    assert state(model) == before


def test_every_encoder_of_later_is_one_of_transformers() -> None:
    without_timm = {name for name in UNSUPPORTED if "Timm" not in name}
    assert set(KNOWN) == without_timm
    assert all(hasattr(transformers, name) for name in set(UNSUPPORTED) - without_timm)


@pytest.mark.parametrize("name", KNOWN)
def test_encoders_that_cannot_be_fused_yet(name: str) -> None:
    model = build(KNOWN[name].name, **KNOWN[name].config)
    assert any(type(part).__name__ == name for part in model.modules())
    why = re.escape(
        f"{type(model).__name__}: {UNSUPPORTED[name]} ({name}), which is not supported yet"
    )
    assert_refused(model, why, r=4)


@pytest.mark.parametrize("reason", UNKNOWN)
def test_models_without_a_vision_encoder_that_is_known(reason: str) -> None:
    model = build(UNKNOWN[reason].name, **UNKNOWN[reason].config)
    why = f"{type(model).__name__} has no vision encoder that is known, only layers of .*{reason}"
    assert_refused(model, f"{why}.*known are DINOv2, ", r=4)


def test_what_is_no_model() -> None:
    assert_refused(nn.Linear(2, 2), "Linear is no model of transformers")


def test_an_encoder_in_a_module_that_is_not_of_transformers_is_named() -> None:
    model = nn.Sequential(tiny("dinov2")[0])
    with pytest.raises(ValueError) as refused:
        fuse_tokens(model, r=4)
    assert "Dinov2Model" in str(refused.value)
    assert "no vision encoder" not in str(refused.value)


WRONG: dict[str, dict[str, Any]] = {
    r"settings \['fuse', 'rr'\] are not known: they are among reduction, .*r, .*restore": {
        "rr": 3,
        "fuse": True,
    },
    r"settings \['num_prefix_tokens'\] are not known": {"num_prefix_tokens": 3},
    "reduction='pca' is not allowed: it must be one of mctf, tome, pitome, diffrate, evit, ": {
        "reduction": "pca"
    },
    "r=-1 is not allowed: r is a count": {"r": -1},
    "r=1.5 is not allowed": {"r": 1.5},
    "r=nan is not allowed": {"r": float("nan")},
    "'r' .*expected int, got str": {"r": "8"},
    "'r' .*expected int, got bool": {"r": True},
    r"r=\[1, 2\] has 2 entries: a list has one for each of the 4 layers": {"r": [1, 2]},
    r"r=\[0, 0, 0, 3\] fuses in layers \[3\], which fusion_layers=\[1\] leaves out": {
        "r": [0, 0, 0, 3],
        "fusion_layers": [1],
    },
    "inflection=2 is not allowed": {"inflection": 2},
    "inflection=1 is not allowed with r=0.3: it takes a count": {"r": 0.3, "inflection": 1},
    "keep_rate=0 is not allowed": {"reduction": "evit", "keep_rate": 0},
    r"fusion_layers=\[9\] is not allowed: \[9\] are not among the layers 0 to 3": {
        "fusion_layers": [9]
    },
    r"fusion_layers=\[1, 1\] is not allowed: it names a layer twice": {"fusion_layers": [1, 1]},
    "tau_sim=-1 is not allowed: it must be a number of at least 0": {"tau_sim": -1},
    "min_tokens=0 is not allowed: it must be a number of at least 1": {"min_tokens": 0},
    "one_step_ahead='future' is not allowed: it must be one of approximate, precise, present, "
    "past": {"one_step_ahead": "future"},
    "pooling='median' is not allowed: it must be one of attention_size, size, mean, max": {
        "pooling": "median"
    },
    "'restore' expected bool, got str": {"restore": "yes"},
    "tau_sim=2 has no effect with reduction='tome': it is a setting of mctf": {
        "reduction": "tome",
        "tau_sim": 2,
    },
    "pooling='max' has no effect with reduction='evit': it is a setting of mctf": {
        "reduction": "evit",
        "pooling": "max",
    },
    "fuse_token=False has no effect with reduction='mctf': it is a setting of evit": {
        "fuse_token": False
    },
    "keep_rate=0.5 has no effect with reduction='mctf', which goes by r": {"keep_rate": 0.5},
    "r=3 has no effect with reduction='evit', which goes by keep_rate": {
        "reduction": "evit",
        "r": 3,
    },
    "r=3 has no effect with reduction='none', which reduces nothing": {
        "reduction": "none",
        "r": 3,
    },
    "inflection=1 has no effect with reduction='evit'": {"reduction": "evit", "inflection": 1},
    "rope_positions='mean' has no effect on CLIPVisionModel, which has no rotary positions": {
        "rope_positions": "mean"
    },
    "restore=True is not allowed with reduction='evit', which drops tokens": {
        "reduction": "evit",
        "fuse_token": False,
    },
}


@pytest.mark.parametrize("message", WRONG)
@torch.no_grad()
def test_settings_that_are_wrong_or_without_effect(message: str) -> None:
    model, inputs = tiny("clip")
    plain = model(**inputs).last_hidden_state
    assert_refused(model, message, **WRONG[message])
    assert torch.equal(model(**inputs).last_hidden_state, plain)
    fuse_tokens(model, r=6)
    fused = model(**inputs).last_hidden_state
    assert not torch.equal(fused, plain)
    with (
        pytest.raises((ValueError, StrictDataclassError), match=message),
        fusion_of(model, **WRONG[message]),
    ):
        pass
    assert torch.equal(model(**inputs).last_hidden_state, fused)


def test_places_of_rotary_encoders_that_do_not_exist() -> None:
    model, _ = tiny("dinov3")
    message = "rope_positions='first' is not allowed: it must be one of mean, kept"
    assert_refused(model, message, rope_positions="first")
    fuse_tokens(model, rope_positions="kept")


@pytest.mark.parametrize("shared", [False, True])
def test_relative_positions_belong_to_pairs_of_places(shared: bool) -> None:
    name = "use_shared_relative_position_bias" if shared else "use_relative_position_bias"
    why = "tokens of this BeitModel cannot be fused: relative position biases"
    assert_refused(build("BeitModel", **BEIT, **{name: True}), why, r=4)
    assert_refused(build("BeitForImageClassification", **BEIT, **{name: True}), why, r=4)


GRIDS = {
    **{name: ENCODERS[name].name for name in ENCODERS if "backbone" in name},
    "Depth Anything": "Dinov2Backbone",
    "DPT": "Dinov2Backbone",
    "UperNet DINOv2": "Dinov2Backbone",
    "BEiT backbone": "BeitBackbone",
    "UperNet BEiT": "BeitBackbone",
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_need_a_row_for_each_place(name: str) -> None:
    model, inputs = tiny(name)
    why = f"restore=False is not allowed with {GRIDS[name]}, which makes grids of its tokens"
    assert_refused(model, why, restore=False)
    fuse_tokens(model)
    with pytest.raises(ValueError, match=why), fusion_of(model, restore=False):
        pass
    model(**inputs)


def test_a_model_that_fuses_already() -> None:
    model, _ = tiny("CLIP")
    fuse_tokens(model, r=4)
    message = "fuses tokens already: call unfuse_tokens first, or use fusion_of"
    assert_refused(model, f"CLIPModel {message}", r=8)
    assert_refused(model.vision_model, f"CLIPVisionModel {message}", r=8)
    fuse_tokens(unfuse_tokens(model), r=8)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [(MCTFDinov2Model, MCTFDinov2Config(**DINO)), (MCTFViTModel, MCTFViTConfig(**SIZE))],
)
def test_a_model_of_this_library_has_its_own_settings(model_class: Any, config: Any) -> None:
    model, name = model_class(config), model_class.__name__
    assert_refused(model, f"{name} fuses tokens already: change its configuration", r=4)
    why = f"{name} was not given fusion by fuse_tokens: its own configuration says how it fuses"
    with pytest.raises(ValueError, match=why):
        unfuse_tokens(model)
    with pytest.raises(ValueError, match=why), fusion_of(model):
        pass


@pytest.mark.parametrize("name", ["dinov2", "CLIP", "text"])
def test_a_model_that_was_never_given_fusion(name: str) -> None:
    model = build("CLIPTextModel", **TEXT) if name == "text" else tiny(name)[0]
    before = state(model)
    why = f"{type(model).__name__} was not given fusion by fuse_tokens$"
    with pytest.raises(ValueError, match=why):
        unfuse_tokens(model)
    with pytest.raises(ValueError, match=why), fusion_of(model, r=4):
        pass
    assert state(model) == before
    if name != "text":
        unfuse_tokens(fuse_tokens(model, r=4))
        with pytest.raises(ValueError, match=why):
            unfuse_tokens(model)


@torch.no_grad()
def test_a_refused_call_leaves_no_trace() -> None:
    model, inputs = tiny("dinov2")
    expected = fuse_tokens(model, r=6)(**inputs).last_hidden_state
    for message, wrong in {
        "r=-1 is not allowed": {"r": -1},
        "r=1 and keep_rate=0.5: give one of them": {"r": 1, "keep_rate": 0.5},
        "keep_rate=0.5 has no effect with reduction='mctf'": {"keep_rate": 0.5},
    }.items():
        with pytest.raises(ValueError, match=message):
            model(**inputs, **wrong)
        assert torch.equal(model(**inputs).last_hidden_state, expected)
    with fusion_of(model) as record:
        with pytest.raises(ValueError, match="has not been called in this block of fusion_of"):
            record.assignment  # noqa: B018
        assert torch.equal(model(**inputs).last_hidden_state, expected)
        model(**inputs, r=3)
        assert [int(one.max()) + 1 for one in record.assignments] == [65, 62, 59, 56]
    with pytest.raises(ValueError, match="push_to_hub=True is not allowed in save_pretrained"):
        model.save_pretrained("folder", push_to_hub=True)


class Pair(PreTrainedModel):
    """A model with two encoders."""

    config_class = transformers.Dinov2Config
    _supports_sdpa = True

    def __init__(self, first: PreTrainedModel, second: PreTrainedModel):
        super().__init__(first.config)
        self.first, self.second = first, second


def test_of_two_encoders_none_is_changed_if_one_is_refused() -> None:
    first, _ = tiny("dinov2")
    model = Pair(first, build("SiglipVisionModel", **{**SIZE, "num_hidden_layers": 3}))
    assert_refused(model, r"\[3\] are not among the layers 0 to 2", fusion_layers=[3])
    model = Pair(first, build("BeitModel", **BEIT, use_relative_position_bias=True))
    assert_refused(model, "tokens of this BeitModel cannot be fused", r=4)
    assert_refused(
        Pair(first, tiny("dinov3")[0]), "no effect on Dinov2Model", rope_positions="kept"
    )


@pytest.mark.parametrize("part", ["norm2", "mlp"])
def test_a_layer_that_lacks_a_part_is_named(part: str) -> None:
    model, _ = tiny("dinov2")
    delattr(model.encoder.layer[2], part)
    assert_refused(model, f"Dinov2Layer has no {part}, by which its family is known", r=4)


def test_an_attention_that_lacks_a_part_is_named() -> None:
    model, _ = tiny("siglip")
    del model.encoder.layers[3].self_attn.k_proj
    why = "SiglipAttention has no key that is understood: it is called k_proj or key"
    assert_refused(model, why, r=4)


MASKED = ["dinov2", "dinov2 registers", "vit", "deit", "mae", "ijepa", "beit", "ast"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*MASKED, "idefics3", "smolvlm", "Idefics3"])
@torch.no_grad()
def test_masks_do_not_go_with_fusion(name: str, attention: str) -> None:
    model, inputs = tiny(name)
    model.set_attn_implementation(attention)
    mask = {"attention_mask": torch.ones(2, model(**inputs)[0].shape[1])}
    if name in ("idefics3", "smolvlm"):
        mask = {"patch_attention_mask": torch.ones(2, 8, 8, dtype=torch.bool)}
    if name == "Idefics3":
        mask = {"pixel_attention_mask": torch.ones(2, 1, 48, 48, dtype=torch.bool)}
    nothing = {key: value.clone() for key, value in mask.items()}
    next(iter(mask.values()))[0, ..., -12:] = 0
    masked = model(**inputs, **mask)[0]
    assert not torch.equal(masked, model(**inputs)[0])
    fused = fuse_tokens(model, r=6)(**inputs)[0]
    why = "attention_mask is not allowed where tokens are fused: leave it out, or set r=0"
    with pytest.raises(ValueError, match=why):
        model(**inputs, **mask)
    assert torch.equal(model(**inputs)[0], fused)
    assert torch.equal(model(**inputs, **nothing)[0], fused)
    assert torch.equal(model(**inputs, **mask, r=0)[0], masked)
    with fusion_of(model, reduction="none", r=0):
        assert torch.equal(model(**inputs, **mask)[0], masked)


@dataclass(frozen=True)
class FirstReducer(Reducer):
    """Keep the first tokens alone."""

    stage: ClassVar = Stage.AFTER_ATTENTION

    def __call__(self, seen: Observation, r: int) -> Reduction:
        batch, num_tokens, _ = seen.tokens.shape
        places = torch.arange(num_tokens)
        kept = torch.where(places < num_tokens - r, places, -1).expand(batch, -1)
        reduction = Reduction.from_assignment(kept, num_tokens - r, r)
        reduction.weigh(torch.ones(batch, num_tokens))
        return reduction


class HonestReducer(FirstReducer):
    drops_tokens = True


class LazyReducer(FirstReducer):
    """Fuses no tokens at all."""

    def __call__(self, seen: Observation, r: int) -> Reduction:
        return super().__call__(seen, 0)


@pytest.fixture
def own() -> Iterator[None]:
    mine = {"first": FirstReducer, "honest": HonestReducer, "lazy": LazyReducer}
    for name, reducer in mine.items():
        register(name)(reducer)
    yield
    for name in mine:
        del REDUCERS[name]


@torch.no_grad()
def test_an_own_method_that_drops_tokens_without_saying_so(own: None) -> None:
    model, inputs = tiny("dinov2")
    plain = model(**inputs)[0]
    fuse_tokens(model, reduction="first", r=6)
    why = "FirstReducer drops tokens, which cannot be restored: .*drops_tokens=True"
    with pytest.raises(ValueError, match=why):
        model(**inputs)
    assert torch.equal(model(**inputs, r=0)[0], plain)
    assert torch.equal(unfuse_tokens(model)(**inputs)[0], plain)


@torch.no_grad()
def test_an_own_method_that_drops_tokens_is_to_say_so_even_if_none_is_restored(own: None) -> None:
    model, inputs = tiny("dinov2")
    fuse_tokens(model, reduction="first", r=6, restore=False)
    with pytest.raises(ValueError, match="FirstReducer.*drops_tokens"):
        model(**inputs)


@torch.no_grad()
def test_an_own_method_that_says_that_it_drops_tokens(own: None) -> None:
    model, inputs = tiny("dinov2")
    why = "restore=True is not allowed with reduction='honest', which drops tokens"
    assert_refused(model, why, reduction="honest", r=6)
    output = fuse_tokens(model, reduction="honest", r=6, restore=False)(**inputs)
    assert output.last_hidden_state.shape[1] == 65 - 3 * 6 == output.token_sizes.shape[1]
    assert output.assignment.tolist() == [[*range(47), *[-1] * 18]] * 2


@torch.no_grad()
def test_an_own_method_that_leaves_too_many_tokens(own: None) -> None:
    model, inputs = tiny("dinov2")
    fuse_tokens(model, reduction="lazy", r=6)
    with pytest.raises(ValueError, match="LazyReducer left 65 tokens, where there are to be 59"):
        model(**inputs)
