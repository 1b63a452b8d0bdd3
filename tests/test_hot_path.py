"""What a layer costs beyond its arithmetic, by counts that do not depend on the machine."""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cli.measuring import peak_bytes
from lightning_modules.batch_augmentation import BatchAugmentation, Mixing, Normalization
from lightning_modules.labelled_images import DRAWS
from lightning_modules.rand_augment import RandAugment
from mctf_hf import (
    MCTFLVViTConfig,
    MCTFT2TViTConfig,
    MCTFViTConfig,
    MCTFViTForImageClassification,
    attention,
    matching,
    selection,
)
from mctf_hf.losses import TokenReductionConsistency
from mctf_hf.presets import PRESETS, preset
from mctf_hf.registry import BACKBONES, build
from tests.helpers import TINY, tiny_model

SMALL = {name: value for name, value in TINY.items() if name != "patch_size"}

# Operators that only look at memory in another way.
VIEWS = {
    "view", "_unsafe_view", "transpose", "t", "slice", "select", "expand", "unsqueeze", "permute",
    "detach", "alias", "empty", "split", "_reshape_alias", "as_strided",
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """Operators as they are called, and what they are called on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = self.largest_map = 0
        self.scattered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.calls[name] += 1
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.numel())
            if name == "_softmax":
                self.largest_map = max(self.largest_map, result.numel())
            if name.startswith(("scatter", "index_add", "index_put")):
                moved = max(a.numel() for a in args[1:] if isinstance(a, torch.Tensor))
                self.scattered = max(self.scattered, moved)
        return result


class Devices(TorchDispatchMode):
    """Devices of all that operators take and make."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tensor.device.type)
        return result


@torch.no_grad()
def record(fusing: int = 1, batch: int = 2, **settings: Any) -> Recorder:
    """The encoder of a model of which the last layers but one fuse, as many as ``fusing``."""
    by_rate = settings.get("reduction") in ("evit", "token_mergence")
    amount = {"keep_rate": 0.875} if by_rate else {"r": 8}
    model = tiny_model(fusion_layers=list(range(4 - fusing, 4)), **amount, **settings)
    embedded = model.embed(torch.randn(batch, 3, 32, 32))
    with Recorder() as recorder:
        model(**embedded)
    return recorder


@pytest.mark.parametrize(
    ("reduction", "most"), [("mctf", 62), ("tome", 36), ("evit", 33), ("token_mergence", 45)]
)
def test_a_fused_layer_calls_few_operators(reduction: str, most: int) -> None:
    one, two = (record(fusing, reduction=reduction).calls.total() for fusing in (1, 2))
    assert 0 < two - one <= most


@pytest.mark.parametrize(
    "settings",
    [{}, {"one_step_ahead": "precise"}, {"one_step_ahead": "present"}]
    + [
        {"reduction": reduction}
        for reduction in ("tome", "pitome", "diffrate", "evit", "token_mergence")
    ],
)
def test_nothing_larger_than_the_map_or_the_mlp_is_made(settings: dict[str, Any]) -> None:
    n, batch = 65, 2
    most = max(TINY["num_attention_heads"] * n * n, n * TINY["intermediate_size"])
    assert record(**settings).largest <= batch * most


def test_only_the_tokens_that_merge_are_scattered() -> None:
    assert record().scattered == 2 * 8 * TINY["hidden_size"]


@torch.inference_mode()
def test_memory_of_a_large_batch_is_below_the_plain_models() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = preset("deit_t", r=16, num_hidden_layers=3)
    settings = {name: getattr(config, name) for name in ("hidden_size", "intermediate_size",
        "num_attention_heads", "num_hidden_layers", "num_labels")}  # fmt: skip
    plain = ViTForImageClassification(ViTConfig(**settings)).eval()
    model = MCTFViTForImageClassification(config).eval()
    pixels = torch.randn(64, 3, 224, 224)
    assert peak_bytes(lambda: model(pixels)) < peak_bytes(lambda: plain(pixels))


@torch.inference_mode()
def test_memory_of_a_large_image_stays_bounded() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = preset("deit_t", r=0.08, num_hidden_layers=2, image_size=1024)
    settings = {name: getattr(config, name) for name in ("hidden_size", "intermediate_size",
        "num_attention_heads", "num_hidden_layers", "image_size")}  # fmt: skip
    plain = ViTForImageClassification(ViTConfig(**settings)).eval()
    model = MCTFViTForImageClassification(config).eval()
    pixels = torch.randn(1, 3, 1024, 1024)
    assert peak_bytes(lambda: model(pixels)) < 1.5 * peak_bytes(lambda: plain(pixels))


@pytest.mark.parametrize(
    "config",
    [
        MCTFViTConfig(**TINY, r=6, drop_path_rate=0.1),
        MCTFViTConfig(**TINY, r=6, one_step_ahead="precise", pooling="max"),
        MCTFViTConfig(**TINY, r=6, one_step_ahead="past", class_token=False),
        MCTFViTConfig(**TINY, r=6, one_step_ahead="present", key_share=0.2, class_share=0.5),
        MCTFViTConfig(**TINY, r=6, reduction="tome"),
        MCTFViTConfig(**TINY, r=6, reduction="pitome"),
        MCTFViTConfig(**TINY, r=6, reduction="diffrate", dropped=2, restore=False),
        MCTFViTConfig(**TINY, reduction="evit", keep_rate=0.7),
        MCTFViTConfig(**TINY, reduction="token_mergence", keep_rate=0.7, multi_scale=[2]),
        MCTFT2TViTConfig(**SMALL, r=1, min_tokens=1, tokens_type="transformer"),
        MCTFT2TViTConfig(**SMALL, r=1, min_tokens=1, tokens_type="performer"),
        MCTFLVViTConfig(**TINY, r=6),
    ],
    ids=lambda config: f"{config.model_type} {config.reduction} {config.one_step_ahead}",
)
def test_a_step_stays_on_its_device_and_waits_for_nothing(
    config: MCTFViTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of the meta device have no values to ask for, and go with those of no other.

    None is made on a CPU either, to be copied. So a stream of a GPU, and a graph that is captured
    there, holds all that a step does.
    """
    for module in (matching, selection):  # autocast does not know the device
        monkeypatch.setattr(module, "full_precision", lambda x: nullcontext())
    model = build(config).to("meta").train()
    images = torch.empty(4, 3, 32, 32, device="meta")
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    with Devices() as devices:
        passes = [model(images, output_fusion=True, **how) for how in ({}, {"r": 0})]
        loss = TokenReductionConsistency()(
            *(part for output in passes for part in (output.logits, output.features)), labels
        )
        loss.total.backward()
    assert devices.seen == {"meta"}
    assert {p.grad.device.type for p in model.parameters() if p.grad is not None} == {"meta"}
    assert passes[0].assignment.device.type == "meta" and passes[0].token_sizes.shape[1] < 65


@torch.no_grad()
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("asked", [{}, {"output_fusion": True}])
def test_encoders_stay_on_their_device(
    name: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (matching, selection):
        monkeypatch.setattr(module, "full_precision", lambda x: nullcontext())
    found = (one for one in PRESETS if type(preset(one)).model_type == name)
    config = preset(next(found), num_hidden_layers=3, image_size=112, r=0.1)
    with torch.device("meta"):
        model, images = BACKBONES[name].model(config).eval(), torch.empty(2, 3, 112, 112)
    with Devices() as devices:
        hidden_states = model(images, **asked).last_hidden_state
    assert hidden_states.shape[0] == 2 and devices.seen == {"meta"}


def test_batches_are_augmented_without_asking_for_their_values() -> None:
    policy, mixing = RandAugment.parse("rand-m9-mstd0.5-inc1"), Mixing(0.8, 1.0)
    augmentation = BatchAugmentation(Normalization(), 10, policy, mixing=mixing)
    draws = np.random.default_rng(0).integers(DRAWS, size=(64, augmentation.num_draws))
    images = torch.empty(64, 3, 32, 32, dtype=torch.uint8, device="meta")
    labels = torch.empty(64, dtype=torch.int64, device="meta")
    images, labels = augmentation(images, labels, draws)
    assert images.device.type == labels.device.type == "meta" and labels.shape == (64, 10)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"reduction": "tome"}, {"one_step_ahead": "present"}, {}])
def test_a_fused_model_attends_by_the_faster_way(
    settings: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all layers of a model that fuses, those of many tokens; and nobody sees a difference."""
    model = tiny_model(r=[0, 0, 8, 8], num_hidden_layers=4, **settings).to(dtype)
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    with Recorder() as own:
        logits = model(images).logits
    assert own.calls["softmax" if "softmax" in own.calls else "_softmax"] >= 3
    monkeypatch.setattr(attention, "FASTER_BY_MAP", {})
    with Recorder() as kernel:
        torch.testing.assert_close(model(images).logits, logits, atol=0.02, rtol=0.02)
    kernels = [name for name in kernel.calls if "scaled_dot_product" in name]
    assert sum(kernel.calls[name] for name in kernels) > sum(own.calls[n] for n in kernels)


@torch.inference_mode()
def test_a_map_that_is_not_held_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, which give the output of attention and what tokens receive in one pass."""
    model = tiny_model(r=8, one_step_ahead="present", key_share=0.2)
    images = torch.randn(2, 3, 32, 32)
    expected = model(images, output_fusion=True)
    monkeypatch.setattr(attention, "MAP_BYTES", 0)
    monkeypatch.setattr(attention, "FASTER_BY_MAP", {})
    monkeypatch.setattr(attention, "BLOCK_BYTES", 2 * 2 * 65 * 4 * 20)  # twenty rows
    with Recorder() as recorder:
        found = model(images, output_fusion=True)
    torch.testing.assert_close(found.logits, expected.logits)
    assert torch.equal(found.assignment, expected.assignment)
    kernels = sum(n for name, n in recorder.calls.items() if "scaled_dot_product" in name)
    fusing = sum(map(bool, model.config.tokens_fused(65)))
    assert kernels == model.config.num_hidden_layers - fusing
    assert recorder.largest_map < 2 * 2 * 65 * 65
