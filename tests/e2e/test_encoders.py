"""The commands on checkpoints of encoders, as anybody has them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTImageProcessorPil,
)

from cli.main import main
from mctf_hf.model_card import ModelCard
from tests.helpers import DIGITS

BASE: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
MLP = {"intermediate_size": 96}
KINDS: dict[str, tuple[type[Any], Any, str]] = {
    "dinov2": (Dinov2Model, Dinov2Config(**{**BASE, "image_size": 48}), "last_hidden_state"),
    "clip": (
        CLIPVisionModelWithProjection,
        CLIPVisionConfig(**BASE, **MLP, projection_dim=8),
        "image_embeds",
    ),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**BASE, **MLP), "last_hidden_state"),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig(**BASE, **MLP), "last_hidden_state"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """The name of a plain checkpoint in the working folder, for images of 32 pixels."""
    model_class, config, _ = KINDS[request.param]
    torch.manual_seed(0)
    model_class(config).save_pretrained(request.param)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(request.param)
    return request.param


def test_an_encoder_is_measured_drawn_exported_and_written(
    kind: str, capsys: pytest.CaptureFixture
) -> None:
    main(["benchmark", kind, f"{kind},r=5", f"{kind},r=auto:0.85", "--batch_sizes", "[2]",
          "--rounds", "1", "--output", "speed.json"])  # fmt: skip
    plain, fused, budget = json.loads(Path("speed.json").read_text())["results"]
    assert fused["gmacs"] < plain["gmacs"] and budget["gmacs"] <= 0.85 * plain["gmacs"]
    assert budget["gmacs"] > 0.8 * plain["gmacs"]

    main(["visualize", f"{kind},r=5", "--images", DIGITS, "--count", "2", "--output", "a.png"])
    before = 64 + (kind != "siglip")
    assert f"{before} -> {before - 10} tokens" in capsys.readouterr().out

    main(["export", f"{kind},r=5", "--output", "a.pt2", "--images", DIGITS, "--count", "4"])
    assert "0.0%" in capsys.readouterr().out and Path("a.pt2").exists()

    main(["convert", f"{kind},r=5", "--output", "own"])
    assert KINDS[kind][2] in capsys.readouterr().out
    main(["push", "own", "org/own", "--license", "mit", "--rounds", "1", "--dry-run", "draft"])
    card = ModelCard.load("draft/README.md")
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert "AutoModel.from_pretrained" in card.text and "classes" not in card.text[:600]
    if kind in ("dinov2", "dinov3"):
        assert json.loads(Path("own/config.json").read_text())["input_size"] == [32, 32]


def test_accuracy_asks_for_a_head(kind: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["benchmark", kind, "--accuracy", DIGITS, "--batch_sizes", "[1]", "--rounds", "1"])
    shown = capsys.readouterr().err
    assert "has no head for classes: finetune it with num_labels first" in shown


def test_a_new_head_is_finetuned_and_predicts(kind: str, tmp_path: Path) -> None:
    from datasets import load_dataset

    photos = tmp_path / "photos"
    photos.mkdir()
    for i, image in enumerate(load_dataset(DIGITS, split="test[:3]")["image"]):
        image.convert("RGB").save(photos / f"{i}.png")
    main(
        ["fit", "--model.pretrained", kind, "--model.num_labels", "10", "--model.r", "5",
         "--model.learning_rate", "0.01", "--model.layer_decay", "0.8",
         "--data.dataset", DIGITS, "--data.num_workers", "0", "--data.batch_size", "16",
         "--trainer.max_steps", "3", "--trainer.limit_val_batches", "1",
         "--trainer.accelerator", "cpu", "--trainer.logger", "false",
         "--trainer.default_root_dir", str(tmp_path), "--export.folder", "fitted"]
    )  # fmt: skip
    model = AutoModelForImageClassification.from_pretrained("fitted").eval()
    assert model.config.r == 5 and model.num_labels == 10
    main(["predict", "--model.pretrained", "fitted", "--data.predict_folder", str(photos),
          "--predictions.path", "labels.csv", "--trainer.accelerator", "cpu",
          "--trainer.logger", "false"])  # fmt: skip
    assert len(Path("labels.csv").read_text().splitlines()) == 4
