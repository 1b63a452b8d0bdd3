"""What the demo page shows for an image: pictures, scores, tokens, cost and time."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mctf_hf.candidates import Candidate, budget_of, meet, methods_for
from mctf_hf.classes import names_of
from mctf_hf.configuration_mctf import as_pair
from mctf_hf.cost import Description, describe
from mctf_hf.images import ImageReader
from mctf_hf.judging import applied, embedding_of
from mctf_hf.problems import REGRESSION, problem_type, scores
from mctf_hf.reducers import REDUCERS
from mctf_hf.registry import output_of
from mctf_hf.visualization import FusedTokens, fused_by_layer

from .measuring import seconds_in_rounds
from .models import load, parse

OWN = "as configured"
PLAIN: dict[str, Any] = {"reduction": "none", "skip_unread": False}  # as transformers computes it
TOP = 5
ROUNDS = 5


@dataclass(frozen=True)
class Answer:
    """One output of a model for an image.

    Attributes:
        name: name of the class, or of the example image.
        plain, fused: value without and with fusion: a probability, a regression value, or the
            cosine similarity of the image's embedding to the example's.
    """

    name: str
    plain: float
    fused: float


@dataclass(frozen=True, eq=False)
class Look:
    """The results for one image.

    Attributes:
        layers: the tokens after each layer.
        answers: the best answers first; for regression, all values in order.
        cost: multiply-accumulates without and with fusion.
        seconds: median seconds for the image, without and with fusion.
        words: the model with this setting, in the form that commands take.
    """

    layers: list[FusedTokens]
    answers: list[Answer]
    cost: tuple[int, int]
    seconds: tuple[float, float]
    words: str

    @property
    def tokens(self) -> list[int]:
        """Number of tokens before the first layer and after each layer."""
        return [self.layers[0].num_tokens, *(layer.tokens_left for layer in self.layers)]


class Viewed:
    """A model that the page shows.

    Args:
        words: ``NAME[,setting=value…]``, see :func:`.models.load`.
        examples: example images by name; an encoder compares other images with them.
        device: ``cpu`` or ``cuda``.

    Attributes:
        methods: fusion methods to choose from; first the model's own setting, if it fuses.
        classifies: whether the model has a head; if not, the answers are the nearest examples.

    Raises:
        ValueError, OSError: see :func:`.models.load`; also for examples that the model can't take.
    """

    def __init__(self, words: str, examples: Mapping[str, Image.Image], device: str = "cpu"):
        model, self.processor = load(words)
        self.model, self.words, self.device = model.to(device), words, device
        self.reader = ImageReader(self.processor, model.config.num_channels)
        fuses = any(model.config.tokens_fused(model.config.num_tokens()))
        self.methods = [OWN] * fuses + list(methods_for(model))
        self.classifies = output_of(model) == "logits"
        self.names = names_of(model.config) if self.classifies else list(examples)
        if not self.classifies:
            embedded = [self._call(self._pixels(image, name)) for name, image in examples.items()]
            self.known = torch.cat(embedded)

    def look(self, image: Image.Image, method: str, saved: float, name: str = "the image") -> Look:
        """Fuse the tokens of an image, and compare with the model without fusion.

        Args:
            image: image of any size and mode.
            method: one of :attr:`methods`.
            saved: share of the multiply-accumulates to save, from 0 (no fusion) to below 1; unused
                with the model's own setting.
            name: name of the image in errors.

        Raises:
            ValueError: for an unknown method, a saving that it cannot reach, or an image that the
                model can't take.
        """
        pixels = self._pixels(image, name)
        described = describe(self.model, (pixels.shape[-2], pixels.shape[-1]))
        settings = self._settings(method, saved, described)
        with applied(self.model, settings):
            layers = fused_by_layer(self.model, self.processor, pixels)
            cost = described.of(self.model.config)
        return Look(
            layers=layers,
            answers=self._answers(*(self._call(pixels, one) for one in (PLAIN, settings))),
            cost=(described.unfused, described.unfused if settings is PLAIN else cost),
            seconds=self._seconds(pixels, [PLAIN, settings]),
            words=self._words(settings),
        )

    def _settings(self, method: str, saved: float, described: Description) -> dict[str, Any]:
        if method not in self.methods:
            raise ValueError(f"method={method!r} is not allowed: {', '.join(self.methods)}")
        if method == OWN:
            return {}
        if saved == 0:
            return PLAIN
        budget = budget_of(self.model, 1 - saved, described)
        return meet(self.model, Candidate.untuned(method), budget, described).settings

    def _words(self, settings: Mapping[str, Any]) -> str:
        if not settings:
            return self.words
        name, given = parse(self.words)
        config = self.model.config
        reducer = REDUCERS.get(settings["reduction"])
        of_methods = {name for method in REDUCERS.values() for name in method.settings}
        own = set() if reducer is None else set(reducer.settings)
        unused = {"r", "keep_rate", "inflection"} | of_methods - own
        chosen = {key: value for key, value in given.items() if key not in unused} | {
            key: new for key, new in settings.items() if key in given or new != getattr(config, key)
        }
        return ",".join([name, *(f"{key}={_written(value)}" for key, value in chosen.items())])

    def _pixels(self, image: Image.Image, name: str) -> Tensor:
        return self.reader(self.reader.admit(image, name))[None].to(self.device)

    @torch.inference_mode()
    def _call(self, pixels: Tensor, settings: Mapping[str, Any] = PLAIN) -> Tensor:
        """The logits or the embedding, (1, d)."""
        resized = tuple(pixels.shape[-2:]) != as_pair(self.model.config.image_size)
        with applied(self.model, dict(settings)):
            output = self.model(pixels, interpolate_pos_encoding=resized)
        return embedding_of(output).float().cpu()

    def _seconds(self, pixels: Tensor, both: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
        runs = [lambda one=one: self._call(pixels, one) for one in both]
        timed = seconds_in_rounds(runs, rounds=ROUNDS, warmup=1, device=self.device)
        plain, fused = map(statistics.median, timed)
        return plain, fused

    def _answers(self, plain: Tensor, fused: Tensor) -> list[Answer]:
        outputs = torch.cat([plain, fused])  # [2, d]
        if self.classifies:
            found = scores(outputs, self.model.config)
        else:
            found = F.normalize(outputs) @ F.normalize(self.known).T
        if self.classifies and problem_type(self.model.config) == REGRESSION:
            order = list(range(len(self.names)))
        else:
            order = found.amax(0).argsort(descending=True)[:TOP].tolist()
        return [Answer(self.names[i], *found[:, i].tolist()) for i in order]


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
