"""Text encoders of CLIP and SigLIP, which score texts for images.

Shapes: ``b`` images, ``t`` texts, ``d`` channels.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from .registry import stored_config

# By model type of transformers: whether the probabilities of an image's texts sum to 1, as in CLIP.
EXCLUSIVE = {"clip": True, "siglip": False}


class TextEncoder(nn.Module):
    """The text encoder of an image and text model, with scale and bias of the scores.

    Args:
        name: folder, or id on the Hub, of a whole CLIP or SigLIP.

    Raises:
        ValueError: for a model without a text encoder, or a tokenizer that cannot be made.
        OSError: if there is no such model, or no tokenizer.
    """

    def __init__(self, name: str):
        super().__init__()
        stored = stored_config(name)
        self.kind = str(stored.get("model_type"))
        if self.kind not in EXCLUSIVE:
            raise ValueError(
                f"texts are not allowed with {name}: it is a {self.kind}, and has no encoder of "
                f"texts. Whole models of {' or '.join(EXCLUSIVE)} have one"
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (ValueError, ImportError) as error:
            raise ValueError(f"the tokenizer of {name} can't be made: {error}") from error
        model: Any = AutoModel.from_pretrained(name).eval()
        self.length = model.config.text_config.max_position_embeddings
        self.scale = float(model.logit_scale.detach().exp())
        self.bias = float(model.logit_bias.detach()) if hasattr(model, "logit_bias") else 0.0
        model.vision_model = None  # the fused model replaces it
        self.model = model

    @torch.inference_mode()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: (t, d) float32, each of length 1; texts that are too long are truncated."""
        inputs = self.tokenizer(
            list(texts),
            padding=True if EXCLUSIVE[self.kind] else "max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        known = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        found = self.model.get_text_features(**known)
        pooled = found if isinstance(found, Tensor) else found.pooler_output
        return F.normalize(pooled.float())


class Texts(nn.Module):
    """Texts as labels of images, with scores for each image.

    Args:
        texts: t different texts.
        encoder: text encoder of the model that embeds the images.

    Raises:
        ValueError: for no texts, or a repeated text.
    """

    embedded: Tensor

    def __init__(self, texts: Sequence[str], encoder: TextEncoder):
        super().__init__()
        twice = sorted(text for text, count in Counter(texts).items() if count > 1)
        if not texts or twice:
            problem = f"{twice[0]!r} is there twice" if twice else "there are none"
            raise ValueError(f"texts are not allowed: {problem}")
        self.texts = tuple(texts)
        self.exclusive = EXCLUSIVE[encoder.kind]
        self.scale, self.bias = encoder.scale, encoder.bias
        self.register_buffer("embedded", encoder(texts), persistent=False)

    def scores(self, images: Tensor) -> Tensor:
        """Probabilities (b, t) of the texts, from embeddings of images (b, d) float32.

        With CLIP, an image's probabilities sum to 1; with SigLIP, they are independent.
        """
        texts = self.embedded.float().to(images.device)
        logits = F.normalize(images) @ texts.T * self.scale + self.bias
        return logits.softmax(-1) if self.exclusive else logits.sigmoid()
