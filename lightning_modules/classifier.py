"""An image classifier in Lightning's validation, test and prediction loops."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from lightning_modules.image_task import ImageTask
from lightning_modules.labels import are_counted
from lightning_modules.metrics import accuracy_by_class, make_counts, make_metrics
from mctf_hf.checks import check_scores
from mctf_hf.losses import label_loss
from mctf_hf.problems import REGRESSION, ranked, scores

FEW_CLASSES = 20  # up to this number, the accuracy of each class is logged by default
Batch = dict[str, Any]


class ImageClassifier(L.LightningModule):
    """Lightning module of a Hugging Face classifier, without training.

    Attributes:
        model: image classifier.
        image_processor: the model's image processor.
        problem_type, num_labels: settings of the model's configuration.
        top_k: number of labels per image in prediction.
    """

    model: Any
    image_processor: Any
    problem_type: str
    num_labels: int
    top_k: int = 1

    def prepare_metrics(self, class_metrics: bool | None) -> None:
        """Create the metrics. ``model`` must be set.

        Args:
            class_metrics: measure the accuracy of each class; ``None``: only for up to 20 classes.
        """
        metrics = make_metrics(self.model.config)
        self.val_metrics, self.test_metrics = metrics.clone("val/"), metrics.clone("test/")
        self.val_counts = self.test_counts = None
        if class_metrics or (class_metrics is None and self.num_labels <= FEW_CLASSES):
            self.val_counts, self.test_counts = (make_counts(self.model.config) for _ in range(2))
        # Lightning's own mean over processes rounds the number of images.
        self.val_loss, self.test_loss = (MeanMetric(nan_strategy=math.nan) for _ in range(2))

    def check_head(self) -> None:
        """Raise ValueError if the model is not ready for evaluation or prediction."""

    @property
    def task(self) -> ImageTask:
        """Pixels and labels that the model takes, for the data module."""
        return ImageTask.of(self.model.config, self.image_processor)

    @property
    def backbone(self) -> nn.Module:
        """The model without its heads; Lightning's ``BackboneFinetuning`` uses this name."""
        return self.model.base_model

    def forward(self, pixel_values: Tensor | None = None, **options: Any) -> Any:
        """Classify images, (b, channels, height, width); see ``MCTFViTForImageClassification``."""
        return self.model(pixel_values, output_features=True, **options)

    def on_validation_start(self) -> None:
        self.check_head()

    def on_test_start(self) -> None:
        self.check_head()

    def on_predict_start(self) -> None:
        self.check_head()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics, self.val_loss, self.val_counts)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics, self.test_loss, self.test_counts)

    def _evaluate(
        self,
        batch: Batch,
        stage: str,
        metrics: MetricCollection,
        mean_loss: MeanMetric,
        counts: Metric | None,
    ) -> None:
        logits, labels = self.model(batch["pixel_values"]).logits.float(), batch["labels"]
        counted = are_counted(labels)
        found, wanted = scores(logits, self.model.config)[counted], labels[counted]
        if len(wanted):
            targets = wanted.view_as(found) if self.problem_type == REGRESSION else wanted.long()
            metrics.update(found, targets)
            if counts is not None:
                counts.update(found, targets)
            # Lightning moves metrics, which gives them the dtype of the weights.
            mean_loss.set_dtype(torch.float32)
            mean_loss.update(
                label_loss(logits[counted], wanted, self.problem_type, reduction="none")
            )
        self.log(f"{stage}/loss", mean_loss, batch_size=len(labels))
        self._log_skipped(batch, stage)
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels))

    def on_validation_epoch_end(self) -> None:
        self._check_counted("val", self.val_loss)
        self._log_classes("val", self.val_counts)

    def on_test_epoch_end(self) -> None:
        self._check_counted("test", self.test_loss)
        self._log_classes("test", self.test_counts)

    def _check_counted(self, stage: str, mean_loss: MeanMetric) -> None:
        """Raise ValueError if no process could read any image."""
        if self.trainer.sanity_checking:
            return
        counted = self.trainer.strategy.reduce(mean_loss.weight.clone(), reduce_op="sum")
        if not counted:
            raise ValueError(f"{stage}: none of the images can be read, so nothing is measured")

    def _log_classes(self, stage: str, counts: Metric | None) -> None:
        """Log the accuracy of each class, over all processes."""
        if counts is not None:
            found = accuracy_by_class(self.model.config, counts)
            self.log_dict({f"{stage}/accuracy/{name}": value for name, value in found.items()})
            counts.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Return rows with file, label and score, ``top_k`` for each image; see :func:`ranked`.

        An image that could not be read has one row, with the error and without label and score.
        """
        logits = self.model(batch["pixel_values"]).logits
        check_scores(logits, f"images from {batch['files'][0]} on")
        files, errors = batch["files"], batch.get("errors")
        rows: list[dict[str, Any]] = []
        for i, found in enumerate(ranked(logits, self.model.config, self.top_k)):
            reason = {} if errors is None else {"error": errors[i]}
            if errors is not None and errors[i]:
                rows.append({"file": files[i], "label": None, "score": None} | reason)
                continue
            rows += [{"file": files[i], "label": a, "score": score} | reason for a, score in found]
        return rows

    def _log_skipped(self, batch: Batch, stage: str) -> None:
        """Log the number of rows with unreadable images, over the epoch and all processes."""
        if "skipped" in batch:
            name, skipped = f"{stage}/skipped_images", batch["skipped"].sum().float()
            self.log(name, skipped, on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
