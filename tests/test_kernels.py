"""Ways to attend that a GPU takes, on a CPU: equal to the one that a CPU takes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mctf_hf import MCTFDINOv3ViTConfig, MCTFDINOv3ViTModel, attention
from mctf_hf.attention import Attention, apply_by_kernel
from tests.conftest import tiny_model

ROTARY: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_register_tokens": 2,
}


class Kernels(TorchDispatchMode):
    """Channels of what enters each kernel of attention, and whether it had a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[set[int], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ == "_scaled_dot_product_flash_attention_for_cpu":
            channels = {one.shape[3] for one in args[:3]}
            self.calls.append((channels, kwargs.get("attn_mask") is not None))
        return func(*args, **kwargs)


def made_model(rotary: bool, **settings: Any) -> Any:
    if not rotary:
        return tiny_model(r=6, **settings)
    torch.manual_seed(0)
    return MCTFDINOv3ViTModel(MCTFDINOv3ViTConfig(**ROTARY, r=6, **settings)).eval()


def output_and_gradients(model: Any, images: Tensor) -> tuple[Tensor, ...]:
    model.zero_grad()
    output = model(images)[0]
    output.square().mean().backward()
    return output.detach(), *(one.grad for one in model.parameters() if one.grad is not None)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("settings", [{"reduction": "tome"}, {"one_step_ahead": "precise"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_as_a_channel_changes_neither_outputs_nor_gradients(
    rotary: bool, settings: dict[str, Any], dtype: torch.dtype, images: Tensor, monkeypatch: Any
) -> None:
    monkeypatch.setattr(attention, "MAP_BYTES", 0)
    model = made_model(rotary, **settings).to(dtype)
    images = images.to(dtype)
    expected = output_and_gradients(model, images)
    monkeypatch.setattr(attention, "BIAS_AS_CHANNEL", {"cpu": (dtype,)})
    with Kernels() as kernels:
        found = output_and_gradients(model, images)
    widened = [channels for channels, _ in kernels.calls if channels == {16}]
    assert widened and not any(biased for _, biased in kernels.calls)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("channels", [12, 60, 64])
def test_channels_become_a_multiple_of_eight(channels: int, monkeypatch: Any) -> None:
    query, key, value = torch.randn(3, 2, 3, 21, channels, dtype=torch.float64)
    sizes = torch.randint(1, 9, (2, 1, 1, 21)).double()
    among = Attention(query, key, sizes.log(), channels**-0.5)
    expected = apply_by_kernel(among, value)
    monkeypatch.setattr(attention, "BIAS_AS_CHANNEL", {"cpu": (torch.float64,)})
    with Kernels() as kernels:
        found = apply_by_kernel(among, value)
    torch.testing.assert_close(found, expected)
    ((widened,), biased) = kernels.calls[0]
    assert not biased and widened % 8 == 0 and channels < widened <= channels + 8


def test_a_bias_of_rows_stays_a_bias(monkeypatch: Any) -> None:
    query, key, value = torch.randn(3, 2, 3, 21, 16)
    among = Attention(query, key, torch.randn(2, 1, 21, 21), 0.25)
    expected = apply_by_kernel(among, value)
    monkeypatch.setattr(attention, "BIAS_AS_CHANNEL", {"cpu": (torch.float32,)})
    assert torch.equal(apply_by_kernel(among, value), expected)
