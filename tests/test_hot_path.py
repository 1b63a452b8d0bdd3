"""What a layer costs beyond its arithmetic, by counts that do not depend on the machine."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cli.measuring import peak_bytes
from mctf_hf import MCTFViTForImageClassification
from mctf_hf.presets import preset
from tests.conftest import TINY, tiny_model

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
        self.largest = 0
        self.scattered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.calls[name] += 1
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.largest = max(self.largest, tensor.numel())
            if name.startswith(("scatter", "index_add", "index_put")):
                moved = max(a.numel() for a in args[1:] if isinstance(a, torch.Tensor))
                self.scattered = max(self.scattered, moved)
        return result


@torch.no_grad()
def record(layer: int = 3, n: int = 65, batch: int = 2, **settings: Any) -> Recorder:
    model = tiny_model(**settings)
    hidden_states, sizes = torch.randn(batch, n, 24), torch.ones(batch, n)
    with Recorder() as recorder:
        model.vit.layers[layer](hidden_states, None, sizes, 8)
    return recorder


def test_a_fused_layer_calls_few_operators() -> None:
    plain = record(reduction="none").calls.total()
    assert record().calls.total() - plain <= 72
    assert record(reduction="tome").calls.total() - plain <= 42
    assert record(reduction="evit").calls.total() - plain <= 50
    assert record(reduction="token_mergence").calls.total() - plain <= 50


@pytest.mark.parametrize(
    "settings",
    [{}, {"one_step_ahead": "precise"}]
    + [{"reduction": reduction} for reduction in ("tome", "evit", "token_mergence")],
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
