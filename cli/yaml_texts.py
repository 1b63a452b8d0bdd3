"""YAML texts of settings, with a limit on what their aliases expand to."""

from contextlib import suppress
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

# Maximum number of values in a text after its aliases are expanded.
VALUES = 10_000


def check_aliases(text: str) -> None:
    """Check how many values a YAML text has after its aliases are expanded.

    Raises:
        ValueError: for more than ``VALUES`` values, or an alias that contains itself.
        yaml.YAMLError: if the text is not valid YAML.
    """
    if "*" not in text:
        return
    anchors: dict[str, int | None] = {}  # number of values of each; None while its node is open
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    anchor: str | None
    size: int | None
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 0))
            if event.anchor:
                anchors[event.anchor] = None
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, inside = open_nodes.pop()
            size = inside + 1
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            anchor, size = None, anchors.get(event.anchor, 0)
        else:
            continue
        if anchor:
            anchors[anchor] = size
        parent, total = open_nodes[-1]
        if size is None or total + size > VALUES:
            amount = "themselves" if size is None else f"more than {VALUES:,} values"
            raise ValueError(f"the YAML is refused: its aliases (*) stand for {amount}")
        open_nodes[-1] = parent, total + size


def load_yaml(text: str) -> Any:
    """Load a YAML text after :func:`check_aliases`."""
    check_aliases(text)
    return yaml.safe_load(text)


_load = get_loader("yaml")


def _checked(text: str, path: str = "") -> Any:
    try:
        check_aliases(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from error
    return _load(text)


def guard() -> None:
    """Make jsonargparse check the aliases of the YAML texts that it reads."""
    set_loader("yaml", _checked, exceptions=(yaml.YAMLError,))


def check_words(words: Any) -> None:
    """Check the aliases in those words of a command that are YAML."""
    for word in words if isinstance(words, (list, tuple)) else ():
        if isinstance(word, str) and "&" in word:
            with suppress(yaml.YAMLError):
                check_aliases(word.partition("=")[2] if word.startswith("--") else word)
                check_aliases(word)
