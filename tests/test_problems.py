"""One label per image, several, or numbers: what each training and evaluation makes of them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision
from transformers import AutoModelForImageClassification, TrainingArguments, ViTImageProcessorPil

from cli.main import main
from lightning_modules import HFImageDataModule, HuggingFaceFolder, MCTFFinetuner
from mctf_hf import MCTFViTForImageClassification
from mctf_hf.losses import TokenReductionConsistency, label_loss, label_probability
from mctf_hf.problems import MULTI, REGRESSION, SINGLE
from mctf_hf.trainer import ConsistencyTrainer
from tests.helpers import tiny_model
from tests.training_runs import digits, short_trainer

SEVERAL = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
KINDS: dict[str, tuple[dict[str, Any], Tensor]] = {
    "one label": ({"problem_type": SINGLE}, torch.tensor([0, 4, 2])),
    "unset, integers": ({}, torch.tensor([0, 4, 2])),
    "several labels": ({"problem_type": MULTI}, SEVERAL),
    "unset, real numbers": ({}, SEVERAL),
    "one number": ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
    "one whole number": ({"num_labels": 1}, torch.tensor([5, 1, 2])),
    "two numbers": ({"num_labels": 2, "problem_type": REGRESSION}, torch.randn(3, 2)),
}


def arguments(**settings: Any) -> TrainingArguments:
    defaults = {"output_dir": "out", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(**{**defaults, **settings})


class Rows(torch.utils.data.Dataset):
    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainers_losses_are_those_of_transformers_for_each_problem(
    kind: str, images: Tensor
) -> None:
    settings, labels = KINDS[kind]
    model, rows = tiny_model(r=6, **settings), Rows(images, labels)
    twin = MCTFViTForImageClassification(tiny_model(r=6, **settings).config)
    twin.load_state_dict(model.state_dict())
    expected = twin(images, labels=labels).loss.item()
    loss = TokenReductionConsistency(teacher_weight=0.0, consistency_weight=0.0)
    training = arguments(max_steps=1, save_strategy="no", per_device_train_batch_size=3)
    trainer = ConsistencyTrainer(
        model=model, args=training, train_dataset=rows, eval_dataset=rows, loss=loss
    )
    assert trainer.train().training_loss == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] < expected + 1
    trainer.save_model("trained")
    saved = AutoModelForImageClassification.from_pretrained("trained").config.problem_type
    assert saved == twin.config.problem_type


def test_confidence_is_that_of_the_labels_of_each_image() -> None:
    logits = torch.logit(torch.tensor([[0.9, 0.5, 0.2], [0.1, 0.3, 0.2]]))
    several = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert label_probability(logits, several, MULTI).tolist() == pytest.approx([0.7, 0.8])
    token = torch.zeros(2, 4)
    loss = TokenReductionConsistency(confidence_threshold=0.75)(
        logits, token, logits, token + 1, several, problem_type=MULTI
    )
    assert (loss.passing, loss.consistency) == (0.5, 1.0)
    numbers = TokenReductionConsistency(confidence_threshold=1.0)(
        logits, token, logits, token + 1, several, problem_type=REGRESSION
    )
    assert (numbers.passing, numbers.confidence) == (1.0, 1.0)


def test_weights_of_classes_and_smoothing_in_each_loss() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    weights = [1.0, 2.0, 0.0, 3.0, 1.0]
    one = torch.tensor([1, 3, 4])
    each = -logits.log_softmax(-1)[range(3), one] * torch.tensor([2.0, 3.0, 1.0])
    torch.testing.assert_close(label_loss(logits, one, class_weights=weights), each.sum() / 6)
    smooth = 0.8 * SEVERAL + 0.1
    expected = -(
        torch.tensor(weights) * smooth * logits.sigmoid().log()
        + (1 - smooth) * (1 - logits.sigmoid()).log()
    )
    found = label_loss(
        logits, SEVERAL, MULTI, class_weights=weights, label_smoothing=0.2, reduction="none"
    )
    torch.testing.assert_close(found, expected.mean(1))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"problem_type": MULTI}, {"label_smoothing_factor": 0.1}, "with problem_type=multi_label"),
        ({"num_labels": 1}, {"label_smoothing_factor": 0.1}, "has no effect with problem_type=reg"),
        ({"num_labels": 1}, {"class_weights": [1.0]}, r"class_weights=\[1.0\] has no effect"),
        (
            {},
            {"class_weights": [1.0, 2.0]},
            "must be one number of at least 0 for each of 5 classes",
        ),
        ({}, {"class_weights": [1, 1, 1, 1, math.nan]}, "is not allowed: it must be one number"),
        ({}, {"learning_rate": math.inf}, "learning_rate=inf is not allowed"),
        (
            {"reduction": "evit", "keep_rate": 0.5},
            {"torch_compile": True},
            "torch_compile=True is not allowed with reduction='evit'",
        ),
    ],
)
def test_settings_of_the_trainer_that_do_not_go_with_the_model(
    model: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    loss = None
    if "class_weights" in settings:
        loss = TokenReductionConsistency(class_weights=settings.pop("class_weights"))
    with pytest.raises(ValueError, match=message):
        ConsistencyTrainer(model=tiny_model(r=6, **model), args=arguments(**settings), loss=loss)


def test_labels_of_another_problem_are_named(images: Tensor) -> None:
    trainer = ConsistencyTrainer(model=tiny_model(r=6, problem_type=MULTI), args=arguments())
    trainer.model.train()
    with pytest.raises(ValueError, match=r"labels of shape \(3,\) are not allowed with problem_ty"):
        trainer.compute_loss(
            trainer.model, {"pixel_values": images, "labels": torch.tensor([0, 1, 2])}
        )


def test_what_is_not_finite_stops_the_trainer_and_is_not_saved(
    images: Tensor, tmp_path: Path
) -> None:
    rows = Rows(images / 0, torch.tensor([0, 1, 2]))
    training = arguments(max_steps=3, save_strategy="no", per_device_train_batch_size=3)
    trainer = ConsistencyTrainer(model=tiny_model(r=6), args=training, train_dataset=rows)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0: training stops"):
        trainer.train()
    with torch.no_grad():
        trainer.model.classifier.weight[0, 0] = math.inf
    with pytest.raises(ValueError, match="weights are infinite or no numbers in classifier.weight"):
        trainer.save_model("trained")
    assert not (tmp_path / "trained").exists()


def test_a_compiled_trainer_makes_one_program_for_each_amount(images: Tensor) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    training = arguments(
        max_steps=6, save_strategy="no", per_device_train_batch_size=3,
        torch_compile=True, torch_compile_backend="eager",
    )  # fmt: skip
    model = tiny_model(r=6, num_hidden_layers=1, fusion_layers=[0])
    trainer = ConsistencyTrainer(
        model=model, args=training, train_dataset=Rows(images, torch.tensor([0, 1, 2])), r_max=2
    )
    limit = torch._dynamo.config.recompile_limit
    trainer.train()
    assert torch._dynamo.config.recompile_limit == limit
    assert trainer.accelerator.state.dynamo_plugin.dynamic is False
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + 2


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({"r": 6}, [{"r": 2}, {"r": 4}, {"r": 0.1}, {"r": 0.2}]),
        ({"reduction": "evit", "keep_rate": 0.7}, [{"keep_rate": 0.5}, {"keep_rate": 0.6}]),
    ],
)
def test_a_whole_program_is_compiled_at_each_amount(
    settings: dict[str, Any], calls: list[dict[str, Any]], images: Tensor
) -> None:
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=1, fusion_layers=[0], **settings)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for call in (*calls, calls[0]):
            torch.testing.assert_close(
                compiled(images, **call).logits, model(images, **call).logits
            )


def photos(labels: list[Any], feature: Any, column: str = "tags") -> str:
    """A folder of parquet files with 12 noisy images in each split, and labels of a type."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(256, size=(12, 32, 32, 3), dtype=np.uint8)
    for split in ("train", "test"):
        rows = Dataset.from_dict(
            {"image": [Image.fromarray(one) for one in pixels], column: labels},
            features=Features({"image": ImageFeature(), column: feature}),
        )
        Path("photos").mkdir(exist_ok=True)
        rows.to_parquet(f"photos/{split}-00000-of-00001.parquet")
    return "photos"


TAGS = List(ClassLabel(names=["cat", "dog", "bird"]))
SEVERAL_TAGS: list[Any] = [[0, 2], [1], [], [0], [0, 1, 2], [2]] * 2


def test_a_class_that_there_is_not_among_several(tiny_folder: Path, capsys: Any) -> None:
    tags = [[0], [0, -1], *SEVERAL_TAGS[2:]]
    words = {"model.pretrained": tiny_folder, "model.num_labels": 3, "model.problem_type": MULTI}
    with pytest.raises(SystemExit):
        run("fit", capsys, **QUICK, **words, **{"data.dataset": photos(tags, TAGS)})
    message = "row 1 of photos, split test has the label -1: the classes are 0 to 2"
    assert message in capsys.readouterr().err


def run(command: str, capsys: pytest.CaptureFixture, **options: Any) -> str:
    words = [command] + [f"--{name}={value}" for name, value in options.items()]
    main(words)
    return capsys.readouterr().out


QUICK = {
    "trainer.max_epochs": 1, "trainer.accelerator": "cpu", "data.batch_size": 4,
    "data.num_workers": 0, "data.val_split": "test", "picture.every_n_epochs": 0,
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_several_labels_per_image_from_fit_to_predict(
    streaming: bool, tiny_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    dataset = photos(SEVERAL_TAGS, TAGS)
    mixed = {"data.mixup": 0.8} if not streaming else {"data.train_images": 12}
    run(
        "fit", capsys, **QUICK, **mixed,
        **{
            "model.pretrained": tiny_folder, "model.r": 6, "model.num_labels": 3,
            "model.problem_type": MULTI, "model.class_weights": [1, 2, 3],
            "model.learning_rate": 1e-3, "data.dataset": dataset, "export.folder": "model",
            "data.streaming": str(streaming).lower(),
        },
    )  # fmt: skip
    config = json.loads(Path("model/config.json").read_text())
    assert config["problem_type"] == MULTI
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "bird"}
    if streaming:
        return
    images, labels = images_of(dataset), torch.zeros(12, 3)
    for row, tags in enumerate(SEVERAL_TAGS):
        labels[row, tags] = 1
    model = MCTFViTForImageClassification.from_pretrained("model").eval()
    with torch.no_grad():
        logits = model(images).logits
    out = run(
        "test", capsys, **{"model.pretrained": "model", "data.dataset": dataset,
                           "data.num_workers": 0, "trainer.accelerator": "cpu",
                           "trainer.default_root_dir": "."},
    )  # fmt: skip
    right = ((logits > 0) == (labels > 0)).all(1).float().mean().item()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels).item()
    precision = multilabel_average_precision(logits.sigmoid(), labels.long(), 3).item()
    for name, value in (
        ("accuracy", right), ("loss", loss), ("mean_average_precision", precision),
        ("accuracy/dog", ((logits > 0) == (labels > 0))[:, 1].float().mean().item()),
    ):  # fmt: skip
        assert told(out, f"test/{name}") == pytest.approx(value, abs=1e-4)
    main(["push", "model", "org/several", "--license=mit", f"--dataset={dataset}", "--rounds=1",
          "--dry-run", "draft"])  # fmt: skip
    evaluation = json.loads(Path("draft/evaluation.json").read_text())
    assert evaluation["metric"] == "exact_match"
    assert evaluation["own"]["accuracy"] == pytest.approx(right)
    card = Path("draft/README.md").read_text()
    assert "Images of which all labels are right on 12 images" in card and "sigmoid()" in card


def test_numbers_from_fit_to_push(tiny_folder: Path, capsys: pytest.CaptureFixture) -> None:
    ages = [float(i) / 4 for i in range(12)]
    dataset = photos(ages, Value("float64"), "age")
    run(
        "fit", capsys, **QUICK,
        **{
            "model.pretrained": tiny_folder, "model.r": 6, "model.num_labels": 1,
            "model.learning_rate": 1e-3, "data.dataset": dataset, "data.label_column": "age",
            "export.folder": "model", "data.cutmix": 1.0,
        },
    )  # fmt: skip
    assert json.loads(Path("model/config.json").read_text())["problem_type"] == REGRESSION
    model = MCTFViTForImageClassification.from_pretrained("model").eval()
    with torch.no_grad():
        error = model(images_of(dataset)).logits[:, 0] - torch.tensor(ages)
    out = run(
        "test", capsys, **{"model.pretrained": "model", "data.dataset": dataset,
                           "data.label_column": "age", "data.num_workers": 0,
                           "trainer.accelerator": "cpu", "trainer.default_root_dir": "."},
    )  # fmt: skip
    assert told(out, "test/mean_absolute_error") == pytest.approx(
        error.abs().mean().item(), abs=1e-4
    )
    assert told(out, "test/loss") == pytest.approx(error.square().mean().item(), abs=1e-4)
    main(["push", "model", "org/ages", "--license=mit", f"--dataset={dataset}", "--rounds=1",
          "--label-column=age", "--dry-run", "draft"])  # fmt: skip
    evaluation = json.loads(Path("draft/evaluation.json").read_text())
    assert evaluation["metric"] == "mae"
    assert evaluation["own"]["accuracy"] == pytest.approx(error.abs().mean().item(), rel=1e-4)
    assert "Mean absolute error on 12 images" in Path("draft/README.md").read_text()


def images_of(dataset: str) -> Tensor:
    processor = ViTImageProcessorPil.from_pretrained("model")
    rows = load_dataset(dataset, split="test")
    return processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]


def told(out: str, name: str) -> float:
    """The number beside a name in the table that Lightning prints."""
    (line,) = [line for line in out.splitlines() if f" {name} " in line]
    return float(line.split("│")[2])


@pytest.mark.parametrize(
    ("labels", "feature", "settings", "message"),
    [
        (SEVERAL_TAGS, TAGS, {"num_labels": 3}, "are several of the classes for each image, but"),
        ([[0.5, 1.0]] * 12, List(Value("float32")), {"num_labels": 2}, "are numbers, but prob"),
        (
            [0] * 12, ClassLabel(names=["a", "b"]), {"num_labels": 1},
            "one of the classes for each image, .* and num_labels to the number of classes",
        ),
        (
            [0, 1] * 6, ClassLabel(names=["a", "b"]),
            {"num_labels": 2, "problem_type": MULTI}, "are one of the classes for each image, but ",
        ),
        (
            [[0, 1]] * 11 + [[0]], List(Value("int8")),
            {"num_labels": 2, "problem_type": MULTI}, r"row 11 .* has the labels \[0\], where othe",
        ),
        (
            [[0, 1]] * 12, List(Value("int8")),
            {"num_labels": 3, "problem_type": MULTI}, "are 2 numbers for each image, the model ha",
        ),
        ([math.nan] * 12, Value("float32"), {"num_labels": 1}, "row 0 .* must be finite"),
    ],
)  # fmt: skip
def test_labels_of_another_problem_than_the_models(
    labels: list[Any], feature: Any, settings: dict[str, Any], message: str, tiny_folder: Path,
) -> None:  # fmt: skip
    data = HFImageDataModule(photos(labels, feature), label_column="tags", num_workers=0)
    with pytest.raises(ValueError, match=message):
        short_trainer(Path()).fit(MCTFFinetuner(str(tiny_folder), **settings), data)


def test_one_label_per_image_ends_what_a_checkpoint_says(tiny_folder: Path, tmp_path: Path) -> None:
    model = tiny_model(r=6, num_labels=10, problem_type=MULTI)
    model.save_pretrained("several")
    shutil.copy(tiny_folder / "preprocessor_config.json", "several")
    with pytest.raises(ValueError, match="but problem_type=multi_label_classification: set "):
        short_trainer(tmp_path).fit(MCTFFinetuner("several"), digits())
    for settings in ({"problem_type": SINGLE}, {"num_labels": 10, "learning_rate": 1e-3}):
        module = MCTFFinetuner("several", **settings)
        folder = HuggingFaceFolder("trained")
        run = short_trainer(tmp_path, max_epochs=1, limit_train_batches=1, callbacks=[folder])
        run.fit(module, digits())
        assert json.loads(Path("trained/config.json").read_text())["problem_type"] == SINGLE


def test_settings_are_judged_for_one_label_per_image(
    tiny_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    tiny_model(r=6, num_labels=3, problem_type=MULTI).save_pretrained("several")
    shutil.copy(tiny_folder / "preprocessor_config.json", "several")
    with pytest.raises(SystemExit):
        main(["sweep", "several", f"--images={photos(SEVERAL_TAGS, TAGS)}"])
    assert "with problem_type=multi_label_classification is not judged" in capsys.readouterr().err
