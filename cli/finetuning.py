"""``mctf fit``, ``validate``, ``test`` and ``predict``: Lightning's command line on our modules."""

import warnings
from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_modules import (
    BestCheckpoint,
    HFImageDataModule,
    HuggingFaceFolder,
    LastCheckpoint,
    MCTFFinetuner,
    PredictionFile,
)

DESCRIPTION = """Make Vision Transformers faster by fusing tokens (MCTF), and finetune them for it.

Beside the subcommands below: `mctf demo` trains, fuses and finetunes a small model on handwritten
digits, `mctf convert` takes over checkpoints of other libraries, `mctf benchmark` times models side
by side, `mctf benchmark-data` the input pipeline, `mctf visualize` draws what was fused, `mctf
export` writes ONNX and torch.export programs, and `mctf push` puts a model on the Hub. Every
command has its own --help.
"""


class FinetuningCommandLine(LightningCLI):
    """LightningCLI with checkpoints, a Hugging Face folder and a file of predictions built in."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(BestCheckpoint, "best")
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(HuggingFaceFolder, "export")
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

    def _parse_ckpt_path(self) -> None:
        """Leave the settings alone: a checkpoint holds weights and progress, not what to run."""


def finetuning(args: Sequence[str] | None = None) -> None:
    """Run the subcommand that ``args``, or the command line, begins with."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        FinetuningCommandLine(
            MCTFFinetuner,
            HFImageDataModule,
            args=None if args is None else list(args),
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "mctf", "description": DESCRIPTION},
        )
