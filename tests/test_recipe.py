"""The parts of the recipe: learning rates by layer and step, averaged weights, distillation."""

import copy
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from lightning_modules import (
    AveragedWeights,
    BestCheckpoint,
    HuggingFaceFolder,
    LastCheckpoint,
    MCTFFinetuner,
)
from lightning_modules.distillation import Guide
from lightning_modules.learning_rates import cosine_with_cooldown, parameter_groups
from mctf_hf import MCTFViTConfig, MCTFViTForImageClassification
from mctf_hf.losses import Distillation
from tests.helpers import tiny_model
from tests.training_runs import CONFIG, STEPS_PER_EPOCH, finetuner, images, trainer


def test_the_learning_rate_stays_lowest_while_cooling_down() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [parameter], "lr": 1.0}])
    schedule = cosine_with_cooldown(optimizer, warmup=4, decay_until=12, lowest=0.1)
    rates = []
    for _ in range(16):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert rates[8] == pytest.approx(0.55)
    assert all(before > after for before, after in pairwise(rates[4:13]))
    assert rates[12:] == pytest.approx([0.1] * 4)


def test_cool_down_ends_the_training_and_is_not_longer_than_it(tmp_path: Path) -> None:
    class Rates(Callback):
        seen: list[float]

        def on_train_start(self, *_: Any) -> None:
            self.seen = []

        def on_train_batch_end(self, run: L.Trainer, *_: Any) -> None:
            self.seen.append(float(run.callback_metrics["train/lr"]))

    rates = Rates()
    module = finetuner(min_learning_rate=1e-4, cooldown_epochs=1.0)
    trainer(tmp_path, rates, limit_val_batches=0).fit(module, images())
    assert rates.seen[-STEPS_PER_EPOCH:] == pytest.approx([1e-4] * STEPS_PER_EPOCH)
    assert rates.seen[-STEPS_PER_EPOCH - 1] > 1.5e-4
    (optimizer,) = module.trainer.optimizers
    slowest = min(group["lr"] for group in optimizer.param_groups)
    assert slowest == pytest.approx(1e-4 * 0.9**4)  # three layers, and the embeddings
    with pytest.raises(ValueError, match=r"cooldown_epochs=4.0 .* longer than the training, 3 epo"):
        trainer(tmp_path).fit(finetuner(cooldown_epochs=4.0), images())


def test_layers_learn_the_slower_the_earlier_they_are() -> None:
    model = tiny_model(distillation_token=True, distillation_head=True)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {
        names[id(p)]: group["lr"]
        for group in parameter_groups(model, 0.05, 1.0, layer_decay=0.5)
        for p in group["params"]
    }
    assert rates.keys() == set(names.values())
    layers = model.config.num_hidden_layers
    for name, rate in rates.items():
        if ".embeddings." in name:
            assert rate == 0.5 ** (layers + 1)
        elif ".layers." in name:
            assert rate == 0.5 ** (layers - int(name.split(".")[2]))
        else:
            assert rate == 1, name
    assert rates["vit.layers.4.mlp.fc1.weight"] == 0.5
    flat = parameter_groups(model, 0.05, 0.3)
    assert [(group["lr"], group["weight_decay"]) for group in flat] == [(0.3, 0.05), (0.3, 0.0)]


class Weights(Callback):
    """Keep a copy of the head's weights after each step, and at each validation."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_end(self, run: L.Trainer, module: Any, *_: Any) -> None:
        self.steps.append(module.model.classifier.weight.detach().clone())

    def on_validation_batch_start(self, run: L.Trainer, module: Any, *_: Any) -> None:
        self.validated.append(module.model.classifier.weight.detach().clone())


def test_averaged_weights_are_what_is_validated_kept_and_exported(tmp_path: Path) -> None:
    weights, module = Weights(), finetuner()
    folder = tmp_path / "model"
    run = trainer(
        tmp_path,
        weights,
        AveragedWeights(0.75),
        HuggingFaceFolder(str(folder)),
        BestCheckpoint(tmp_path, monitor="step", mode="max"),  # the last epoch's
        limit_val_batches=1,
    )
    run.fit(module, images())
    average, averages = None, []
    for step in weights.steps:
        average = step if average is None else 0.75 * average + 0.25 * step
        averages.append(average)
    ends = averages[STEPS_PER_EPOCH - 1 :: STEPS_PER_EPOCH]
    torch.testing.assert_close(torch.stack(weights.validated), torch.stack(ends))
    assert not torch.allclose(ends[-1], weights.steps[-1])
    exported = AutoModelForImageClassification.from_pretrained(folder).classifier.weight
    torch.testing.assert_close(exported, ends[-1])
    record = (folder / "training.json").read_text()
    assert '"ema_decay": 0.75' in record and '"layer_decay": 0.9' in record


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, "decay=1.0 is not allowed: it must be at least 0 and below 1"),
        (
            {"decay": 0.9, "every_n_steps": 0},
            "every_n_steps=0 is not allowed: it must be at least 1",
        ),
    ],
)
def test_averages_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AveragedWeights(**settings)


def test_distillation_is_that_of_deit() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, guide = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(6) % 5
    supervised = F.cross_entropy(logits, labels)
    hard = Distillation("hard", 0.5)(supervised, logits, guide)
    expected = 0.5 * supervised - 0.5 * logits.log_softmax(-1)[range(6), guide.argmax(-1)].mean()
    torch.testing.assert_close(hard, expected)
    soft = Distillation("soft", 0.1, temperature=3.0)(supervised, logits, guide)
    wanted = (guide / 3).softmax(-1)
    divergence = (wanted * (wanted.log() - (logits / 3).log_softmax(-1))).sum(-1).mean()
    expected = 0.9 * supervised + 0.1 * 9 * divergence
    torch.testing.assert_close(soft, expected, rtol=1e-5, atol=0)
    same = Distillation("soft", 1.0)(supervised, guide, guide)
    assert abs(same.item()) < 1e-6


@pytest.fixture
def guide_folder(tmp_path: Path) -> Path:
    """A classifier of another size, for larger images, with another scaling of pixels."""
    torch.manual_seed(5)
    settings = {**CONFIG, "image_size": 24, "hidden_size": 8, "reduction": "none", "r": 0}
    model = MCTFViTForImageClassification(MCTFViTConfig(**settings))
    model.config.id2label = {i: str(i) for i in range(10)}
    model.save_pretrained(tmp_path / "guide")
    ViTImageProcessorPil(
        size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3], image_std=[0.9, 0.8, 0.7]
    ).save_pretrained(tmp_path / "guide")
    return tmp_path / "guide"


def test_a_guide_sees_images_as_its_own_processor_makes_them(guide_folder: Path) -> None:
    size = {"height": 24, "width": 24}
    processor = ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    own = ViTImageProcessorPil.from_pretrained(guide_folder)
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8).numpy()
    guide = Guide(str(guide_folder), MCTFViTConfig(num_labels=10), processor)
    seen: list[Tensor] = []
    guide.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    guide(processor(list(pixels), return_tensors="pt")["pixel_values"])
    expected = own(list(pixels), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)
    guide(torch.zeros(2, 3, 16, 16))
    assert seen[1].shape == (2, 3, 24, 24)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_model_learns_what_its_guide_says(kind: str, guide_folder: Path, tmp_path: Path) -> None:
    module = finetuner(
        distill_from=str(guide_folder), distillation=kind, distillation_weight=1.0,
        distillation_temperature=1.0, label_smoothing=0.0, learning_rate=1.0,
        consistency_weight=0.0,
    )  # fmt: skip
    data = images(crop="none", flip=False)
    run = trainer(tmp_path, max_epochs=4, limit_train_batches=12, limit_val_batches=0)
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, run: L.Trainer, *_: Any) -> None:
            losses.append(float(run.callback_metrics["train/student"]))

    run.callbacks.append(Losses())
    run.fit(module, data)
    assert sum(losses[-12:]) < 0.7 * sum(losses[:12]), losses
    assert not any("guide" in name for name in module.state_dict())
    again = trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    again.fit(module, data)  # and goes on with it a second time


def test_the_distillation_head_learns_from_the_guide_and_the_other_from_labels(
    guide_folder: Path, tmp_path: Path
) -> None:
    config = {**CONFIG, "distillation_token": True, "distillation_head": True}
    settings = {"config": config, "distill_from": str(guide_folder), "drop_path_rate": 0.0}
    module = finetuner(**settings, r_max=0)  # without a teacher, the heads' losses alone
    before = copy.deepcopy(module.model).eval()
    given: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    class Watch(Callback):
        def on_train_batch_start(self, run: L.Trainer, module: Any, batch: Any, _: int) -> None:
            given.update(batch)

        def on_after_backward(self, run: L.Trainer, module: Any) -> None:
            gradients.update({name: p.grad.clone() for name, p in module.model.named_parameters()})

    once = {"limit_train_batches": 1, "limit_val_batches": 0, "max_epochs": 1}
    trainer(tmp_path, Watch(), enable_checkpointing=False, **once).fit(module, images())
    pixels, labels = given["pixel_values"], given["labels"]
    with torch.no_grad():
        hidden = before.base_model(pixels).last_hidden_state
        guided = Guide(str(guide_folder), before.config, module.image_processor)(pixels)
    smoothing = module.loss.label_smoothing
    for name, token, target, smooth in (
        ("classifier", 0, labels, smoothing),
        ("distillation_classifier", 1, guided.argmax(-1), 0.0),
    ):
        head = getattr(before, name)
        weight = head.weight.detach().requires_grad_()
        logits = F.linear(hidden[:, token], weight, head.bias.detach())
        (0.5 * F.cross_entropy(logits, target, label_smoothing=smooth)).backward()
        torch.testing.assert_close(gradients[f"{name}.weight"], weight.grad, atol=1e-6, rtol=1e-4)
    # The teacher is compared with what both heads say.
    module, compared = finetuner(**settings), []
    module.loss.register_forward_pre_hook(lambda _, args: compared.append(args[0].detach()))
    trainer(tmp_path, **once).fit(module, images())
    torch.testing.assert_close(compared[0], before(pixels).logits, atol=1e-6, rtol=1e-4)


def test_a_guide_of_other_classes_is_refused_in_one_clear_error(
    guide_folder: Path, tmp_path: Path
) -> None:
    guide = MCTFViTForImageClassification.from_pretrained(guide_folder)
    folder = tmp_path / "other"
    shutil.copytree(guide_folder, folder)

    def refused(message: str) -> None:
        guide.save_pretrained(folder)
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path).fit(finetuner(distill_from=str(folder)), images())

    guide.config.id2label = {i: str((i + 1) % 10) for i in range(10)}
    refused(r"distill_from='.*other' calls class 0 '1', .* '0', and 10 of 10 classes differ")
    guide.config.id2label = {i: f"{i}, one of the digits" for i in range(10)}
    guide.save_pretrained(folder)
    trainer(tmp_path, max_epochs=1).fit(finetuner(distill_from=str(folder)), images())
    guide.config.id2label = {i: f"LABEL_{i}" for i in range(7)}
    guide.classifier = torch.nn.Linear(8, 7)
    refused("has 7 classes, the model that learns from it 10")
    with pytest.raises(OSError, match="nowhere"):
        trainer(tmp_path).fit(finetuner(distill_from=str(tmp_path / "nowhere")), images())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_decay": 1.5}, "layer_decay=1.5 is not allowed: .* at most 1"),
        (
            {"distillation": "medium"},
            "distillation='medium' is not allowed: it must be soft or hard",
        ),
        ({"distillation_weight": 2.0}, "distillation_weight=2.0 is not allowed"),
        ({"cooldown_epochs": -1.0}, "cooldown_epochs=-1.0 is not allowed: it must be at least 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MCTFFinetuner(config=CONFIG, r=3, **settings)


def test_before_there_is_an_average_the_weights_themselves_count(tmp_path: Path) -> None:
    module, folder = finetuner(learning_rate=0.3), tmp_path / "model"
    begun = {name: weight.clone() for name, weight in module.model.state_dict().items()}
    callbacks = (AveragedWeights(0.5, from_step=100), HuggingFaceFolder(str(folder)))
    run = trainer(
        tmp_path,
        *callbacks,
        BestCheckpoint(tmp_path, "best", monitor="val/loss", mode="min"),
        LastCheckpoint(4, folder=str(tmp_path)),
        max_epochs=1,
    )
    run.fit(module, images())
    written = load_file(folder / "model.safetensors")
    assert not torch.equal(written["classifier.weight"], begun["classifier.weight"])
    last = torch.load(tmp_path / "last.ckpt")
    for name, weight in last["current_model_state"].items():
        assert torch.equal(last["state_dict"][name], weight)
        assert torch.equal(written[name.removeprefix("model.")], weight)
    (again,) = trainer(tmp_path).validate(module, images(), verbose=False)
    assert again["val/loss"] == pytest.approx(run.callback_metrics["val/loss"].item())
