"""Finetuning a Vision Transformer with token fusion, by token-reduction consistency."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from lightning_modules.pretrained import load_or_make
from mctf_hf import MCTFViTConfig
from mctf_hf.configuration_mctf import KeepRate, TokensFused
from mctf_hf.cost import resolve_budget
from mctf_hf.losses import TokenReductionConsistency, mix_seed, teacher_amount, teacher_limit

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
        num_labels: give the model a new head with so many classes. Unset: keep its own.
        reduction: method of token reduction, ``mctf``, ``tome``, ``evit``, ``token_mergence`` or
            ``none``. Unset, here and in the next four: as ``pretrained`` has it, or the defaults of
            ``MCTFViTConfig`` (``mctf`` with an ``r`` of 16) where it is a plain ViT.
        r: tokens that each fusing layer fuses: a count, a fraction, a list with one per layer, or
            ``auto:0.56`` for the list that leaves 56% of the multiply-accumulates.
        keep_rate: instead of ``r`` with ``evit`` and ``token_mergence``: part of the patch tokens
            that each fusing layer keeps, a list with one per layer, or ``auto:0.56``.
        fusion_layers: zero-based layers that fuse.
        fusion: further settings of fusion by name, such as ``tau_sim`` or ``pooling``.
        r_max: the teacher's r stays below this, which is at most ``r``; 0 trains without a
            teacher. Unset: half of ``r``, and 0 without reduction. Where ``keep_rate`` counts, the
            teacher's is drawn above the student's, unless ``r_max`` is 0.
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
        r: int | float | list[int | float] | str | None = None,
        keep_rate: float | list[int | float] | str | None = None,
        fusion_layers: list[int] | None = None,
        fusion: dict[str, Any] | None = None,
        r_max: int | None = None,
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
        _check_numbers(
            num_labels=(num_labels, 1, math.inf),
            teacher_weight=(teacher_weight, 0, math.inf),
            consistency_weight=(consistency_weight, 0, math.inf),
            confidence_threshold=(confidence_threshold, 0, 1),
            label_smoothing=(label_smoothing, 0, 1),
            learning_rate=(learning_rate, 0, math.inf),
            reference_batch_size=(reference_batch_size, 1, math.inf),
            min_learning_rate=(min_learning_rate, 0, math.inf),
            warmup_epochs=(warmup_epochs, 0, math.inf),
            weight_decay=(weight_decay, 0, math.inf),
        )
        self.save_hyperparameters()
        settings = dict(fusion or {}, drop_path_rate=drop_path_rate)
        given = {
            "reduction": reduction,
            "r": r,
            "keep_rate": keep_rate,
            "fusion_layers": fusion_layers,
        }
        settings.update({name: value for name, value in given.items() if value is not None})
        budgets = {
            name: settings.pop(name)
            for name in ("r", "keep_rate")
            if isinstance(settings.get(name), str)
        }
        if "r" in budgets:  # the method decides what a plain model's default does
            settings["r"] = 0
        self.model, self.image_processor = load_or_make(pretrained, config, num_labels, settings)
        self.model.train()
        for name, budget in budgets.items():
            setattr(self.model.config, name, resolve_budget(self.model.config, name, budget))
        _check_effect(self.model.config, r=r, keep_rate=keep_rate)
        self.r_max = teacher_limit(self.model.config, r_max)
        self.num_labels: int = self.model.config.num_labels
        self.loss = TokenReductionConsistency(
            teacher_weight, consistency_weight, confidence_threshold, label_smoothing
        )
        metrics = {"accuracy": MulticlassAccuracy(self.num_labels, average="micro")}
        if self.num_labels > 5:
            metrics["accuracy_top5"] = MulticlassAccuracy(self.num_labels, top_k=5, average="micro")
        self.val_metrics = MetricCollection(metrics, prefix="val/")
        self.test_metrics = MetricCollection(metrics, prefix="test/").clone()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        r: TokensFused | None = None,
        inputs_embeds: Tensor | None = None,
        keep_rate: KeepRate | None = None,
    ) -> Any:
        """Classify images, (b, channels, height, width); see ``MCTFViTForImageClassification``."""
        return self.model(
            pixel_values, r=r, output_fusion=True, inputs_embeds=inputs_embeds, keep_rate=keep_rate
        )

    def setup(self, stage: str) -> None:
        """Tell what will run, and agree with the dataset on the names of the classes.

        Raises:
            ValueError: if the dataset has the model's classes in another order.
        """
        config = self.model.config
        fused = ", ".join(map(str, config.tokens_fused(config.num_tokens())))
        rank_zero_info(f"reduction={config.reduction}: the layers fuse {fused} tokens")
        names = getattr(self.trainer.datamodule, "label_names", None)
        if names is None or len(names) != self.num_labels:
            return
        check_order(config, names)
        if stage == "fit":
            config.id2label = dict(enumerate(names))
            config.label2id = {name: i for i, name in enumerate(names)}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(mix_seed(self.hparams["seed"], self._step(), self.global_rank + 1))

    def _step(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.ready

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        labels = batch["labels"]
        embedded = self.model.base_model.embeddings(batch["pixel_values"])  # for both passes
        student = self(inputs_embeds=embedded)
        if self.r_max:
            amount = teacher_amount(
                self.model.config, self.r_max, self.hparams["seed"], self._step()
            )
            teacher = self(inputs_embeds=embedded, **amount)
            total, *parts = self.loss(
                student.logits, student.class_token, teacher.logits, teacher.class_token, labels
            )
            names = ("student", "teacher", "consistency", "passing", "confidence")
            self._log_step(dict(zip(names, parts, strict=True)), labels)
            for name, value in amount.items():
                least = min(value) if isinstance(value, list) else value
                self._log_step({f"teacher_{name}": float(least)}, labels)
        else:
            smoothing = self.loss.label_smoothing
            total = F.cross_entropy(student.logits, labels, label_smoothing=smoothing)
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"the loss is {total.item()} at step {self.global_step} of epoch "
                f"{self.current_epoch}: training stops, checkpoints saved so far are untouched"
            )
        self._log_step({"loss": total}, labels, prog_bar=True)
        self._log_skipped(batch, "train")
        self._log_step({"lr": self.optimizers().param_groups[0]["lr"]}, labels)
        return total

    def _log_step(self, values: dict[str, Any], labels: Tensor, prog_bar: bool = False) -> None:
        named = {f"train/{name}": value for name, value in values.items()}
        self.log_dict(named, prog_bar=prog_bar, batch_size=len(labels))

    def _log_skipped(self, batch: Batch, stage: str) -> None:
        """Count the rows whose image could not be read, over the epoch and all processes."""
        if "skipped" in batch:
            name, skipped = f"{stage}/skipped_images", batch["skipped"].sum().float()
            self.log(name, skipped, on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics, "val/loss")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.test_metrics, "test/loss")

    def _evaluate(self, batch: Batch, metrics: MetricCollection, loss_name: str) -> None:
        logits, labels = self.model(batch["pixel_values"]).logits, batch["labels"]
        metrics.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log(loss_name, loss, batch_size=len(labels), sync_dist=True)
        self._log_skipped(batch, loss_name.split("/")[0])
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        scores, indices = self.model(batch["pixel_values"]).logits.softmax(-1).max(-1)
        names = self.model.config.id2label
        found = zip(batch["files"], indices.tolist(), scores.tolist(), strict=True)
        return [
            {"file": file, "label": names[index], "score": score} for file, index, score in found
        ]

    def configure_optimizers(self) -> dict[str, Any]:
        hparams, trainer = self.hparams, self.trainer
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("the schedule needs an end: set trainer.max_epochs or max_steps")
        trainer.fit_loop.setup_data()
        accumulated = trainer.accumulate_grad_batches
        global_batch = trainer.train_dataloader.batch_size * trainer.world_size * accumulated
        rate = hparams["learning_rate"] * global_batch / hparams["reference_batch_size"]
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, hparams["weight_decay"]), lr=rate
        )
        steps_per_epoch = math.ceil(trainer.num_training_batches / accumulated)
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer,
            num_warmup_steps=round(hparams["warmup_epochs"] * steps_per_epoch),
            num_training_steps=int(steps),
            min_lr=min(hparams["min_learning_rate"], rate),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with and without weight decay.

    Without are vectors (norms, biases) and what the model adds to its input (positions, class,
    distillation and mask tokens).
    """
    added = ("_token", "_tokens", "position_embeddings")
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name.endswith(added)
            (no_decay if exempt else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


def _check_numbers(**settings: tuple[float | None, float, float]) -> None:
    """Raise ValueError for the first (value, low, high) out of its range; None is in any."""
    for name, (value, low, high) in settings.items():
        if value is not None and not low <= value <= high:
            limit = f" and at most {high}" if math.isfinite(high) else ""
            raise ValueError(f"{name}={value!r} is not allowed: it is at least {low}{limit}")


def _check_effect(config: MCTFViTConfig, **given: Any) -> None:
    """Raise ValueError for an amount that the method does not go by."""
    amount = None if config.reducer_class is None else config.reducer_class.amount
    nothing = {"r": 0, "keep_rate": 1}
    for name, value in given.items():
        if value not in (None, nothing[name]) and name != amount:
            raise ValueError(
                f"{name}={value!r} has no effect with reduction={config.reduction!r}, which "
                f"pretrained or the settings say: set reduction, or leave {name} unset"
            )


def check_order(config: MCTFViTConfig, names: list[str]) -> None:
    """Raise ValueError if a dataset has the model's classes, but in another order."""
    own = [config.id2label[i] for i in range(config.num_labels)]
    if own != names and sorted(own) == sorted(names):
        raise ValueError(
            f"the dataset's classes {names} are the model's {own} in another order: reorder "
            "them (datasets' align_labels_with_mapping), or set num_labels for a new head"
        )
