"""The consistency objective against the official implementation and by hand."""

import pytest
import torch

from mctf_hf.conversion import convert_state_dict
from mctf_hf.losses import TokenReductionConsistency, label_probability
from tests.helpers import Golden, tiny_model

GOLDEN = Golden("train")


@pytest.mark.parametrize("name", GOLDEN.cases)
def test_losses_and_gradients_equal_the_official_ones(name: str) -> None:
    case = GOLDEN.cases[name]
    model = tiny_model().train()
    model.load_state_dict(convert_state_dict(GOLDEN.weights(f"{name}/model."), source="timm"))
    images, labels = GOLDEN[f"{name}/pixel_values"], GOLDEN[f"{name}/labels"]
    student = model(images, r=case["r_student"], output_fusion=True)
    teacher = model(images, r=case["r_teacher"], output_fusion=True)
    criterion = TokenReductionConsistency(
        case["teacher_weight"],
        case["consistency_weight"],
        case["confidence_threshold"],
        case["label_smoothing"],
    )
    loss = criterion(student.logits, student.features, teacher.logits, teacher.features, labels)
    loss.total.backward()

    exact = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(student.logits, GOLDEN[f"{name}/student_logits"], **exact)
    torch.testing.assert_close(teacher.logits, GOLDEN[f"{name}/teacher_logits"], **exact)
    torch.testing.assert_close(loss.total, GOLDEN[f"{name}/loss"], **exact)
    torch.testing.assert_close(loss.student, GOLDEN[f"{name}/loss_student"], **exact)
    torch.testing.assert_close(loss.teacher, GOLDEN[f"{name}/loss_teacher"], **exact)
    weighted = case["consistency_weight"] * loss.consistency
    torch.testing.assert_close(weighted, GOLDEN[f"{name}/loss_consistency"], **exact)
    torch.testing.assert_close(
        label_probability(student.logits, labels), GOLDEN[f"{name}/confidence"], **exact
    )
    expected = convert_state_dict(GOLDEN.weights(f"{name}/grad."), source="timm")
    for weight, parameter in model.named_parameters():
        error = (parameter.grad - expected[weight]).norm()
        if weight.endswith("k_proj.bias"):  # zero but for rounding: softmax ignores it
            assert error < 1e-6
        else:
            assert error / expected[weight].norm() < 1e-4, weight


def test_only_images_that_pass_count_for_consistency() -> None:
    student_logits = torch.tensor([[5.0, 0.0], [0.0, 5.0]])  # right, wrong
    labels = torch.tensor([0, 0])
    student, teacher = torch.zeros(2, 4), torch.tensor([[1.0] * 4, [9.0] * 4])
    loss = TokenReductionConsistency()(student_logits, student, student_logits, teacher, labels)
    assert loss.consistency.item() == 1
    assert loss.passing.item() == 0.5
    none = TokenReductionConsistency(confidence_threshold=1.0)(
        student_logits, student, student_logits, teacher, labels
    )
    assert none.consistency.item() == 0
    assert torch.isfinite(none.total)


def test_the_teacher_is_not_drawn_to_the_student() -> None:
    logits = torch.tensor([[9.0, 0.0]])
    student = torch.ones(1, 4, requires_grad=True)
    teacher = torch.zeros(1, 4, requires_grad=True)
    criterion = TokenReductionConsistency(teacher_weight=0)
    criterion(logits, student, logits, teacher, torch.tensor([0])).total.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_images_without_a_label_do_not_count() -> None:
    logits, labels = torch.tensor([[5.0, 0.0], [5.0, 0.0]]), torch.tensor([0, -100])
    student, teacher = torch.zeros(2, 4), torch.tensor([[1.0] * 4, [9.0] * 4])
    loss = TokenReductionConsistency()(logits, student, logits, teacher, labels)
    alone = TokenReductionConsistency()(
        logits[:1], student[:1], logits[:1], teacher[:1], labels[:1]
    )
    torch.testing.assert_close(loss.total, alone.total)
    assert loss.passing == 0.5 and label_probability(logits, labels)[1] == 0


def test_both_labels_of_a_mixed_image_count_together() -> None:
    logits = torch.log(torch.tensor([[0.3, 0.25, 0.45]]))
    mixed = torch.tensor([[0.6, 0.4, 0.0]])
    assert label_probability(logits, mixed).item() == pytest.approx(0.55)
