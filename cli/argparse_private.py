"""The private parts of argparse that the command line uses."""

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mctf_hf.dependencies import check_names

check_names(
    "Python",
    {
        "argparse._ActionsContainer": ("_action_groups", "_actions"),
        "argparse._ArgumentGroup": ("_group_actions",),
    },
)


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """All option strings of a parser, such as ``--output``."""
    return [option for action in parser._actions for option in action.option_strings]


@contextmanager
def actions_chosen(
    parser: argparse.ArgumentParser,
    choose: Callable[[list[argparse.Action]], list[argparse.Action]],
    rank: Callable[[argparse.Action], Any],
) -> Iterator[None]:
    """Limit a parser to some of its actions inside a ``with`` block.

    Args:
        choose: function that selects and orders a list of actions.
        rank: sort key of a group, computed from its first action.
    """
    own = parser._actions, parser._action_groups
    groups = [copy.copy(group) for group in parser._action_groups]
    for group in groups:
        group._group_actions = choose(group._group_actions)
    parser._actions = choose(parser._actions)
    parser._action_groups = sorted(
        (group for group in groups if group._group_actions),
        key=lambda group: rank(group._group_actions[0]),
    )
    try:
        yield
    finally:
        parser._actions, parser._action_groups = own
