"""``mctf fit``, ``validate``, ``test`` and ``predict``: Lightning's command line on our modules."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from cli.parsing import BriefErrors
from lightning_modules import (
    AveragedWeights,
    BestCheckpoint,
    FusedTokensPicture,
    HFImageDataModule,
    HuggingFaceFolder,
    LastCheckpoint,
    MCTFFinetuner,
    PredictionFile,
    Summary,
    Watch,
    make_loggers,
)
from lightning_modules.checkpoint_files import LAST, PREVIOUS

TOLD_TO_STOP = 128 + 15  # the exit status of what SIGTERM ends


class FinetuningParser(BriefErrors, LightningArgumentParser):
    """Lightning's parser with errors of a line or two."""


class FinetuningCommandLine(LightningCLI):
    """LightningCLI with checkpoints, loggers, a Hugging Face folder and predictions built in."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_function_arguments(make_loggers, "log")
        parser.add_lightning_class_args(AveragedWeights, "ema")
        parser.add_lightning_class_args(BestCheckpoint, "best")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(HuggingFaceFolder, "export")
        parser.add_lightning_class_args(FusedTokensPicture, "picture")
        parser.add_lightning_class_args(Summary, "summary")
        parser.add_lightning_class_args(PredictionFile, "predictions")
        parser.set_defaults(
            {
                "best.filename": "best-{epoch}-{step}",
                "best.monitor": "val/accuracy",
                "best.mode": "max",
            }
        )
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint of ``ckpt_path: last``, if there is one by now."""
        settings = self.config[self.subcommand]
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
        if self._get(self.config_init, "trainer").get("logger") in (None, True):
            kwargs.setdefault("logger", make_loggers(**self._get(self.config, "log")))
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> L.Trainer:
        unused = [
            call
            for call in callbacks
            if isinstance(call, AveragedWeights)
            and (call.decay is None or self.subcommand != "fit")
        ]
        callbacks = [Watch(), *(call for call in callbacks if call not in unused)]
        return super()._instantiate_trainer(config, callbacks)

    def _parse_ckpt_path(self) -> None:
        """Leave the settings alone: a checkpoint holds weights and progress, not what to run."""


def finetuning(args: Sequence[str] | None = None) -> None:
    """Run the subcommand that ``args``, or the command line, begins with."""
    try:
        FinetuningCommandLine(
            MCTFFinetuner,
            HFImageDataModule,
            args=None if args is None else list(args),
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            # Its table knows no operations of these models; the finetuner tells their weights.
            trainer_defaults={"enable_model_summary": False},
            parser_class=FinetuningParser,
            parser_kwargs={"prog": "mctf"},
        )
    except SIGTERMException as stopped:
        print(f"mctf: {stopped}", file=sys.stderr)
        sys.exit(TOLD_TO_STOP)
