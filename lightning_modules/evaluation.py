"""How accurate a model is with its own and with other r."""

from collections.abc import Iterable
from typing import Any

import torch

from mctf_hf import MCTFViTConfig, MCTFViTForImageClassification
from mctf_hf.configuration_mctf import TokensFused
from mctf_hf.cost import r_for_budget

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)


def sweep(config: MCTFViTConfig) -> list[TokensFused]:
    """The own r, and those that meet a few budgets of multiply-accumulates."""
    if config.reduction == "none":
        return [0]
    settings: list[TokensFused] = [config.r]
    tokens = config.num_tokens()
    known = {config.tokens_fused(tokens, config.r)}
    for budget in BUDGETS:
        try:
            r = r_for_budget(config, budget)[0]
        except ValueError:  # these layers can't fuse as much
            break
        if config.tokens_fused(tokens, r) not in known:
            known.add(config.tokens_fused(tokens, r))
            settings.append(r)
    return settings


@torch.inference_mode()
def count_right(
    model: MCTFViTForImageClassification,
    batches: Iterable[dict[str, Any]],
    settings: Iterable[TokensFused],
) -> tuple[torch.Tensor, int]:
    """Images classified right by setting of r, (settings,) int64, and how many there are."""
    rs = list(settings)
    right = torch.zeros(len(rs), dtype=torch.int64)
    total = 0
    for batch in batches:
        images = batch["pixel_values"].to(model.device, model.dtype)
        labels = batch["labels"].to(model.device)
        total += len(labels)
        for i, r in enumerate(rs):
            right[i] += (model(images, r=r).logits.argmax(-1) == labels).sum().cpu()
    return right, total
