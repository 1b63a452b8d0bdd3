"""What fusion loses: a model's outputs with fusion beside those without, or beside labels.

Shapes: ``n`` images, ``d`` channels or classes.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .apply import fusion_of
from .candidates import FittedCandidate
from .cost import describe, fusion_config_of
from .fused_models import FusedModel

# Images that are judged at once.
CHUNK = 32


@contextlib.contextmanager
def applied(model: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Fuse by some settings for a while.

    Args:
        model: of this library, or one that ``fuse_tokens`` was called with.
    """
    if isinstance(model, FusedModel):
        with fusion_of(model, **settings):
            yield
        return
    config = model.config
    before = {name: getattr(config, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(config, name, value)
        config.validate()
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def embedding_of(output: Any) -> Tensor:
    """What a model says of images: logits, image embeddings, or its pooled output, (n, d)."""
    for name in ("logits", "image_embeds", "pooler_output"):
        found = getattr(output, name, None)
        if found is not None:
            return found
    return output.last_hidden_state[:, 0]


class Judge:
    """Compares what a model says of images with and without fusion.

    Args:
        model: of this library, or one that ``fuse_tokens`` was called with, in evaluation.
        pixel_values: (n, channels, height, width).
        labels: (n,) int64, of a classifier; unset, the model without fusion is the measure.

    Attributes:
        described: what the model costs.
        unfused: its outputs without fusion, (n, d).
    """

    def __init__(self, model: Any, pixel_values: Tensor, labels: Tensor | None = None):
        self.model, self.pixel_values, self.labels = model, pixel_values, labels
        self.described = describe(model)
        self.unfused = self.outputs({"reduction": "none"})
        output = self._call(pixel_values[:1])
        self.classifies = getattr(output, "logits", None) is not None

    def __len__(self) -> int:
        return len(self.pixel_values)

    def part(self, which: slice) -> "Judge":
        """A judge with some of the images, of which nothing is computed again."""
        part = copy.copy(self)
        part.pixel_values, part.unfused = self.pixel_values[which], self.unfused[which]
        part.labels = None if self.labels is None else self.labels[which]
        return part

    @torch.inference_mode()
    def _call(self, pixel_values: Tensor) -> Any:
        device = next(self.model.parameters()).device
        return self.model(pixel_values.to(device, self.model.dtype))

    def outputs(self, settings: dict[str, Any], start: int = 0, stop: int | None = None) -> Tensor:
        """Outputs (stop - start, d) in float32 of some images by some settings."""
        with applied(self.model, settings):
            chunks = self.pixel_values[start:stop].split(CHUNK)
            return torch.cat([embedding_of(self._call(one)).float().cpu() for one in chunks])

    def loss(self, outputs: Tensor, start: int = 0) -> Tensor:
        """What is lost for each image, (n,), of the outputs from one image on.

        With labels their cross-entropy; without, a classifier's Kullback-Leibler divergence from
        the probabilities without fusion, or one minus the cosine of an embedding to that without.
        """
        if self.labels is not None:
            labels = self.labels[start : start + len(outputs)]
            return F.cross_entropy(outputs, labels, reduction="none")
        return self.change(outputs, start)

    def change(self, outputs: Tensor, start: int = 0) -> Tensor:
        """How far fusion moves the outputs from one image on, (n,): see :meth:`loss`."""
        unfused = self.unfused[start : start + len(outputs)]
        if self.classifies:
            return F.kl_div(
                outputs.log_softmax(-1), unfused.log_softmax(-1), log_target=True, reduction="none"
            ).sum(-1)
        return 1 - F.cosine_similarity(outputs, unfused)

    def agreement(self, outputs: Tensor) -> Tensor:
        """For each of all images whether fusion changes nothing that somebody would see, (n,).

        A classifier's is the same class, an embedding's the same nearest neighbour among the
        embeddings without fusion of the other images.
        """
        if self.classifies:
            return outputs.argmax(-1) == self.unfused.argmax(-1)
        known = F.normalize(self.unfused)
        nearest = [
            (F.normalize(one) @ known.T).fill_diagonal_(-torch.inf).argmax(1)
            for one in (outputs, self.unfused)
        ]
        return nearest[0] == nearest[1]

    def right(self, outputs: Tensor) -> Tensor | None:
        """For each of all images whether its label is found, (n,); ``None`` without labels."""
        return None if self.labels is None else outputs.argmax(-1) == self.labels


@dataclass
class Verdict:
    """What a setting costs and loses, on some images.

    Attributes:
        name: what it is called in tables.
        setting: the settings; ``None`` for no fusion.
        cost: multiply-accumulates of one image.
        fraction: of the cost without fusion, all tokens computed.
        loss: see :meth:`Judge.loss`, (n,).
        change: see :meth:`Judge.change`, (n,).
        agreement: see :meth:`Judge.agreement`, (n,).
        right: see :meth:`Judge.right`.
        gained: with labels, for each image 1 if fusion alone makes it right, -1 if it makes it
            wrong, else 0, (n,).
        ratio: measured speed over that without fusion, if it was measured.
    """

    name: str
    setting: FittedCandidate | None
    cost: int
    fraction: float
    loss: Tensor
    change: Tensor
    agreement: Tensor
    right: Tensor | None = None
    gained: Tensor | None = None
    ratio: float | None = None

    def row(self, best: "Verdict | None" = None) -> dict[str, float | str]:
        """Figures by name, with standard errors; of differences in loss, against another one's."""
        row: dict[str, float | str] = {
            "setting": self.name,
            "gmacs": self.cost / 1e9,
            "fraction": self.fraction,
            "loss": _mean(self.loss),
            "loss_error": _error(self.loss),
            "agreement": 100 * _mean(self.agreement.float()),
            "agreement_error": 100 * _error(self.agreement.float()),
        }
        if self.right is not None:
            row["accuracy"] = 100 * _mean(self.right.float())
            row["accuracy_error"] = 100 * _error(self.right.float())
            row["change"], row["change_error"] = _mean(self.change), _error(self.change)
        if self.gained is not None:
            row["difference"] = 100 * _mean(self.gained)
            row["difference_error"] = 100 * _error(self.gained)
        if self.ratio is not None:
            row["speed"] = self.ratio
        if best is not None:
            difference = self.loss - best.loss
            row["more_loss"], row["more_loss_error"] = _mean(difference), _error(difference)
        return row


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _error(values: Tensor) -> float:
    """Standard error of the mean."""
    return float(values.double().std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def judge(judging: Judge, name: str, setting: FittedCandidate | None) -> Verdict:
    """A setting on all of the judge's images; without one, the model without fusion."""
    described = judging.described
    outputs = judging.unfused if setting is None else judging.outputs(setting.settings)
    nothing = [0] * described.num_layers
    unfused = described.cost(fusion_config_of(judging.model), nothing)
    cost = unfused if setting is None else setting.cost
    right, before = judging.right(outputs), judging.right(judging.unfused)
    return Verdict(
        name,
        setting,
        cost,
        cost / described.unfused,
        judging.loss(outputs),
        judging.change(outputs),
        judging.agreement(outputs),
        right,
        None if right is None or before is None else right.float() - before.float(),
    )
