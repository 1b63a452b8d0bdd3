"""Measuring what a model loses by fusion, against its outputs without fusion or against labels.

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

# Images per forward pass.
CHUNK = 32


@contextlib.contextmanager
def applied(model: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Apply fusion settings to a model within a block.

    Args:
        model: model of this library, or one that ``fuse_tokens`` was called with.
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
    """Logits, image embeddings, pooled output or first token: the first that exists, (n, d)."""
    for name in ("logits", "image_embeds", "pooler_output"):
        found = getattr(output, name, None)
        if found is not None:
            return found
    return output.last_hidden_state[:, 0]


class Judge:
    """Compares a model's outputs for images with and without fusion.

    Args:
        model: model of this library, or fused by ``fuse_tokens``, in evaluation mode.
        pixel_values: (n, channels, height, width).
        labels: (n,) int64, for a classifier; unset, the outputs without fusion are the reference.

    Attributes:
        described: cost of the model.
        unfused: outputs without fusion, (n, d).
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
        """A judge for some of the images, which reuses the outputs without fusion."""
        part = copy.copy(self)
        part.pixel_values, part.unfused = self.pixel_values[which], self.unfused[which]
        part.labels = None if self.labels is None else self.labels[which]
        return part

    @torch.inference_mode()
    def _call(self, pixel_values: Tensor) -> Any:
        device = next(self.model.parameters()).device
        return self.model(pixel_values.to(device, self.model.dtype))

    def outputs(self, settings: dict[str, Any], start: int = 0, stop: int | None = None) -> Tensor:
        """Outputs with some settings for images start to stop: (stop - start, d), float32."""
        with applied(self.model, settings):
            chunks = self.pixel_values[start:stop].split(CHUNK)
            return torch.cat([embedding_of(self._call(one)).float().cpu() for one in chunks])

    def loss(self, outputs: Tensor, start: int = 0) -> Tensor:
        """Loss of each image, (n,), for outputs that begin at image ``start``.

        With labels, this is the cross-entropy; without, see :meth:`change`.
        """
        if self.labels is not None:
            labels = self.labels[start : start + len(outputs)]
            return F.cross_entropy(outputs, labels, reduction="none")
        return self.change(outputs, start)

    def change(self, outputs: Tensor, start: int = 0) -> Tensor:
        """Change of each image's output by fusion, (n,), for outputs that begin at image ``start``.

        For a classifier, this is the Kullback-Leibler divergence between the probabilities without
        and with fusion; for embeddings, one minus the cosine similarity.
        """
        unfused = self.unfused[start : start + len(outputs)]
        if self.classifies:
            return F.kl_div(
                outputs.log_softmax(-1), unfused.log_softmax(-1), log_target=True, reduction="none"
            ).sum(-1)
        return 1 - F.cosine_similarity(outputs, unfused)

    def agreement(self, outputs: Tensor) -> Tensor:
        """Whether each image has the same result with fusion, (n,), for outputs of all images.

        The result is the predicted class of a classifier, and for embeddings the nearest neighbour
        among the embeddings of the other images without fusion.
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
        """Whether each image's predicted class is its label, (n,); ``None`` without labels."""
        return None if self.labels is None else outputs.argmax(-1) == self.labels


@dataclass
class Verdict:
    """Cost and loss of a setting, measured on some images.

    Attributes:
        name: name in tables.
        setting: fitted candidate; ``None`` for no fusion.
        cost: multiply-accumulates of one image.
        fraction: cost relative to the model without fusion that computes all tokens.
        loss: see :meth:`Judge.loss`, (n,).
        change: see :meth:`Judge.change`, (n,).
        agreement: see :meth:`Judge.agreement`, (n,).
        right: see :meth:`Judge.right`.
        gained: with labels, 1 if right only with fusion, -1 if right only without, else 0, (n,).
        ratio: speed relative to no fusion; ``None`` if not measured.
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
        """Results by name, with standard errors; given ``best``, also the difference in loss."""
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
    """Judge a setting, or the model without fusion for ``None``, on all images of ``judging``."""
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
