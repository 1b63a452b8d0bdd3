"""Models named on the command line with fusion settings: ``my/model,r=8,tau_info=10``."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.processors import settle_size
from mctf_hf.configuration_mctf import EncoderConfigMixin
from mctf_hf.cost import resolve_budget
from mctf_hf.hub import load_image_processor
from mctf_hf.loading import load_pretrained
from mctf_hf.registry import (
    BACKBONES,
    backbone_of,
    backbone_of_type,
    class_of,
    settings_for,
    stored_config,
    types_of,
)
from mctf_hf.registry import FUSION_SETTINGS as FUSION

from .commands import nearest
from .yaml_texts import load_yaml


def parse(words: str, more: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """Split ``NAME[,setting=value…]``; a setting without a value is true.

    Args:
        more: allowed settings besides the fusion settings.

    Raises:
        ValueError: for an unknown or repeated setting, an empty name, or an invalid value.
    """
    name, *pairs = re.split(r",(?![^\[(]*[\])])", words)  # except at commas inside of brackets
    if not name:
        raise ValueError(f"{words!r} names no model: it must be NAME[,setting=value…]")
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        allowed = (*FUSION, *more)
        if key not in allowed:
            near = nearest(key, allowed)
            raise ValueError(
                f"setting {key!r} of {words!r} is not known"
                + (f", did you mean {near!r}?" if near else "")
                + f": it must be one of {', '.join(allowed)}"
            )
        if key in settings:
            raise ValueError(f"setting {key!r} of {words!r} is given twice")
        settings[key] = _value(key, value) if equals else True
    return name, settings


def _value(key: str, text: str) -> Any:
    in_brackets = text[:1] + text[-1:] == "()"
    try:
        value = load_yaml(f"[{text[1:-1]}]" if in_brackets else text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{key}={text!r} is not allowed: it must be a number, a word, or a list such as [8, 4, "
            "0]"
        ) from error
    return tuple(value) if in_brackets else value


def captions_of(models: Sequence[str]) -> list[str]:
    """Captions of models: all words, or only the settings if all have the same name."""
    parts = [words.partition(",") for words in models]
    if len({name for name, _, _ in parts}) > 1:
        return list(models)
    return [settings or Path(name).name for name, _, settings in parts]


def resolve(
    config: EncoderConfigMixin, settings: dict[str, Any], image_size: int | None = None
) -> dict[str, Any]:
    """The settings, with numbers instead of an ``r`` or ``keep_rate`` such as ``auto:0.56``.

    Raises:
        ValueError: for a setting that the model does not have, or a value that is not allowed.
    """
    config.check_known(settings)
    budgets = {
        key: settings[key] for key in ("r", "keep_rate") if isinstance(settings.get(key), str)
    }
    if not budgets:
        return settings
    without: Any = copy.deepcopy(config)
    without.r = 0
    for key, value in settings.items():
        if key not in budgets:
            setattr(without, key, value)
    without.validate()
    resolved = {
        key: resolve_budget(without, key, value, image_size=image_size)
        for key, value in budgets.items()
    }
    return settings | resolved


def load(words: str) -> tuple[Any, Any]:
    """Load a model for inference and its image processor, from ``NAME[,setting=value…]``.

    Args:
        words: NAME is a local folder or Hub id of a model of this library or of a plain model. A
            plain model fuses nothing unless a fusion setting is given.

    Raises:
        ValueError: for an unknown setting, a value that is not allowed, or weights that do not
            exactly fit the model.
        OSError: if there is no such model, or no image processor.
    """
    name, settings = parse(words)
    return _load(name, settings, class_of(name))


def load_encoder(words: str) -> tuple[Any, Any]:
    """Like :func:`load`, but a ViT that was saved without a head is loaded as an encoder.

    Raises:
        ValueError, OSError: see :func:`load`; ValueError also for a model that is not for images.
    """
    name, settings = parse(words)
    stored = stored_config(name)
    kind = str(stored.get("model_type"))
    entry = backbone_of_type(kind)
    if entry is None:
        known = dict.fromkeys(k for one in BACKBONES.values() for k in types_of(one))
        raise ValueError(
            f"{name} is a model of type {kind!r}, which makes no vectors of images here: known "
            f"types are {', '.join(known)}"
        )
    saved_as = next(iter(stored.get("architectures") or ()), "Classification")
    headless = entry.classifies and "Classification" not in saved_as
    return _load(name, settings, entry.model if headless else class_of(name))


def _load(name: str, settings: dict[str, Any], model_class: type[Any]) -> tuple[Any, Any]:
    config = backbone_of(name).config.from_pretrained(name)
    processor = load_image_processor(name)
    size = settle_size(config, processor)
    settings = resolve(config, settings_for(name, settings))
    model = load_pretrained(name, model_class, **settings, **size)
    model.config.check_effect(settings)
    return model, processor
