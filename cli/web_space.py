"""Writes a Space of the Hugging Face Hub to a folder: the demo page with some models."""

import re
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from mctf_hf.hub import save

from .models import load, parse
from .web_page import open_examples

APP = '''\
"""What token fusion makes of images, as `mctf web` shows it."""

import os
from pathlib import Path

from mctf_cli.web_page import serve

if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    serve({models!r}, images={images!r})
'''
REQUIREMENTS = """\
--extra-index-url https://download.pytorch.org/whl/cpu
torch=={torch}+cpu
mctf-hf[web]=={own}
"""
ABOUT = """\
# Token fusion

How a Vision Transformer fuses the tokens of an image, layer by layer, and what that changes.
Written by `mctf web --space`.
"""
LARGE = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"  # for pushes with git
MODELS, EXAMPLES = "models", "examples"
LONGEST_SIDE = 512  # maximum size of an example, in pixels


def write_space(folder: str, models: Sequence[str], images: str | None = None) -> None:
    """Write a Space: README, app and requirements, with copies of local models.

    Args:
        folder: a new or empty folder.
        models: ``NAME[,setting=value…]``. Local models are copied with their settings; models of
            the Hub are loaded when the Space starts.
        images: examples to copy, see :func:`.web_page.open_examples`; ``None`` copies none.

    Raises:
        FileExistsError: if the folder is not empty.
        ValueError, OSError: see :func:`.models.load` and :func:`.web_page.open_examples`; nothing
            is written then.
    """
    space = Path(folder)
    if space.is_file() or (space.is_dir() and any(space.iterdir())):
        raise FileExistsError(f"{space} is not empty: name a new folder")
    space.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=space.parent, prefix=".draft-") as place:
        draft = Path(place, space.name)
        draft.mkdir()
        _write_models(draft, models)
        app: dict[str, Any] = {"models": _names_there(models), "images": None}
        if images is not None:
            app["images"] = EXAMPLES
            _write_examples(draft / EXAMPLES, images)
        (draft / "app.py").write_text(APP.format(**app), encoding="utf-8")
        (draft / "README.md").write_text(_readme(models), encoding="utf-8")
        (draft / "requirements.txt").write_text(
            REQUIREMENTS.format(torch=version("torch").partition("+")[0], own=version("mctf-hf"))
        )
        (draft / ".gitattributes").write_text(LARGE)
        if space.exists():
            space.rmdir()
        draft.rename(space)


def _names_there(models: Sequence[str]) -> list[str]:
    """Names of the models in the Space; those of local models are paths in its folder."""
    there = []
    for number, words in enumerate(models, 1):
        path = Path(parse(words)[0])
        there.append(f"{MODELS}/{number}-{path.resolve().name}" if path.is_dir() else words)
    return there


def _write_models(folder: Path, models: Sequence[str]) -> None:
    for words, there in zip(models, _names_there(models), strict=True):
        if there != words:
            save(*load(words), folder / there)


def _write_examples(folder: Path, images: str) -> None:
    folder.mkdir()
    for name, image in open_examples(images).items():
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        stem = re.sub(r"[^\w-]+", "-", name)
        file, number = folder / f"{stem}.png", 2
        while file.exists():  # of a name that differs in other signs alone
            file, number = folder / f"{stem}-{number}.png", number + 1
        image.save(file)


def _readme(models: Sequence[str]) -> str:
    header: dict[str, Any] = {
        "title": "Token fusion",
        "emoji": "🧩",
        "colorFrom": "yellow",
        "colorTo": "red",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "short_description": "What a faster Vision Transformer sees",
    }
    names = [parse(words)[0] for words in models]
    if of_hub := [name for name in names if not Path(name).is_dir()]:
        header["models"] = of_hub
    front_matter = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return f"---\n{front_matter}---\n\n{ABOUT}"
