"""How much a real DINOv2 loses by fusion, on a probe of its class token and on a dense task.

    python benchmarks/encoders.py results.json

Photographs, weights and the probe's protocol lie in the folder that MCTF_SHARED names (../shared
unless set): a DINOv2-small that was finetuned for saliency, with its decoder, and Caltech-101.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Dinov2Model

from mctf_hf import fuse_tokens, fusion_of
from mctf_hf.cost import describe, resolve_budget
from mctf_hf.files import write_text
from mctf_hf.hub import load_image_processor

SHARED = Path(os.environ.get("MCTF_SHARED", Path(__file__).parents[2] / "shared"))
CHECKPOINT = SHARED / "checkpoints" / "dinov2-small-saliency"
BUDGETS = (0.85, 0.7, 0.56, 0.45)
METHODS: dict[str, dict[str, Any]] = {
    "mctf": {"reduction": "mctf"},
    "tome": {"reduction": "tome"},
    "evit": {"reduction": "evit"},
    "token_mergence": {"reduction": "token_mergence"},
}
# Settings that were measured elsewhere, to compare with.
KNOWN: dict[str, dict[str, Any]] = {
    "mctf r 22": {"reduction": "mctf", "r": 22},
    "tome r 18": {"reduction": "tome", "r": 18},
}
DENSE = 200  # photographs for the dense task
SIZE = 224


class SaliencyDecoder(nn.Module):
    """The head of the dense task: patches (b, 256, 384) -> saliency (b, 1, 224, 224) in (0, 1)."""

    def __init__(self, file: Path):
        super().__init__()
        for i, (entering, leaving) in enumerate(((384, 256), (256, 128), (128, 64)), 1):
            upconv = nn.ConvTranspose2d(entering, leaving, 4, stride=2, padding=1)
            setattr(self, f"upconv{i}", upconv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(leaving, eps=1e-6))
        self.final_conv = nn.Conv2d(64, 1, 1)
        missing, unexpected = self.load_state_dict(load_file(file), strict=False)
        assert not unexpected and all("num_batches" in name for name in missing)
        self.eval()

    def forward(self, patches: Tensor) -> Tensor:
        x = patches.transpose(1, 2).unflatten(2, (16, 16))
        for i in (1, 2, 3):
            x = getattr(self, f"bn{i}")(getattr(self, f"upconv{i}")(x)).relu()
        size = {"size": (SIZE, SIZE), "mode": "bilinear", "align_corners": False}
        return nn.functional.interpolate(self.final_conv(x), **size).sigmoid()


class Encoder:
    """Class tokens of photographs, and on the way the saliency of the first ones of a run."""

    def __init__(self) -> None:
        self.model = fuse_tokens(Dinov2Model.from_pretrained(CHECKPOINT).eval(), r=0)
        self.decoder = SaliencyDecoder(CHECKPOINT / "saliency_decoder.safetensors")
        self.saliency: list[Tensor] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        hidden = self.model(pixels).last_hidden_state
        if sum(map(len, self.saliency)) < DENSE:
            self.saliency.append(self.decoder(hidden[:, 1:]))
        return hidden[:, 0]


def load_probe() -> Any:
    """The class of the probe, whose file is shared with other measurements."""
    spec = importlib.util.spec_from_file_location("probe", SHARED / "tools" / "caltech_probe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Probe


def check_reference(encoder: Encoder) -> dict[str, float]:
    """Largest differences from the original program's outputs, without fusion."""
    known = load_file(CHECKPOINT / "reference.safetensors")
    with torch.inference_mode():
        hidden = encoder.model(known["pixel_values"]).last_hidden_state
        saliency = encoder.decoder(hidden[:, 1:])
    return {
        "last_hidden_state": (hidden - known["last_hidden_state"]).abs().max().item(),
        "saliency": (saliency - known["saliency"]).abs().max().item(),
    }


def settings_by_name(model: Any) -> dict[str, dict[str, Any]]:
    """All settings that are measured, budgets worked out for images of 224 x 224 pixels."""
    found = dict(KNOWN)
    for name, method in METHODS.items():
        for budget in BUDGETS:
            with fusion_of(model, **method) as fusion:
                amount = fusion.settings.reducer_class.amount
                value = resolve_budget(model, amount, f"auto:{budget}", image_size=SIZE)
            found[f"{name} {budget}"] = {**method, amount: value}
    return found


def main(file: str) -> None:
    """Measure, print a table and write JSON."""
    encoder = Encoder()
    print("differences from the original program:", check_reference(encoder))
    probe = load_probe()(encoder, load_image_processor(str(CHECKPOINT)))
    encoder.saliency.clear()
    probe.features(encoder, probe.test_pixels[:DENSE])
    plain = torch.cat(encoder.saliency)
    described = describe(encoder.model, SIZE)
    rows = []
    for name, settings in settings_by_name(encoder.model).items():
        encoder.saliency.clear()
        with fusion_of(encoder.model, **settings) as fusion:
            scores = probe.score(encoder)
            gmacs = described.of(fusion.settings) / 1e9
        saliency = torch.cat(encoder.saliency)[:DENSE]
        pair = torch.stack([saliency.flatten(), plain[:DENSE].flatten()])
        rows.append(
            {
                "setting": name,
                **settings,
                "gmacs": gmacs,
                "budget": gmacs * 1e9 / described.of(fusion.settings, r=0),
                **{key: float(value) for key, value in scores.items()},
                "saliency_difference": (pair[0] - pair[1]).abs().mean().item(),
                "saliency_correlation": torch.corrcoef(pair)[0, 1].item(),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    write_text(file, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:2])
