"""MCTF (arXiv 2403.10030) and ToMe (arXiv 2210.09461) as they are written down, and slowly.

One image at a time, one pair of tokens at a time, and matrices of which token goes where. Shapes:
``n`` tokens before and ``m`` after a layer, ``p`` prefix tokens, ``d`` channels.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Old positions of the members of each new token. What others have joined comes first.
Groups = list[list[int]]


class Layer(NamedTuple):
    """What a layer is made of.

    Attributes:
        scales: of the outputs of attention and MLP, before they are added.
    """

    norm_attention: Any
    attention: Any
    norm_mlp: Any
    mlp: Any
    scales: tuple[Tensor | float, Tensor | float] = (1.0, 1.0)

    def maps(self, normed: Tensor, sizes: Tensor) -> list[Tensor]:
        """Proportional attention of (n, d), for each head: (n, n)."""
        found = []
        for query, key in zip(self._heads("q", normed), self._heads("k", normed), strict=True):
            scores = query @ key.T / math.sqrt(query.shape[1])
            found.append((scores + sizes.log()[None, :]).softmax(1))
        return found

    def keys(self, normed: Tensor) -> Tensor:
        """Mean over heads: (n, d) -> (n, d / heads)."""
        return torch.stack(self._heads("k", normed)).mean(0)

    def attend(self, maps: list[Tensor], tokens: Tensor, normed: Tensor) -> Tensor:
        """Tokens with the output of attention added: (n, d)."""
        values = self._heads("v", normed)
        heads = [one @ value for one, value in zip(maps, values, strict=True)]
        names = ("out_proj", "o_proj", "projection_layer")
        project = next(getattr(self.attention, name) for name in names if name in self._parts())
        return tokens + self.scales[0] * project(torch.cat(heads, 1))

    def think(self, tokens: Tensor) -> Tensor:
        """Tokens with the output of the MLP added: (n, d)."""
        return tokens + self.scales[1] * self.mlp(self.norm_mlp(tokens))

    def _heads(self, name: str, normed: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys or values of each head: (n, d / heads)."""
        parts, made = self._parts(), getattr(self.attention, f"{name}_proj")(normed)
        made = parts[f"{name}_norm"](made) if f"{name}_norm" in parts else made
        heads = "num_heads" if hasattr(self.attention, "num_heads") else "num_attention_heads"
        return made.chunk(getattr(self.attention, heads), 1)

    def _parts(self) -> dict[str, nn.Module]:
        return dict(self.attention.named_children())


class Image(NamedTuple):
    """The tokens of one image.

    Attributes:
        tokens: (n, d).
        sizes: (n,).
        source: of each embedded token, the position of the token that it is part of.
    """

    tokens: Tensor
    sizes: Tensor
    source: list[int]

    def grouped(self, groups: Groups, weights: Tensor) -> "Image":
        """After a fusion, with the weights of the n old tokens."""
        columns, pooling = matrices(groups, weights)
        moved = [next(i for i, group in enumerate(groups) if old in group) for old in self.source]
        return Image(pooling @ self.tokens, columns.T @ self.sizes, moved)


def matrices(groups: Groups, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``C``, (n, m), which sums columns of a map, and ``R``, (m, n), which pools rows."""
    columns = weights.new_zeros(len(weights), len(groups))
    for new, group in enumerate(groups):
        for old in group:
            columns[old, new] = 1
    pooling = (columns * weights[:, None]).T
    return columns, pooling / pooling.sum(1, keepdim=True)


def similarity(first: Tensor, second: Tensor) -> float:
    return float(first @ second / (first.norm() * second.norm()))


def match_by_many_criteria(
    tokens: Tensor, received: Tensor, sizes: Tensor, r: int, prefix: int
) -> Groups:
    """Bidirectional bipartite soft matching of MCTF, with the temperatures of the paper."""
    num_tokens = len(tokens)
    alpha = [i for i in range(prefix, num_tokens) if i % 2 == 0]
    beta = [i for i in range(prefix, num_tokens) if i % 2 == 1]
    uninformative = ((1 / received) / (1 / received).max()).tolist()
    small = ((1 / sizes) / (1 / sizes).max()).tolist()
    attraction = {}
    for i in alpha:
        for j in beta:
            alike = (similarity(tokens[i], tokens[j]) + 1) / 2
            attraction[i, j] = (
                alike ** (1 / 1)
                * (uninformative[i] * uninformative[j]) ** (1 / 20)
                * (small[i] * small[j]) ** (1 / 40)
            )
    groups = {token: [token] for token in range(num_tokens)}
    forward, backward = r // 2, r - r // 2

    pick = {i: max(beta, key=lambda j: attraction[i, j]) for i in alpha}
    alpha.sort(key=lambda i: -attraction[i, pick[i]])
    for i in alpha[:forward]:
        groups[pick[i]] += groups.pop(i)
    alpha = alpha[forward:]
    if prefix:
        alpha.sort()

    pick = {j: max(alpha, key=lambda i: attraction[i, j]) for j in beta}
    beta.sort(key=lambda j: -attraction[pick[j], j])
    for j in beta[:backward]:
        groups[pick[j]] += groups.pop(j)
    return [groups[token] for token in [*range(prefix), *alpha, *beta[backward:]]]


def match_by_keys(keys: Tensor, r: int, prefix: int) -> Groups:
    """Bipartite soft matching of ToMe."""
    num_tokens = len(keys)
    alpha = [i for i in range(prefix, num_tokens) if i % 2 == 0]
    beta = [i for i in range(prefix, num_tokens) if i % 2 == 1]
    alike = {(i, j): similarity(keys[i], keys[j]) for i in alpha for j in beta}
    groups = {token: [token] for token in range(num_tokens)}
    pick = {i: max(beta, key=lambda j: alike[i, j]) for i in alpha}
    alpha.sort(key=lambda i: -alike[i, pick[i]])
    for i in alpha[:r]:
        groups[pick[i]] += groups.pop(i)
    alpha = alpha[r:]
    if prefix:  # as in the authors' code
        alpha.sort()
    return [groups[token] for token in [*range(prefix), *alpha, *beta]]


def mctf(layer: Layer, image: Image, r: int, prefix: int) -> Image:
    """A layer of MCTF with approximate one-step-ahead attention."""
    maps = layer.maps(layer.norm_attention(image.tokens), image.sizes)
    received = torch.stack([one.mean(0) for one in maps]).mean(0)
    groups: Groups = [[token] for token in range(len(image.tokens))]
    if r:
        groups = match_by_many_criteria(image.tokens, received, image.sizes, r, prefix)
    columns, pooling = matrices(groups, received * image.sizes)
    image = image.grouped(groups, received * image.sizes)
    fused = [pooling @ one @ columns for one in maps]
    tokens = layer.attend(fused, image.tokens, layer.norm_attention(image.tokens))
    return image._replace(tokens=layer.think(tokens))


def tome(layer: Layer, image: Image, r: int, prefix: int) -> Image:
    """A layer of ToMe with proportional attention."""
    normed = layer.norm_attention(image.tokens)
    attended = layer.attend(layer.maps(normed, image.sizes), image.tokens, normed)
    image = image._replace(tokens=attended)
    if r:
        image = image.grouped(match_by_keys(layer.keys(normed), r, prefix), image.sizes)
    return image._replace(tokens=layer.think(image.tokens))


def mctf_present(layer: Layer, image: Image, r: int, prefix: int) -> Image:
    """A layer of MCTF's criteria on tokens after attention, judged by that attention."""
    normed = layer.norm_attention(image.tokens)
    maps = layer.maps(normed, image.sizes)
    received = torch.stack([one.mean(0) for one in maps]).mean(0)
    image = image._replace(tokens=layer.attend(maps, image.tokens, normed))
    if r:
        groups = match_by_many_criteria(image.tokens, received, image.sizes, r, prefix)
        image = image.grouped(groups, received * image.sizes)
    return image._replace(tokens=layer.think(image.tokens))


METHODS = {"mctf": mctf, "present": mctf_present, "tome": tome}
SETTINGS = {
    "mctf": {"reduction": "mctf"},
    "present": {"reduction": "mctf", "one_step_ahead": "present"},
    "tome": {"reduction": "tome"},
}


def encode(
    layers: list[Layer], embedded: Tensor, method: str, counts: list[int], prefix: int
) -> list[Image]:
    """Run all layers on embedded images, (b, n, d), each fusing so many tokens."""
    images = []
    for tokens in embedded:
        image = Image(tokens, tokens.new_ones(len(tokens)), list(range(len(tokens))))
        for layer, r in zip(layers, counts, strict=True):
            image = METHODS[method](layer, image, r, prefix)
        images.append(image)
    return images
