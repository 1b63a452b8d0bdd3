"""The private methods of Lightning's command line that this library overrides."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from mctf_hf.dependencies import check_names

check_names(
    "lightning",
    {
        "lightning.pytorch.cli.LightningCLI": (
            "_instantiate_trainer",
            "_parse_ckpt_path",
            "_prepare_subcommand_parser",
        )
    },
)


class OpenCLI(LightningCLI):
    """LightningCLI with public methods for its private steps, so that they can be overridden."""

    def make_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def make_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> L.Trainer:
        return super()._instantiate_trainer(config, callbacks)

    def _prepare_subcommand_parser(self, *args: Any, **kwargs: Any) -> LightningArgumentParser:
        return self.make_subcommand_parser(*args, **kwargs)

    def _instantiate_trainer(self, *args: Any) -> L.Trainer:
        return self.make_trainer(*args)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: settings in a checkpoint must not replace those of the command line."""
