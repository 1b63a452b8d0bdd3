"""The README's code runs as it stands, but for the model that it downloads."""

import re
from dataclasses import fields
from pathlib import Path

import yaml
from transformers import ViTConfig

from mctf_hf import MCTFLVViTConfig, MCTFT2TViTConfig, MCTFViTConfig
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_the_code_runs_and_its_comments_are_true(tiny_folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        code = block.replace("facebook/deit-small-patch16-224", str(tiny_folder))
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
    of_transformers = {field.name for field in fields(ViTConfig)}
    for config_class in (MCTFViTConfig, MCTFT2TViTConfig, MCTFLVViTConfig):
        for name in {field.name for field in fields(config_class)} - of_transformers:
            default = getattr(config_class(), name)
            if default is None:  # told in words
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
