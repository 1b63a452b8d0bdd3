"""Models that ``mctf benchmark`` compares, made from words such as ``deit_s,r=16,compile``."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from lightning_modules.processors import settle_size
from mctf_hf.checks import check_weights
from mctf_hf.configuration_mctf import as_pair, check_exists
from mctf_hf.cost import counted, describe, multiply_accumulates
from mctf_hf.export import FirstOutput, compile_ahead, load
from mctf_hf.files import check_indexes
from mctf_hf.hub import HUB_ID, load_image_processor
from mctf_hf.presets import PRESETS, preset, preset_class
from mctf_hf.reducers import build_reducer
from mctf_hf.registry import (
    BACKBONES,
    class_of,
    only_if_asked,
    plain_class,
    plain_config,
    settings_for,
)

from .commands import nearest
from .models import parse, resolve
from .sliced import slice_tokens

SETTINGS = ("attn_implementation", "aot", "compile", "slice", "sliced")


@dataclass
class Contestant:
    """A model to time.

    Attributes:
        name: the words that it was made from.
        model: takes images, (b, channels, height, width); a classifier returns logits.
        multiply_accumulates: multiply-accumulates of one image.
        image_size: height and width of its images in pixels.
        folder: folder or Hub id of the weights; ``None`` for random weights.
        missing: names of the weights that the checkpoint lacks, which are random.
    """

    name: str
    model: "Classifier"
    multiply_accumulates: int
    image_size: int
    folder: str | None = None
    missing: tuple[str, ...] = ()


def make(words: str, image_size: int | None, dtype: torch.dtype, device: str) -> Contestant:
    """Make a model from ``NAME[,setting=value…]``.

    Args:
        words: NAME is a preset, a local folder or an id on the Hub. Without fusion settings, a
            preset or a plain checkpoint is the plain model of transformers, if there is one. All
            others are models of this library. ``compile`` compiles the model, ``aot`` compiles it
            ahead of time, ``slice=16`` feeds it 16 images at a time. ``sliced`` is the plain model
            with tokens cut off instead of fused: an upper bound on the speed.
        image_size: height and width in pixels; ``None`` for the model's own.

    Raises:
        ValueError: for an unknown name or setting, or a value that is not allowed.
    """
    name, settings = parse(words, SETTINGS)
    compiled, slice_size = settings.pop("compile", False), settings.pop("slice", None)
    ahead, sliced = settings.pop("aot", False), settings.pop("sliced", False)
    for key, value in {"aot": ahead, "sliced": sliced}.items():
        if not isinstance(value, bool):
            raise ValueError(f"{key}={value!r} of {words!r} is not allowed: it takes no value")
    if compiled and ahead:
        raise ValueError(f"compile and aot of {words!r} are not allowed together")
    if slice_size is not None and (
        slice_size is True or not isinstance(slice_size, int) or slice_size < 1
    ):
        raise ValueError(
            f"slice={slice_size!r} of {words!r} is not allowed: it must be a count of images"
        )
    attention = {k: settings.pop(k) for k in ("attn_implementation",) if k in settings}
    missing: tuple[str, ...] = ()
    if name in PRESETS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, config, cost = _from_preset(name, settings, attention, image_size)
    elif Path(name).is_dir() or HUB_ID.fullmatch(name):
        model, config, cost, missing = _from_checkpoint(name, settings, attention, image_size)
    else:
        check_exists(name)
        near = nearest(name, tuple(PRESETS))
        raise ValueError(
            f"model {name!r} is not known{f', did you mean {near!r}?' if near else ''}: it must be "
            f"a folder, an id on the Hub such as org/name, or a preset ({', '.join(PRESETS)})"
        )
    height, width = config.usual_size
    if height != width or config.num_channels != 3:
        raise ValueError(
            f"{name} is made for {config.num_channels} x {height} x {width} pixels: only square "
            "images of 3 channels are measured"
        )
    size = image_size or height
    interpolates = not config.any_size and (size, size) != as_pair(config.image_size)
    if sliced:
        model = _sliced(words, model, config, attention, size)
    classifier = Classifier(model.eval().to(device, dtype), interpolates, slice_size)
    if sliced:
        cost = counted(classifier, torch.empty(1, 3, size, size))
    if compiled:
        mode = None if compiled is True else str(compiled)
        classifier.model = torch.compile(classifier.model, fullgraph=True, mode=mode)
    if ahead:
        classifier.compile_ahead(torch.zeros(2, 3, size, size, device=device, dtype=dtype))
    folder = None if name in PRESETS else name
    return Contestant(words, classifier, cost, size, folder, missing)


def _from_preset(
    name: str, settings: dict[str, Any], attention: dict[str, Any], image_size: int | None
) -> tuple[nn.Module, Any, int]:
    """A model with random weights, its configuration and its multiply-accumulates."""
    sizes = {} if image_size is None else {"image_size": image_size}
    chosen = resolve(preset(name, **sizes), only_if_asked(settings), image_size)
    config = preset(name, **sizes, **chosen)
    config.check_effect(chosen)
    own = preset_class(name)
    plain_of = plain_class(own, config)
    if settings or plain_of is None:
        model = own._from_config(config, **attention)
        return model, config, multiply_accumulates(model, image_size=image_size)
    plain = plain_of._from_config(plain_config(own, config), **attention)
    return plain, config, _plain_cost(own, config, image_size)


def _from_checkpoint(
    name: str, settings: dict[str, Any], attention: dict[str, Any], image_size: int | None
) -> tuple[nn.Module, Any, int, tuple[str, ...]]:
    """Like ``_from_preset`` for a folder or Hub id; also the names of the weights it lacks."""
    own = class_of(name)
    config = own.config_class.from_pretrained(name)
    size: dict[str, Any] = {}
    if config.any_size and image_size is None:
        size = settle_size(config, load_image_processor(name))
    plain = plain_class(own, config)
    stored = AutoConfig.from_pretrained(name).model_type
    if settings or plain is None or stored in BACKBONES:
        settings = resolve(config, settings_for(name, settings), image_size)
        model, report = own.from_pretrained(
            name, **settings, **size, **attention, output_loading_info=True
        )
        model.config.check_effect(settings)
        config, cost = model.config, multiply_accumulates(model, image_size=image_size)
    else:
        check_indexes(name)
        model, report = plain.from_pretrained(name, **attention, output_loading_info=True)
        cost = _plain_cost(own, config, image_size)
    check_weights(model, name)
    return model, config, cost, tuple(sorted(report["missing_keys"]))


def _sliced(
    words: str, model: nn.Module, config: Any, attention: dict[str, Any], size: int
) -> nn.Module:
    """The plain model, with as many tokens in each layer as in the fusing ``model``."""
    own, reducer = type(model), build_reducer(config)
    plain = plain_class(own, config)
    if reducer is None or plain is None:
        raise ValueError(
            f"sliced of {words!r} has no effect: name what is fused, in a model that transformers "
            "has too"
        )
    num_tokens = config.num_tokens((size, size))
    sliced = plain._from_config(plain_config(own, config), **attention)
    slice_tokens(sliced, config.tokens_fused(num_tokens), reducer.stage, num_tokens)
    return sliced


def _plain_cost(own: type[Any], config: Any, image_size: int | None) -> int:
    """Multiply-accumulates of the plain model of a class of this library."""
    with torch.device("meta"):
        model = own(config)
    return describe(model.eval(), image_size).unfused


class Classifier(nn.Module):
    """Runs a model on whole batches or on slices of them, and returns its first output."""

    def __init__(self, model: nn.Module, interpolate: bool, slice_size: int | None):
        super().__init__()
        self.model: Any = model  # the model, or its compiled form
        self.options = {"interpolate_pos_encoding": True} if interpolate else {}
        self.slice_size = slice_size

    def compile_ahead(self, example: Tensor) -> None:
        """Replace the model by an AOTInductor package for batches of any size."""
        self.model, self.options = CompiledAhead(self.model, self.options, example), {}

    def forward(self, pixel_values: Tensor) -> Tensor:
        parts = pixel_values.split(self.slice_size or len(pixel_values))
        found = [self.model(part, **self.options)[0] for part in parts]
        return torch.cat(found) if len(found) > 1 else found[0]


class CompiledAhead(nn.Module):
    """A model as an AOTInductor package; it returns the first output as a tuple of one."""

    def __init__(self, model: nn.Module, options: dict[str, Any], example: Tensor):
        super().__init__()
        self.config = model.config
        with tempfile.TemporaryDirectory(prefix="mctf-") as folder:
            file = Path(folder, "model.pt2")
            compile_ahead(FirstOutput(model, **options), example, file, {})
            self.run = load(file)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        return (self.run(pixel_values),)
