"""Parameter groups for AdamW, and the learning rate schedule."""

import math
import re
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel


def parameter_groups(
    model: PreTrainedModel,
    weight_decay: float,
    learning_rate: float | None = None,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Group parameters by weight decay and, if their learning rates differ, by layer.

    Vectors (norms, biases) have no weight decay, nor do parameters that the model adds to its input
    (positions, class, distillation and mask tokens).

    Args:
        model: classifier of this library.
        weight_decay: weight decay of the other parameters.
        learning_rate: learning rate of the parameters after the last layer.
        layer_decay: factor of the learning rate from each layer to the one before it (BEiT, arXiv
            2106.08254, appendix H); the embeddings come before the first layer.
    """
    added = ("_token", "_tokens", "_embedding", "position_embeddings", "position_embedding.weight")
    layers = model.config.num_hidden_layers
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or name.endswith(added)
        depth = layers + 1 if layer_decay == 1 else _depth(name, layers)
        group = {"params": [], "weight_decay": 0.0 if exempt else weight_decay}
        if learning_rate is not None:
            group["lr"] = learning_rate * layer_decay ** (layers + 1 - depth)
        groups.setdefault((depth, exempt), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _depth(name: str, layers: int) -> int:
    """Depth of a parameter: 0 in embeddings, i + 1 in layer i, layers + 1 after the last layer."""
    found = re.match(r"\w+\.(?:(embeddings|pre_layrnorm)|(?:\w+\.)?layers?\.(\d+))\.", name)
    if found is None:
        return layers + 1
    return 0 if found[1] else int(found[2]) + 1


class _OwnGroups(LambdaLR):
    """Schedule of the initial parameter groups; groups that are added later keep their rates."""

    def get_lr(self) -> list[float | torch.Tensor]:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        pairs = zip(self.base_lrs, self.lr_lambdas, strict=True)
        own = [base * factor(self.last_epoch) for base, factor in pairs]
        return [*own, *rates[len(own) :]]


def cosine_with_cooldown(
    optimizer: torch.optim.Optimizer, *, warmup: int, decay_until: int, lowest: float
) -> LambdaLR:
    """Schedule: linear warm-up, half a cosine, then the lowest learning rate.

    Args:
        optimizer: optimizer whose learning rates are the highest ones.
        warmup: number of steps from 0 to the highest learning rate.
        decay_until: step that reaches the lowest learning rate; later steps keep it.
        lowest: lowest learning rate as a fraction of the highest.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        progress = min(1.0, (step - warmup) / max(1, decay_until - warmup))
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2

    return _OwnGroups(optimizer, factor)
