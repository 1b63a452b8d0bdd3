"""Ways to attend that a GPU takes, on a CPU: equal to the one that a CPU takes."""

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mctf_hf import MCTFDINOv3ViTConfig, MCTFDINOv3ViTModel, attention
from mctf_hf.attention import Attention, apply_by_kernel
from tests.helpers import REPOSITORY, tiny_model

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


@torch.no_grad()
def test_without_triton_plain_operators_tell_what_tokens_receive(
    images: Tensor, monkeypatch: Any
) -> None:
    model = made_model(rotary=False)
    expected = model(images).logits
    monkeypatch.setattr(attention, "BY_TRITON", {"cpu": (torch.float32,)})
    monkeypatch.setattr("mctf_hf.kernels.triton", None)
    assert torch.equal(model(images).logits, expected)


INTERPRETED = """
import torch
from mctf_hf import attention, kernels
from mctf_hf.attention import Attention, apply_by_kernel
from tests.test_hot_path import Recorder
from tests.test_kernels import made_model, output_and_gradients

torch.manual_seed(0)
for dtype, rounding in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
    for batch, heads, tokens, channels in ((2, 3, 65, 64), (1, 6, 197, 64), (2, 2, 70, 12)):
        made = torch.randn(3, batch, tokens, heads, channels).transpose(2, 3).to(dtype)
        sizes = torch.randint(1, 9, (batch, 1, 1, tokens)).log().to(dtype)
        for bias in (None, sizes, sizes[:1]):
            exact = Attention(
                *made[:2].double(), None if bias is None else bias.double(), channels**-0.5
            )
            output, means = kernels.attend(*made, bias, channels**-0.5)
            expected = apply_by_kernel(exact, made[2].double())
            torch.testing.assert_close(output.double(), expected, atol=rounding, rtol=rounding)
            torch.testing.assert_close(means.double(), exact.received(), atol=1e-7, rtol=1e-5)
            alone = kernels.attention_received(*made[:2], bias, channels**-0.5)
            assert torch.equal(alone, means)

images = torch.randn(2, 3, 32, 32)
for settings in ({}, {"one_step_ahead": "present"}, {"one_step_ahead": "precise"}):
    for rotary in (False, True):
        model = made_model(rotary, **settings)
        attention.BY_TRITON = {}
        with torch.no_grad():
            expected = model(images, output_fusion=True)
        gradients = output_and_gradients(model, images)
        attention.BY_TRITON = {"cpu": (torch.float32,)}
        with torch.no_grad(), Recorder() as recorder:
            found = model(images, output_fusion=True)
        assert not recorder.largest_map
        torch.testing.assert_close(found[0], expected[0])
        assert torch.equal(found.assignment, expected.assignment)
        for one, other in zip(output_and_gradients(model, images), gradients, strict=True):
            torch.testing.assert_close(one, other)  # none flows through kernels
"""


@pytest.mark.skipif(
    find_spec("triton") is None,
    reason="Triton is not installed: pip install --target FOLDER triton, PYTHONPATH=FOLDER pytest",
)
def test_kernels_equal_the_plain_way_in_tritons_interpreter() -> None:
    """Not in bfloat16, whose products the interpreter takes of their bits."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
