"""Every family of encoders, and models with one in them: without fusion, with it, and after it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mctf_hf import fuse_tokens, fusion_of, supported, unfuse_tokens
from mctf_hf.fusion import Reduction
from mctf_hf.reducers import REDUCERS, Observation, Reducer, Stage, register
from tests.tiny_models import COMPOSITES, ENCODERS, MODELS, build, pictures, tiny

CLOSE = {"atol": 1e-5, "rtol": 0}
METHODS: dict[str, dict[str, Any]] = {
    "approximate": {"reduction": "mctf", "r": 6},
    "precise": {"reduction": "mctf", "r": 6, "one_step_ahead": "precise"},
    "past": {"reduction": "mctf", "r": 6, "one_step_ahead": "past"},
    "present": {"reduction": "mctf", "r": 6, "one_step_ahead": "present", "key_share": 0.2},
    "tome": {"reduction": "tome", "r": 6},
    "diffrate": {"reduction": "diffrate", "r": 6},
    "evit": {"reduction": "evit"},
    "token_mergence": {"reduction": "token_mergence"},
    "own": {"reduction": "pairs", "r": 6},
}
BACKBONES = [name for name in ENCODERS if "backbone" in name]
PLAIN = [name for name in ENCODERS if name not in BACKBONES]
# Where models have layers beside those of their encoder, some of the same class.
OTHER_LAYERS = {
    "CLIP": "text_model",
    "SigLIP": "text_model",
    "LLaVA": "language_model",
    "InternVL": "language_model",
    "Idefics3": "text_model",
    "MAE pretraining": "decoder",
}
HEADS = [name for name in COMPOSITES if "classifier" in name or name == "DeiT two heads"]


@dataclass(frozen=True)
class PairReducer(Reducer):
    """The first patches become one with their right neighbours, as the mean of the two."""

    stage: ClassVar = Stage.AFTER_ATTENTION

    def __call__(self, seen: Observation, r: int) -> Reduction:
        batch, num_tokens, _ = seen.tokens.shape
        prefix = seen.num_prefix_tokens
        places = torch.arange(num_tokens)
        pairs = prefix + (places - prefix) // 2
        joined = torch.where(places < prefix + 2 * r, pairs, places - r)
        joined = torch.where(places < prefix, places, joined).expand(batch, -1)
        reduction = Reduction.from_assignment(joined, num_tokens - r)
        reduction.weigh(torch.ones(batch, num_tokens))
        return reduction


@pytest.fixture(autouse=True)
def pairs() -> Iterator[None]:
    register("pairs")(PairReducer)
    yield
    del REDUCERS["pairs"]


def tensors(output: Any, place: str = "") -> dict[str, Tensor]:
    """All tensors of an output, by where they are in it."""
    if isinstance(output, Tensor):
        return {place: output}
    parts = output.items() if isinstance(output, dict) else enumerate(output)
    return {
        key: value
        for name, part in parts
        for key, value in tensors(part, f"{place}.{name}".removeprefix(".")).items()
    }


@torch.no_grad()
def run(model: PreTrainedModel, inputs: dict[str, Any], **more: Any) -> dict[str, Tensor]:
    return tensors(model(**inputs, output_hidden_states=True, **more))


def attend(model: PreTrainedModel, attention: str) -> None:
    """Set the kind of attention of all parts of a model that have the choice."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part._supports_sdpa:
            part.set_attn_implementation(attention)


def everything(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and hidden states with two kinds of attention, and the maps of one of them."""
    found = {}
    for attention, more in (("eager", {"output_attentions": True}), ("sdpa", {})):
        attend(model, attention)
        found |= tensors({attention: run(model, inputs, **more)})
    assert any("attentions" in place for place in found)
    assert any("hidden_states" in place for place in found)
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    different = [place for place in found if not torch.equal(found[place], expected[place])]
    assert not different


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def names(of: dict[str, type]) -> dict[str, tuple[str, str, str]]:
    """What the classes of transformers in a model are called."""
    return {
        place: (one.__name__, one.__qualname__, one.__module__)
        for place, one in of.items()
        if one is not nn.ModuleList and not issubclass(one, nn.ModuleList)
    }


def converted(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    floating = [
        key for key, value in inputs.items() if torch.is_floating_point(torch.as_tensor(value))
    ]
    return inputs | {key: inputs[key].to(dtype) for key in floating}


def test_every_family_is_in_the_table() -> None:
    owners = {owner for family in supported().values() for owner in family}
    assert {encoder.name for encoder in ENCODERS.values()} == owners


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_without_fusion(name: str, dtype: torch.dtype) -> None:
    model, inputs = tiny(name)
    model, inputs = model.to(dtype), converted(inputs, dtype)
    before, weights, were = everything(model, inputs), list(model.state_dict()), classes(model)
    assert fuse_tokens(model, r=0) is model
    assert_equal(everything(model, inputs), before)
    assert list(model.state_dict()) == weights
    assert classes(model) != were and names(classes(model)) == names(were)


@pytest.mark.parametrize("name", MODELS)
def test_fusion_is_taken_away_without_a_trace(name: str) -> None:
    model, inputs = tiny(name)
    before, weights, were = everything(model, inputs), list(model.state_dict()), classes(model)
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    fuse_tokens(model, **METHODS["approximate"])
    fused = everything(model, inputs)
    with fusion_of(model, r=3):
        run(model, inputs)
    assert any(not torch.equal(fused[place], before[place]) for place in before)
    assert unfuse_tokens(model) is model
    assert classes(model) == were
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
    assert list(model.state_dict()) == weights
    assert_equal(everything(model, inputs), before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_fused_outputs_have_the_form_of_others(name: str, method: str) -> None:
    model, inputs = tiny(name)
    plain = model(**inputs, output_hidden_states=True)
    fused = fuse_tokens(model, **METHODS[method])(**inputs, output_hidden_states=True)
    assert type(fused) is type(plain) and list(fused) == list(plain)
    expected, found = tensors(plain), tensors(fused)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    assert all(torch.isfinite(value).all() for value in found.values())
    read = [place for place in found if place.split(".")[0] == next(iter(plain))][-1]
    assert not torch.allclose(found[read], expected[read], atol=1e-4)
    positional = model(**inputs, output_hidden_states=True, return_dict=False)
    assert type(positional) is tuple
    first = tensors(positional[0])
    assert_equal(first, dict(zip(first, tensors(fused[0]).values(), strict=True)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_fewer_tokens_say_the_same(name: str, method: str, attention: str) -> None:
    model, inputs = tiny(name)
    model.set_attn_implementation(attention)
    fuse_tokens(model, **METHODS[method])
    whole = model(**inputs)
    with fusion_of(model, restore=False):
        fewer = model(**inputs)
    assert isinstance(fewer, type(whole))
    assert list(fewer) == [*whole, "token_sizes", "assignment"]
    batch, num_tokens, _ = whole.last_hidden_state.shape
    left = fewer.last_hidden_state.shape[1]
    assert left < num_tokens - 10 and fewer.token_sizes.shape == (batch, left)
    assert fewer.assignment.shape == (batch, num_tokens)
    counted = [torch.bincount(own, minlength=left) for own in fewer.assignment]
    if method == "diffrate":  # what is merged counts by its cosine
        assert (fewer.token_sizes <= torch.stack(counted) + 1e-5).all()
    else:
        assert torch.equal(torch.stack(counted).float(), fewer.token_sizes)
    restored = [own[of] for own, of in zip(fewer.last_hidden_state, fewer.assignment, strict=True)]
    torch.testing.assert_close(torch.stack(restored), whole.last_hidden_state, **CLOSE)
    if "pooler_output" in whole:
        torch.testing.assert_close(fewer.pooler_output, whole.pooler_output, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_heads_do_not_depend_on_restoring(name: str, method: str) -> None:
    model, inputs = tiny(name)
    fuse_tokens(model, **METHODS[method], restore=False)
    fewer = model(**inputs)
    with fusion_of(model, restore=True):
        whole = model(**inputs)
    assert list(fewer) == [*whole, "token_sizes", "assignment"]
    for field in whole:
        torch.testing.assert_close(fewer[field], whole[field], **CLOSE)


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_outputs_without_names_are_the_same_without_restoring(name: str) -> None:
    model, inputs = tiny(name)
    if name != "DeiT two heads":
        inputs["labels"] = torch.tensor([0, 1])
    expected = fuse_tokens(model, r=6)(**inputs, return_dict=False)
    with fusion_of(model, restore=False):
        found = model(**inputs, return_dict=False)
    assert_equal(tensors(found), tensors(expected))


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_dropped_tokens_are_told(name: str) -> None:
    model, inputs = tiny(name)
    num_tokens = model(**inputs).last_hidden_state.shape[1]
    output = fuse_tokens(model, reduction="evit", fuse_token=False, restore=False)(**inputs)
    left = output.last_hidden_state.shape[1]
    assert torch.equal(output.token_sizes, torch.ones(2, left))
    assert torch.equal((output.assignment >= 0).sum(1), torch.full((2,), left))
    assert left < num_tokens - 10 and output.assignment.shape == (2, num_tokens)


@torch.no_grad()
def test_texts_as_long_as_images_keep_their_tokens() -> None:
    model, inputs = tiny("SigLIP")
    inputs["input_ids"] = inputs["input_ids"].repeat(1, 4)
    plain = model(**inputs)
    text, image = plain.text_model_output, plain.vision_model_output
    assert text.last_hidden_state.shape == image.last_hidden_state.shape
    found = fuse_tokens(model, r=6, restore=False)(**inputs)
    assert torch.equal(found.text_model_output.last_hidden_state, text.last_hidden_state)
    assert found.vision_model_output.last_hidden_state.shape[1] == 64 - 3 * 6


@pytest.mark.parametrize("method", ["approximate", "precise", "past", "tome", "own"])
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_every_hidden_state_has_all_places(name: str, method: str) -> None:
    model, inputs = tiny(name)
    plain = model(**inputs, output_hidden_states=True).hidden_states
    fuse_tokens(model, **METHODS[method], fusion_layers=[1, 3])
    with fusion_of(model) as record:
        states = model(**inputs, output_hidden_states=True).hidden_states
    batch, num_tokens, _ = plain[0].shape
    assert torch.equal(states[0], plain[0])
    torch.testing.assert_close(states[1], plain[1], **CLOSE)
    assert [state.shape for state in states] == [state.shape for state in plain]
    assert record.assignment is not None and record.token_sizes is not None
    assert record.token_sizes.shape == (batch, num_tokens - 12)
    tokens_left = [num_tokens, num_tokens, num_tokens - 6, num_tokens - 6, num_tokens - 12]
    for state, left in zip(states, tokens_left, strict=True):
        for rows, final in zip(state, record.assignment, strict=True):
            _, token = rows.unique(dim=0, return_inverse=True)
            assert token.max() + 1 == left
            # Each token of this layer becomes part of one of the last layer.
            pairs = torch.stack([token, final]).unique(dim=1)
            assert pairs.shape[1] == left and len(pairs[1].unique()) == num_tokens - 12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["dinov2", "dinov3", "siglip", "aimv2", "internvl norms"])
@torch.no_grad()
def test_attention_is_told_of_the_tokens_that_are_left(name: str, method: str) -> None:
    model, inputs = tiny(name)
    model.set_attn_implementation("eager")
    num_tokens = model(**inputs).last_hidden_state.shape[1]
    output = fuse_tokens(model, **METHODS[method])(**inputs, output_attentions=True)
    lengths = [told.shape[2] for told in output.attentions]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] == num_tokens > lengths[-1]
    for told in output.attentions:
        assert told.shape == (2, 2, told.shape[2], told.shape[2])
        torch.testing.assert_close(told.sum(-1), torch.ones(told.shape[:3]), **CLOSE)


# What lets each encoder take an image that is not square, of 6 times 10 patches.
WIDE: dict[str, dict[str, Any]] = {
    **{name: {} for name in ENCODERS if "dino" in name},
    "aimv2 native": {},
    "internvl": {},
    "internvl norms": {},
    "idefics3": {},
    "smolvlm": {},
    **{
        name: {"interpolate_pos_encoding": True}
        for name in ("clip", "metaclip2", "siglip", "vit", "deit", "ijepa", "mae")
    },
}


def wide(name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    model, inputs = tiny(name)
    inputs = {**inputs, **pictures(36, 60), **WIDE[name]}
    if name == "mae":
        inputs["noise"] = inputs["noise"][:, :60]
    return model, inputs


@pytest.mark.parametrize("method", ["approximate", "tome"])
@pytest.mark.parametrize("name", WIDE)
@torch.no_grad()
def test_images_that_are_not_square(name: str, method: str) -> None:
    model, inputs = wide(name)
    before = everything(model, inputs)
    fuse_tokens(model, **METHODS[method])
    with fusion_of(model, r=0):
        assert_equal(everything(model, inputs), before)
    with fusion_of(model) as record:
        found = run(model, inputs)
    expected = {k.removeprefix("sdpa."): v for k, v in before.items() if k.startswith("sdpa.")}
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    final = found[[place for place in found if place.startswith("hidden_states")][-1]]
    assert record.assignment is not None and record.assignment.shape == final.shape[:2]
    prefix = final.shape[1] - (45 if name == "mae" else 60)
    assert torch.equal(record.assignment[:, :prefix], torch.arange(prefix).expand(2, -1))
    for rows, token in zip(final, record.assignment, strict=True):
        assert len(rows.unique(dim=0)) == len(token.unique()) < len(token) - 10


MAPS = [(name, size) for name in BACKBONES for size in ((48, 48), (36, 60), (72, 30))]


@pytest.mark.parametrize(("name", "size"), [*MAPS, ("BEiT backbone", (48, 48))])
@torch.no_grad()
def test_each_place_of_a_map_shows_its_token(name: str, size: tuple[int, int]) -> None:
    model, _ = tiny(name)
    inputs = pictures(*size)
    plain = model(**inputs).feature_maps
    fuse_tokens(model, r=6)
    with fusion_of(model) as record:
        maps = model(**inputs).feature_maps
    rows, columns = size[0] // 6, size[1] // 6
    assert [one.shape for one in maps] == [one.shape for one in plain]
    assert maps[-1].shape == (2, 24, rows, columns)
    torch.testing.assert_close(maps[0], plain[0], **CLOSE)
    assert record.assignment is not None
    tokens = record.assignment[:, -rows * columns :].view(2, rows, columns)
    for image in range(2):
        for token in tokens[image].unique():
            shown = maps[-1][image][:, tokens[image] == token]  # [d, members]
            assert torch.equal(shown, shown[:, :1].expand_as(shown))
        assert len(maps[-1][image].flatten(1).unique(dim=1).T) == len(tokens[image].unique())


@pytest.mark.parametrize("name", ["Depth Anything", "UperNet DINOv2"])
@torch.no_grad()
def test_dense_predictions_of_images_that_are_not_square(name: str) -> None:
    model, _ = tiny(name)
    inputs = pictures(36, 60)
    before = everything(model, inputs)
    plain = model(**inputs)[0]
    fuse_tokens(model, r=6)
    assert model(**inputs)[0].shape == plain.shape and plain.shape[-2:] == (36, 60)
    assert not torch.equal(model(**inputs)[0], plain)
    with fusion_of(model, r=0):
        assert_equal(everything(model, inputs), before)


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_layers_that_are_not_of_the_encoder_are_not_touched(name: str) -> None:
    model, _ = tiny(name)
    were = classes(model)
    others = [place for place in were if OTHER_LAYERS[name] in place]
    fuse_tokens(model, r=6)
    now = classes(model)
    assert len(others) > 10 and all(now[place] is were[place] for place in others)
    changed = {place for place in now if now[place] is not were[place]} - {""}
    assert changed and all("vision" in place or f"{place}.".startswith("vit.") for place in changed)


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "CLIP"])
def test_a_fused_model_can_be_shown(name: str) -> None:
    model, _ = tiny(name)
    shown = repr(fuse_tokens(model, r=6))
    assert shown.startswith(f"{type(model).__name__}(") and "Attention(" in shown


@torch.no_grad()
def test_similarity_to_texts_reads_them_as_before() -> None:
    model, inputs = tiny("CLIP")
    plain = model(**inputs)
    fused = fuse_tokens(model, r=6)(**inputs)
    assert torch.equal(fused.text_embeds, plain.text_embeds)
    features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    features = features / features.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(fused.image_embeds, features, **CLOSE)
    assert not torch.allclose(fused.image_embeds, plain.image_embeds, atol=1e-4)


@torch.no_grad()
def test_an_own_method_decides_what_becomes_of_the_tokens() -> None:
    model = build("Dinov2WithRegistersModel", **ENCODERS["dinov2 registers"].config)
    fuse_tokens(model, reduction="pairs", r=3, fusion_layers=[2])
    output = model(**pictures(), output_fusion=True)
    expected = [*range(5), 5, 5, 6, 6, 7, 7, *range(8, 66)]
    assert output.assignment.tolist() == [expected] * 2
    assert output.token_sizes.tolist() == [[1.0] * 5 + [2.0] * 3 + [1.0] * 58] * 2
