"""Short help of ``mctf fit`` and similar commands, and ``--help_all`` for all settings."""

import argparse
import copy
from collections.abc import Callable
from typing import Any

from .argparse_private import actions_chosen

ALL = "--help_all"
# The most used settings, in the order of the help; a subcommand shows those that affect it.
FIRST = (
    "help",
    "config",
    "model.pretrained",
    "model.num_labels",
    "model.r",
    "model.keep_rate",
    "model.r_max",
    "model.learning_rate",
    "model.freeze",
    "data.dataset",
    "data.image_column",
    "data.label_column",
    "data.val_split",
    "data.test_split",
    "data.batch_size",
    "data.num_workers",
    "data.crop",
    "data.flip",
    "data.rand_augment",
    "data.streaming",
    "data.predict_folder",
    "trainer.max_epochs",
    "trainer.devices",
    "trainer.precision",
    "log.folder",
    "ema.decay",
    "export.folder",
    "predictions.path",
    "predictions.top_k",
    "ckpt_path",
)
# Help texts that replace the long ones of Lightning.
WORDS = {
    "trainer.max_epochs": "epochs to train for",
    "trainer.devices": "number of devices to use, or a list of their numbers",
    "trainer.precision": "type of numbers: 32-true, bf16-mixed, 16-mixed and others",
    "ckpt_path": "checkpoint of a run, to go on from or to measure; last is that of last.folder",
}


class HelpAll(argparse.Action):
    """The option ``--help_all``: prints the help with all settings."""

    def __init__(self, option_strings: Any, dest: str = argparse.SUPPRESS, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, *args: Any) -> None:
        print(parser.format_help(brief=False), end="")
        parser.exit()


class BriefHelp:
    """Mixin for a parser with many settings: its help lists only those in :data:`FIRST`.

    Attributes:
        has_effect: function that returns whether an option such as ``--model.r`` has an effect.
        whole_help: option that prints all settings.
    """

    usage: str | None
    epilog: str | None
    has_effect: Callable[[str], bool] | None = None
    whole_help = ALL

    def add_help_all(self: Any) -> None:
        """Add the option ``--help_all``."""
        self.add_argument(ALL, "--help-all", action=HelpAll, help="show all settings and exit")

    def format_help(self: Any, *args: Any, brief: bool = True) -> str:
        whole = super().format_help  # type: ignore[misc]
        if not brief or self.has_effect is None:
            return whole(*args)
        command = self.prog.replace(" [options]", "")
        kept = self.usage, self.epilog
        self.usage = f"{command} [--config FILE] [--SETTING VALUE …]"
        self.epilog = f"The most used settings; `{command} {ALL}` shows all of them."
        try:
            with actions_chosen(self, self._first, _rank):
                return whole(*args)
        finally:
            self.usage, self.epilog = kept

    def _is_first(self: Any, action: argparse.Action) -> bool:
        if isinstance(action, HelpAll):
            return True
        return action.dest in FIRST and all(map(self.has_effect, action.option_strings))

    def _first(self: Any, actions: list[argparse.Action]) -> list[argparse.Action]:
        """The actions in :data:`FIRST`, in its order, with the help texts of :data:`WORDS`."""
        found = [copy.copy(action) for action in actions if self._is_first(action)]
        for action in found:
            action.help = WORDS.get(action.dest, action.help)
        return sorted(found, key=_rank)


def _rank(action: argparse.Action) -> int:
    return FIRST.index(action.dest) if action.dest in FIRST else 0
