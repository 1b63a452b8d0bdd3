"""What a model with fusion is finetuned by: token-reduction consistency, and distillation."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .problems import MULTI, REGRESSION, SINGLE


class ConsistencyLoss(NamedTuple):
    """The total and its parts, each a scalar tensor.

    Attributes:
        total: student + teacher_weight * teacher + consistency_weight * consistency.
        student: loss of the labels of the pass that fuses most.
        teacher: loss of the labels of the pass that fuses less.
        consistency: mean squared distance of the two class tokens over the images that pass.
        passing: fraction of images that the student is confident about.
        confidence: mean of :func:`label_probability` of the student.
    """

    total: Tensor
    student: Tensor
    teacher: Tensor
    consistency: Tensor
    passing: Tensor
    confidence: Tensor


class TokenReductionConsistency(nn.Module):
    """Loss of one set of weights run twice, fusing much (student) and little (teacher).

    MCTF (arXiv 2403.10030), section 3.4. The student's class token is drawn to the teacher's for
    those images whose label the student already gives more than ``confidence_threshold``.

    Args:
        teacher_weight: weight of the teacher's loss of the labels.
        consistency_weight: weight of the distance between class tokens.
        confidence_threshold: an image counts for consistency if :func:`label_probability` is more.
            In regression, which knows no probability, all images count.
        label_smoothing: of both losses of the labels, see :func:`label_loss`.
        class_weights: of both losses of the labels, likewise.
    """

    def __init__(
        self,
        teacher_weight: float = 1.0,
        consistency_weight: float = 3.0,
        confidence_threshold: float = 0.4,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        self.teacher_weight = teacher_weight
        self.consistency_weight = consistency_weight
        self.confidence_threshold = confidence_threshold
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights

    def check(self, problem_type: str, num_labels: int) -> None:
        """Raise ValueError for settings that are not those of such a head."""
        weights = self.class_weights
        if weights is not None:
            if problem_type == REGRESSION:
                raise ValueError(
                    f"class_weights={list(weights)!r} has no effect with {problem_type=!s}: leave "
                    "it out"
                )
            wrong = [one for one in weights if not (one >= 0 and math.isfinite(one))]
            if len(weights) != num_labels or wrong or not any(weights):
                raise ValueError(
                    f"class_weights={list(weights)!r} is not allowed: it is one number of at least "
                    f"0 for each of {num_labels} classes, not all 0"
                )
        if self.label_smoothing and problem_type == REGRESSION:
            raise ValueError(
                f"label_smoothing={self.label_smoothing!r} has no effect with {problem_type=!s}: "
                "leave it out"
            )

    def forward(
        self,
        student_logits: Tensor,
        student_features: Tensor,
        teacher_logits: Tensor,
        teacher_features: Tensor,
        labels: Tensor,
        *,
        problem_type: str = SINGLE,
        student_loss: Tensor | None = None,
        teacher_loss: Tensor | None = None,
        mean_over_processes: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> ConsistencyLoss:
        """Compare the two passes.

        Args:
            student_logits, teacher_logits: (b, c).
            student_features, teacher_features: (b, d), what the head reads.
            labels: see :func:`label_loss`.
            problem_type: what labels are, as ``config.problem_type`` has it.
            student_loss, teacher_loss: scalars to use instead of the losses of the labels.
            mean_over_processes: mean of a scalar over the processes that train together, if there
                are several. Their consistencies, averaged as gradients are, are then a mean over
                the passing images of all processes, not a mean of means.
        """
        if student_loss is None:
            student_loss = self.label_loss(student_logits, labels, problem_type)
        if teacher_loss is None:
            teacher_loss = self.label_loss(teacher_logits, labels, problem_type)
        confidence = label_probability(student_logits, labels, problem_type)
        passing = confidence > self.confidence_threshold
        if problem_type == REGRESSION:
            passing = torch.ones_like(passing)
        distance = (teacher_features.detach() - student_features).square().mean(1)  # [b]
        count = mean_over_processes(passing.sum().float())
        consistency = (distance * passing).sum() / torch.where(count > 0, count, 1)
        student, teacher = student_loss, teacher_loss
        return ConsistencyLoss(
            total=student + self.teacher_weight * teacher + self.consistency_weight * consistency,
            student=student,
            teacher=teacher,
            consistency=consistency,
            passing=passing.float().mean(),
            confidence=confidence.mean(),
        )

    def label_loss(self, logits: Tensor, labels: Tensor, problem_type: str = SINGLE) -> Tensor:
        """:func:`label_loss` with these settings, mean over images: a scalar."""
        return label_loss(
            logits,
            labels,
            problem_type,
            label_smoothing=self.label_smoothing,
            class_weights=self.class_weights,
        )


def label_loss(
    logits: Tensor,
    labels: Tensor,
    problem_type: str = SINGLE,
    *,
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """How far logits are from labels, as transformers' losses for each ``problem_type`` tell.

    Args:
        logits: (b, c).
        labels: of one label per image (b,) int64, -100 where there is none, or (b, c) probabilities
            that are positive for an image's labels; of several (b, c), 1 or 0; of regression
            (b, c), or (b,) of one value.
        problem_type: cross-entropy of one label per image, mean of the binary cross-entropies of
            several, mean squared error of regression.
        label_smoothing: part of a label that all classes share; with several labels per image it
            draws 1 and 0 that far to 0.5.
        class_weights: how much each class counts; with several labels per image, where it is there.
        reduction: ``mean`` over images, by their weights, or ``none``.

    Returns:
        A scalar, or (b,).

    Raises:
        ValueError: for labels of another shape.
    """
    weights = None
    if class_weights is not None:
        weights = torch.as_tensor(class_weights, dtype=logits.dtype, device=logits.device)
    if problem_type == SINGLE:
        if labels.ndim != 1 and labels.shape != logits.shape:
            raise ValueError(_misshapen(labels, problem_type, logits))
        return F.cross_entropy(
            logits, labels, weights, label_smoothing=label_smoothing, reduction=reduction
        )
    if labels.ndim == 1 and logits.shape[1] == 1:
        labels = labels[:, None]
    if labels.shape != logits.shape:
        raise ValueError(_misshapen(labels, problem_type, logits))
    labels = labels.to(logits.dtype)
    if problem_type == MULTI:
        labels = labels * (1 - label_smoothing) + label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(
            logits, labels, pos_weight=weights, reduction="none"
        )
    else:
        losses = F.mse_loss(logits, labels, reduction="none")
    losses = losses.mean(1)
    return losses if reduction == "none" else losses.mean()


def _misshapen(labels: Tensor, problem_type: str, logits: Tensor) -> str:
    return (
        f"labels of shape {tuple(labels.shape)} are not allowed with problem_type={problem_type} "
        f"and logits of shape {tuple(logits.shape)}"
    )


class Distillation(nn.Module):
    """Learning from another classifier's logits (DeiT, arXiv 2012.12877, section 4).

    Args:
        kind: ``hard`` learns the class that the other gives most, ``soft`` its probabilities.
        weight: part of this in the loss; the rest is the cross-entropy of the labels. The paper's
            are 0.5 (hard) and 0.1 (soft).
        temperature: of both probabilities, for ``soft``; the paper's is 3.
    """

    def __init__(
        self, kind: Literal["soft", "hard"] = "hard", weight: float = 0.5, temperature: float = 3.0
    ):
        super().__init__()
        if kind not in ("soft", "hard"):
            raise ValueError(f"distillation={kind!r} is not allowed: it is soft or hard")
        self.kind = kind
        self.weight = weight
        self.temperature = temperature

    def forward(self, supervised: Tensor, logits: Tensor, guide_logits: Tensor) -> Tensor:
        """Join the loss of the labels with that of the guide.

        Args:
            supervised: scalar, the loss of the labels.
            logits: (b, c), of the head that learns from the guide.
            guide_logits: (b, c), of the guide.

        Returns:
            A scalar.
        """
        if self.kind == "hard":
            guided = F.cross_entropy(logits, guide_logits.argmax(-1))
        else:
            own, wanted = (
                (found.float() / self.temperature).log_softmax(-1)
                for found in (logits, guide_logits)
            )
            guided = self.temperature**2 * F.kl_div(
                own, wanted, log_target=True, reduction="batchmean"
            )
        return (1 - self.weight) * supervised + self.weight * guided


@torch.no_grad()
def label_probability(logits: Tensor, labels: Tensor, problem_type: str = SINGLE) -> Tensor:
    """How sure a model is of each image's label.

    Args:
        logits: (b, c).
        labels: see :func:`label_loss`.

    Returns:
        (b,): the probability of the label, of both labels together for mixed images. With several
        labels per image, the mean of their probabilities; where there is none, the mean
        probability that the classes are not there. In regression 1.
    """
    if problem_type == REGRESSION:
        return logits.new_ones(len(logits))
    if problem_type == MULTI:
        probability, there = logits.sigmoid(), labels > 0
        some = there.any(1)
        probability = torch.where(some[:, None], probability, 1 - probability)
        counted = there | ~some[:, None]
        return (probability * counted).sum(1) / counted.sum(1)
    probability = logits.softmax(-1)
    if labels.ndim == 1:
        return probability.gather(1, labels[:, None]).squeeze(1)
    return (probability * (labels > 0)).sum(1)
