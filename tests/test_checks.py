"""Numbers that are none or infinite: refused where they come in, and never written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTImageProcessorPil

from cli.main import main
from lightning_modules.amounts import add_up
from mctf_hf.export import to_torch_export
from mctf_hf.hub import save
from tests.helpers import DIGITS, in_timm_names, tiny_model

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
WEIGHT = "vit.layers.2.mlp.fc1.weight"


def spoilt(value: float) -> Any:
    model = tiny_model(num_labels=10, r=4)
    with torch.no_grad():
        model.get_parameter(WEIGHT)[1, 2] = value
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with one weight that is no number."""
    folder = tmp_path / "spoilt"
    spoilt(float("nan")).save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


def edit(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def refused(capsys: pytest.CaptureFixture, *words: str | Path) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_every_command_refuses_weights_that_are_no_numbers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    on_digits = ("--data.dataset", DIGITS, "--model.pretrained", folder, "--trainer.logger=false")
    for words in (
        ("benchmark", folder),
        ("benchmark", folder, "--accuracy", DIGITS),
        ("export", folder, "--output", "m.pt2"),
        ("convert", folder, "--output", "m"),
        ("visualize", folder, "--images", DIGITS, "--output", "m.png"),
        ("push", folder, "you/model", "--license", "mit", "--dry-run", "draft"),
        ("fit", *on_digits),
        ("test", *on_digits),
        ("predict", "--data.predict_folder", DIGITS, "--model.pretrained", folder),
    ):
        message = refused(capsys, *words)
        assert f"spoilt is not used: weights are infinite or no numbers in {WEIGHT}" in message
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_files_of_such_weights_are_not_converted(
    value: float, capsys: pytest.CaptureFixture
) -> None:
    torch.save(in_timm_names(spoilt(value).state_dict()), "vit.pth")
    message = refused(capsys, "convert", "vit.pth", "--output", "m", "--num_heads", "2")
    assert "vit.pth: the checkpoint is not used" in message and "in blocks.2.mlp.fc1" in message
    assert not Path("m").exists()


def test_such_models_are_not_saved_or_exported(tmp_path: Path) -> None:
    model = spoilt(float("-inf"))
    with pytest.raises(ValueError, match=f"infinite or no numbers in {WEIGHT}"):
        save(model, PROCESSOR, tmp_path / "model")
    with pytest.raises(ValueError, match=f"infinite or no numbers in {WEIGHT}"):
        to_torch_export(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_std", [0.5, 0, 0.5]),
        ("image_std", float("nan")),
        ("image_mean", [float("inf")] * 3),
        ("rescale_factor", 0),
    ],
)
def test_processors_that_divide_by_nothing_are_refused(
    name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = save(tiny_model(num_labels=10), PROCESSOR, tmp_path / "model")
    edit(folder / "preprocessor_config.json", **{name: value})
    message = refused(capsys, "benchmark", folder, "--accuracy", DIGITS)
    assert f"model: {name}=" in message and "of the image processor is not allowed" in message


def test_scores_that_are_no_numbers_are_no_accuracy() -> None:
    model = tiny_model(r=4)
    with torch.no_grad():
        model.classifier.weight.fill_(3e38)  # finite, but the scores are not
    batch = {"pixel_values": torch.randn(3, 3, 32, 32), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match="r 4: the scores of 3 of 3 images are infinite or no num"):
        add_up(model, [batch], [{"r": 4}])
