"""T2T-ViT, LV-ViT, distilled DeiT and registers: the same layers behind other front ends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ViTImageProcessorPil,
)

from cli.main import main
from mctf_hf import (
    MCTFLVViTConfig,
    MCTFLVViTForImageClassification,
    MCTFT2TViTConfig,
    MCTFT2TViTForImageClassification,
    MCTFViTConfig,
    MCTFViTForImageClassification,
    modeling_mctf_vit,
)
from mctf_hf.conversion import build_model, infer_config
from mctf_hf.cost import multiply_accumulates
from mctf_hf.export import check
from mctf_hf.hub import save
from mctf_hf.modeling_mctf import take_over_names
from mctf_hf.presets import PRESETS, preset, preset_class
from mctf_hf.registry import build
from tests.export_files import WRITE, assert_quantizes
from tests.helpers import DIGITS, TINY, Golden, count
from tests.strangers import load_as_stranger
from tests.tiny_models import BACKBONES, SMALL_BACKBONE, pixels, small_backbone

GOLDEN = [
    ("t2t", "t2t_transformer", "t2t_vit", {"attention_scale": "head_dim"}),
    ("t2t", "t2t_performer", "t2t_vit", {"attention_scale": "head_dim"}),
    ("lvvit", "lvvit", "lv_vit", {"skip_lambda": 2.0}),
]


@pytest.mark.parametrize(("file", "case", "source", "own"), GOLDEN)
@torch.no_grad()
def test_logits_are_those_of_the_official_implementations(
    file: str, case: str, source: str, own: dict[str, Any]
) -> None:
    golden = Golden(file)
    stated = golden.cases[case]
    weights = golden.weights(f"{case}/model.")
    config = infer_config(
        weights, source, num_heads=stated["num_heads"], r=stated["r"], min_tokens=1, **own
    )
    assert config.image_size == stated["image_size"]
    assert config.tokens_fused(config.num_tokens())[0] == 0
    model = build_model(weights, source, config)
    images = golden[f"{case}/pixel_values"]
    for expected, r in (("base_logits", 0), ("logits", None)):
        torch.testing.assert_close(
            model(images, r=r).logits, golden[f"{case}/{expected}"], rtol=0, atol=1e-5
        )
    assert (model(images).logits - golden[f"{case}/base_logits"]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "plain_class", [DeiTForImageClassificationWithTeacher, DeiTForImageClassification]
)
@torch.no_grad()
def test_a_distilled_deit_of_transformers_loads_as_it_is(plain_class: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = plain_class(DeiTConfig(**{**TINY, "num_labels": 10})).eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.2)
    plain.save_pretrained(tmp_path / "deit")
    model, report = MCTFViTForImageClassification.from_pretrained(
        tmp_path / "deit", r=6, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    images = pixels(size=32)
    expected = plain(images).logits
    torch.testing.assert_close(model.eval()(images, r=0).logits, expected, rtol=0, atol=1e-6)
    fused = model(images, output_fusion=True)
    assert fused.token_sizes.shape[1] == 66 - 4 * 6
    assert not torch.allclose(fused.logits, expected, atol=1e-3)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(images).logits, model(images).logits)


@torch.no_grad()
def test_the_two_heads_of_a_distilled_deit_are_averaged() -> None:
    model = small_backbone("distilled")
    hidden = model.vit(pixels()).last_hidden_state
    heads = model.classifier(hidden[:, 0]), model.distillation_classifier(hidden[:, 1])
    torch.testing.assert_close(model(pixels()).logits, sum(heads) / 2)


@torch.no_grad()
def test_registers_have_no_position_and_come_after_the_class_token() -> None:
    model = small_backbone("registers")
    embeddings = model.vit.embeddings
    tokens = embeddings(pixels())
    registers = embeddings.register_tokens.expand(2, -1, -1)
    assert torch.equal(tokens[:, 1:5], registers)
    patches = embeddings.patch_embeddings(pixels()) + embeddings.position_embeddings[:, 1:]
    assert torch.equal(tokens[:, 5:], patches)


@pytest.mark.parametrize("kind", BACKBONES)
@settings(max_examples=15)
@given(data=st.data())
@torch.no_grad()
def test_prefix_tokens_stay(kind: str, data: st.DataObject) -> None:
    registers = data.draw(st.sampled_from([0, 1, 4]), label="registers")
    model = small_backbone(
        kind,
        num_register_tokens=registers,
        bidirectional=data.draw(st.booleans(), label="bidirectional"),
        one_step_ahead=data.draw(st.sampled_from(["approximate", "precise", "past"])),
        min_tokens=1,
    )
    prefix = model.config.num_prefix_tokens
    output = model(pixels(), r=data.draw(st.integers(1, 12), label="r"), output_fusion=True)
    assert torch.equal(output.assignment[:, :prefix], torch.arange(prefix).expand(2, -1))
    assert (output.token_sizes[:, :prefix] == 1).all()
    assert (output.assignment[:, prefix:] >= prefix).all()
    assert (output.token_sizes.sum(1) == model.config.num_tokens()).all()


@pytest.mark.parametrize("kind", BACKBONES)
def test_what_runs_is_what_is_counted(kind: str) -> None:
    model = small_backbone(kind, attn_implementation="eager")
    # The kernel of the front end's attention is counted where it is one of those that are known.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counted = count(model, pixels(1))
    assert multiply_accumulates(model.config) == pytest.approx(counted, rel=0.005)


# G, of the official implementations.
PUBLISHED = [
    ("t2t_vit_t_14", 6.106, 13, 4.193),
    ("t2t_vit_t_19", 9.808, 9, 6.442),
    ("t2t_vit_14", 4.800, 13, 2.887),
    ("lv_vit_t", 2.879, 12, 2.313),
    ("lv_vit_s", 6.569, 12, 4.165),
    ("lv_vit_s", 6.569, 8, 4.956),
    ("lv_vit_m", 12.704, 8, 8.329),
]


@pytest.mark.parametrize(("name", "base", "r", "fused"), PUBLISHED)
def test_published_costs(name: str, base: float, r: int, fused: float) -> None:
    """The official code applies a fused map, which only maximum pooling does here.

    Without it attention is applied to the values of all old positions: up to 0.51% more.
    """
    config = preset(name, r=r, pooling="max", skip_unread=False)
    assert multiply_accumulates(config, r=0) / 1e9 == pytest.approx(base, rel=0.0025)
    assert multiply_accumulates(config) / 1e9 == pytest.approx(fused, rel=0.0025)
    config = preset(name, r=r, skip_unread=False)
    assert multiply_accumulates(config) / 1e9 == pytest.approx(fused, rel=0.0051)


def test_every_preset_can_be_built() -> None:
    assert len(PRESETS) == 33 + 15
    for name in PRESETS:
        with torch.device("meta"):
            model = preset_class(name)(preset(name))
        grid = 224 // model.config.patch_size
        assert model.config.num_tokens() == grid**2 + model.config.num_prefix_tokens
    assert build(preset("deit_t")).num_labels == 1000
    assert preset("lv_vit_l").skip_lambda == 3


@torch.no_grad()
def test_a_stranger_loads_them(tmp_path: Path) -> None:
    processor = ViTImageProcessorPil(size={"height": 96, "width": 96})
    models = {kind: small_backbone(kind) for kind in BACKBONES}
    folders = [
        save(model, processor, tmp_path / kind.replace(" ", "-")) for kind, model in models.items()
    ]
    images = pixels()
    strangers, _ = load_as_stranger(folders, images, tmp_path)
    for model, folder, found in zip(models.values(), folders, strangers, strict=True):
        logits, hidden = model(images).logits, model.vit(images).last_hidden_state
        with_library = AutoModelForImageClassification.from_pretrained(folder).eval()
        assert type(with_library) is type(model)
        assert torch.equal(with_library(images).logits, logits)
        assert torch.equal(found["logits"], logits) and torch.equal(found["resaved"], logits)
        encoder = AutoModel.from_pretrained(folder).eval()
        assert torch.equal(encoder(images).last_hidden_state, hidden)
        assert torch.equal(found["hidden"], hidden)


@pytest.mark.parametrize("kind", BACKBONES)
@torch.no_grad()
def test_images_of_another_size_and_shape(kind: str) -> None:
    model = small_backbone(kind)
    images = torch.randn(2, 3, 128, 160, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"Input image size \(128\*160\) doesn't match model"):
        model(images)
    output = model(images, interpolate_pos_encoding=True, output_fusion=True)
    assert output.assignment.shape[1] == 8 * 10 + model.config.num_prefix_tokens
    assert torch.isfinite(output.logits).all()


@pytest.mark.parametrize("kind", [kind for kind in BACKBONES if kind.startswith("t2t")])
@torch.no_grad()
def test_windows_of_tokens_take_sizes_that_they_fill(kind: str) -> None:
    images = torch.randn(1, 3, 140, 160)
    with pytest.raises(ValueError, match="140 x 160 pixels are not allowed: .*multiples of 16"):
        small_backbone(kind)(images, interpolate_pos_encoding=True)


@torch.no_grad()
def test_scores_are_scaled_as_the_published_weights_want_it() -> None:
    """By all channels: as if queries were smaller by the root of the number of heads."""
    expected = small_backbone("t2t transformer", attention_scale="hidden_size")
    model = small_backbone("t2t transformer")
    assert torch.equal(model.vit.layers[0].mlp.fc1.weight, expected.vit.layers[0].mlp.fc1.weight)
    assert not torch.allclose(model(pixels()).logits, expected(pixels()).logits, atol=1e-6)
    for layer in model.vit.layers:
        layer.attention.q_proj.weight.mul_(model.config.num_attention_heads**-0.5)
    torch.testing.assert_close(model(pixels()).logits, expected(pixels()).logits)
    weights = Golden("t2t").weights("t2t_transformer/model.")
    assert infer_config(weights, "t2t_vit", num_heads=2).attention_scale == "hidden_size"


@torch.no_grad()
def test_positions_of_a_t2t_vit_are_fixed() -> None:
    model = small_backbone("t2t performer")
    positions = model.vit.embeddings.position_embeddings
    assert not positions.requires_grad
    assert positions[0, 3, 4].item() == pytest.approx(
        torch.sin(torch.tensor(3 / 10000 ** (4 / 24))).item(), abs=1e-6
    )
    features = model.vit.embeddings.patch_embeddings.token_transformers[0].features
    torch.testing.assert_close(features @ features.mT, 8 * torch.eye(8), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config_class", "wrong", "message"),
    [
        (MCTFT2TViTConfig, {"patch_size": 8}, "patch_size=8 is not allowed: a T2T-ViT's is 16"),
        (
            MCTFT2TViTConfig,
            {"tokens_type": "x"},
            "tokens_type='x' is not allowed: it must be one of",
        ),
        (MCTFLVViTConfig, {"patch_size": 7}, "patch_size=7 is not allowed"),
        (MCTFLVViTConfig, {"skip_lambda": 0}, "skip_lambda=0 is not allowed"),
        (MCTFViTConfig, {"distillation_head": True}, "not allowed without distillation_token"),
        (MCTFViTConfig, {"num_register_tokens": -1}, "num_register_tokens=-1 is not allowed"),
    ],
)
def test_settings_are_checked(
    config_class: type[MCTFViTConfig], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        config_class(**wrong)


@pytest.mark.parametrize(("file", "case", "source", "own"), GOLDEN)
@torch.no_grad()
def test_convert_makes_a_folder_of_published_names(
    file: str,
    case: str,
    source: str,
    own: dict[str, Any],
    capsys: pytest.CaptureFixture,
) -> None:
    golden = Golden(file)
    save_file(golden.weights(f"{case}/model."), "weights.safetensors")
    words = "".join(f",{name}={value}" for name, value in own.items())
    stated = golden.cases[case]
    main(
        ["convert", f"weights.safetensors,r={stated['r']},min_tokens=1{words}", "--num_heads",
         str(stated["num_heads"]), "--output", "folder"]
    )  # fmt: skip
    assert "weights of weights.safetensors" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained("folder").eval()
    torch.testing.assert_close(
        model(golden[f"{case}/pixel_values"]).logits, golden[f"{case}/logits"], rtol=0, atol=1e-5
    )


def test_convert_of_a_distilled_deit(tmp_path: Path) -> None:
    golden = Golden("deit")
    weights = golden.weights("deit/model.")
    positions = weights["pos_embed"]
    weights |= {
        "pos_embed": torch.cat([positions[:, :1], positions], dim=1),
        "dist_token": torch.randn(1, 1, 24),
        "head_dist.weight": torch.randn(5, 24),
        "head_dist.bias": torch.randn(5),
    }
    torch.save({"model": weights}, "distilled.pth")
    main(["convert", "distilled.pth", "--num_heads", "2", "--output", "folder"])
    model = AutoModelForImageClassification.from_pretrained("folder")
    assert model.config.distillation_token and model.config.distillation_head
    assert torch.equal(model.distillation_classifier.weight, weights["head_dist.weight"])
    assert torch.equal(model.vit.embeddings.distillation_token, weights["dist_token"])


# A plain ViT learns in tests/test_finetuning.py and tests/e2e/test_commands.py.
@pytest.mark.parametrize("kind", ["t2t performer", "lv", "distilled"])
def test_finetuning_ends_above_its_start(kind: str, tmp_path: Path) -> None:
    """From scratch on handwritten digits, with consistency, through the real command."""
    config_class, own = BACKBONES[kind]
    size = {"image_size": 48} if kind.startswith("t2t") else {"image_size": 32, "patch_size": 8}
    config: dict[str, Any] = {
        **SMALL_BACKBONE,
        **own,
        **size,
        "model_type": config_class.model_type,
    }
    config |= {"hidden_size": 64, "num_hidden_layers": 3, "initializer_range": 0.1}
    config |= {"num_register_tokens": 4} if kind == "distilled" else {}
    del config["num_labels"]
    epochs = "3" if kind == "distilled" else "2"
    folder = tmp_path / "model"
    main(
        ["fit", "--model.config", str(config), "--model.num_labels", "10", "--model.r", "2",
         "--model.fusion", "{min_tokens: 5}", "--model.learning_rate", "0.05",
         "--data.dataset", DIGITS, "--data.batch_size", "32", "--data.num_workers", "0",
         "--trainer.accelerator", "cpu", "--trainer.logger", "false",
         "--trainer.max_epochs", epochs, "--trainer.limit_val_batches", "1",
         "--trainer.default_root_dir", str(tmp_path), "--export.folder", str(folder)]
    )  # fmt: skip
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert sum(model.config.tokens_fused(model.config.num_tokens())) == 4
    rows = load_dataset(DIGITS, split="test").select(range(200))
    processor = ViTImageProcessorPil.from_pretrained(folder)
    pixels = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")
    with torch.no_grad():
        predicted = model(**pixels).logits.argmax(-1)
    assert (predicted == torch.tensor(rows["label"][:])).float().mean() > 0.4  # 0.1 by chance


@pytest.mark.parametrize(
    ("kind", "suffix"),
    # A plain ViT is exported in tests/test_export.py, and ONNX goes by torch.export as well.
    [("t2t transformer", "pt2"), ("t2t performer", "onnx"), ("lv", "onnx"), ("distilled", "onnx")],
)  # fmt: skip
@torch.no_grad()
def test_an_exported_file_computes_what_its_model_does(kind: str, suffix: str) -> None:
    # With weights so wide that fusion shows, and that a performer's features underflow.
    settings = {"num_hidden_layers": 2, "fusion_layers": [0, 1], "initializer_range": 0.3, "r": 6}
    if kind == "distilled":
        settings["num_register_tokens"] = 4
    model = small_backbone(kind, **settings)
    assert (model(pixels()).logits - model(pixels(), r=0).logits).abs().max() > 0.1
    file = WRITE[suffix](model, f"model.{suffix}")
    found = check(model, file, [pixels(1), pixels(3)])
    assert found.differing == 0 and found.top1 == 1
    if suffix == "onnx":
        assert_quantizes(file, pixels(3), within=1)


@pytest.mark.parametrize("kind", ["t2t transformer", "t2t performer", "lv"])
@torch.no_grad()
def test_front_ends_go_through_a_batch_in_slices(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = small_backbone(kind), pixels(5)
    front_end, sizes = model.vit.embeddings.patch_embeddings, []
    front_end.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    whole = model(images).logits
    per_image = 96 * 96 * front_end.numbers_per_pixel * 4
    monkeypatch.setattr(modeling_mctf_vit, "FRONT_END_BYTES", 2.5 * per_image)
    torch.testing.assert_close(model(images).logits, whole, rtol=0, atol=1e-6)
    assert sizes == [5, 2, 2, 1]
    model.train()(images)  # batch statistics are those of the batch
    assert sizes[4:] == [5]


@torch.no_grad()
def test_they_compile_whole_and_are_drawn(tmp_path: Path) -> None:
    model = small_backbone("t2t performer", num_hidden_layers=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixels()).logits, model(pixels()).logits)
    folder = save(model, ViTImageProcessorPil(size={"height": 96, "width": 96}), tmp_path / "m")
    main(["visualize", str(folder), "--images", DIGITS, "--output", "drawn.png"])
    assert Path("drawn.png").exists()


def test_a_card_is_written_for_them(tmp_path: Path) -> None:
    folder = save(
        small_backbone("lv"),
        ViTImageProcessorPil(size={"height": 96, "width": 96}),
        tmp_path / "lv",
    )
    words = ["--license", "mit", "--rounds", "1", "--batch_size", "2", "--max_images", "10"]
    words += ["--dataset", DIGITS, "--picture", DIGITS, "--dry-run", str(tmp_path / "draft")]
    main(["push", str(folder), "org/lv", *words])
    measured = json.loads((tmp_path / "draft" / "evaluation.json").read_text())
    assert measured["plain"]["name"] == "no fusion" and measured["plain"]["ratio"] == 1
    assert "`skip_lambda`" not in (tmp_path / "draft" / "README.md").read_text()  # fusion alone


def test_benchmark_takes_them(capsys: pytest.CaptureFixture) -> None:
    main(
        ["benchmark", "t2t_vit_7", "t2t_vit_7,r=8", "lv_vit_t", "deit_t_distilled,r=8",
         "--image_size", "64", "--batch_sizes", "[1]", "--rounds", "1"]
    )  # fmt: skip
    assert "batches of 1, 64 px" in capsys.readouterr().out


def test_classes_are_public() -> None:
    assert MCTFT2TViTForImageClassification.config_class is MCTFT2TViTConfig
    assert MCTFLVViTForImageClassification.config_class is MCTFLVViTConfig


def test_every_head_learns_where_another_classifier_teaches() -> None:
    """The auxiliary head learns the labels, the distillation head from the other classifier."""
    model = small_backbone("lv", distillation_token=True, distillation_head=True).train()
    output = model(pixels(), output_fusion=True)
    assert output.distillation_logits is not None
    average = (output.label_logits + output.distillation_logits) / 2
    assert not torch.allclose(output.logits, average)  # the auxiliary logits count whole
    output.label_logits.sum().backward()
    assert model.auxiliary_classifier.weight.grad.abs().sum() > 0
    assert model.distillation_classifier.weight.grad is None
    output = model(pixels(), output_fusion=True)
    output.distillation_logits.sum().backward()
    assert model.distillation_classifier.weight.grad.abs().sum() > 0
    plain = small_backbone("vit")(pixels(), output_fusion=True)
    assert plain.distillation_logits is None and plain.label_logits is None


def test_names_that_transformers_no_longer_converts_are_missed_at_once() -> None:
    with pytest.raises(ImportError, match="no conversion mapping of NoSuchModel"):
        take_over_names(("MCTFViTModel",), "NoSuchModel")


def test_positions_are_interpolated_for_all_prefix_tokens() -> None:
    model = small_backbone("distilled")
    embeddings = model.vit.embeddings
    tokens = embeddings(pixels(size=128), interpolate_pos_encoding=True)
    found = embeddings.interpolate_pos_encoding(tokens, 128, 128)
    assert found.shape == (1, *tokens.shape[1:])
    assert torch.equal(found[:, :2], embeddings.position_embeddings[:, :2])
