"""Any encoder of transformers with fusion: against a literal implementation, and on its own."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from mctf_hf import fuse_tokens, fusion_of
from tests.helpers import Golden

ENCODERS = Golden("encoders")
COMPOSITES = Golden("composites")
EXACT = {"atol": 1e-5, "rtol": 0}
SETTINGS = ("reduction", "r", "one_step_ahead", "fusion_layers", "min_tokens", "rope_positions")


def golden_model(golden: Golden, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a case in transformers, and its settings of fusion."""
    case = golden.cases[name]
    model_class = getattr(transformers, case["class"])
    model = model_class(model_class.config_class.from_dict(case["config"])).eval()
    weights = golden.weights(f"{case['family']}/model.")
    if any(".attention.attention.query." in name for name in model.state_dict()):
        weights = {_before_5_18(name): weight for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("position_ids" in name for name in missing)
    return model, {key: case[key] for key in SETTINGS if key in case}


def _before_5_18(name: str) -> str:
    """What older releases of transformers call a weight of DINOv2."""
    for new, old in {"q_proj": "query", "k_proj": "key", "v_proj": "value"}.items():
        name = name.replace(f".attention.{new}.", f".attention.attention.{old}.")
    return name.replace(".attention.o_proj.", ".attention.output.dense.")


def test_all_reference_cases_are_there() -> None:
    assert (len(ENCODERS.cases), len(COMPOSITES.cases)) == (19, 4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ENCODERS.cases)
@torch.no_grad()
def test_outputs_equal_those_of_a_literal_implementation(name: str, attention: str) -> None:
    model, settings = golden_model(ENCODERS, name)
    model.set_attn_implementation(attention)
    pixels = ENCODERS[f"{name}/pixel_values"]
    fields = [
        key.split("/")[1].removeprefix("unfused_")
        for key in ENCODERS.names
        if key.startswith(f"{name}/unfused_")
    ]
    assert fields
    plain = model(pixels)
    fused = fuse_tokens(model, **settings)(pixels)
    assert type(fused) is type(plain) and list(fused) == list(plain)
    for field in fields:
        torch.testing.assert_close(plain[field], ENCODERS[f"{name}/unfused_{field}"], **EXACT)
        torch.testing.assert_close(fused[field], ENCODERS[f"{name}/{field}"], **EXACT)
    told = model(pixels, output_fusion=True)
    assert torch.equal(told.assignment, ENCODERS[f"{name}/source"])
    torch.testing.assert_close(told.token_sizes, ENCODERS[f"{name}/token_size"], **EXACT)


@pytest.mark.parametrize("name", COMPOSITES.cases)
@torch.no_grad()
def test_models_with_an_encoder_in_them(name: str) -> None:
    model, settings = golden_model(COMPOSITES, name)
    inputs = {
        key: COMPOSITES[f"{name}/{key}"]
        for key in ("pixel_values", "input_ids")
        if f"{name}/{key}" in COMPOSITES.names
    }
    plain = model(**inputs)
    fuse_tokens(model, **settings)
    with fusion_of(model) as record:
        fused = model(**inputs)
    assert torch.equal(record.assignment, COMPOSITES[f"{name}/source"])
    (field,) = COMPOSITES.cases[name]["fields"]
    for output, prefix in ((plain, "unfused_"), (fused, "")):
        found = output[field]
        found = (
            {f"{field}.{i}": one for i, one in enumerate(found)}
            if isinstance(found, tuple)
            else {field: found}
        )
        for key, value in found.items():
            torch.testing.assert_close(value, COMPOSITES[f"{name}/{prefix}{key}"], **EXACT)
