"""``mctf push``: a model to the Hub, with its code, its card and what was measured of it."""

import io
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser
from rich.console import Console

from cli.evaluation import evaluate, open_labelled
from cli.models import load
from lightning_modules.data import LabelledImages
from mctf_hf import MCTFViTForImageClassification
from mctf_hf.hub import EVALUATION, TRAINING, check_folder, loadable_files, push, save
from mctf_hf.model_card import make_card
from mctf_hf.visualization import contact_sheet, enlarge, fused_tokens

PICTURE = "fused_tokens.png"


def main(args: Sequence[str]) -> None:
    """Read the command line and run :func:`push_model`."""
    parser = ArgumentParser(
        prog="mctf push",
        description="Measure a model, write its card, and put all that loads it anywhere on the "
        "Hub in one commit. `hf auth login` or HF_TOKEN says who you are.",
    )
    parser.add_argument("model", help="folder or Hub id, with settings if they are to change: r=8")
    parser.add_argument("repo_id", help="organisation/name on the Hub")
    parser.add_argument(
        "--private", action=ActionYesNo, default=False, help="make a new repository private"
    )
    parser.add_function_arguments(push_model, skip={"model", "repo_id", "private"})
    push_model(**parser.parse_args(list(args)).as_dict())


def push_model(
    model: str,
    repo_id: str,
    license: str,
    private: bool = False,
    revision: str = "main",
    dataset: str | None = None,
    split: str = "test",
    max_images: int | None = None,
    batch_size: int = 16,
    rounds: int = 10,
    base_model: str | None = None,
    message: str = "Upload a model with token fusion",
    dry_run: str | None = None,
) -> None:
    """Measure a model, write its card, and push all of it.

    Args:
        model: see above.
        repo_id: see above.
        license: of the weights, such as apache-2.0.
        private: see above.
        revision: branch to push to.
        dataset: local folder or Hub id of a dataset to measure accuracy on and to show images of;
            unset, the card says that it was not measured.
        split: of that dataset.
        max_images: measure accuracy on so many evenly spaced images of it; unset, on all.
        batch_size: images per call when speed is measured.
        rounds: timings of each setting, whose median counts.
        base_model: Hub id of the model that it was made from; unset, what it was trained from or
            is read from, if that is on the Hub.
        message: of the commit.
        dry_run: folder to write what would go up to, instead of pushing it.
    """
    for name, value in {
        "max_images": max_images,
        "batch_size": batch_size,
        "rounds": rounds,
    }.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} is not allowed: it is at least 1")
    if dry_run is not None:
        check_folder(dry_run)
    loaded, processor = load(model)
    training = _training(model.split(",")[0])
    images = None
    if dataset is not None:
        images = open_labelled(dataset, split, max_images, loaded, processor)
    console = Console()
    console.print(f"Measuring {model} …")
    evaluation = evaluate(loaded, images, batch_size=batch_size, rounds=rounds)
    if dataset is not None:
        evaluation.dataset, evaluation.split = _name(dataset), split
    card = make_card(
        repo_id,
        loaded.config,
        license=license,
        evaluation=evaluation,
        base_model=base_model or _origin(model.split(",")[0], training, repo_id),
        datasets=[name] if (name := _hub_id(training.get("dataset"))) else None,
        training=training,
        picture=None if images is None else PICTURE,
    )
    files: dict[str, str | bytes] = {"README.md": str(card), EVALUATION: evaluation.to_json()}
    if images is not None:
        files[PICTURE] = _picture(loaded, processor, images)
    if training:
        files[TRAINING] = json.dumps(training, indent=2) + "\n"
    with tempfile.TemporaryDirectory() as draft:
        folder = save(loaded, processor, dry_run or Path(draft, "model"), files=files)
        for file in loadable_files(folder):
            console.print(f"  {file.stat().st_size:>12,} bytes  {file.name}", highlight=False)
        if dry_run is not None:
            console.print(f"Would go to {repo_id}, revision {revision}: {folder}")
            return
        commit = push(folder, repo_id, private=private, revision=revision, message=message)
    console.print(f"{commit.commit_url}\nrevision={commit.oid!r} pins it", highlight=False)


def _training(folder: str) -> dict[str, Any]:
    """The record of its training that lies beside a model; empty if there is none."""
    file = Path(folder, TRAINING)
    return json.loads(file.read_text()) if file.is_file() else {}


def _picture(model: MCTFViTForImageClassification, processor: Any, images: LabelledImages) -> bytes:
    """Four images beside their fused tokens, as a PNG file."""
    chosen = [int(images.indices[i * len(images) // 4]) for i in range(min(4, len(images)))]
    seen = fused_tokens(model, processor, [images.rows.image(row) for row in chosen])
    pairs = [(enlarge(tokens.view), tokens.picture()) for tokens in seen]
    per_row = min(2, len(pairs))
    captions = ["original", f"{seen[0].num_tokens} -> {seen[0].tokens_left} tokens"] * per_row
    rows = [sum(pairs[i : i + per_row], ()) for i in range(0, len(pairs), per_row)]
    rows = [row for row in rows if len(row) == len(captions)]
    file = io.BytesIO()
    contact_sheet(captions, rows).save(file, format="PNG")
    return file.getvalue()


def _origin(name: str, training: dict[str, Any], repo_id: str) -> str | None:
    """Hub id of what a model was trained from, or of where it is read from, if it is another."""
    if training:
        return _hub_id(training.get("pretrained"))
    return None if Path(name).exists() or name == repo_id else _hub_id(name)


def _hub_id(name: str | None) -> str | None:
    return name if name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _name(dataset: str) -> str:
    """A dataset's name for strangers: its id, or the last part of a local folder's path."""
    path = Path(dataset)
    return path.resolve().name if path.exists() else dataset
