"""Each mistake of the page, made: the program prints what the page says."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from cli.main import main
from mctf_hf.hub import load_image_processor, save
from tests.helpers import DIGITS, REPOSITORY, TINY, tiny_model

PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
BLOCK = r"```{}\n(.*?)```"
SECTIONS = {
    section.partition("\n")[0]: section for section in re.split(r"^### ", PAGE, flags=re.M)[1:]
}
UNTRUSTED = "Loading without trust"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models under the names that the page has, and images."""
    folder = tmp_path_factory.mktemp("troubleshooting")
    torch.manual_seed(0)
    large = {**TINY, "image_size": 224, "patch_size": 32, "num_hidden_layers": 12}
    for name, config, size in (
        ("facebook/deit-tiny-patch16-224", ViTConfig(**large), 224),
        ("five-classes", ViTConfig(**TINY), 32),
    ):
        ViTForImageClassification(config).save_pretrained(folder / name)
        ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder / name)
    dino = Dinov2Config(
        hidden_size=24, num_attention_heads=2, num_hidden_layers=2, image_size=32, patch_size=4
    )
    Dinov2Model(dino).save_pretrained(folder / "facebook/dinov2-small")
    processor = load_image_processor(str(folder / "five-classes"))
    save(tiny_model(), processor, folder / "outputs/digits/model")
    for name in ("photos/1.png", "photos/2.png", "damaged/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.effect_noise((40, 40), 60).convert("RGB").save(folder / name)
    (folder / "damaged/b.png").write_text("no image")
    (folder / "data").mkdir()
    (folder / "data" / "digits").symlink_to(DIGITS)
    return folder


def says(found: str, told: str) -> bool:
    """Whether a text holds what the page tells, which leaves out something at each ellipsis."""
    parts = [re.escape(" ".join(part.split())) for part in told.split("…")]
    return re.search(" ?.*? ?".join(parts), " ".join(found.split())) is not None


def test_there_are_twenty() -> None:
    assert len(SECTIONS) == 20


@pytest.mark.parametrize("title", [title for title in SECTIONS if title != UNTRUSTED])
def test_the_mistake_gets_the_message(
    title: str,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(models)
    (told,) = re.findall(BLOCK.format("text"), SECTIONS[title], re.DOTALL)
    commands = re.findall(BLOCK.format("console"), SECTIONS[title], re.DOTALL)
    found = []
    try:
        for line in commands:
            main(shlex.split(line)[1:])
        for code in re.findall(BLOCK.format("python"), SECTIONS[title], re.DOTALL):
            exec(code, {})
    except SystemExit as stopped:
        assert stopped.code
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    found += [capsys.readouterr().err, caplog.text]
    assert says("\n".join(found), told), found


def test_code_of_others_needs_trust(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (told,) = re.findall(BLOCK.format("text"), SECTIONS[UNTRUSTED], re.DOTALL)
    monkeypatch.chdir(models)
    file = Path("outputs/digits/model/config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model_type": "of_somebody_else"}))
    try:
        with pytest.raises(ValueError) as refused:
            AutoModelForImageClassification.from_pretrained(
                "outputs/digits/model", trust_remote_code=False
            )
    finally:
        file.write_text(json.dumps(config))
    assert says(str(refused.value), told)
