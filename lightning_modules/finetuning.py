"""Finetuning of Vision Transformers with token fusion and token-reduction consistency."""

import math
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lightning_modules.amounts import fusion_text
from lightning_modules.checkpoint_files import check_file
from lightning_modules.classifier import Batch, ImageClassifier
from lightning_modules.distillation import Guide
from lightning_modules.learning_rates import cosine_with_cooldown, parameter_groups
from lightning_modules.lightning_private import has_trainer
from lightning_modules.pretrained import load_or_make
from mctf_hf.checks import check_range
from mctf_hf.classes import check_classes, give_names, has_names, names_of
from mctf_hf.cost import describe, resolve_budget
from mctf_hf.losses import Distillation, TokenReductionConsistency
from mctf_hf.problems import REGRESSION, SINGLE
from mctf_hf.teacher import check_compiled, mix_seed, teacher_amount, teacher_limit
from mctf_hf.torch_private import compile_for_many

LEARNING_RATE = 1.5e-5  # of the paper, for a global batch of 512


class Pass(NamedTuple):
    """Results of one pass over a batch, for the loss.

    Attributes:
        logits: (b, c), logits of the model.
        features: (b, d), input of the head, after the final LayerNorm.
        loss: scalar loss of the labels and, with a guide, of distillation.
    """

    logits: Tensor
    features: Tensor
    loss: Tensor


class MCTFFinetuner(ImageClassifier):
    """Finetunes a Vision Transformer of the Hugging Face Hub with token fusion.

    Each step runs the same weights twice: as student with the full ``r``, and as teacher with an r
    drawn from {0, …, r_max - 1}. The loss pulls the student's class token towards the teacher's
    (MCTF, arXiv 2403.10030, section 3.4). Randomness depends only on seed, step and process.

    Args:
        pretrained: id of a model on the Hugging Face Hub, or a local folder: a ViT, DeiT, DINOv2,
            DINOv3, CLIP or SigLIP, or a model of this library. Unset: train from scratch with
            ``config``.
        config: settings of ``MCTFViTConfig`` for training from scratch.
        num_labels: number of outputs of a new head. Unset: keep the head of the model.
        problem_type: kind of labels: ``single_label_classification`` (cross-entropy),
            ``multi_label_classification`` (binary cross-entropies) or ``regression`` (mean squared
            error). Unset: as in ``pretrained`` if the model keeps its head; for a new head,
            regression if ``num_labels`` is 1, otherwise one label per image.
        image_size: height and width of the images in pixels, or one number for both. Unset: as in
            ``pretrained``. Another size interpolates positions and changes the image processor.
        freeze: train only the head. Other weights stay fixed, without dropout; no teacher is used.
        reduction: method of token reduction: ``mctf``, ``tome``, ``pitome``, ``diffrate``,
            ``evit``, ``token_mergence``, ``none`` or one of your own. Unset (this and the next
            four): as in ``pretrained``. A plain or new model fuses nothing if all five are unset;
            otherwise the unset ones take the defaults of ``MCTFViTConfig``.
        r: tokens that each fusing layer fuses: a count, a fraction, a list with one entry per
            layer, or ``auto:0.56`` for a list that leaves 56% of the multiply-accumulates.
        keep_rate: instead of ``r``, for ``evit`` and ``token_mergence``: fraction of the patch
            tokens that each fusing layer keeps, a list with one per layer, or ``auto:0.56``.
        fusion_layers: zero-based indices of the layers that fuse.
        fusion: further fusion settings by name, such as ``tau_sim`` or ``pooling``.
        r_max: exclusive upper bound of the teacher's r; at most ``r``. 0 trains without a teacher.
            Unset: half of ``r``, or 0 without reduction. For methods with ``keep_rate``, the
            teacher's keep rate is drawn above the student's, unless ``r_max`` is 0.
        teacher_weight: weight of the teacher's label loss.
        consistency_weight: weight of the distance between class tokens.
        confidence_threshold: images count for consistency if the student's probability of their
            label is higher. With several labels per image, this is the mean of their
            probabilities; in regression, all images count.
        label_smoothing: fraction of a label that is spread over all classes; with several labels
            per image, it moves 1 and 0 towards 0.5. Unset: 0.1, or 0 in regression.
        class_weights: weight of each class in the loss, one number each, or ``balanced`` for
            weights inverse to the class frequencies in training. With several labels per image, a
            weight applies to images with the class. The validation loss uses no weights.
        class_metrics: log the accuracy of each class, too. Unset: only for up to 20 classes.
        distill_from: id or folder of a classifier with the same classes, of any architecture. Both
            passes learn from it in addition to the labels. A model with a distillation head learns
            from it with that head, and from the labels with the other (DeiT, arXiv 2012.12877).
        distillation: learn that classifier's top class (``hard``) or its probabilities (``soft``).
        distillation_weight: weight of distillation in the loss, 0 to 1; the labels get the rest.
        distillation_temperature: temperature of the probabilities, for ``soft``.
        drop_path_rate: probability of skipping the last layer's residual branches.
        attn_implementation: how transformers computes attention in layers that do not fuse, such as
            ``sdpa`` (its default) or ``eager``, which trains faster in bfloat16 on CPUs.
        compile: compile the passes of a training step with ``torch.compile``, optionally with
            arguments by name, such as ``mode``. Each fused amount needs a program of its own.
        learning_rate: peak learning rate for a global batch of ``reference_batch_size``; it is
            scaled linearly to the actual global batch.
        reference_batch_size: see ``learning_rate``.
        min_learning_rate: final learning rate of the cosine schedule; not scaled.
        warmup_epochs: epochs of linear warm-up.
        cooldown_epochs: last epochs of the training, at ``min_learning_rate``.
        layer_decay: factor of the learning rate from each layer to the layer before it.
        weight_decay: weight decay of AdamW, except for norms, biases, positions and class token.
        seed: seed of the teacher's r, dropout and drop path.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        num_labels: int | None = None,
        problem_type: Literal[
            "single_label_classification", "multi_label_classification", "regression"
        ]
        | None = None,
        image_size: int | list[int] | None = None,
        freeze: bool = False,
        reduction: str | None = None,
        r: int | float | list[int | float] | str | None = None,
        keep_rate: float | list[int | float] | str | None = None,
        fusion_layers: list[int] | None = None,
        fusion: dict[str, Any] | None = None,
        r_max: int | None = None,
        teacher_weight: float = 1.0,
        consistency_weight: float = 3.0,
        confidence_threshold: float = 0.4,
        label_smoothing: float | None = None,
        class_weights: list[float] | Literal["balanced"] | None = None,
        class_metrics: bool | None = None,
        distill_from: str | None = None,
        distillation: Literal["soft", "hard"] = "hard",
        distillation_weight: float = 0.5,
        distillation_temperature: float = 3.0,
        drop_path_rate: float = 0.0,
        attn_implementation: str | None = None,
        compile: bool | dict[str, Any] = False,
        learning_rate: float = LEARNING_RATE,
        reference_batch_size: int = 512,
        min_learning_rate: float = 1e-6,
        warmup_epochs: float = 0.0,
        cooldown_epochs: float = 0.0,
        layer_decay: float = 1.0,
        weight_decay: float = 0.05,
        seed: int = 0,
    ):
        super().__init__()
        check_range(1, num_labels=num_labels, reference_batch_size=reference_batch_size)
        check_range(0, teacher_weight=teacher_weight, consistency_weight=consistency_weight)
        check_range(0, learning_rate=learning_rate, min_learning_rate=min_learning_rate)
        check_range(0, warmup_epochs=warmup_epochs, cooldown_epochs=cooldown_epochs)
        check_range(0, weight_decay=weight_decay)
        check_range(0, 1, label_smoothing=label_smoothing, layer_decay=layer_decay)
        check_range(0, 1, confidence_threshold=confidence_threshold)
        check_range(0, 1, distillation_weight=distillation_weight)
        check_range(0.01, distillation_temperature=distillation_temperature)
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
        if "r" in budgets:  # placeholder: without an r, a plain model would fuse nothing
            settings["r"] = 0
        self.model, self.image_processor = load_or_make(
            pretrained, config, num_labels, settings, problem=problem_type, image_size=image_size
        )
        if attn_implementation is not None:
            self.model.set_attn_implementation(attn_implementation)
        self.model.train()
        if freeze:
            _check_frozen(
                r_max=(r_max, 0),
                layer_decay=(layer_decay, 1.0),
                drop_path_rate=(drop_path_rate, 0.0),
            )
            r_max = 0
            self.backbone.eval().requires_grad_(False)
        for name, budget in budgets.items():
            setattr(self.model.config, name, resolve_budget(self.model.config, name, budget))
        self.model.config.check_effect({**settings, **budgets})
        self.r_max = teacher_limit(self.model.config, r_max)
        self.problem_type: str = self.model.config.problem_type
        self.num_labels: int = self.model.config.num_labels
        if label_smoothing is None:
            label_smoothing = 0.0 if self.problem_type == REGRESSION else 0.1
        self.loss = TokenReductionConsistency(
            teacher_weight,
            consistency_weight,
            confidence_threshold,
            label_smoothing,
            [1.0] * self.num_labels if class_weights == "balanced" else class_weights,
        )
        self._check_problem(distill_from)
        self.distillation = Distillation(
            distillation, distillation_weight, distillation_temperature
        )
        self._guide: Guide | None = None
        self._new_head = pretrained is not None and num_labels is not None
        self._training_pass: Callable[..., Pass] = self._pass
        self._unchecked: Tensor | float = 0.0  # sum of losses since the last optimizer step
        if compile and self.r_max:
            check_compiled(self.model.config, f"compile={compile!r}", "set r_max to 0 (no teacher)")
        self.prepare_metrics(class_metrics)

    def _check_problem(self, distill_from: str | None) -> None:
        """Raise ValueError for settings that do not fit the head."""
        problem = self.problem_type
        if self.num_labels == 1 and problem != REGRESSION:
            raise ValueError(
                f"num_labels=1 is not allowed with problem_type={problem}: it is at least 2, or "
                "regression is meant"
            )
        self.loss.check(problem, self.num_labels)
        if distill_from is not None and problem != SINGLE:
            raise ValueError(
                f"distill_from={distill_from!r} is not allowed with problem_type={problem}: one "
                "label per image is distilled"
            )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as Lightning does, after a check of the file.

        Raises:
            ValueError: if the file is damaged or not a checkpoint.
        """
        if isinstance(checkpoint_path, str | os.PathLike) and "://" not in str(checkpoint_path):
            check_file(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def configure_model(self) -> None:
        """Shard the weights if the strategy requires it (FSDP2).

        Raises:
            ValueError: for ``compile``, whose full-graph programs cannot fetch shards.
        """
        if not has_trainer(self):  # loaded by load_from_checkpoint
            return
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        if isinstance(self, FSDPModule):
            return
        if self.hparams["compile"]:
            raise ValueError(
                f"compile={self.hparams['compile']!r} is not allowed with weights in shards: "
                "use --trainer.strategy ddp, or leave it out"
            )
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.base_model.fused_layers.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)
        for step in ("training_step", "validation_step", "test_step", "predict_step"):
            register_fsdp_forward_method(self, step)

    def setup(self, stage: str) -> None:
        """Log what will run, and match the model's class names with those of the dataset.

        Raises:
            ValueError: if the dataset or the model of ``distill_from`` has other classes, or has
                them in another order; if the settings of the trainer leave nothing to train.
        """
        config = self.model.config
        for name in ("limit_train_batches", "accumulate_grad_batches"):
            if stage == "fit" and not getattr(self.trainer, name):
                raise ValueError(f"trainer.{name}=0 is not allowed: nothing would be trained")
        rank_zero_info(f"fusion: {fusion_text(config, describe(config))}")
        if stage == "fit":
            weights = [(weight.numel(), weight.requires_grad) for weight in self.model.parameters()]
            trained = sum(count for count, learns in weights if learns)
            rank_zero_info(f"{trained:,} of {sum(n for n, _ in weights):,} weights are trained")
        data = self.trainer.datamodule
        names = getattr(data, "label_names", None)
        if names is not None:
            check_classes(config, names, "the model", "the dataset")
            if stage == "fit" or not has_names(config):
                give_names(config, names)
        if stage == "fit" and self.hparams["class_weights"] == "balanced":
            self.loss.class_weights = _balanced(data, self.problem_type, self.num_labels)
        if stage == "fit" and self.hparams["distill_from"] is not None:
            self._guide = Guide(self.hparams["distill_from"], config, self.image_processor)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_names"] = names_of(self.model.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._new_head = False
        names, config = checkpoint.get("class_names", []), self.model.config
        if len(names) == self.num_labels and not has_names(config):
            give_names(config, names)

    def on_train_start(self) -> None:
        if self.hparams["freeze"]:
            self.backbone.eval()
        if self._new_head and self.hparams["learning_rate"] == LEARNING_RATE:
            rank_zero_warn(
                f"learning_rate={LEARNING_RATE} is for trained heads, and the new head begins with "
                "random weights: try some 100 times as much"
            )
        self._new_head = False

    def on_fit_start(self) -> None:
        if self.hparams["freeze"]:  # otherwise Lightning warns about its evaluation mode
            self.backbone.train()
        if self._guide is not None:
            self._guide.to(self.device)
        chosen = self.hparams["compile"]
        if chosen:
            named = {} if chosen is True else chosen
            options = {"fullgraph": True, "dynamic": False, **named}
            # One program for the student, and one for each r of the teacher.
            self._training_pass = compile_for_many(self._pass, **options)

    def on_fit_end(self) -> None:
        self._guide = None
        self._training_pass = self._pass

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(mix_seed(self.hparams["seed"], self._step(), self.global_rank + 1))

    def _step(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.ready

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch["pixel_values"], batch["labels"]
        embedded = self.model.embed(images)  # shared by both passes
        guide_logits = None if self._guide is None else self._guide(images)
        student = self._training_pass(embedded, labels, guide_logits)
        logged = {"loss": student.loss}
        if self.r_max:
            drawn = self._draw()
            teacher = self._training_pass(embedded, labels, guide_logits, **drawn)
            loss_parts = self.loss(
                student.logits,
                student.features,
                teacher.logits,
                teacher.features,
                labels,
                problem_type=self.problem_type,
                student_loss=student.loss,
                teacher_loss=teacher.loss,
                mean_over_processes=self._mean_over_processes,
            )._asdict()
            logged = {"loss": loss_parts.pop("total"), **loss_parts}
            for name, value in drawn.items():
                amount = max(value) if name == "r" else min(value)
                logged[f"teacher_{name}"] = images.new_full((), amount)
        total = logged["loss"]
        means = self._mean_over_processes(
            torch.stack([v.detach().float() for v in logged.values()])
        )
        self._unchecked = means[0] + self._unchecked
        values = {f"train/{name}": mean for name, mean in zip(logged, means, strict=True)}
        self.log("train/loss", values.pop("train/loss"), prog_bar=True, batch_size=len(labels))
        optimizer: Any = self.optimizers()
        highest = max(group["lr"] for group in optimizer.param_groups)
        values["train/lr"] = means.new_full((), highest)
        self.log_dict(values, batch_size=len(labels))
        self._log_skipped(batch, "train")
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Check the loss of all processes. This waits for the GPU, so it is done late in the step.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        loss, self._unchecked = float(self._unchecked), 0.0
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.global_step} of epoch {self.current_epoch}: "
                "training stops, checkpoints saved so far are untouched"
            )

    def _draw(self) -> dict[str, Any]:
        """Draw how much the teacher fuses in this step; return arguments of the model's call."""
        return teacher_amount(self.model.config, self.r_max, self.hparams["seed"], self._step())

    def _pass(
        self,
        embedded: dict[str, Any],
        labels: Tensor,
        guide_logits: Tensor | None,
        **options: Any,
    ) -> Pass:
        """Run the model on embedded images, and compute the loss of labels and guide."""
        output = self(**embedded, **options)
        logits, features = output.logits, output.features
        by_label = by_guide = logits
        if guide_logits is not None and output.distillation_logits is not None:
            by_label, by_guide = output.label_logits, output.distillation_logits
        loss = self.loss.label_loss(by_label, labels, self.problem_type)
        if guide_logits is not None:
            loss = self.distillation(loss, by_guide, guide_logits)
        return Pass(logits, features, loss)

    def _mean_over_processes(self, value: Tensor) -> Tensor:
        """Mean of a tensor over processes, of the same shape and without gradient."""
        if self.trainer.world_size == 1:
            return value.detach()
        # The strategy's reduce would first make all processes wait for their devices.
        total = value.detach().clone()
        torch.distributed.all_reduce(total)
        return total / self.trainer.world_size

    def check_head(self) -> None:
        """Raise ValueError if the head still has random weights, except in ``fit``."""
        if self._new_head and self.trainer.state.fn != "fit":
            raise ValueError(
                f"num_labels={self.hparams['num_labels']!r} is not allowed without training: it "
                f"gives {self.hparams['pretrained']} a new head, with random weights; leave it out"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        hparams, trainer = self.hparams, self.trainer
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("the schedule needs an end: set trainer.max_epochs or max_steps")
        trainer.fit_loop.setup_data()
        assert trainer.train_dataloader is not None
        accumulated = trainer.accumulate_grad_batches
        global_batch = trainer.train_dataloader.batch_size * trainer.world_size * accumulated
        rate = hparams["learning_rate"] * global_batch / hparams["reference_batch_size"]
        groups = parameter_groups(
            self.model, hparams["weight_decay"], rate, layer_decay=hparams["layer_decay"]
        )
        # Parameters that a callback adds later get this weight decay, too.
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=hparams["weight_decay"])
        steps_per_epoch = math.ceil(trainer.num_training_batches / accumulated)
        warmup, cooldown = (
            round(hparams[f"{phase}_epochs"] * steps_per_epoch) for phase in ("warmup", "cooldown")
        )
        if warmup + cooldown > steps:
            raise ValueError(
                f"warmup_epochs={hparams['warmup_epochs']!r} and cooldown_epochs="
                f"{hparams['cooldown_epochs']!r} are not allowed: together they are longer than "
                f"the training, {steps / steps_per_epoch:g} epochs"
            )
        schedule = cosine_with_cooldown(
            optimizer,
            warmup=warmup,
            decay_until=int(steps) - cooldown,
            lowest=min(hparams["min_learning_rate"] / rate, 1.0) if rate else 1.0,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }


def _check_frozen(**settings: tuple[Any, Any]) -> None:
    """Raise ValueError for settings that have no effect on a frozen model.

    Each setting is a pair: the given value, and the only value allowed beside None.
    """
    for name, (value, nothing) in settings.items():
        if value not in (None, nothing):
            raise ValueError(f"{name}={value!r} has no effect with freeze=True: leave it out")


def _balanced(data: Any, problem: str, num_labels: int) -> list[float]:
    """Class weights inverse to the class frequencies in training.

    With one label per image, the mean weight over images is 1. With several labels, images with and
    without a class get equal total weight. A class that never occurs has the weight 1.
    """
    labels = None if data is None else data.training_labels()
    if labels is None:
        raise ValueError(
            "class_weights='balanced' is not allowed with a stream, or without a data module of "
            "this library: give one number for each class"
        )
    if problem == SINGLE:
        counts = np.bincount(labels, minlength=num_labels)
        weights = len(labels) / np.count_nonzero(counts) / np.maximum(counts, 1)
    else:
        counts = (labels > 0.5).sum(0)
        weights = (len(labels) - counts) / np.maximum(counts, 1)
    return np.where(counts > 0, weights, 1.0).tolist()
