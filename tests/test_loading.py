"""Weights in and out: any ViT checkpoint loads, and what is saved loads anywhere."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mctf_hf import MCTFViTConfig, MCTFViTForImageClassification, MCTFViTModel
from mctf_hf.hub import load_image_processor, save
from tests.helpers import REPOSITORY, TINY, tiny_model
from tests.strangers import load_as_stranger, run_as_stranger


@torch.no_grad()
def test_a_stranger_loads_what_was_saved(tmp_path: Path, images: Tensor) -> None:
    model = tiny_model(r=7)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    folders = [
        save(model, processor, tmp_path / "classifier"),
        save(model.vit, processor, tmp_path / "encoder"),
    ]
    strangers, _ = load_as_stranger(folders, images, tmp_path)
    for folder, found in zip(folders, strangers, strict=True):
        assert found["processor"].startswith("ViTImageProcessor")
        assert found["r"] == 7
        assert torch.equal(found["hidden"], model.vit(images).last_hidden_state)
        assert torch.equal(found["resaved"], found["logits"])
        for name, weight in model.vit.state_dict(prefix="vit.").items():
            assert torch.equal(found["weights"][name], weight)
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
    weights = strangers[0]["weights"]
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(strangers[0]["logits"], model(images).logits)


@torch.no_grad()
def test_a_folder_of_the_version_before_loads(tmp_path: Path) -> None:
    """With its own code and with ours; as it was pushed, with the logits that it gave."""
    folder = tmp_path / "pushed"
    shutil.unpack_archive(REPOSITORY / "tests" / "golden" / "pushed_before.zip", folder)
    known = load_file(folder / "expected.safetensors")
    images, logits = known["pixel_values"], known["logits"]
    (found,), _ = load_as_stranger([folder], images, tmp_path)
    torch.testing.assert_close(found["logits"], logits, atol=1e-6, rtol=0)
    for load in (AutoModelForImageClassification, MCTFViTForImageClassification):
        model = load.from_pretrained(folder).eval()
        assert type(model) is MCTFViTForImageClassification and model.config.r == 7
        torch.testing.assert_close(model(images).logits, logits, atol=1e-6, rtol=0)
    save(model, ViTImageProcessorPil(), folder)
    again = AutoModelForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(again(images).logits, logits, atol=1e-6, rtol=0)


def test_an_older_transformers_is_told_in_one_line(tmp_path: Path) -> None:
    folder = save(tiny_model(r=7), ViTImageProcessorPil(), tmp_path / "model")
    code = "import sys, transformers; transformers.__version__ = '4.57.6'\n"
    code += "transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)"
    done = run_as_stranger(code, folder, status=1)
    required = (REPOSITORY / "pyproject.toml").read_text()
    (floor,) = re.findall(r'"transformers>=([^,]*),', required)
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: this model needs transformers {floor} or newer, and 4.57.6 is installed: "
        "pip install --upgrade transformers"
    )
    # That release copies what the module names, and reads all that this needs before it is run.
    module = folder / "modeling_mctf_vit.py"
    named = {folder / f"{name}.py" for name in get_relative_imports(module)}
    assert named >= {Path(file) for file in get_relative_import_files(module)} - {module}


@torch.no_grad()
def test_with_the_library_no_remote_code_is_needed(tmp_path: Path, images: Tensor) -> None:
    model = tiny_model(r=7)
    model.save_pretrained(tmp_path / "model")
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    encoder = AutoModel.from_pretrained(tmp_path / "model").eval()
    assert type(classifier) is MCTFViTForImageClassification
    assert type(encoder) is MCTFViTModel
    assert torch.equal(classifier(images).logits, model(images).logits)
    assert torch.equal(encoder(images).last_hidden_state, model.vit(images).last_hidden_state)


@torch.no_grad()
def test_plain_vit_checkpoints_with_old_and_new_names(
    tiny_folder: Path, tmp_path: Path, images: Tensor
) -> None:
    plain = ViTForImageClassification.from_pretrained(tiny_folder).eval()
    expected = plain(images).logits
    old = load_file(tiny_folder / "model.safetensors")
    assert any("encoder.layer.0.attention.attention.query" in name for name in old)
    new = tmp_path / "new"
    plain.config.save_pretrained(new)
    save_file(plain.state_dict(), new / "model.safetensors", {"format": "pt"})
    assert any("layers.0.attention.q_proj" in name for name in plain.state_dict())

    for folder in (tiny_folder, new):
        model, report = MCTFViTForImageClassification.from_pretrained(
            folder, r=3, tau_info=7, skip_unread=False, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert (model.config.r, model.config.tau_info, model.config.model_type) == (
            3,
            7,
            "mctf_vit",
        )
        assert torch.equal(model.eval()(images, r=0).logits, expected)
        assert not torch.equal(model(images).logits, expected)


def test_settings_given_to_from_pretrained_are_checked(tiny_folder: Path) -> None:
    for settings, message in (
        ({"r": -1}, "r=-1 is not allowed"),
        ({"fusion_layers": [9]}, "fusion_layers=.9. is not allowed"),
        ({"r": [1, 2]}, "has 2 entries"),
    ):
        with pytest.raises(StrictDataclassError, match=message):
            MCTFViTForImageClassification.from_pretrained(tiny_folder, **settings)


def test_checkpoints_of_other_architectures_and_shapes_are_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    settings = json.loads((tiny_folder / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**settings, "model_type": "beit"}))
    with pytest.raises(ValueError, match="holds a model of type 'beit'.* 'vit'"):
        MCTFViTForImageClassification.from_pretrained(other)
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        MCTFViTForImageClassification.from_pretrained(tiny_folder, image_size=64)


def test_saving_replaces_a_model_whole_and_nothing_else(tmp_path: Path) -> None:
    processor = ViTImageProcessorPil()
    folder = save(tiny_model(), processor, tmp_path / "model")
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("of an earlier save")
    save(tiny_model(r=3), processor, folder)
    assert AutoModelForImageClassification.from_pretrained(folder).config.r == 3
    assert (folder / "notes.txt").read_text() == "mine"
    assert not list(folder.glob("model-*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_saving_that_fails_leaves_the_old_model(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: str) -> None:
            raise OSError("no space left on device")

    folder = save(tiny_model(r=3), ViTImageProcessorPil(), tmp_path / "model")
    with pytest.raises(OSError, match="no space left"):
        save(tiny_model(r=5), Broken(), folder)
    assert AutoModelForImageClassification.from_pretrained(folder).config.r == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]

    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="documents holds something else than a model"):
        save(tiny_model(), ViTImageProcessorPil(), tmp_path / "documents")


def test_the_image_processor_lies_beside_the_model(tmp_path: Path) -> None:
    folder = save(
        tiny_model(), ViTImageProcessorPil(size={"height": 32, "width": 32}), tmp_path / "m"
    )
    assert AutoImageProcessor.from_pretrained(folder).size == {"height": 32, "width": 32}
    assert MCTFViTConfig.from_pretrained(folder).hidden_size == TINY["hidden_size"]


def test_settings_from_the_future_are_told(tmp_path: Path, images: Tensor) -> None:
    """In a process of its own, for a warning is shown once in each."""
    model = tiny_model(r=7)
    folder = save(model, ViTImageProcessorPil(), tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "tau_depth": 3, "spiral": None}))
    (found,), done = load_as_stranger([folder], images, tmp_path)
    assert "settings that this version does not know" in done.stderr
    assert "no effect: spiral, tau_depth." in done.stderr
    with torch.no_grad():
        expected = model(images).logits
    assert torch.equal(found["logits"], expected)

    (folder / "config.json").write_text(json.dumps({**settings, "reduction": "spiral"}))
    with pytest.raises(
        StrictDataclassError, match="reduction='spiral' is not allowed: it must be one"
    ):
        AutoModelForImageClassification.from_pretrained(folder)


def test_no_warning_without_settings_from_the_future(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tiny_model(r=7), ViTImageProcessorPil(), tmp_path / "model")
    settings = json.loads((tiny_folder / "config.json").read_text())
    old = shutil.copytree(tiny_folder, tmp_path / "old")
    old_settings = {**settings, "finetuning_task": None, "pruned_heads": {}, "use_cache": True}
    (old / "config.json").write_text(json.dumps(old_settings))
    save(MCTFViTForImageClassification.from_pretrained(old), ViTImageProcessorPil(), tmp_path / "n")
    assert "pruned_heads" not in (tmp_path / "n" / "config.json").read_text()
    for checkpoint in (folder, tiny_folder, old, tmp_path / "n"):
        MCTFViTForImageClassification.from_pretrained(checkpoint)
    assert "does not know" not in caplog.text


def test_an_image_processors_own_code_is_not_run(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "folder")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_image_processor(str(folder))
    assert not (tmp_path / "harm").exists()


def test_a_tampered_auto_map_runs_nothing_without_consent(tmp_path: Path) -> None:
    folder = save(tiny_model(r=7), ViTImageProcessorPil(), tmp_path / "model")
    harm = tmp_path / "harm"
    (folder / "evil.py").write_text(f"open({str(harm)!r}, 'w').close()\nclass Model: pass\n")
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = dict.fromkeys(settings["auto_map"], "evil.Model")
    (folder / "config.json").write_text(json.dumps(settings))
    assert AutoModelForImageClassification.from_pretrained(folder).config.r == 7  # our own classes
    assert MCTFViTForImageClassification.from_pretrained(folder).config.r == 7

    code = "import sys; from transformers import AutoModelForImageClassification as Auto\n"
    done = run_as_stranger(f"{code}Auto.from_pretrained(sys.argv[1])", folder, status=1)
    assert "trust_remote_code=True" in done.stderr
    assert not harm.exists()
