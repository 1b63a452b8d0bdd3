"""Which parameter learns how fast, and when: groups for AdamW, and the learning rate by step."""

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
    """Parameters with and without weight decay, and by layer where their learning rates differ.

    Without are vectors (norms, biases) and what the model adds to its input (positions, class,
    distillation and mask tokens).

    Args:
        model: a classifier of this library.
        weight_decay: of those that decay.
        learning_rate: of what comes after the last layer.
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
    """0 for the embeddings, i + 1 for layer i, and one more for what comes after the last."""
    found = re.match(r"\w+\.(?:(embeddings|pre_layrnorm)|(?:\w+\.)?layers?\.(\d+))\.", name)
    if found is None:
        return layers + 1
    return 0 if found[1] else int(found[2]) + 1


class _OwnGroups(LambdaLR):
    """A schedule of the groups that it was made for; what is added later keeps its own rates."""

    def get_lr(self) -> list[float | torch.Tensor]:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        pairs = zip(self.base_lrs, self.lr_lambdas, strict=True)
        own = [base * factor(self.last_epoch) for base, factor in pairs]
        return [*own, *rates[len(own) :]]


def cosine_with_cooldown(
    optimizer: torch.optim.Optimizer, *, warmup: int, decay_until: int, lowest: float
) -> LambdaLR:
    """Linear warm-up, half a cosine, and the lowest learning rate from there on.

    Args:
        optimizer: its learning rates are the highest.
        warmup: steps from 0 to the highest.
        decay_until: step at which the lowest is reached; those that follow cool down.
        lowest: part of the highest learning rate.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        progress = min(1.0, (step - warmup) / max(1, decay_until - warmup))
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2

    return _OwnGroups(optimizer, factor)
