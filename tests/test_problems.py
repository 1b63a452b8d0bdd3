"""One label per image, several, or numbers: what each training and evaluation makes of them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, TrainingArguments

from mctf_hf import MCTFViTForImageClassification
from mctf_hf.losses import TokenReductionConsistency, label_loss, label_probability
from mctf_hf.problems import MULTI, REGRESSION, SINGLE
from mctf_hf.trainer import ConsistencyTrainer
from tests.conftest import tiny_model

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
        ({}, {"class_weights": [1.0, 2.0]}, "it is one number of at least 0 for each of 5 classes"),
        ({}, {"class_weights": [1, 1, 1, 1, math.nan]}, "is not allowed: it is one number"),
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
    trainer.train()
    assert trainer.accelerator.state.dynamo_plugin.dynamic is False
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + 2


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({"r": 6}, [{"r": 2}, {"r": 4}, {"r": 0.1}, {"r": 0.2}, {"r": [3]}, {"r": [5]}]),
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
