"""Embedding vectors of images, and the scores of labels.

Shapes: ``b`` images, ``n`` tokens, ``d`` channels, ``c`` labels.
"""

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .classes import names_of
from .configuration_mctf import as_pair
from .modeling_mctf import mean_patches
from .modeling_mctf_encoder import MCTFEncoderClassifierMixin
from .problems import REGRESSION, problem_type, scores
from .registry import output_of
from .texts import Texts

VECTORS = ("class_token", "pooled", "mean_patches")


class Embedded(NamedTuple):
    """Vectors and scores of images.

    Attributes:
        vectors: (b, d) float32.
        scores: (b, c) float32, one per label or text; ``None`` for a model without either.
    """

    vectors: Tensor
    scores: Tensor | None


def default_vector(model: Any) -> str:
    """``pooled`` for models of image embeddings or without class token, else ``class_token``."""
    if output_of(model) == "image_embeds" or not model.config.class_token:
        return "pooled"
    return "class_token"


class Embedder(nn.Module):
    """Computes a vector of each image, and the scores of labels if the model has labels.

    If only the class token is read, the last layer computes no other token, unless the model's
    ``skip_unread`` is false.

    Args:
        model: model of this library, in evaluation mode.
        vector: ``class_token``, after the encoder's last norm; ``pooled``, the model's own vector
            of an image (the embedding of CLIP and SigLIP, the input of a classifier's head); or
            ``mean_patches``, the mean in which a fused token counts once per patch. Unset, the
            result of :func:`default_vector`.
        normalize: whether to scale vectors to length 1.
        texts: texts that serve as labels of a model with a text encoder.

    Attributes:
        labels: names of the labels, in the order of the scores; ``None`` if there are none.

    Raises:
        ValueError: if the model does not have that vector, or is a classifier and gets texts.
    """

    def __init__(
        self,
        model: Any,
        vector: str | None = None,
        *,
        normalize: bool = False,
        texts: Texts | None = None,
    ):
        super().__init__()
        self.model = model
        self.vector = default_vector(model) if vector is None else vector
        self.normalize = normalize
        self.texts = texts
        self._kind = output_of(model)
        self._classifies = self._kind == "logits" and bool(model.config.num_labels)
        self._check()
        self.labels = None if texts is None else list(texts.texts)
        if self._classifies:
            self.labels = names_of(model.config)

    def _check(self) -> None:
        name = type(self.model).__name__
        if self.vector not in VECTORS:
            raise ValueError(
                f"vector={self.vector!r} is not allowed: it must be one of {', '.join(VECTORS)}"
            )
        if self.vector == "class_token" and not self.model.config.class_token:
            raise ValueError(
                f"vector='class_token' is not allowed with {name}, which has none: it is pooled "
                "or mean_patches"
            )
        if self.texts is not None and self._kind == "logits":
            raise ValueError(f"texts are not allowed with {name}, which has labels of its own")

    @property
    def names_best(self) -> bool:
        """Whether there are labels and the highest score marks the best one; not in regression."""
        if self.texts is not None:
            return True
        return self._classifies and problem_type(self.model.config) != REGRESSION

    @torch.inference_mode()
    def forward(self, pixel_values: Tensor) -> Embedded:
        """Embed images, (b, channels, height, width).

        Raises:
            ValueError: if the pooled output is needed and the model has none.
        """
        parameter = next(self.model.parameters())
        pixel_values = pixel_values.to(parameter.device, parameter.dtype)
        vectors, pooled, logits = self._read(pixel_values)
        vectors, found = vectors.float(), None
        if self._classifies:
            assert logits is not None
            found = scores(logits, self.model.config)
        elif self.texts is not None:
            assert pooled is not None
            found = self.texts.scores(pooled.float())
        if self.normalize:
            vectors = F.normalize(vectors)
        return Embedded(vectors, found)

    def _read(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The vectors, the pooled output and the logits, in the model's precision."""
        config, options = self.model.config, self._options(pixel_values)
        if self._kind == "logits":
            return self._read_classifier(pixel_values, options)
        output = self.model(pixel_values, **options)
        pooled = output.image_embeds if self._kind == "image_embeds" else output.pooler_output
        if pooled is None and (self.vector == "pooled" or self.texts is not None):
            raise ValueError(
                f"vector='pooled' is not allowed with this {type(self.model).__name__}, which "
                "pools nothing: it must be class_token or mean_patches"
            )
        if self.vector == "pooled":
            return pooled, pooled, None
        hidden_states = output.last_hidden_state
        if self.vector == "class_token":
            return hidden_states[:, 0], pooled, None
        sizes = None if config.restore else output.token_sizes
        return mean_patches(hidden_states, sizes, config.num_prefix_tokens), pooled, None

    def _read_classifier(
        self, pixel_values: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The same for a classifier, whose head may read more than the class token."""
        model, config = self.model, self.model.config
        head_reads_more = isinstance(model, MCTFEncoderClassifierMixin)
        if self.vector == "pooled" or (self.vector == "class_token" and not head_reads_more):
            output = model(pixel_values, output_features=True, **options)
            return output.features, output.features, output.logits
        seen: list[Any] = []
        # A hook makes the encoder compute and output all tokens.
        hook = model.base_model.register_forward_hook(lambda *call: seen.append(call[-1]))
        try:
            output = model(pixel_values, output_features=True, **options)
        finally:
            hook.remove()
        hidden_states = seen[0].last_hidden_state
        if self.vector == "class_token":
            return hidden_states[:, 0], output.features, output.logits
        sizes = None if config.restore else output.token_sizes
        vectors = mean_patches(hidden_states, sizes, config.num_prefix_tokens)
        return vectors, output.features, output.logits

    def _options(self, pixel_values: Tensor) -> dict[str, Any]:
        config = self.model.config
        options: dict[str, Any] = {}
        other_size = tuple(pixel_values.shape[-2:]) != as_pair(config.image_size)
        if not config.any_size and other_size:
            options["interpolate_pos_encoding"] = True
        if self.vector == "mean_patches":
            if not config.restore:
                options["output_fusion"] = True
        elif self._kind != "logits" and config.class_token and config.skip_unread is not False:
            options["num_read_tokens"] = 1
        return options


def digest(model: nn.Module) -> str:
    """A hash of a model's weights, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]
