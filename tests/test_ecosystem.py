"""What users of transformers and accelerate do with a model, done with ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from mctf_hf import MCTFViTForImageClassification, MCTFViTModel
from mctf_hf.hub import save
from mctf_hf.losses import TokenReductionConsistency
from mctf_hf.teacher import teacher_r
from mctf_hf.trainer import ConsistencyTrainer
from tests.helpers import DIGITS, REPOSITORY, TINY, tiny_model
from tests.strangers import run_as_stranger

pytestmark = pytest.mark.timeout(300)

STRANGER = """
import sys

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

folder, photo, results = sys.argv[1:]
trusted = {"trust_remote_code": True}
classify = pipeline("image-classification", model=folder, top_k=2, **trusted)
extract = pipeline("image-feature-extraction", model=folder, **trusted)
torch.save({
    "classes": classify(photo),
    "features": torch.tensor(extract(photo)),
    "model": type(classify.model).__module__,
    "r": AutoConfig.from_pretrained(folder, **trusted).r,
    "size": AutoImageProcessor.from_pretrained(folder).size["height"],
    "dtype": AutoModel.from_pretrained(folder, dtype=torch.bfloat16, **trusted).dtype,
    "device": AutoModelForImageClassification.from_pretrained(
        folder, device_map="auto", **trusted
    ).device.type,
}, results)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return save(tiny_model(r=7), processor, tmp_path / "model")


@torch.no_grad()
def test_pipelines_and_auto_classes_of_a_stranger(folder: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.effect_noise((40, 50), 80).convert("RGB").save(photo)
    run_as_stranger(STRANGER, folder, photo, tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt")
    model = MCTFViTForImageClassification.from_pretrained(folder).eval()
    processor = ViTImageProcessorPil.from_pretrained(folder)
    pixel_values = processor(Image.open(photo), return_tensors="pt")["pixel_values"]
    scores, indices = model(pixel_values).logits.softmax(-1)[0].topk(2)
    assert [entry["label"] for entry in found["classes"]] == [
        model.config.id2label[index.item()] for index in indices
    ]
    assert [entry["score"] for entry in found["classes"]] == pytest.approx(scores.tolist())
    hidden = model.vit(pixel_values).last_hidden_state
    assert found["features"].shape == hidden.shape == (1, model_tokens(model), 24)
    torch.testing.assert_close(found["features"], hidden)
    assert found["model"].startswith("transformers_modules.")
    assert (found["r"], found["size"], found["device"]) == (7, 32, "cpu")
    assert found["dtype"] == torch.bfloat16


def model_tokens(model: MCTFViTForImageClassification) -> int:
    tokens = model.config.num_tokens()
    return tokens - sum(model.config.tokens_fused(tokens))


def test_pipelines_with_the_library(folder: Path) -> None:
    classify = pipeline("image-classification", model=str(folder))
    assert type(classify.model) is MCTFViTForImageClassification
    assert len(classify(Image.new("RGB", (32, 32)))) == 5
    extract = pipeline("image-feature-extraction", model=str(folder))
    assert type(extract.model) is MCTFViTModel


@torch.no_grad()
def test_shards_device_map_and_bfloat16(folder: Path, tmp_path: Path, images: Tensor) -> None:
    model = MCTFViTForImageClassification.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    expected = model(images).logits
    placed = AutoModelForImageClassification.from_pretrained(
        tmp_path / "shards", device_map="auto"
    ).eval()
    assert torch.equal(placed(images).logits, expected)
    split = AutoModelForImageClassification.from_pretrained(
        tmp_path / "shards", device_map={"vit": "cpu", "classifier": "disk"}, offload_folder="off"
    ).eval()
    assert torch.equal(split(images).logits, expected)
    half = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.bfloat16).eval()
    logits = half(images).logits
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
    half.save_pretrained(tmp_path / "half")
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        assert file.get_tensor("classifier.weight").dtype == torch.bfloat16
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "half").dtype == half.dtype


@torch.no_grad()
def test_saving_after_r_was_changed(folder: Path, tmp_path: Path, images: Tensor) -> None:
    model = MCTFViTForImageClassification.from_pretrained(folder).eval()
    model.config.r = 3
    model.save_pretrained(tmp_path / "changed")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "changed").eval()
    assert again.config.r == 3
    assert torch.equal(again(images).logits, model(images, r=3).logits)
    assert not torch.equal(again(images).logits, model(images, r=7).logits)


@torch.no_grad()
def test_a_loaded_model_compiles_whole(folder: Path, images: Tensor) -> None:
    model = AutoModelForImageClassification.from_pretrained(folder, num_hidden_layers=2).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).logits, model(images).logits)


class Pixels(torch.utils.data.Dataset):
    """Random images and labels."""

    def __init__(self, count: int):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, 32, 32, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": torch.tensor(index % 5)}


def arguments(**settings: object) -> TrainingArguments:
    defaults = {"output_dir": "out", "report_to": "none", "use_cpu": True, "seed": 3}
    return TrainingArguments(**defaults | settings)


def test_the_trainers_loss_is_that_of_two_passes(images: Tensor) -> None:
    model = tiny_model(r=6)
    trainer = ConsistencyTrainer(model=model, args=arguments(label_smoothing_factor=0.1), r_max=4)
    inputs = {"pixel_values": images, "labels": torch.tensor([0, 1, 2])}
    r = teacher_r(3, 0, 4)
    told = {"output_features": True}
    student, teacher = model(images, **told), model(images, r=r, **told)
    expected = TokenReductionConsistency(label_smoothing=0.1)(
        student.logits, student.features, teacher.logits, teacher.features, inputs["labels"]
    ).total
    model.train()
    assert torch.equal(trainer.compute_loss(model, inputs), expected)
    model.eval()
    plain = torch.nn.functional.cross_entropy(student.logits, inputs["labels"], label_smoothing=0.1)
    loss, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
    torch.testing.assert_close(loss, plain)
    assert torch.equal(outputs.logits, student.logits)


def test_accumulated_batches_train_as_one(images: Tensor) -> None:
    weights = []
    for batch, accumulated in ((8, 1), (4, 2)):
        settings = arguments(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            save_strategy="no",
            max_grad_norm=0.0,
        )
        # Consistency is a mean over the images that pass, so that only cross-entropies add up.
        loss = TokenReductionConsistency(consistency_weight=0.0)
        model = tiny_model(r=6)
        ConsistencyTrainer(
            model=model, args=settings, train_dataset=Pixels(8), loss=loss, r_max=4
        ).train()
        weights.append(model.classifier.weight)
    assert not torch.equal(weights[0], tiny_model().classifier.weight)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("r", "r_max", "message"),
    [
        (6, 7, "r_max=7 is not allowed: it must be at least 0 .* and at most 6"),
        (6, 0, "r_max=0: without a teacher there is no consistency"),
        (0, None, "Choose an r of the model"),
    ],
)
def test_a_teacher_that_teaches_nothing_is_refused(r: int, r_max: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConsistencyTrainer(model=tiny_model(r=r), args=arguments(), r_max=r_max)


def test_a_loss_function_beside_the_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="compute_loss_func is not allowed"):
        ConsistencyTrainer(
            model=tiny_model(r=6), args=arguments(), compute_loss_func=lambda *words: 0
        )


def test_transformers_own_trainer_trains_and_evaluates() -> None:
    settings = arguments(max_steps=2, per_device_train_batch_size=4, save_strategy="no")
    trainer = Trainer(
        model=tiny_model(r=6), args=settings, train_dataset=Pixels(8), eval_dataset=Pixels(6)
    )
    trainer.train()
    assert trainer.predict(Pixels(6)).predictions.shape == (6, 5)
    assert 0 < trainer.evaluate()["eval_loss"] < 10


LAUNCHED = """
import json, sys
import torch
from datasets import load_dataset
from transformers import TrainingArguments, ViTImageProcessorPil
from mctf_hf import MCTFViTForImageClassification
from mctf_hf.trainer import ConsistencyTrainer

pretrained, digits = sys.argv[1:]
processor = ViTImageProcessorPil.from_pretrained(pretrained)
rows = load_dataset(digits)

def prepare(batch):
    images = [image.convert("RGB") for image in batch["image"]]
    return processor(images, return_tensors="pt") | {"labels": batch["label"]}

def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean().item()}

model = MCTFViTForImageClassification.from_pretrained(pretrained, r=6)
trainer = ConsistencyTrainer(
    model=model,
    args=TrainingArguments(
        "out", use_cpu=True, report_to="none", per_device_train_batch_size=16, seed=3,
        learning_rate=5e-3, warmup_steps=20, num_train_epochs=2, remove_unused_columns=False,
        logging_steps=1, save_strategy="epoch",
    ),
    train_dataset=rows["train"].with_transform(prepare),
    eval_dataset=rows["test"].select(range(100)).with_transform(prepare),
    compute_metrics=accuracy,
    processing_class=processor,
    r_max=4,
)
trainer.train()
accuracy = trainer.evaluate()["eval_accuracy"]
state, accelerator = trainer.state, trainer.accelerator
weights = sum(parameter.double().sum() for parameter in model.parameters())
everywhere = accelerator.gather(weights[None]).tolist()
trainer.save_model("trained")
if accelerator.is_main_process:
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    json.dump({
        "processes": accelerator.num_processes, "weights": everywhere, "losses": losses,
        "accuracy": accuracy, "rows": len(rows["train"]),
    }, open("report.json", "w"))
accelerator.end_training()
"""


def test_accelerate_launches_two_processes(tmp_path: Path) -> None:
    # With the weights of 0.02 that suit a real width, one of 24 learns in 80 steps only by luck.
    start = ViTConfig(**{**TINY, "num_labels": 10, "initializer_range": 0.15})
    torch.manual_seed(0)
    ViTForImageClassification(start).save_pretrained("start")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained("start")
    (tmp_path / "train.py").write_text(LAUNCHED)
    done = subprocess.run(
        [
            # Its launcher of many processes is called that for the CPU as well.
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
            "--num_processes", "2",
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", "0", "train.py", "start", DIGITS,
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["processes"] == 2
    assert report["weights"][0] == report["weights"][1]
    losses = report["losses"]
    assert len(losses) == 2 * -(-report["rows"] // 32)
    assert sum(losses[-10:]) < sum(losses[:10]) - 10 * 0.8
    assert report["accuracy"] > 0.3
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "trained").config.r == 6
    record = json.loads((tmp_path / "trained" / "training.json").read_text())
    assert (record["r_max"], record["epochs"], record["global_batch_size"]) == (4, 2, 32)
    assert {"preprocessor_config.json", "modeling_mctf_vit.py"} <= {
        path.name for path in (tmp_path / "trained").iterdir()
    }
