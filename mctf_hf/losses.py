"""Losses for finetuning a model with fusion: token-reduction consistency and distillation."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .problems import MULTI, REGRESSION, SINGLE


class ConsistencyLoss(NamedTuple):
    """The total loss and its parts, each a scalar tensor.

    Attributes:
        total: student + teacher_weight * teacher + consistency_weight * consistency.
        student: label loss of the pass that fuses most.
        teacher: label loss of the pass that fuses less.
        consistency: mean squared distance between the features of the two passes, over the images
            that count for consistency.
        passing: fraction of the images that count for consistency.
        confidence: mean :func:`label_probability` of the student.
    """

    total: Tensor
    student: Tensor
    teacher: Tensor
    consistency: Tensor
    passing: Tensor
    confidence: Tensor


class TokenReductionConsistency(nn.Module):
    """Loss of two passes with the same weights: one fuses much (student), one little (teacher).

    MCTF (arXiv 2403.10030), section 3.4. The loss pulls the student's class token towards the
    teacher's, for images whose label the student gives more than ``confidence_threshold``.

    Args:
        teacher_weight: weight of the teacher's label loss.
        consistency_weight: weight of the distance between class tokens.
        confidence_threshold: images count for consistency if :func:`label_probability` is above it.
            In regression, which has no probability, all images count.
        label_smoothing: label smoothing of both label losses, see :func:`label_loss`.
        class_weights: class weights of both label losses, see :func:`label_loss`.
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
        """Raise ValueError for settings that a head of this kind cannot use."""
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
                    f"class_weights={list(weights)!r} is not allowed: it must be one number of at "
                    f"least 0 for each of {num_labels} classes, not all 0"
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
            student_features, teacher_features: (b, d), input of the head.
            labels: see :func:`label_loss`.
            problem_type: kind of labels, as in ``config.problem_type``.
            student_loss, teacher_loss: scalars that replace the label losses.
            mean_over_processes: function that averages a scalar over all training processes. The
                consistency, averaged over processes like gradients, is then the mean over all
                images that count in all processes, not a mean of means.
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
        total = student_loss + self.teacher_weight * teacher_loss
        return ConsistencyLoss(
            total=total + self.consistency_weight * consistency,
            student=student_loss,
            teacher=teacher_loss,
            consistency=consistency,
            passing=passing.float().mean(),
            confidence=confidence.mean(),
        )

    def label_loss(self, logits: Tensor, labels: Tensor, problem_type: str = SINGLE) -> Tensor:
        """:func:`label_loss` with the settings of this loss, mean over images: a scalar."""
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
    """Loss of logits for labels, as transformers defines it for each ``problem_type``.

    Args:
        logits: (b, c).
        labels: with one label per image, (b,) int64, -100 for none, or (b, c) probabilities,
            positive for an image's labels; with several labels per image, (b, c), 1 or 0; in
            regression, (b, c), or (b,) for one value.
        problem_type: one label per image gives the cross-entropy, several labels the mean binary
            cross-entropy, regression the mean squared error.
        label_smoothing: fraction of a label that is spread over all classes; with several labels
            per image, fraction of the distance by which 1 and 0 move towards 0.5.
        class_weights: weight of each class; with several labels per image, only of present classes.
        reduction: ``mean`` over images (weighted, for one label per image), or ``none``.

    Returns:
        A scalar, or (b,) without reduction.

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
    """Learning from another classifier, the guide (DeiT, arXiv 2012.12877, section 4).

    Args:
        kind: ``hard`` learns the most probable class of the guide, ``soft`` its probabilities.
        weight: weight of the distillation loss, w; the label loss has the weight 1 - w. The paper
            uses 0.5 (hard) and 0.1 (soft).
        temperature: temperature of both softmaxes, for ``soft``; the paper uses 3.
    """

    def __init__(
        self, kind: Literal["soft", "hard"] = "hard", weight: float = 0.5, temperature: float = 3.0
    ):
        super().__init__()
        if kind not in ("soft", "hard"):
            raise ValueError(f"distillation={kind!r} is not allowed: it must be soft or hard")
        self.kind = kind
        self.weight = weight
        self.temperature = temperature

    def forward(self, supervised: Tensor, logits: Tensor, guide_logits: Tensor) -> Tensor:
        """Combine the label loss with the distillation loss.

        Args:
            supervised: scalar, the label loss.
            logits: (b, c), logits of the head that learns from the guide.
            guide_logits: (b, c), logits of the guide.

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
    """Probability that a model gives to each image's label.

    Args:
        logits: (b, c).
        labels: see :func:`label_loss`.

    Returns:
        (b,): probability of the label, or of both labels together for mixed images; 0 for an image
        whose label is -100. With several
        labels per image, the mean of their probabilities; for an image without labels, the mean
        probability that a class is absent. In regression 1.
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
        there = labels >= 0
        return probability.gather(1, labels.clamp(min=0)[:, None]).squeeze(1) * there
    return (probability * (labels > 0)).sum(1)
