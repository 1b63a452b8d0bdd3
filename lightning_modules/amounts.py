"""Accuracy of a model at several amounts of token reduction, and texts about these amounts."""

from collections.abc import Iterable
from typing import Any

import torch

from lightning_modules.labels import are_counted
from mctf_hf import MCTFViTConfig, MCTFViTForImageClassification
from mctf_hf.checks import check_scores
from mctf_hf.cost import Description, keep_rate_for_budget, r_for_budget
from mctf_hf.problems import quality

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)

Amount = dict[str, Any]  # keyword argument of the model: r or keep_rate


def amount_text(amount: Amount) -> str:
    """Text for an amount, such as ``r 16``."""
    return ", ".join(f"{name} {value}" for name, value in amount.items())


def fusion_text(config: MCTFViTConfig, described: Description) -> str:
    """One line of text: the tokens that a model fuses, and the multiply-accumulates it saves."""
    tokens, plain = config.num_tokens(), described.unfused / 1e9
    cost = described.of(config) / 1e9
    fused = config.tokens_fused(tokens)
    if not any(fused):
        return f"none: all {tokens} tokens stay, {cost:.4f} GMACs"
    saved = f"{cost:.4f} GMACs, {plain:.4f} without ({100 * (cost / plain - 1):+.0f}%)"
    return (
        f"{config.reduction}, {amount_text(config.own_amount())}: {tokens} tokens become "
        f"{tokens - sum(fused)} (by layer: {', '.join(map(str, fused))} fewer); {saved}"
    )


def sweep(config: MCTFViTConfig) -> list[Amount]:
    """The configured amount, and amounts that meet several budgets of multiply-accumulates."""
    settings = [config.own_amount()]
    if config.reducer_class is None:
        return settings
    name = config.reducer_class.amount
    tokens = config.num_tokens()
    known = {config.tokens_fused(tokens)}
    for budget in BUDGETS:
        try:
            if name == "keep_rate":
                amount: Amount = {name: keep_rate_for_budget(config, budget)}
            else:
                amount = {name: r_for_budget(config, budget)[0]}
        except ValueError:  # no amount meets this budget or a smaller one
            break
        if config.tokens_fused(tokens, **amount) not in known:
            known.add(config.tokens_fused(tokens, **amount))
            settings.append(amount)
    return settings


@torch.inference_mode()
def add_up(
    model: MCTFViTForImageClassification,
    batches: Iterable[dict[str, Any]],
    settings: Iterable[Amount],
) -> tuple[torch.Tensor, int]:
    """Sum of :class:`.Quality` per setting, (settings,) float64, and number of labelled images."""
    amounts, judge = list(settings), quality(model.config).of
    sums = torch.zeros(len(amounts), dtype=torch.float64)
    total = 0
    for batch in batches:
        images = batch["pixel_values"].to(model.device, model.dtype)
        labels = batch["labels"].to(model.device)
        counted = are_counted(labels)
        total += int(counted.sum())
        for i, amount in enumerate(amounts):
            scores = model(images, **as_counts(model.config, images, amount)).logits
            logits = check_scores(scores, amount_text(amount))
            sums[i] += judge(logits[counted], labels[counted]).sum().cpu()
    return sums, total


def as_counts(config: MCTFViTConfig, images: torch.Tensor, amount: Amount) -> Amount:
    """Replace ``r`` by the tokens that each layer fuses of images (b, c, height, width)."""
    if not amount.get("r"):
        return amount
    num_tokens = config.num_tokens((images.shape[-2], images.shape[-1]))
    return {"r": list(config.tokens_fused(num_tokens, **amount))}
