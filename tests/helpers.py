"""What tests of any kind need: places, small models, known numbers, commands and their words."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cli.main import main
from mctf_hf import MCTFViTConfig, MCTFViTForImageClassification

REPOSITORY = Path(__file__).parent.parent
SHARED = Path(os.environ.get("MCTF_SHARED", REPOSITORY.parent / "shared"))
DIGITS = str(REPOSITORY / "data" / "digits")

# A model small enough to run in milliseconds; golden/ has weights of this shape.
TINY: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 24,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_labels": 5,
    "layer_norm_eps": 1e-6,
}


def docs_script(name: str) -> Any:
    """A script of docs/, as a module."""
    file = REPOSITORY / "docs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


class Golden:
    """Tensors of one file in golden/, computed with the official implementations."""

    def __init__(self, name: str):
        self.file = safe_open(REPOSITORY / "tests" / "golden" / f"{name}.safetensors", "pt")
        self.cases: dict[str, dict[str, Any]] = json.loads(self.file.metadata()["cases"])
        self.names = set(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def weights(self, prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): self[name] for name in self.names if name.startswith(prefix)
        }


def needs_shared(folder: str) -> pytest.MarkDecorator:
    """Skip where the larger real data is not at hand; MCTF_SHARED says where it lies."""
    return pytest.mark.skipif(
        not (SHARED / folder).exists(), reason=f"{folder} is not in MCTF_SHARED={SHARED}"
    )


def tiny_model(**settings: Any) -> MCTFViTForImageClassification:
    torch.manual_seed(0)
    return MCTFViTForImageClassification(MCTFViTConfig(**{**TINY, **settings})).eval()


def in_timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a ViT of transformers as timm would name them."""
    renamed = {}
    for name, tensor in weights.items():
        name = name.replace("vit.embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("vit.embeddings.position_embeddings", "pos_embed")
        name = name.replace("vit.embeddings.", "").replace("vit.layernorm", "norm")
        name = name.replace("vit.layers", "blocks").replace("classifier", "head")
        name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        name = name.replace("attention.o_proj", "attn.proj").replace("attention", "attn")
        parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if "q_proj" in name:
            joined = [f"vit.layers.{part.removeprefix('blocks.')}" for part in parts]
            joined = [part.replace("attn", "attention") for part in joined]
            renamed[name.replace("q_proj", "qkv")] = torch.cat([weights[part] for part in joined])
        elif "k_proj" not in name and "v_proj" not in name:
            renamed[name] = tensor
    return renamed


def count(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> int:
    """Multiply-accumulates of a forward pass, as an independent counter sees them."""

    def normalised(shape: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * 5 * torch.Size(shape).numel()

    norms = {torch.ops.aten.native_layer_norm: normalised}
    with FlopCounterMode(display=False, custom_mapping=norms) as counter, torch.no_grad():
        model(*inputs, **options)
    return counter.get_total_flops() // 2


def mctf(*words: str | Path, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cli.main", *map(str, words)]
    own = {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **own}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line of an error."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("mctf: error: ")]
    return line


def predict_words(model: Path | str, photos: Path | str, *more: str) -> list[str]:
    return [
        "predict", "--model.pretrained", str(model), "--data.predict_folder", str(photos),
        "--data.num_workers", "0", "--trainer.accelerator", "cpu", "--trainer.logger", "false",
        "--trainer.enable_progress_bar", "false", *more,
    ]  # fmt: skip


def fit_words(folder: Path, pretrained: Path) -> list[str | Path]:
    return [
        "fit",
        "--model.pretrained", pretrained,
        "--model.r", "6",
        "--model.r_max", "3",
        "--model.drop_path_rate", "0.1",
        "--model.learning_rate", "0.02",
        "--data.dataset", DIGITS,
        "--data.batch_size", "32",
        "--data.num_workers", "1",
        "--data.crop", "padded",
        "--trainer.accelerator", "cpu",
        "--trainer.default_root_dir", folder,
        "--trainer.logger", "CSVLogger",
        "--trainer.logger.save_dir", folder,
        "--trainer.logger.name", "",
        "--trainer.logger.version", "run",
        "--trainer.max_epochs", "2",
        "--trainer.log_every_n_steps", "1",
        "--last.every_n_train_steps", "5",
        "--export.folder", folder / "model",
    ]  # fmt: skip
