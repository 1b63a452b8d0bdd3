"""The console command ``mctf``: one command line for everything the library does."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from cli.demo import demo
from lightning_modules import (
    HFImageDataModule,
    HuggingFaceFolder,
    MCTFFinetuner,
    PredictionFile,
)

# Commands beside those of LightningCLI: each is a function whose arguments are its options.
COMMANDS: dict[str, Callable[..., Any]] = {"demo": demo}

DESCRIPTION = """Make Vision Transformers faster by fusing tokens (MCTF), and finetune them for it.

Also: `mctf demo` trains, fuses and finetunes a small model on handwritten digits.
Every command has its own --help.
"""


class MCTFCommandLine(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ModelCheckpoint, "best")
        parser.add_lightning_class_args(ModelCheckpoint, "last")
        parser.add_lightning_class_args(HuggingFaceFolder, "export")
        parser.add_lightning_class_args(PredictionFile, "predictions")
        parser.set_defaults(
            {
                "best.filename": "best-{epoch}-{step}",
                "best.monitor": "val/accuracy",
                "best.mode": "max",
                "last.filename": "last",
                "last.every_n_train_steps": 100,
                "last.save_on_train_epoch_end": True,
                "last.enable_version_counter": False,
            }
        )
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)


def _message(error: BaseException) -> str:
    """The error's own words, without the traceback that a data loading worker adds."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught "):
        return lines[-1].partition(": ")[2]
    return str(error)


def main(args: Sequence[str] | None = None) -> None:
    """Run ``mctf`` with the given words, or those of the command line.

    What a user can mend (a setting, a file, a dataset) is reported in a line, with exit status 1;
    ``MCTF_DEBUG=1`` shows where it was raised.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        if words and words[0] in COMMANDS:
            auto_cli(COMMANDS[words[0]], args=words[1:], prog=f"mctf {words[0]}")
            return
        MCTFCommandLine(
            MCTFFinetuner,
            HFImageDataModule,
            args=None if args is None else words,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "mctf", "description": DESCRIPTION},
        )
    except (ValueError, OSError, FloatingPointError, StrictDataclassError) as error:
        if os.environ.get("MCTF_DEBUG"):
            raise
        print(f"mctf: error: {_message(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
