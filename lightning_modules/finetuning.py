"""Finetuning a Vision Transformer with token fusion, by token-reduction consistency."""

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from transformers import ViTImageProcessorPil, get_cosine_with_min_lr_schedule_with_warmup

# Older releases hide the top-level name where torchvision is missing, though this needs none.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mctf_hf import MCTFViTConfig, MCTFViTForImageClassification
from mctf_hf.configuration_mctf import TokensFused, as_pair
from mctf_hf.losses import TokenReductionConsistency

Batch = dict[str, Any]


class MCTFFinetuner(L.LightningModule):
    """Any ViT or DeiT of the Hugging Face Hub, finetuned with token fusion.

    Each step runs the same weights twice, as student with the full ``r`` and as teacher with one
    drawn from {0, …, r_max - 1}, and draws the student's class token to the teacher's (MCTF, arXiv
    2403.10030, section 3.4). Randomness of a step is a function of the seed and the step alone.

    Args:
        pretrained: id of a model on the Hugging Face Hub or a local folder: a ViT, a DeiT or a
            model of this library. Unset: train from scratch with ``config``.
        config: settings of ``MCTFViTConfig`` for training from scratch.
        num_labels: classes of a new head. Unset: keep the head of ``pretrained``.
        reduction: method of token reduction, ``mctf`` or ``none``. Unset, here and in the next
            three: as in ``pretrained``.
        r: tokens that each fusing layer fuses: a count, a fraction, or a list with one per layer.
        fusion_layers: zero-based layers that fuse.
        fusion: further settings of fusion by name, such as ``tau_sim`` or ``pooling``.
        r_max: the teacher's r stays below this; 0 trains without a teacher.
        teacher_weight: weight of the teacher's cross-entropy.
        consistency_weight: weight of the distance of class tokens.
        confidence_threshold: images count for consistency if the student gives their label more.
        label_smoothing: of the cross-entropy.
        drop_path_rate: probability of skipping the last layer's residual branches.
        learning_rate: peak learning rate for a global batch of ``reference_batch_size``; it is
            scaled linearly to the actual global batch.
        reference_batch_size: see ``learning_rate``.
        min_learning_rate: where the cosine schedule ends; not scaled.
        warmup_epochs: epochs of linear warm-up.
        weight_decay: of AdamW; norms, biases, positions and the class token have none.
        seed: of the teacher's r, dropout and drop path.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        num_labels: int | None = None,
        reduction: str | None = None,
        r: int | float | list[int | float] | None = None,
        fusion_layers: list[int] | None = None,
        fusion: dict[str, Any] | None = None,
        r_max: int = 8,
        teacher_weight: float = 1.0,
        consistency_weight: float = 3.0,
        confidence_threshold: float = 0.4,
        label_smoothing: float = 0.1,
        drop_path_rate: float = 0.0,
        learning_rate: float = 1.5e-5,
        reference_batch_size: int = 512,
        min_learning_rate: float = 1e-6,
        warmup_epochs: float = 0.0,
        weight_decay: float = 0.05,
        seed: int = 0,
    ):
        super().__init__()
        if r_max < 0:
            raise ValueError(f"r_max={r_max!r} is not allowed: it is at least 0 (0 for no teacher)")
        self.save_hyperparameters()
        settings = dict(fusion or {}, drop_path_rate=drop_path_rate)
        given = {"reduction": reduction, "r": r, "fusion_layers": fusion_layers}
        settings.update({name: value for name, value in given.items() if value is not None})
        self.model, self.image_processor = _load(pretrained, config, num_labels, settings)
        self.model.train()
        if self.model.config.reduction == "none" and (r or r_max):
            raise ValueError(
                f"r={r!r} and r_max={r_max!r} have no effect with reduction='none', which "
                "pretrained or the settings say: set reduction, or leave r unset and r_max 0"
            )
        self.num_labels: int = self.model.config.num_labels
        self.loss = TokenReductionConsistency(
            teacher_weight, consistency_weight, confidence_threshold, label_smoothing
        )
        metrics = {"accuracy": MulticlassAccuracy(self.num_labels, average="micro")}
        if self.num_labels > 5:
            metrics["accuracy_top5"] = MulticlassAccuracy(self.num_labels, top_k=5, average="micro")
        self.val_metrics = MetricCollection(metrics, prefix="val/")
        self.test_metrics = MetricCollection(metrics, prefix="test/").clone()

    def forward(self, pixel_values: Tensor, r: TokensFused | None = None) -> Any:
        """Classify images, (b, channels, height, width); see ``MCTFViTForImageClassification``."""
        return self.model(pixel_values, r=r, output_fusion=True)

    def setup(self, stage: str) -> None:
        names = getattr(self.trainer.datamodule, "label_names", None)
        if (
            stage == "fit"
            and names is not None
            and len(names) == self.num_labels
            and self._unnamed()
        ):
            self.model.config.id2label = dict(enumerate(names))
            self.model.config.label2id = {name: i for i, name in enumerate(names)}

    def _unnamed(self) -> bool:
        return all(name == f"LABEL_{i}" for i, name in self.model.config.id2label.items())

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(_mix(self.hparams["seed"], self._step(), self.global_rank + 1))

    def _step(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.ready

    def teacher_r(self, step: int) -> int:
        """The teacher's r in a step, the same in every process: uniform in {0, …, r_max - 1}."""
        generator = torch.Generator().manual_seed(_mix(self.hparams["seed"], step, 0))
        return int(torch.randint(self.hparams["r_max"], (), generator=generator))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        labels = batch["labels"]
        student = self(batch["pixel_values"])
        if self.hparams["r_max"]:
            r = self.teacher_r(self._step())
            teacher = self(batch["pixel_values"], r=r)
            loss = self.loss(
                student.logits, student.class_token, teacher.logits, teacher.class_token, labels
            )
            parts = {
                f"train/{name}": value for name, value in loss._asdict().items() if name != "total"
            }
            self.log_dict({**parts, "train/teacher_r": float(r)}, batch_size=len(labels))
            total = loss.total
        else:
            total = F.cross_entropy(
                student.logits, labels, label_smoothing=self.loss.label_smoothing
            )
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"the loss is {total.item()} at step {self.global_step} of epoch "
                f"{self.current_epoch}: training stops, checkpoints saved so far are untouched"
            )
        self.log("train/loss", total, prog_bar=True, batch_size=len(labels))
        self.log("train/lr", self.optimizers().param_groups[0]["lr"], batch_size=len(labels))
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics, "val/loss")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.test_metrics, "test/loss")

    def _evaluate(self, batch: Batch, metrics: MetricCollection, loss_name: str) -> None:
        logits = self.model(batch["pixel_values"]).logits
        size = len(logits)
        metrics.update(logits, batch["labels"])
        self.log(
            loss_name, F.cross_entropy(logits, batch["labels"]), batch_size=size, sync_dist=True
        )
        self.log_dict(metrics, prog_bar=True, batch_size=size)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        scores, indices = self.model(batch["pixel_values"]).logits.softmax(-1).max(-1)
        names = self.model.config.id2label
        return [
            {"file": file, "label": names[index], "score": score}
            for file, index, score in zip(
                batch["files"], indices.tolist(), scores.tolist(), strict=True
            )
        ]

    def configure_optimizers(self) -> dict[str, Any]:
        hparams = self.hparams
        steps = int(self.trainer.estimated_stepping_batches)
        loader = self.trainer.train_dataloader
        global_batch = (
            loader.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        )
        rate = hparams["learning_rate"] * global_batch / hparams["reference_batch_size"]
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, hparams["weight_decay"]), lr=rate
        )
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer,
            num_warmup_steps=round(
                steps * hparams["warmup_epochs"] / (self.trainer.max_epochs or 1)
            ),
            num_training_steps=steps,
            min_lr=min(hparams["min_learning_rate"], rate),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }


def _mix(*numbers: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with and without weight decay.

    Without are vectors (norms, biases) and what the model adds to its input (positions, class,
    distillation and mask tokens).
    """
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name.endswith(
                ("_token", "_tokens", "position_embeddings")
            )
            (no_decay if exempt else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


def _load(
    pretrained: str | None,
    config: dict[str, Any] | None,
    num_labels: int | None,
    settings: dict[str, Any],
) -> tuple[MCTFViTForImageClassification, Any]:
    """The model and its image processor, from a checkpoint or from scratch."""
    labels = {} if num_labels is None else {"num_labels": num_labels}
    if (pretrained is None) == (config is None):
        raise ValueError(
            f"pretrained={pretrained!r} and config={config!r}: set one of them, a checkpoint to "
            "start from or the settings of a model to train from scratch"
        )
    if config is not None:
        model_config = MCTFViTConfig(**{**config, **labels, **settings})
        height, width = as_pair(model_config.image_size)
        processor = ViTImageProcessorPil(size={"height": height, "width": width})
        return MCTFViTForImageClassification(model_config), processor
    processor = AutoImageProcessor.from_pretrained(pretrained, backend="pil")
    model_config = MCTFViTConfig.from_pretrained(pretrained)
    unknown = sorted(name for name in settings if not hasattr(model_config, name))
    if unknown:
        raise ValueError(f"fusion={settings!r} is not allowed: there are no settings {unknown}")
    new_head = num_labels not in (None, model_config.num_labels)
    model, report = MCTFViTForImageClassification.from_pretrained(
        pretrained,
        **labels,
        **settings,
        ignore_mismatched_sizes=new_head,
        output_loading_info=True,
    )
    wrong = [name for name in _weights(report) if not name.startswith("classifier.")]
    if wrong:
        raise ValueError(
            f"{pretrained} does not fit this model: weights missing or of another shape: {wrong}"
        )
    return model, processor


def _weights(report: dict[str, Any]) -> list[str]:
    """Names of the weights that a checkpoint did not fill."""
    mismatched = [key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]]
    return sorted({*report["missing_keys"], *mismatched})
