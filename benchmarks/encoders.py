"""The loss of a real DINOv2 when tokens are fused, on a class token probe and a dense task.

    python benchmarks/encoders.py results.json [TUNED …]

It measures all methods as in their papers, at four budgets, and the settings in folders that
``mctf tune`` wrote. Costs are reported for the class token alone and for all tokens. The folder
MCTF_SHARED (default: ../shared) contains photographs (Caltech-101), the probe's code, and weights:
a DINOv2-small that was finetuned for saliency, with its decoder.
"""

import dataclasses
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
from mctf_hf.candidates import Candidate, FittedCandidate, meet, methods_for
from mctf_hf.cost import Description, describe
from mctf_hf.files import read_object, write_text
from mctf_hf.hub import load_image_processor
from mctf_hf.model_folder import TUNING

SHARED = Path(os.environ.get("MCTF_SHARED", Path(__file__).parents[2] / "shared"))
CHECKPOINT = SHARED / "checkpoints" / "dinov2-small-saliency"
BUDGETS = (0.85, 0.7, 0.56, 0.45)
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
    """Computes class tokens of photographs; stores the saliency of at least the first ``DENSE``."""

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
    """Load the class of the probe from the shared folder."""
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


def settings_by_name(
    model: Any, described: Description, tuned: list[str]
) -> dict[str, FittedCandidate]:
    """All methods at all budgets, and the settings in folders that ``mctf tune`` wrote."""
    found = {}
    for folder in tuned:
        settings = read_object(Path(folder, TUNING))["settings"]
        with fusion_of(model, **settings) as fusion:
            cost = described.of(fusion.settings)
        found[f"tuned {Path(folder).name}"] = FittedCandidate(Candidate("tuned"), settings, cost)
    for method in methods_for(model):
        for fraction in BUDGETS:
            budget = int(fraction * described.unfused)
            found[f"{method} {fraction}"] = meet(
                model, Candidate.untuned(method), budget, described
            )
    return found


def measure(encoder: Encoder, probe: Any, plain: Tensor) -> dict[str, float]:
    """Measure the loss that the active fusion settings cause, with standard errors."""
    encoder.saliency.clear()
    features: list[Tensor] = []

    def encode(pixels: Tensor) -> Tensor:
        features.append(encoder(pixels))
        return features[-1]

    scores = {key: float(value) for key, value in probe.score(encode).items()}
    cosines = nn.functional.cosine_similarity(torch.cat(features), torch.tensor(probe.unfused))
    agreed, number = scores["agreement"] / 100, len(cosines)
    saliency = torch.cat(encoder.saliency)[:DENSE]
    pair = torch.stack([saliency.flatten(), plain.flatten()])
    return {
        **scores,
        "agreement_error": 100 * (agreed * (1 - agreed) / number) ** 0.5,
        "cosine_error": cosines.std().item() / number**0.5,
        "saliency_difference": (pair[0] - pair[1]).abs().mean().item(),
        "saliency_correlation": torch.corrcoef(pair)[0, 1].item(),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table in Markdown."""
    return (
        f"| {row['setting']} | {row['gmacs']:.3f} | {row['gmacs_of_all']:.3f} "
        f"| {row['top1'] - row['unfused_top1']:+.1f} ± {row['difference_error']:.1f} "
        f"| {row['agreement']:.1f} ± {row['agreement_error']:.1f} "
        f"| {row['cosine']:.4f} ± {row['cosine_error']:.4f} "
        f"| {row['saliency_difference']:.4f} | {row['saliency_correlation']:.3f} |"
    )


def main(file: str, *tuned: str) -> None:
    """Measure, print a table and write JSON; results in the file are not measured again."""
    encoder = Encoder()
    print("differences from the original program:", check_reference(encoder))
    probe = load_probe()(encoder, load_image_processor(str(CHECKPOINT)))
    encoder.saliency.clear()
    probe.features(encoder, probe.test_pixels[:DENSE])
    plain = torch.cat(encoder.saliency)[:DENSE]
    whole = describe(encoder.model, SIZE)
    described = dataclasses.replace(whole, num_read=1)  # cost of the class token alone
    rows = json.loads(Path(file).read_text()) if Path(file).exists() else []
    known = {row["setting"]: row["settings"] for row in rows}
    for name, setting in settings_by_name(encoder.model, described, list(tuned)).items():
        if known.get(name) == setting.settings:
            continue
        with fusion_of(encoder.model, **setting.settings) as fusion:
            row = {"setting": name, "settings": setting.settings, "gmacs": setting.cost / 1e9}
            row["gmacs_of_all"] = whole.of(fusion.settings) / 1e9
            row |= measure(encoder, probe, plain)
        rows = [*(one for one in rows if one["setting"] != name), row]
        print(line(row), flush=True)
        write_text(file, json.dumps(rows, indent=2) + "\n")
    print("\n".join(map(line, rows)))


if __name__ == "__main__":
    main(*sys.argv[1:])
