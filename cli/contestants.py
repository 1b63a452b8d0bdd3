"""Models that ``mctf benchmark`` compares, made from words such as ``deit_s,r=16,compile``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, ViTForImageClassification

from cli.models import FUSION, parse, resolve
from mctf_hf import MCTFViTConfig, MCTFViTForImageClassification
from mctf_hf.configuration_mctf import as_pair
from mctf_hf.cost import multiply_accumulates
from mctf_hf.hub import HUB_ID
from mctf_hf.presets import PRESETS, preset
from mctf_hf.registry import BACKBONES, backbone_of

SETTINGS = ("attn_implementation", "compile", "slice")


@dataclass
class Contestant:
    """A model to be timed.

    Attributes:
        name: the words that it was made from.
        model: classifies (b, channels, height, width).
        multiply_accumulates: of one image.
        image_size: height and width of the images that it was made for.
        folder: or id on the Hub that the weights are from; ``None`` for random ones.
        missing: names of weights that were not there and are random.
    """

    name: str
    model: nn.Module
    multiply_accumulates: int
    image_size: int
    folder: str | None = None
    missing: tuple[str, ...] = ()


def make(words: str, image_size: int | None, dtype: torch.dtype, device: str) -> Contestant:
    """Make a model from ``NAME[,setting=value…]``.

    Args:
        words: NAME is a preset, a local folder or an id on the Hub. A preset, or a plain ViT's
            checkpoint, with no setting of fusion is the plain model of transformers; with one, or
            saved by this library, it is this library's. ``compile`` compiles it, ``slice=16`` feeds
            it 16 images at a time.
        image_size: height and width, if they are not to be the model's own.

    Raises:
        ValueError: for an unknown name or setting, or a value that is not allowed.
    """
    name, settings = parse(words, SETTINGS)
    compiled, slice_size = settings.pop("compile", False), settings.pop("slice", None)
    if slice_size is not None and (
        slice_size is True or not isinstance(slice_size, int) or slice_size < 1
    ):
        raise ValueError(
            f"slice={slice_size!r} of {words!r} is not allowed: it is a count of images"
        )
    attention = {k: settings.pop(k) for k in ("attn_implementation",) if k in settings}
    torch.manual_seed(0)
    missing: tuple[str, ...] = ()
    if name in PRESETS:
        sizes = {} if image_size is None else {"image_size": image_size}
        settings = resolve(preset(name, **sizes), settings, image_size)
        config = preset(name, **sizes, **settings)
        if settings or config.model_type != MCTFViTConfig.model_type or config.distillation_token:
            if not settings:
                config.reduction = "none"
            model = BACKBONES[config.model_type].classifier._from_config(config, **attention)
        else:
            plain = {k: v for k, v in config.to_dict().items() if k not in (*FUSION, "model_type")}
            plain_config = ViTForImageClassification.config_class(**plain)
            model = ViTForImageClassification._from_config(plain_config, **attention)
    elif Path(name).is_dir() or HUB_ID.fullmatch(name):
        plain_type = AutoConfig.from_pretrained(name).model_type
        classifier = backbone_of(name).classifier
        config = classifier.config_class.from_pretrained(name)
        if settings or plain_type in BACKBONES:
            settings = resolve(config, settings, image_size)
            model, report = classifier.from_pretrained(
                name, **settings, **attention, output_loading_info=True
            )
            config = model.config
        else:
            model, report = AutoModelForImageClassification.from_pretrained(
                name, **attention, output_loading_info=True
            )
        missing = tuple(sorted(report["missing_keys"]))
    else:
        raise ValueError(
            f"model {name!r} is not known: it is a preset ({', '.join(PRESETS)}), a folder, or an "
            "id on the Hub such as org/name"
        )
    r = None if isinstance(model, MCTFViTForImageClassification) else 0
    cost = multiply_accumulates(config, r=r, image_size=image_size)
    config.check_effect(settings)
    height, width = as_pair(config.image_size)
    if height != width or config.num_channels != 3:
        raise ValueError(
            f"{name} is made for {config.num_channels} x {height} x {width} pixels: only square "
            "images of 3 channels are measured"
        )
    other_size = image_size not in (None, height)
    model = Classifier(model.eval().to(device, dtype), other_size, slice_size)
    if compiled:
        model.model = torch.compile(model.model, fullgraph=True, mode=_mode(compiled))
    folder = None if name in PRESETS else name
    return Contestant(words, model, cost, image_size or height, folder, missing)


class Classifier(nn.Module):
    """A model that is handed images, whole batches or slices of them, and gives logits."""

    def __init__(self, model: nn.Module, interpolate: bool, slice_size: int | None):
        super().__init__()
        self.model = model
        self.options = {"interpolate_pos_encoding": True} if interpolate else {}
        self.slice_size = slice_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        parts = pixel_values.split(self.slice_size or len(pixel_values))
        logits = [self.model(part, **self.options).logits for part in parts]
        return torch.cat(logits) if len(logits) > 1 else logits[0]


def _mode(compiled: Any) -> str | None:
    return None if compiled is True else str(compiled)
