"""Explanations of models with fused tokens, on the grid of the image's patches.

Shapes: ``b`` images, ``n`` embedded tokens, ``m`` tokens left, ``d`` channels, ``h`` x ``w``
patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_mctf import as_pair


def attention_rollout(attentions: Sequence[Tensor], assignments: Sequence[Tensor]) -> Tensor:
    """The share of each embedded token in each final token, through all layers.

    Attention rollout (arXiv 2005.00928): each layer contributes the average of the identity and its
    attention map's mean over heads, and the layers are multiplied. Where a layer fuses tokens, each
    old token has a weight in its new token: the number of embedded tokens that it represents.

    Args:
        attentions: one (b, heads, n', n') per layer, from ``output_attentions=True``.
        assignments: one (b, n) per layer, from ``output_fusion=True`` in the same call.

    Returns:
        (b, m, n), each row sums to 1. Row 0 belongs to the class token, if there is one. Columns
        are the prefix tokens, then the patches from left to right and top to bottom.

    Raises:
        ValueError: if there is not one of each for every layer, or their tokens do not match.
    """
    if not attentions or len(attentions) != len(assignments):
        raise ValueError(
            f"{len(attentions)} attentions and {len(assignments)} assignments are not allowed: "
            "there is one of each for every layer, of one call"
        )
    batch, num_tokens = assignments[0].shape
    places = torch.arange(num_tokens, device=assignments[0].device).expand(batch, -1)
    drawn = torch.eye(num_tokens, device=places.device).expand(batch, -1, -1)
    for layer, (attention, after) in enumerate(zip(attentions, assignments, strict=True)):
        pooling = _pooling(places, after)  # [b, tokens after, tokens before]
        left, entering = pooling.shape[1:]
        if attention.shape[-1] not in (left, entering):
            raise ValueError(
                f"attentions[{layer}] of {attention.shape[-1]} tokens are not allowed: there are "
                f"{entering} before that layer and {left} after it"
            )
        fused_before = attention.shape[-1] == left
        drawn = pooling @ drawn if fused_before else drawn
        mean = attention.mean(1).float()
        mean = mean / mean.sum(-1, keepdim=True)
        drawn = (drawn + mean @ drawn) / 2
        drawn = drawn if fused_before else pooling @ drawn
        places = after
    return drawn


def _pooling(before: Tensor, after: Tensor) -> Tensor:
    """Shares of the tokens before a layer in those after it: (b, tokens after, tokens before).

    Args:
        before, after: (b, n), assignments of the embedded tokens before and after the layer.
    """
    embedded = _members(before)  # [b, tokens before, n]
    counts = _members(after) @ embedded.mT
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


def _members(assignment: Tensor) -> Tensor:
    """(b, n), -1 for dropped tokens -> (b, tokens, n), 1 for the members of each token."""
    tokens = torch.arange(int(assignment.max()) + 1, device=assignment.device)
    return (assignment[:, None, :] == tokens[:, None]).float()


class Explained(nn.Module):
    """A classifier in the form that explanation libraries expect: images in, logits out.

    With pytorch-grad-cam, use ``GradCAM(explained, target_layers, explained.reshape_transform)``.
    Choose a module that runs once per layer and outputs one row per token: the MLP
    (``layers[-2].mlp``) or the norm before it. The norm before attention runs twice in a layer that
    fuses before attention. After the last attention, patches no longer affect the class token.

    Args:
        model: model of this library, or model that ``fuse_tokens`` was applied to.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self._grid: tuple[int, int] | None = None
        self._assignments: tuple[Tensor, ...] = ()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Classify images: (b, channels, height, width) -> (b, labels)."""
        output = self.model(pixel_values, output_fusion=True)
        sides = as_pair(self.model.config.patch_size)
        height, width = pixel_values.shape[-2:]
        self._grid = (height // sides[0], width // sides[1])
        self._assignments = tuple(one.detach() for one in output.assignments)
        return output.logits

    def reshape_transform(self, tokens: Tensor) -> Tensor:
        """Place tokens of the last call, from any layer, on the grid of the patches.

        Each patch gets the row of its token, or zeros if it was dropped.

        Args:
            tokens: (b, m, d), activations or their gradients.

        Returns:
            (b, d, h, w)

        Raises:
            ValueError: before any call, or if no layer has that number of tokens.
        """
        if self._grid is None:
            raise ValueError("no tokens are known: call the model first")
        batch, count, width = tokens.shape
        num_embedded = self._assignments[0].shape[1]
        whole = torch.arange(num_embedded, device=tokens.device).expand(batch, -1)
        by_count = {int(one.max()) + 1: one for one in (*self._assignments, whole)}
        if count not in by_count:
            raise ValueError(
                f"{count} tokens are not allowed: there are {', '.join(map(str, by_count))} in the "
                "layers"
            )
        assignment = by_count[count].to(tokens.device)
        rows = tokens.gather(1, assignment.clamp(min=0)[:, :, None].expand(-1, -1, width))
        rows = rows * (assignment >= 0)[:, :, None]
        rows_down, columns = self._grid
        patches = rows[:, num_embedded - rows_down * columns :]
        return patches.unflatten(1, self._grid).permute(0, 3, 1, 2)
