"""What is told of a model's outputs beside the loss, and the accuracy of each class."""

import math
from typing import Any

from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassStatScores,
    MultilabelAveragePrecision,
    MultilabelExactMatch,
    MultilabelF1Score,
    MultilabelStatScores,
)

from mctf_hf.classes import names_of
from mctf_hf.problems import MULTI, REGRESSION, SINGLE, problem_type


def make_metrics(config: Any) -> MetricCollection:
    """What evaluation tells beside the loss, of probabilities or, in regression, values.

    Of one label per image: accuracy, that of the first five, and macro F1. Of several: the part of
    images of which all labels are right at a probability of one half, macro F1, and mean average
    precision. In regression: mean absolute and mean squared error.
    """
    problem, count = problem_type(config), config.num_labels
    metrics: dict[str, Metric | MetricCollection]
    if problem == SINGLE:
        metrics = {"accuracy": MulticlassAccuracy(count, average="micro")}
        if count > 5:
            metrics["accuracy_top5"] = MulticlassAccuracy(count, top_k=5, average="micro")
        metrics["f1_macro"] = MulticlassF1Score(count, average="macro")
    elif problem == MULTI:
        metrics = {
            "accuracy": MultilabelExactMatch(count),
            "f1_macro": MultilabelF1Score(count, average="macro"),
            "mean_average_precision": MultilabelAveragePrecision(count, average="macro"),
        }
    else:
        metrics = {
            "mean_absolute_error": MeanAbsoluteError(),
            "mean_squared_error": MeanSquaredError(),
        }
    return MetricCollection(metrics)


def make_counts(config: Any) -> Metric | None:
    """What tells the accuracy of each class; None in regression."""
    problem, count = problem_type(config), config.num_labels
    if problem == REGRESSION:
        return None
    kind = MulticlassStatScores if problem == SINGLE else MultilabelStatScores
    return kind(count, average="none")


def accuracy_by_class(config: Any, counts: Metric) -> dict[str, float]:
    """Accuracy of each class that has images, over these.

    With several labels per image: of all classes, over all images.
    """
    hit, false, absent, missed, there = counts.compute().double().T  # [classes]
    right = hit / there
    if problem_type(config) == MULTI:
        right = (hit + absent) / (hit + false + absent + missed)
    names = names_of(config)
    unique = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    found = zip(unique, right.tolist(), strict=True)
    return {name: value for name, value in found if not math.isnan(value)}
