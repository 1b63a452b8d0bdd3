"""``mctf fit``, ``validate``, ``test`` and ``predict``: Lightning's CLI with our modules."""

import inspect
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from lightning_modules import (
    AveragedWeights,
    BestCheckpoint,
    FusedTokensPicture,
    HFImageDataModule,
    HuggingFaceFolder,
    LastCheckpoint,
    MCTFFinetuner,
    PredictionFile,
    ProgressLines,
    Summary,
    Watch,
    make_loggers,
)
from lightning_modules.checkpoint_files import LAST, PREVIOUS
from lightning_modules.checkpoints import Stopped
from mctf_hf.problems import REGRESSION
from mctf_hf.registry import backbone_of

from .brief_help import BriefHelp
from .commands import FINETUNING
from .lightning_cli_private import OpenCLI
from .options import command
from .parsing import BriefErrors

MONITOR = "val/accuracy"  # default metric of the best checkpoint

# Data settings that a subcommand uses; `fit` uses all except those in OF_OTHERS.
_LOADED = ("batch_size", "eval_batch_size", "num_workers", "on_bad_image")
_LABELLED = ("dataset", "name", "revision", "image_column", "label_column", "streaming", *_LOADED)
USED = {
    "validate": ("train_split", "val_split", "val_fraction", *_LABELLED),
    "test": ("test_split", *_LABELLED),
    "predict": ("predict_folder", *_LOADED),
}
# Settings of the model's own optimizer and schedule.
SCHEDULE = (
    "learning_rate",
    "reference_batch_size",
    "min_learning_rate",
    "warmup_epochs",
    "cooldown_epochs",
    "layer_decay",
    "weight_decay",
)
OF_OTHERS = {"predict_folder", "test_split"}
# Model settings that only `fit` uses, and groups of settings that only one subcommand uses.
TRAINED = {
    *SCHEDULE, "freeze", "r_max", "teacher_weight", "consistency_weight", "confidence_threshold",
    "label_smoothing", "class_weights", "distill_from", "distillation", "distillation_weight",
    "distillation_temperature", "drop_path_rate", "compile",
}  # fmt: skip
GROUPS = {
    **dict.fromkeys(("best", "ema", "export", "picture", "summary"), "fit"),
    "predictions": "predict",
}


class FinetuningParser(BriefErrors, BriefHelp, LightningArgumentParser):
    """Lightning's parser with short error messages and a short help."""


class FinetuningCommandLine(OpenCLI):
    """LightningCLI with built-in checkpoints, loggers, Hugging Face export and predictions."""

    def make_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        kwargs["description"] = f"{FINETUNING[subcommand].capitalize()}."
        parser = super().make_subcommand_parser(klass, subcommand, **kwargs)
        assert isinstance(parser, FinetuningParser)
        parser.add_help_all()
        parser.has_effect = partial(_has_effect, subcommand)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_function_arguments(make_loggers, "log")
        parser.add_lightning_class_args(AveragedWeights, "ema")
        parser.add_lightning_class_args(BestCheckpoint, "best")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(HuggingFaceFolder, "export")
        parser.add_lightning_class_args(FusedTokensPicture, "picture")
        parser.add_lightning_class_args(ProgressLines, "progress")
        parser.add_lightning_class_args(Summary, "summary")
        parser.add_lightning_class_args(PredictionFile, "predictions")
        parser.set_defaults(
            {
                "best.filename": "best-{epoch}-{step}",
                "best.monitor": MONITOR,
                "best.mode": "max",
            }
        )
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    def before_instantiate_classes(self) -> None:
        """Replace ``ckpt_path: last`` by the file, and choose the model of other subcommands.

        The settings of a run describe how ``fit`` makes a model. The other subcommands use
        ``model.pretrained`` unchanged.
        """
        settings = self.config[self.subcommand]
        if self.subcommand != "fit" and settings.model.pretrained is not None:
            settings.model.config = None
            if settings.get("ckpt_path") is None:
                _check_own_head(**settings.model)
                settings.model.num_labels = None
        if self.subcommand == "fit":
            _check_optimizer(settings)
        if settings.get("ckpt_path") == "last":
            folder = settings.last.folder
            if folder is None:
                raise ValueError("ckpt_path='last' needs last.folder: say where last.ckpt lies")
            path = Path(folder, LAST)
            begun = path.exists() or path.with_name(PREVIOUS).exists()
            if not begun:
                rank_zero_info(f"There is no {path} yet: training starts from the beginning")
            settings.ckpt_path = str(path) if begun else None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        if self.config_init[self.subcommand].trainer.logger in (None, True):
            kwargs.setdefault("logger", make_loggers(**self.config[self.subcommand].log))
        return super().instantiate_trainer(**kwargs)

    def make_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> L.Trainer:
        unused = [
            call
            for call in callbacks
            if isinstance(call, AveragedWeights)
            and (call.decay is None or self.subcommand != "fit")
        ]
        lines = [call for call in callbacks if isinstance(call, ProgressLines) and call.writes]
        if self.subcommand == "fit" and lines and config.get("enable_progress_bar") is None:
            config["enable_progress_bar"] = False
        callbacks = [Watch(), *(call for call in callbacks if call not in unused)]
        if self.model.problem_type == REGRESSION:
            callbacks = [self._by_loss(call) for call in callbacks]
        try:
            return super().make_trainer(config, callbacks)
        except TypeError as error:
            if "devices" not in str(error):
                raise
            raise ValueError(
                f"trainer.devices={config.get('devices')!r} is not allowed: {error}"
            ) from error

    def _by_loss(self, call: Callback) -> Callback:
        """For regression: let the best checkpoint monitor the loss instead of the accuracy."""
        if not isinstance(call, BestCheckpoint) or call.monitor != MONITOR:
            return call
        settings = self.config[self.subcommand].best.as_dict()
        return BestCheckpoint(**{**settings, "monitor": "val/loss", "mode": "min"})


def _check_optimizer(settings: Any) -> None:
    """Raise ValueError for SCHEDULE with ``--optimizer``, or for ``--lr_scheduler`` without it."""
    if not settings.get("optimizer"):
        if settings.get("lr_scheduler"):
            raise ValueError("--lr_scheduler is not allowed without --optimizer: it needs one")
        return
    parameters = inspect.signature(MCTFFinetuner).parameters
    unused = [name for name in SCHEDULE if settings.model[name] != parameters[name].default]
    if unused:
        raise ValueError(
            f"{', '.join(f'model.{name}' for name in unused)} is not allowed with --optimizer, "
            "which takes the place of AdamW and its schedule: set --optimizer.lr and the like, or "
            "leave --optimizer out"
        )


def _check_own_head(pretrained: str, num_labels: int | None, **others: Any) -> None:
    """Raise ValueError if ``num_labels`` differs from the model's number of classes."""
    own = backbone_of(pretrained).config.from_pretrained(pretrained).num_labels
    if num_labels not in (None, own):
        raise ValueError(
            f"num_labels={num_labels!r} is not allowed with {pretrained}, which has {own} classes: "
            "a new head has random weights until `mctf fit` trains it"
        )


def finetuning(args: Sequence[str] | None = None, imports: Sequence[str] = ()) -> None:
    """Run the subcommand of ``args``, or of the command line if ``None``.

    Args:
        imports: ``--import`` options, repeated in the printed command that continues a run.

    Raises:
        ValueError: for an option that has no effect in the subcommand.
    """
    words = list(sys.argv[1:] if args is None else args)
    _check_effect(words)
    try:
        FinetuningCommandLine(
            MCTFFinetuner,
            HFImageDataModule,
            args=words,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            # Lightning's table lacks these models' operations; the finetuner logs their weights.
            trainer_defaults={"enable_model_summary": False},
            parser_class=FinetuningParser,
            parser_kwargs={"prog": "mctf"},
        )
    except Stopped as stopped:
        print(f"mctf: {_how_to_go_on(stopped, [*imports, *words])}", file=sys.stderr)
        sys.exit(128 + stopped.signum)  # the exit status after a signal
    except SystemExit as stopped:
        if isinstance(stopped.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def _how_to_go_on(stopped: Stopped, words: Sequence[str]) -> str:
    """Message for a run that was stopped by a signal, with the command that continues it."""
    if stopped.checkpoint is None:
        return f"{stopped.reason}: no state was saved, for no checkpoints are kept"
    kept, rest = [], iter(words)
    for word in rest:
        if word == "--ckpt_path":
            next(rest, None)
        elif not word.startswith("--ckpt_path="):
            kept.append(word)
    go_on = command(*kept, "--ckpt_path", stopped.checkpoint)
    return f"{stopped.reason}, its state is saved. Go on from there with\n{go_on}"


def _check_effect(words: Sequence[str]) -> None:
    """Raise ValueError for an option that has no effect in its subcommand."""
    command = next((word for word in words if word in ("fit", *USED)), None)
    for word in words:
        option = word.partition("=")[0]
        if command is not None and option.startswith("--") and not _has_effect(command, option):
            settings = f"settings of data there are {', '.join(USED.get(command, ()))}"
            raise ValueError(
                f"{option} is not allowed with `mctf {command}`, where it has no effect"
                + (f": {settings}" if option.startswith("--data.") and command in USED else "")
            )


def _has_effect(command: str, option: str) -> bool:
    """Whether an option such as ``--model.r`` has an effect in a subcommand."""
    group, _, name = option.removeprefix("--").partition(".")
    if group == "data" and name in inspect.signature(HFImageDataModule).parameters:
        return name in USED[command] if command in USED else name not in OF_OTHERS
    if group == "model" and name in TRAINED:
        return command == "fit"
    return not name or GROUPS.get(group, command) == command
