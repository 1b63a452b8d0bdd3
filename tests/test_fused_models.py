"""Models with fusion in the ecosystem: copied, compiled, exported, trained, saved and counted."""

import copy
import io
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.export import Dim
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

import mctf_hf
from mctf_hf import fuse_tokens, fusion_of, unfuse_tokens
from mctf_hf.cost import multiply_accumulates, r_for_budget
from mctf_hf.export import check, to_onnx
from mctf_hf.families import find_encoders
from mctf_hf.fused_encoder import FusedLayerList
from mctf_hf.hub import save
from mctf_hf.registry import BACKBONES, backbone_of_type
from tests.export_files import assert_quantizes
from tests.helpers import count, needs_shared
from tests.strangers import load_as_stranger
from tests.training_runs import as_rank, compare_gradients, free_port, start

BASE: dict[str, Any] = {
    "image_size": 48,
    "patch_size": 6,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
MLP = {"intermediate_size": 96}
# Plain models whose checkpoints classes of this library load, and their configurations.
PLAIN: dict[str, tuple[type[Any], Any]] = {
    "dinov2": (Dinov2Model, Dinov2Config(**BASE)),
    "dinov2 swiglu": (Dinov2Model, Dinov2Config(**BASE, use_swiglu_ffn=True)),
    "dinov2 classifier": (Dinov2ForImageClassification, Dinov2Config(**BASE)),
    "registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig(**BASE, num_register_tokens=4),
    ),
    "registers classifier": (
        Dinov2WithRegistersForImageClassification,
        Dinov2WithRegistersConfig(**BASE, num_register_tokens=4),
    ),
    "clip": (CLIPVisionModel, CLIPVisionConfig(**BASE, **MLP, projection_dim=8)),
    "clip projection": (
        CLIPVisionModelWithProjection,
        CLIPVisionConfig(**BASE, **MLP, projection_dim=8),
    ),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**BASE, **MLP)),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig(**BASE, **MLP, num_register_tokens=4)),
    "dinov3 gated": (DINOv3ViTModel, DINOv3ViTConfig(**BASE, **MLP, use_gated_mlp=True)),
}


def plain_model(kind: str, **settings: Any) -> Any:
    model_class, config = PLAIN[kind]
    torch.manual_seed(0)
    stages = {"out_features", "out_indices", "stage_names"}  # follow from the number of layers
    given = {name: value for name, value in config.to_dict().items() if name not in stages}
    return model_class(type(config).from_dict(given | settings)).eval()


def own_class(kind: str) -> type[Any]:
    model_class, config = PLAIN[kind]
    entry = backbone_of_type(config.model_type)
    assert entry is not None
    return next(own for own, plain in entry.plain.items() if plain is model_class)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", PLAIN)
@torch.no_grad()
def test_a_plain_checkpoint_loads_with_fusion(kind: str, pixels: Tensor, tmp_path: Path) -> None:
    plain = plain_model(kind)
    plain.save_pretrained(tmp_path / "plain")
    own, report = own_class(kind).from_pretrained(tmp_path / "plain", r=5, output_loading_info=True)
    assert not any(report.values()), report
    own.eval()
    expected, found = (
        model(pixels, output_hidden_states=True, **amount)
        for model, amount in ((plain, {}), (own, {"r": 0}))
    )
    assert torch.equal(found[0], expected[0])
    for state, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(state, other)
    half = pixels.bfloat16()
    assert torch.equal(
        copy.deepcopy(own).bfloat16()(half, r=0)[0], copy.deepcopy(plain).bfloat16()(half)[0]
    )
    fused = fuse_tokens(plain, r=5)(pixels, output_fusion=True)
    output = own(pixels, output_fusion=True)
    torch.testing.assert_close(output[0], fused[0], atol=1e-6, rtol=0)
    if "classifier" not in kind:
        assert torch.equal(output.assignment, fused.assignment)
    own.save_pretrained(tmp_path / "own")
    again = own_class(kind).from_pretrained(tmp_path / "own").eval()
    assert again.config.r == 5
    assert torch.equal(again(pixels)[0], output[0])


@torch.no_grad()
def test_the_vision_part_of_a_whole_clip_loads(pixels: Tensor, tmp_path: Path) -> None:
    text = {**MLP, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**text, "vocab_size": 60},
        vision_config={**BASE, **MLP, "projection_dim": 8},
        projection_dim=8,
    )
    whole = CLIPModel(config).eval()
    whole.save_pretrained(tmp_path / "clip")
    expected = whole.get_image_features(pixels).pooler_output
    model = mctf_hf.MCTFCLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip").eval()
    assert torch.equal(model(pixels, r=0).image_embeds, expected)
    encoder = mctf_hf.MCTFCLIPVisionModel.from_pretrained(tmp_path / "clip").eval()
    torch.testing.assert_close(
        model.visual_projection(encoder(pixels, r=0).pooler_output), expected
    )


@torch.no_grad()
def test_strangers_load_every_family(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 48, 48)
    kinds = ("dinov2 classifier", "registers classifier")
    models = []
    for kind in kinds:
        plain_model(kind).save_pretrained(tmp_path / kind)
        models.append(own_class(kind).from_pretrained(tmp_path / kind, r=5).eval())
    for entry in ("mctf_clip_vision", "mctf_siglip_vision", "mctf_dinov3_vit"):
        backbone = BACKBONES[entry]
        models.append(backbone.classifier(backbone.config(**BASE, **MLP, r=5)).eval())
    processor = ViTImageProcessorPil(size={"height": 48, "width": 48})
    folders = [save(model, processor, tmp_path / f"own{i}") for i, model in enumerate(models)]
    strangers, _ = load_as_stranger(folders, images, tmp_path)
    for model, found in zip(models, strangers, strict=True):
        assert found["r"] == 5
        assert torch.equal(found["logits"], model(images).logits)
        assert torch.equal(found["resaved"], found["logits"])
        assert torch.equal(found["hidden"], model.base_model(images).last_hidden_state)


@torch.no_grad()
def test_settings_of_fusion_are_saved_beside_an_unchanged_checkpoint(
    pixels: Tensor, tmp_path: Path
) -> None:
    plain = plain_model("dinov2 classifier")
    plain.save_pretrained(tmp_path / "plain")
    model = fuse_tokens(plain, r=6, reduction="tome", fusion_layers=[1, 2])
    model.save_pretrained(tmp_path / "fused")
    files = {"config.json", "model.safetensors"}
    for name in files:
        before, after = ((tmp_path / folder / name).read_bytes() for folder in ("plain", "fused"))
        assert before == after
    assert {file.name for file in (tmp_path / "fused").iterdir()} == {*files, "token_fusion.json"}
    again = mctf_hf.from_pretrained(tmp_path / "fused").eval()
    assert type(again).__name__ == "Dinov2ForImageClassification"
    assert torch.equal(again(pixels).logits, model(pixels).logits)
    other = mctf_hf.from_pretrained(tmp_path / "fused", reduction="evit", keep_rate=0.5).eval()
    assert not torch.equal(other(pixels).logits, model(pixels).logits)
    unfused = mctf_hf.from_pretrained(tmp_path / "plain").eval()
    assert type(unfused) is Dinov2ForImageClassification
    assert torch.equal(unfused(pixels).logits, model(pixels, r=0).logits)
    own = mctf_hf.MCTFDinov2Model(mctf_hf.MCTFDinov2Config(**BASE, r=4))
    own.save_pretrained(tmp_path / "own")
    assert mctf_hf.from_pretrained(tmp_path / "own", r=7).config.r == 7
    (tmp_path / "fused" / "token_fusion.json").write_text("[1")
    with pytest.raises(ValueError, match=r"token_fusion.json cannot be read"):
        mctf_hf.from_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match="push_to_hub=True is not allowed"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)


@torch.no_grad()
def test_copies_and_pickles_fuse_by_themselves(pixels: Tensor) -> None:
    model = fuse_tokens(plain_model("dinov3"), r=6)
    expected = model(pixels).last_hidden_state
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other).__name__ == "DINOv3ViTModel"
        assert torch.equal(other(pixels).last_hidden_state, expected)
        with fusion_of(other, r=0):
            assert not torch.equal(other(pixels).last_hidden_state, expected)
        assert torch.equal(model(pixels).last_hidden_state, expected)
        assert type(unfuse_tokens(other)) is DINOv3ViTModel
    assert torch.equal(model(pixels).last_hidden_state, expected)


# A fused DINOv2 is compiled in the next test.
@pytest.mark.parametrize("kind", ["clip projection", "siglip", "dinov3"])
@torch.no_grad()
def test_a_fused_model_compiles_as_one_graph(kind: str, pixels: Tensor) -> None:
    torch._dynamo.reset()
    model = fuse_tokens(plain_model(kind, num_hidden_layers=2), r=6, fusion_layers=[0, 1])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pixels)[0], model(pixels)[0])


@torch.no_grad()
def test_a_compiled_model_fuses_as_it_is_told(pixels: Tensor) -> None:
    torch._dynamo.reset()
    model = fuse_tokens(plain_model("dinov2", num_hidden_layers=2), r=6, fusion_layers=[0, 1])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pixels)[0], model(pixels)[0])
    with fusion_of(model, r=2, reduction="tome"):
        inside = compiled(pixels)[0]
        torch.testing.assert_close(inside, model(pixels)[0])
    torch.testing.assert_close(compiled(pixels, r=3)[0], model(pixels, r=3)[0])
    torch.testing.assert_close(compiled(pixels)[0], model(pixels)[0])
    assert not torch.equal(inside, model(pixels)[0])


@pytest.mark.parametrize("kind", ["dinov2 classifier", "clip projection", "siglip", "dinov3"])
@torch.no_grad()
def test_own_classes_compile_as_one_graph(kind: str, pixels: Tensor, tmp_path: Path) -> None:
    torch._dynamo.reset()
    plain_model(kind, num_hidden_layers=2).save_pretrained(tmp_path / "plain")
    settings = {"r": 6, "fusion_layers": [0, 1]}
    model = own_class(kind).from_pretrained(tmp_path / "plain", **settings).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pixels)[0], model(pixels)[0])


@torch.no_grad()
def test_threads_fuse_different_amounts(pixels: Tensor) -> None:
    model = fuse_tokens(plain_model("dinov2"), r=6)
    found: dict[int, Tensor] = {}

    def encode(r: int) -> None:
        with torch.no_grad(), fusion_of(model, r=r):
            for _ in range(4):
                found[r] = model(pixels).last_hidden_state

    threads = [threading.Thread(target=encode, args=(r,)) for r in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for r, hidden in found.items():
        assert torch.equal(hidden, model(pixels, r=r).last_hidden_state)
    assert len({hidden.abs().sum().item() for hidden in found.values()}) == 8


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_gradient_checkpointing_changes_no_gradient(
    own: bool, reentrant: bool, pixels: Tensor
) -> None:
    gradients = []
    for checkpointing in (False, True):
        if own:
            torch.manual_seed(0)
            config = mctf_hf.MCTFDinov2Config(**BASE, r=6)
            model: Any = mctf_hf.MCTFDinov2ForImageClassification(config)
        else:
            model = fuse_tokens(plain_model("dinov2 classifier"), r=6)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        images = pixels.clone().requires_grad_(reentrant)
        model(images, labels=torch.tensor([0, 1, 1])).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 50
    torch.testing.assert_close(gradients[1], gradients[0])


def test_lora_on_a_fused_model_learns(pixels: Tensor) -> None:
    model = fuse_tokens(plain_model("dinov2 classifier"), r=6)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in ("q_proj", "v_proj", "query", "value") if name in names]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, r=4))
    adapted.train()
    labels, losses = torch.tensor([0, 1, 1]), []
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 0.05)
    for _ in range(8):
        loss = adapted(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        assert not torch.equal(
            adapted(pixel_values=pixels, r=0)[0], adapted(pixel_values=pixels)[0]
        )


@torch.no_grad()
def test_layers_on_several_devices(pixels: Tensor, tmp_path: Path) -> None:
    plain_model("dinov2").save_pretrained(tmp_path / "plain")
    expected = fuse_tokens(plain_model("dinov2"), r=6)(pixels).last_hidden_state
    layers = {f"encoder.layer.{i}": "cpu" if i % 2 else "disk" for i in range(4)}
    model = Dinov2Model.from_pretrained(
        tmp_path / "plain",
        device_map={"embeddings": "cpu", **layers, "layernorm": "cpu"},
        offload_folder=tmp_path / "offload",
    ).eval()
    assert torch.equal(fuse_tokens(model, r=6)(pixels).last_hidden_state, expected)
    plain = plain_model("dinov2")(pixels).last_hidden_state
    assert torch.equal(unfuse_tokens(model)(pixels).last_hidden_state, plain)
    own = mctf_hf.MCTFDinov2Model.from_pretrained(
        tmp_path / "plain", r=6, device_map="auto", max_memory={"cpu": "1GB"}
    ).eval()
    assert torch.equal(own(pixels).last_hidden_state, expected)


def test_no_module_that_must_stay_whole_is_named_in_vain() -> None:
    """device_map goes by the names of classes."""
    for entry in BACKBONES.values():
        settings = {"patch_size": 16, "image_size": 32} if "t2t" in entry.config.model_type else {}
        config = entry.config(**BASE | settings, min_tokens=1)
        for model_class in (entry.model, entry.classifier, *entry.further):
            model = model_class(config)
            named = {type(module).__name__ for module in model.modules()}
            listed = {name for name in model._no_split_modules if "Text" not in name}
            assert listed <= named, (model_class, listed - named)
            layers = next(one for one in model.modules() if isinstance(one, FusedLayerList))
            assert type(layers[0]).__name__ in listed


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    port = free_port()
    runs = [start(as_rank, rank, 2, port, compare_gradients, tmp_path) for rank in range(2)]
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert (tmp_path / "compared").read_text() == "all gradients"


@torch.no_grad()
def test_a_fused_vision_tower_is_exported(pixels: Tensor, tmp_path: Path) -> None:
    small = {"num_hidden_layers": 2}
    both = {"r": 6, "fusion_layers": [0, 1]}
    model = fuse_tokens(plain_model("clip projection", **small), **both)
    shapes = {"pixel_values": {0: Dim("batch", max=64)}}
    program = torch.export.export(model, (pixels,), dynamic_shapes=shapes, strict=False)
    torch.testing.assert_close(program.module()(pixels[:2])[0], model(pixels[:2])[0])
    # For exports, transformers makes a mask of its own.
    with_mask = fuse_tokens(plain_model("dinov2", **small), **both)
    program = torch.export.export(with_mask, (pixels,), strict=False)
    torch.testing.assert_close(program.module()(pixels)[0], with_mask(pixels)[0])


@pytest.mark.parametrize("kind", ["dinov2 classifier", "dinov3"])
@torch.no_grad()
def test_own_classes_are_written_as_onnx(kind: str, pixels: Tensor, tmp_path: Path) -> None:
    plain_model(kind, num_hidden_layers=2).save_pretrained(tmp_path / "plain")
    settings = {"r": 6, "fusion_layers": [0, 1]}
    model = own_class(kind).from_pretrained(tmp_path / "plain", **settings).eval()
    to_onnx(model, tmp_path / "model.onnx")
    agreement = check(model, tmp_path / "model.onnx", [pixels[:1], pixels])
    assert agreement.differing == 0
    assert (agreement.top1 is None) == ("classifier" not in kind)
    assert_quantizes(tmp_path / "model.onnx", pixels, within=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 6},
        {"r": 6, "one_step_ahead": "precise"},
        {"r": 6, "reduction": "tome"},
        {"reduction": "evit", "keep_rate": 0.6},
        {"reduction": "token_mergence"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", PLAIN)
def test_what_runs_is_what_is_counted(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    image = torch.randn(1, 3, 48, 48)
    model = fuse_tokens(plain_model(kind, attn_implementation="eager"), **settings)
    if "classifier" not in kind and "projection" not in kind:  # of these the encoder is counted
        assert multiply_accumulates(model) == count(model, image)
    plain_model(kind).save_pretrained(tmp_path / "plain")
    own = own_class(kind).from_pretrained(
        tmp_path / "plain", **settings, attn_implementation="eager"
    )
    assert multiply_accumulates(own.eval()) == count(own, image)


def test_other_sizes_and_budgets_of_encoders() -> None:
    image = torch.randn(1, 3, 60, 84)
    for kind in ("dinov2", "dinov3"):
        model = fuse_tokens(plain_model(kind, attn_implementation="eager"), r=6)
        assert multiply_accumulates(model, image_size=(60, 84)) == count(model, image)
    model = fuse_tokens(plain_model("clip", attn_implementation="eager"), r=6)
    counted = count(model, image, interpolate_pos_encoding=True)
    assert multiply_accumulates(model, image_size=(60, 84)) == counted
    constant, schedule = r_for_budget(model, 0.8)
    whole = multiply_accumulates(model, r=0)
    assert multiply_accumulates(model, r=constant) <= 0.8 * whole
    assert multiply_accumulates(model, r=schedule) <= 0.8 * whole
    assert multiply_accumulates(model, r=schedule) > 0.78 * whole


def test_the_usual_size_of_images_counts(tmp_path: Path) -> None:
    config = mctf_hf.MCTFDinov2Config(**BASE, input_size=24)
    assert (config.num_tokens(), config.num_tokens(48)) == (17, 65)
    own = mctf_hf.MCTFDinov2Model(config)
    own.save_pretrained(tmp_path / "own")
    assert AutoModel.from_pretrained(tmp_path / "own").config.input_size == 24
    assert multiply_accumulates(config) == multiply_accumulates(config, image_size=24)


@needs_shared("checkpoints/dinov2-small-saliency")
@torch.no_grad()
def test_a_real_dinov2_computes_what_its_program_does() -> None:
    from safetensors.torch import load_file

    from tests.helpers import SHARED

    folder = SHARED / "checkpoints" / "dinov2-small-saliency"
    known = load_file(folder / "reference.safetensors")
    own = mctf_hf.MCTFDinov2Model.from_pretrained(folder, r=22).eval()
    hosted = fuse_tokens(Dinov2Model.from_pretrained(folder), r=22).eval()
    pixels, expected = known["pixel_values"], known["last_hidden_state"]
    for model in (own, hosted):
        hidden = model(pixels, r=0).last_hidden_state
        torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=0)
    fused = own(pixels).last_hidden_state
    torch.testing.assert_close(hosted(pixels).last_hidden_state, fused, atol=1e-4, rtol=0)
    cosine = nn.functional.cosine_similarity(fused[:, 0], expected[:, 0])
    assert cosine.mean() > 0.97
    (encoder,) = find_encoders(hosted)
    assert multiply_accumulates(hosted, image_size=224) == pytest.approx(3.334e9, rel=1e-3)
    assert encoder.family.name == "DINOv2"
    json.dumps(own.config.to_dict())


@torch.no_grad()
def test_blocks_that_overlap_leave_nothing_behind(pixels: Tensor) -> None:
    model = fuse_tokens(plain_model("dinov2", num_hidden_layers=2), r=6)
    first, second = fusion_of(model, r=2), fusion_of(model, r=4)
    entered, left = threading.Event(), threading.Event()

    def hold() -> None:
        with first:
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    with second:
        left.set()
        thread.join()
        inside = model(pixels).last_hidden_state
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert model.fused_layers[0].call is None
    torch.testing.assert_close(compiled(pixels)[0], model(pixels)[0])
    assert torch.equal(inside, model(pixels, r=4).last_hidden_state)


@torch.no_grad()
def test_the_class_of_a_fused_model_makes_and_loads_plain_ones(
    pixels: Tensor, tmp_path: Path
) -> None:
    plain = plain_model("dinov2")
    expected = plain(pixels).last_hidden_state
    model = fuse_tokens(plain, r=6)
    model.save_pretrained(tmp_path / "model")
    made = type(model)(model.config).eval()
    made.load_state_dict(model.state_dict())
    loaded = type(model).from_pretrained(tmp_path / "model").eval()
    for other in (made, loaded):
        assert type(other) is Dinov2Model
        assert torch.equal(other(pixels).last_hidden_state, expected)
    again, report = mctf_hf.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert torch.equal(again.eval()(pixels)[0], model(pixels)[0]) and "missing_keys" in report


def test_what_would_run_without_fusion_says_so(pixels: Tensor) -> None:
    model = fuse_tokens(plain_model("dinov2"), r=6)
    with pytest.raises(ValueError, match="nn.DataParallel is not supported"):
        for module in model.modules():  # as replicas are made
            module._replicate_for_data_parallel()
    with pytest.raises(ValueError, match=r"\['reduction'\] are not allowed in this call"):
        model(pixels, reduction="none")


@torch.no_grad()
def test_another_amount_in_other_calls_than_the_models_own(pixels: Tensor) -> None:
    model = fuse_tokens(plain_model("clip projection"), r=6)
    found = model.vision_model(pixels, r=2).last_hidden_state
    with fusion_of(model, r=2):
        assert torch.equal(found, model.vision_model(pixels).last_hidden_state)
    with pytest.raises(ValueError, match=r"\['output_fusion'\] are not allowed in this call"):
        model.vision_model(pixels, output_fusion=True)


@torch.no_grad()
def test_hooks_within_layers_see_the_whole_batch(
    pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = fuse_tokens(plain_model("dinov2"), r=6), []
    expected = model(pixels).last_hidden_state
    monkeypatch.setattr("mctf_hf.fused_encoder.SLICE_BYTES", 1)
    torch.testing.assert_close(model(pixels).last_hidden_state, expected)
    handle = model.encoder.layer[2].mlp.register_forward_hook(
        lambda _, args, output: seen.append(len(output))
    )
    model(pixels)
    handle.remove()
    assert seen == [3]


@torch.no_grad()
def test_there_is_a_map_of_each_layer(pixels: Tensor) -> None:
    model = fuse_tokens(plain_model("clip"), r=6, reduction="mctf")
    attentions = model(pixels, output_attentions=True).attentions
    assert [a.shape[-1] for a in attentions] == [65, 59, 53, 47]
    for attention in attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


@torch.no_grad()
def test_outputs_with_fusion_are_pickled(pixels: Tensor) -> None:
    output = fuse_tokens(plain_model("dinov2"), r=6)(pixels, output_fusion=True)
    again = pickle.loads(pickle.dumps(output))
    assert type(again) is type(output) and torch.equal(again.assignment, output.assignment)


def test_fewer_tokens_are_refused_where_each_has_a_place() -> None:
    masked = ViTMAEForPreTraining(ViTMAEConfig(**BASE, **MLP, decoder_num_hidden_layers=1))
    with pytest.raises(ValueError, match="restore=False is not allowed with ViTMAEForPreTraining"):
        fuse_tokens(masked, r=4, restore=False)
    fuse_tokens(masked, r=4)
    with (
        pytest.raises(ValueError, match="which has a place for each token"),
        fusion_of(masked, restore=False),
    ):
        pass


@torch.no_grad()
def test_settings_of_a_whole_clip_count(tmp_path: Path) -> None:
    text = {**MLP, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**text, "vocab_size": 60},
        vision_config={**BASE, **MLP},
        projection_dim=16,
        problem_type="multi_label_classification",
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    model = mctf_hf.MCTFCLIPVisionModelWithProjection.from_pretrained(tmp_path / "clip")
    assert model.visual_projection.out_features == 16
    assert model.config.problem_type == "multi_label_classification"


@torch.no_grad()
def test_classes_that_others_make_of_a_fused_one(pixels: Tensor) -> None:
    """As FSDP2 does, of models and of their layers."""
    model = fuse_tokens(plain_model("dinov2"), r=6)
    expected = model(pixels).last_hidden_state
    for module in (model, model.encoder, model.encoder.layer[1]):
        module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})
    assert torch.equal(model(pixels).last_hidden_state, expected)
