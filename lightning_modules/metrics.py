"""Evaluation metrics beside the loss, and the accuracy of each class."""

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
    """Create the metrics. Their inputs are probabilities or, in regression, values.

    One label per image: accuracy, top-5 accuracy if there are more than five classes, and macro F1.
    Several labels: fraction of images with all labels right at a threshold of 0.5, macro F1, and
    mean average precision. Regression: mean absolute and mean squared error.
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
    """Create the metric that :func:`accuracy_by_class` reads; None in regression."""
    problem, count = problem_type(config), config.num_labels
    if problem == REGRESSION:
        return None
    kind = MulticlassStatScores if problem == SINGLE else MultilabelStatScores
    return kind(count, average="none")


def accuracy_by_class(config: Any, counts: Metric) -> dict[str, float]:
    """Accuracy of each class that has images, over the images of the class.

    With several labels per image: accuracy of every class, over all images.
    """
    hit, false, absent, missed, there = counts.compute().double().T  # [classes]
    right = hit / there
    if problem_type(config) == MULTI:
        right = (hit + absent) / (hit + false + absent + missed)
    names = names_of(config)
    unique = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    found = zip(unique, right.tolist(), strict=True)
    return {name: value for name, value in found if not math.isnan(value)}
