"""What people finetune: the head alone, other sizes, other processors, classes that are rare."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from PIL import Image
from torchmetrics.functional.classification import multiclass_f1_score
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil

from lightning_modules import HuggingFaceFolder, MCTFFinetuner
from mctf_hf import MCTFViTForImageClassification
from tests.helpers import tiny_model
from tests.tiny_models import MODELS, build
from tests.training_runs import digits, short_trainer


def test_the_head_alone_is_trained(tiny_folder: Path, tmp_path: Path) -> None:
    module = MCTFFinetuner(str(tiny_folder), r=6, freeze=True, learning_rate=0.1)
    before = {name: weight.clone() for name, weight in module.model.state_dict().items()}
    assert module.r_max == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found .* in eval mode")
        filters = list(warnings.filters)
        short_trainer(tmp_path, max_epochs=1).fit(module, digits())
        assert warnings.filters == filters
    changed = {
        name
        for name, weight in module.model.state_dict().items()
        if not torch.equal(weight, before[name])
    }
    assert changed == {"classifier.weight", "classifier.bias"}
    assert not module.backbone.training and module.model.classifier.training


def test_lightnings_callback_unfreezes_the_backbone(tiny_folder: Path, tmp_path: Path) -> None:
    rates: list[list[float]] = []

    class Noting(BackboneFinetuning):
        def on_train_batch_end(self, run: Any, *args: Any) -> None:
            rates.append([group["lr"] for group in run.optimizers[0].param_groups])

    module = MCTFFinetuner(str(tiny_folder), r=6, learning_rate=0.1, weight_decay=0.2)
    before = module.backbone.layers[0].mlp.fc1.weight.clone()
    unfreezing = Noting(1, backbone_initial_ratio_lr=0.5, should_align=False)
    run = short_trainer(tmp_path, callbacks=[unfreezing], limit_train_batches=3, max_epochs=2)
    run.fit(module, digits())
    assert [len(each) for each in rates] == [2, 2, 2, 3, 3, 3]
    assert rates[3][2] == pytest.approx(0.5 * rates[2][0]) and rates[4][0] < rates[3][0]
    assert run.optimizers[0].param_groups[2]["weight_decay"] == 0.2
    assert not torch.equal(module.backbone.layers[0].mlp.fc1.weight, before)


def test_weights_of_classes_are_those_of_the_loss(tiny_folder: Path, tmp_path: Path) -> None:
    weights = [float(i) for i in range(10)]
    module = MCTFFinetuner(str(tiny_folder), r=0, label_smoothing=0, class_weights=weights)
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 9])
    found = module.loss.label_loss(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits, labels, torch.tensor(weights))
    assert found == expected
    data = digits()
    module = MCTFFinetuner(str(tiny_folder), r=6, class_weights="balanced")
    short_trainer(tmp_path, max_epochs=1, limit_train_batches=1).fit(module, data)
    counts = np.bincount(data.training_labels())
    assert module.loss.class_weights == pytest.approx(counts.sum() / 10 / counts)
    with pytest.raises(
        ValueError, match="class_weights=.* one number of at least 0 for each of 10"
    ):
        MCTFFinetuner(str(tiny_folder), class_weights=[1.0, 2.0])


def test_macro_f1_and_the_accuracy_of_each_class(tiny_folder: Path, tmp_path: Path) -> None:
    module, data = MCTFFinetuner(str(tiny_folder), r=6), digits(eval_batch_size=64)
    (result,) = short_trainer(tmp_path).test(module, data, verbose=False)
    images = data.test_dataloader().dataset
    batch = torch.stack([images[i]["pixel_values"] for i in range(len(images))])
    labels = torch.tensor([images[i]["labels"] for i in range(len(images))])
    with torch.no_grad():
        found = module.model.eval()(batch).logits.argmax(-1)
    assert result["test/f1_macro"] == pytest.approx(
        multiclass_f1_score(found, labels, 10, average="macro").item()
    )
    for digit in range(10):
        right = (found == labels)[labels == digit].float().mean().item()
        assert result[f"test/accuracy/{digit}"] == pytest.approx(right)
    quiet = MCTFFinetuner(str(tiny_folder), r=6, class_metrics=False)
    (result,) = short_trainer(tmp_path).test(quiet, data, verbose=False)
    assert not [name for name in result if name.startswith("test/accuracy/")]


def test_images_of_another_size_than_the_checkpoints(tiny_folder: Path, tmp_path: Path) -> None:
    module = MCTFFinetuner(str(tiny_folder), r=6, image_size=48)
    plain = MCTFViTForImageClassification.from_pretrained(tiny_folder, r=6).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = plain(images, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(module.model.eval()(images).logits, expected)
    folder = HuggingFaceFolder(str(tmp_path / "model"))
    short_trainer(tmp_path, callbacks=[folder], max_epochs=1, limit_train_batches=1).fit(
        module, digits()
    )
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert model.config.image_size == 48
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    pixels = processor(Image.new("RGB", (80, 50)), return_tensors="pt")["pixel_values"]
    assert model(pixels).logits.shape == (1, 10)
    wide = MCTFFinetuner(str(tiny_folder), r=6, image_size=[16, 32])
    assert wide.model(torch.randn(1, 3, 16, 32)).logits.shape == (1, 10)


@pytest.mark.parametrize("name", ["DINOv2 classifier", "CLIP classifier", "SigLIP classifier"])
def test_other_encoders_at_another_size(name: str, tmp_path: Path) -> None:
    build(MODELS[name].name, **MODELS[name].config).save_pretrained("encoder")
    ViTImageProcessorPil(
        size={"shortest_edge": 40}, do_center_crop=True, crop_size=32
    ).save_pretrained("encoder")
    module = MCTFFinetuner("encoder", num_labels=3, r=2, image_size=48)
    assert module.model.config.usual_size == (48, 48)
    processor = module.image_processor
    assert processor.size["shortest_edge"] == 60 and processor.crop_size["height"] == 48
    pixels = processor(Image.new("RGB", (80, 50)), return_tensors="pt")["pixel_values"]
    assert module.model(pixels).logits.shape == (1, 3)


def test_a_processor_that_keeps_the_aspect_ratio_crops(tmp_path: Path) -> None:
    tiny_model(r=6, num_labels=10).save_pretrained("model")
    ViTImageProcessorPil(size={"shortest_edge": 32}).save_pretrained("model")
    for name, size in (("wide", (60, 40)), ("high", (30, 90))):
        for i in range(4):
            for split in ("train", "test"):
                folder = Path("photos", split, name)
                folder.mkdir(parents=True, exist_ok=True)
                Image.effect_noise(size, 40 + i).convert("RGB").save(folder / f"{i}.png")
    module = MCTFFinetuner("model", num_labels=2, learning_rate=1e-3)
    folder = HuggingFaceFolder(str(tmp_path / "trained"))
    run = short_trainer(tmp_path, max_epochs=1, callbacks=[folder])
    data = digits(batch_size=2)
    data.dataset = "photos"
    run.fit(module, data)
    (result,) = run.test(module, data, verbose=False)
    assert result["test/accuracy"] in [right / 8 for right in range(9)]  # of 8 images
    saved = AutoImageProcessor.from_pretrained("trained", backend="pil")
    assert saved(Image.new("RGB", (80, 50)), return_tensors="pt")["pixel_values"].shape[-1] == 32
