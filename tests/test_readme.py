"""The README's code runs as it stands, but for the model that it downloads."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import yaml
from transformers import Dinov2Config, Dinov2Model

from mctf_hf.registry import BACKBONES
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_the_code_runs_and_its_comments_are_true(tiny_folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    dino = Dinov2Config(
        hidden_size=24, num_attention_heads=2, num_hidden_layers=2, image_size=32, patch_size=4
    )
    Dinov2Model(dino).save_pretrained("dinov2")
    names: dict[str, object] = {}
    for block in blocks:
        code = block.replace("facebook/deit-small-patch16-224", str(tiny_folder))
        code = code.replace("facebook/dinov2-small", "./dinov2")
        exec(compile(code, "README.md", "exec"), names)
    stated = re.findall(r"^(\S.*?)\s+# (\(.*\)|[\d.]+)$", blocks[-1], re.MULTILINE)
    assert len(stated) == 3
    for expression, value in stated:
        found = eval(expression, names)
        assert (round(found, 3) if isinstance(found, float) else found) == eval(value)


def test_every_setting_is_told_with_its_default() -> None:
    told = {}
    section = README.partition("## Settings")[2]
    for settings, defaults in re.findall(r"^\| (`.*?`) \| (.*?) \|", section, re.MULTILINE):
        names, values = re.findall(r"`(\w+)`", settings), defaults.replace("`", "").split(", ")
        told |= zip(names, values if len(values) > 1 else values * len(names), strict=True)
    for entry in BACKBONES.values():
        of_transformers = {
            field.name
            for base in entry.config.__mro__
            if base.__module__.startswith("transformers.") and is_dataclass(base)
            for field in fields(base)
        }
        for name in {field.name for field in fields(entry.config)} - of_transformers:
            default = getattr(entry.config(), name)
            if default is None or (name == "restore" and not entry.classifies):  # told in words
                assert name in told
            else:
                assert yaml.safe_load(told[name]) == default, name


def test_nothing_is_left_to_fill_in() -> None:
    for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")):
        assert "<!--" not in page.read_text(), page


def test_the_files_that_it_names_exist() -> None:
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (REPOSITORY / target).exists(), target
    for config in re.findall(r"configs/\w+\.yaml", README):
        assert (REPOSITORY / config).exists(), config
