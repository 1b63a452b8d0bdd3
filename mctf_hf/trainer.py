"""Token-reduction consistency for training with transformers' ``Trainer``."""

import json
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import Trainer

from .checks import check_weights
from .files import write_text
from .losses import TokenReductionConsistency
from .model_folder import TRAINING
from .problems import SINGLE, problem_type, settle_problem_type
from .teacher import check_compiled, r_max_of, teacher_amount, teacher_limit
from .torch_private import many_programs


class ConsistencyTrainer(Trainer):
    """A ``Trainer`` that runs the model twice per training step, with much and with little fusion.

    MCTF (arXiv 2403.10030), section 3.4. Everything else, such as evaluation, saving and
    ``accelerate launch``, works as in ``Trainer``. Datasets yield ``pixel_values`` and ``labels``,
    of the configuration's ``problem_type``; if unset, it is found as in transformers' losses.

    Args:
        args, kwargs: arguments of ``Trainer``; the model is an image classifier of this library.
        loss: loss that combines the two passes. Unset: the default weights, and the label smoothing
            of ``TrainingArguments``.
        r_max: exclusive limit of the teacher's r, which is drawn from {0, …, r_max - 1} in each
            step, the same in every process. Unset: half of the most that a layer of the model
            fuses. Leave it unset for a method with ``keep_rate``.

    Raises:
        ValueError: if the teacher could fuse more than the student, the model fuses nothing,
            ``compute_loss_func`` is set, or a setting is not allowed or has no effect with the
            model's ``problem_type`` or method.
    """

    def __init__(
        self,
        *args: Any,
        loss: TokenReductionConsistency | None = None,
        r_max: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func is not allowed: the objective is this class's own, set by loss"
            )
        if not math.isfinite(self.args.learning_rate):
            raise ValueError(f"learning_rate={self.args.learning_rate!r} is not allowed: no number")
        smoothing = self.args.label_smoothing_factor
        self.consistency = loss or TokenReductionConsistency(label_smoothing=smoothing)
        config = self.accelerator.unwrap_model(self.model).config
        self._check(config, problem_type(config))
        self.r_max = teacher_limit(config, r_max)
        if not self.r_max:
            raise ValueError(
                f"r_max={r_max!r}: without a teacher there is no consistency. Choose an r of the "
                "model and an r_max that are above 0 (a keep_rate below 1 and no r_max), or use "
                "transformers' Trainer"
            )
        # The loss is a mean over the images of one batch, also with gradient accumulation.
        self.model_accepts_loss_kwargs = False
        if self.args.torch_compile:
            check_compiled(config, "torch_compile=True", "use transformers' Trainer")
            # Dynamic shapes take many times as long to compile.
            self.accelerator.state.dynamo_plugin.dynamic = False

    def _check(self, config: Any, problem: str) -> None:
        """Raise ValueError for settings that a head of this problem type cannot use."""
        self.consistency.check(problem, config.num_labels)
        if self.args.label_smoothing_factor and problem != SINGLE:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor!r} is not allowed with "
                f"problem_type={problem}: in evaluation, the Trainer smooths one label per image "
                "(loss=TokenReductionConsistency(label_smoothing=…) smooths several in training)"
            )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The consistency objective in training, the ``Trainer``'s own loss in evaluation.

        Raises:
            FloatingPointError: for a training loss that is not finite.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        images, labels = inputs["pixel_values"], inputs["labels"]
        config = self.accelerator.unwrap_model(model).config
        if config.problem_type is None:
            self._check(config, settle_problem_type(config, labels))
        amount = teacher_amount(config, self.r_max, self.args.seed, self.state.global_step)
        student = model(images, output_features=True)
        teacher = model(images, **amount, output_features=True)
        losses = self.consistency(
            student.logits,
            student.features,
            teacher.logits,
            teacher.features,
            labels,
            problem_type=config.problem_type,
            mean_over_processes=lambda value: self.accelerator.reduce(value, "mean"),
        )
        total = losses.total.item()
        if not math.isfinite(total):
            raise FloatingPointError(
                f"the loss is {total} at step {self.state.global_step}: training stops, "
                "checkpoints saved so far are untouched"
            )
        return (losses.total, student) if return_outputs else losses.total

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._compiling():
            return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._compiling():
            return super().prediction_step(*args, **kwargs)

    def _compiling(self) -> AbstractContextManager:
        """Allow one program for each r of student and teacher, and for whole and last batches."""
        return many_programs() if self.args.torch_compile else nullcontext()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as every ``Trainer`` does, with a record of the training.

        Raises:
            ValueError: for weights that are not finite.
        """
        model = self.accelerator.unwrap_model(self.model)
        check_weights(model, "the model")
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            limit = r_max_of(model.config, self.r_max)
            record: dict[str, Any] = {} if limit is None else {"r_max": limit}
            record |= {
                "teacher_weight": self.consistency.teacher_weight,
                "consistency_weight": self.consistency.consistency_weight,
                "confidence_threshold": self.consistency.confidence_threshold,
                "label_smoothing": self.consistency.label_smoothing,
                "class_weights": self.consistency.class_weights,
                "learning_rate": self.args.learning_rate,
                "lr_scheduler_type": str(self.args.lr_scheduler_type),
                "weight_decay": self.args.weight_decay,
                "global_batch_size": self.args.train_batch_size
                * self.args.gradient_accumulation_steps
                * self.args.world_size,
                "epochs": self.state.epoch,
                "steps": self.state.global_step,
                "seed": self.args.seed,
                "transformers": transformers.__version__,
            }
            folder = output_dir or self.args.output_dir
            write_text(Path(str(folder), TRAINING), json.dumps(record, indent=2) + "\n")
