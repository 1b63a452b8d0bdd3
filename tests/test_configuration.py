"""Settings: what they mean in tokens, and what is refused."""

from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st

from mctf_hf import MCTFDINOv3ViTConfig, MCTFViTConfig


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"r": 16}, [0, *[16] * 11]),
        ({"r": 0}, [0] * 12),
        ({"r": 16, "fusion_layers": [0, 2]}, [16, 0, 16, *[0] * 9]),
        ({"r": 0.35, "fusion_layers": [3, 6, 9]}, [0, 0, 0, 68, 0, 0, 44, 0, 0, 29, 0, 0]),
        ({"r": [0, 8, 0.5, *[0] * 9]}, [0, 8, 94, *[0] * 9]),
        ({"r": [7, *[0] * 11]}, [7, *[0] * 11]),
        ({"r": 1000}, [0, 98, 49, 24, 12, 4, *[0] * 6]),
        ({"r": 1000, "min_tokens": 120}, [0, 77, *[0] * 10]),
        ({"r": 16.0}, [0, *[16] * 11]),
        ({"reduction": "none"}, [0] * 12),
    ],
)
def test_tokens_fused_by_each_layer(settings: dict[str, Any], expected: list[int]) -> None:
    assert list(MCTFViTConfig(**settings).tokens_fused(197)) == expected


def test_r_of_one_call_replaces_the_setting() -> None:
    config = MCTFViTConfig(r=16)
    assert sum(config.tokens_fused(197, r=4)) == 44
    assert sum(config.tokens_fused(197, r=0)) == 0
    with pytest.raises(ValueError, match="r=-2 is not allowed"):
        config.tokens_fused(197, r=-2)
    with pytest.raises(ValueError, match="r=4 has no effect with reduction='none'"):
        MCTFViTConfig(reduction="none").tokens_fused(197, r=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": -1}, "r=-1 is not allowed: r is a count of tokens"),
        ({"r": 1.5}, "r=1.5 is not allowed"),
        ({"r": float("nan")}, "r=nan is not allowed"),
        ({"r": float("inf")}, "r=inf is not allowed"),
        ({"r": "many"}, "'r' with value 'many'"),
        ({"r": True}, "'r' with value True"),
        ({"r": [0, -1, *[0] * 10]}, r"r=\[0, -1"),
        ({"r": [1] * 13}, "has 13 entries: a list has one for each of the 12 layers"),
        ({"r": [1] * 5}, "has 5 entries"),
        ({"r": [1] * 12, "fusion_layers": [3]}, "which fusion_layers=.3. leaves out"),
        ({"fusion_layers": [12]}, r"fusion_layers=\[12\] is not allowed: .* layers 0 to 11"),
        ({"fusion_layers": [-1]}, r"fusion_layers=\[-1\] is not allowed"),
        ({"fusion_layers": [3, 3]}, "names a layer twice"),
        ({"fusion_layers": 3}, "'fusion_layers' with value 3"),
        (
            {"reduction": "prune"},
            "reduction='prune' is not allowed: it must be one of mctf, tome, pitome, diffrate, "
            "evit",
        ),
        ({"pooling": "sum"}, "pooling='sum' is not allowed: it must be one of attention_size"),
        (
            {"one_step_ahead": "future"},
            "one_step_ahead='future' is not allowed: it must be one of appr",
        ),
        ({"tau_sim": -1}, "tau_sim=-1 is not allowed: it must be a number of at least 0"),
        ({"tau_info": -0.5}, "tau_info=-0.5 is not allowed"),
        ({"tau_size": float("inf")}, "tau_size=inf is not allowed"),
        ({"min_tokens": 0}, "min_tokens=0 is not allowed"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0 is not allowed: .* below 1"),
        ({"image_size": 225}, "image_size=225 is not allowed: it is no multiple of patch_size=16"),
        ({"image_size": [224, 200]}, "is no multiple of patch_size=16"),
        ({"bidirectional": "yes"}, "bidirectional"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        MCTFViTConfig(**settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reduction": "evit", "r": 0}, "r=0 has no effect with .*: set keep_rate=1 to reduce not"),
        ({"reduction": "mctf", "keep_rate": 1}, "keep_rate=1 has no effect with .*: set r=0 to re"),
    ],
)
def test_nothing_is_asked_for_in_the_methods_own_amount(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MCTFViTConfig(**given).check_effect(given)
    MCTFViTConfig(reduction="none").check_effect({"r": 0, "keep_rate": 1})


def test_settings_of_some_encoders_are_settings_of_fusion() -> None:
    config = MCTFDINOv3ViTConfig(rope_positions="mean", r=3)
    found = config.fusion_settings()
    assert (found["rope_positions"], found["r"]) == ("mean", 3)
    assert "rope_positions" not in MCTFViTConfig().fusion_settings()
    assert MCTFViTConfig(multi_scale=[2]).fusion_settings()["multi_scale"] == [2]


def test_settings_are_checked_when_they_are_changed() -> None:
    config = MCTFViTConfig()
    with pytest.raises(StrictDataclassError, match="r=-1 is not allowed"):
        config.r = -1
    assert config.r == 16


COUNT = st.one_of(st.integers(0, 300), st.floats(0.01, 0.99))


@given(
    num_tokens=st.integers(2, 400),
    r=st.one_of(COUNT, st.lists(COUNT, min_size=12, max_size=12)),
    layers=st.none() | st.sets(st.integers(0, 11)).map(sorted),
    min_tokens=st.integers(1, 50),
)
def test_the_schedule_never_takes_more_than_there_is(
    num_tokens: int, r: Any, layers: list[int] | None, min_tokens: int
) -> None:
    layers = None if isinstance(r, list) else layers
    config = MCTFViTConfig(r=r, fusion_layers=layers, min_tokens=min_tokens)
    wanted = r if isinstance(r, list) else [r] * 12
    for layer, count in enumerate(config.tokens_fused(num_tokens)):
        patches = num_tokens - 1
        asked = int(patches * wanted[layer]) if 0 < wanted[layer] < 1 else wanted[layer]
        fuses = isinstance(r, list) or (layer in layers if layers is not None else layer > 0)
        room = max(0, min(patches // 2, num_tokens - min_tokens))
        assert count == (min(asked, room) if fuses else 0)
        num_tokens -= count
