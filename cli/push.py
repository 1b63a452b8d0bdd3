"""``mctf push``: pushes a model to the Hub, with its code, model card and measurements."""

import io
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from jsonargparse import ActionYesNo

from lightning_modules.opening import NamedDataset
from mctf_hf import MCTFViTForImageClassification
from mctf_hf.checks import check_range
from mctf_hf.files import read_object
from mctf_hf.hub import check_folder, check_repo_id, loadable_files, push, save
from mctf_hf.model_card import check_base_model, make_card, public_name
from mctf_hf.model_folder import CARD, EVALUATION, PICTURE, TRAINING, TUNED, TUNING, stays_within
from mctf_hf.visualization import contact_sheet, enlarge, fused_tokens

from .evaluation import evaluate, open_labelled
from .models import load, parse
from .options import command, parser_of, read, refuse
from .paths import open_images

OF_AS_IS = {"model", "repo_id", "as_is", "private", "revision", "message"}
OF_DATASET = {"name", "dataset_revision", "split", "image_column", "label_column", "max_images"}


def main(args: Sequence[str]) -> None:
    """Read the command line and run :func:`push_model`."""
    flags = {
        "private": "make a new repository private",
        "as_is": "push the folder as it is, without measuring or writing anything",
    }
    parser = parser_of(
        "push",
        push_model,
        flags,
        model={"help": "folder or Hub id, with settings if they are to change: r=8"},
        repo_id={"help": "organisation/name on the Hub"},
    )
    for name, meaning in flags.items():
        parser.add_argument(f"--{name}", action=ActionYesNo, default=False, help=meaning)
    settings, given = read(parser, args)
    if settings["as_is"]:
        refuse(given - OF_AS_IS, given, "beside --as-is, which measures and writes nothing")
    if settings["dataset"] is None:
        refuse(given, OF_DATASET, "without --dataset, to which it belongs")
    push_model(**settings)


def push_model(
    model: str,
    repo_id: str,
    license: str | None = None,
    private: bool = False,
    as_is: bool = False,
    revision: str = "main",
    dataset: str | None = None,
    name: str | None = None,
    dataset_revision: str | None = None,
    split: str = "test",
    image_column: str | None = None,
    label_column: str | None = None,
    max_images: int | None = None,
    batch_size: int = 16,
    rounds: int = 10,
    picture: str | None = None,
    base_model: str | None = None,
    message: str = "Upload a model with token fusion",
    dry_run: str | None = None,
) -> None:
    """Measure a model, write its card, and push all files needed to load it to the Hub.

    All files are pushed in one commit. Log in with `hf auth login`, or set HF_TOKEN.

    Args:
        model: the model, as :func:`main` describes it.
        repo_id: repository on the Hub, organisation/name.
        license: license of the weights, such as apache-2.0; required without as_is.
        private: whether a new repository is private.
        as_is: whether to push the folder unchanged, without measuring or writing anything.
        revision: branch to push to.
        dataset: dataset folder or dataset id on the Hub to measure accuracy on. If unset, the card
            says that it was not measured.
        name: configuration of the dataset, if it has several.
        dataset_revision: branch, tag or commit of the dataset on the Hub.
        split: split of the dataset.
        image_column: column of the images. If unset, the only one of type image.
        label_column: column of the labels. If unset, found by its type or its name (label).
        max_images: number of evenly spaced images to measure accuracy on. If unset, all.
        batch_size: number of images per call, for the speed.
        rounds: number of timings of each setting; the median is used.
        picture: image file, folder of images, dataset folder or dataset id on the Hub. The card
            shows up to four evenly spaced images with their fused tokens. If unset, none.
        base_model: Hub id of the model that this one was made from. If unset, the Hub id that it
            was trained from or is loaded from, if any.
        message: commit message.
        dry_run: folder to write the files to, instead of pushing them.
    """
    check_repo_id(repo_id)
    to = {"private": private, "revision": revision, "message": message}
    if as_is:
        _send(Path(model), repo_id, to)
        return
    if license is None or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(
            f"license={license!r} is not allowed: it must be an identifier of the Hub, such as "
            "apache-2.0, mit, cc-by-4.0 or other"
        )
    if base_model is not None:
        check_base_model(base_model)
    check_range(1, max_images=max_images, batch_size=batch_size, rounds=rounds)
    if dry_run is not None:
        check_folder(dry_run, alone=True)
    loaded, processor = load(model)
    source = parse(model)[0]
    training = _training(source)
    tuning, found = _tuning(source, loaded.config)
    files: dict[str, str | bytes] = {**found}
    if picture is not None:
        files[PICTURE] = _picture(loaded, processor, picture)
    images = None
    if dataset is not None:
        images = open_labelled(
            NamedDataset(dataset, name, dataset_revision),
            split,
            max_images,
            loaded,
            processor,
            image_column=image_column,
            label_column=label_column,
        )

    print(f"Measuring {model} …")
    evaluation = evaluate(loaded, images, batch_size=batch_size, rounds=rounds)
    if dataset is not None:
        evaluation.dataset, evaluation.split = public_name(dataset), split
    files[EVALUATION] = evaluation.to_json()
    files[CARD] = str(
        make_card(
            repo_id,
            loaded.config,
            license=license,
            evaluation=evaluation,
            base_model=base_model or _origin(source, training, repo_id),
            datasets=[trained_on] if (trained_on := _hub_id(training.get("dataset"))) else None,
            training=training,
            tuning=tuning,
            picture=None if picture is None else PICTURE,
            model=loaded,
        )
    )
    if training:
        files[TRAINING] = json.dumps(training, indent=2) + "\n"
    folder = Path(dry_run or tempfile.mkdtemp(prefix="mctf-push-"), *[] if dry_run else ["model"])
    save(loaded, processor, folder, files=files)
    if dry_run is not None:
        _list(folder)
        print(f"Would go to {repo_id}, revision {revision}, by\n{_as_is(folder, repo_id, to)}")
        return
    _send(folder, repo_id, to)
    shutil.rmtree(folder.parent)


def _send(folder: Path, repo_id: str, to: dict[str, Any]) -> None:
    """Push a folder unchanged; ``to`` contains the further arguments of :func:`push`."""
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder: --as-is pushes a folder as it is")
    _list(folder)
    try:
        commit = push(folder, repo_id, **to)
    except (ConnectionError, ValueError) as error:
        kind = ConnectionError if isinstance(error, ConnectionError) else ValueError
        raise kind(
            f"{error}\nThe files are in {folder}. This pushes them without measuring again:"
            f"\n{_as_is(folder, repo_id, to)}"
        ) from error
    print(f"{commit.commit_url}\nrevision={commit.oid!r} pins it")


def _as_is(folder: Path, repo_id: str, to: dict[str, Any]) -> str:
    """The command that pushes a folder unchanged to the same repository."""
    usual = {name: option.default for name, option in signature(push).parameters.items()}
    asked = {name: value for name, value in to.items() if value != usual[name]}
    return command("push", folder, repo_id, as_is=True, **asked)


def _list(folder: Path) -> None:
    for file in loadable_files(folder):
        print(f"  {file.stat().st_size:>12,} bytes  {file.name}")


def _beside(name: str, file: str) -> Path | None:
    """Path of a file in a model's folder or repository; ``None`` if it does not exist."""
    path = Path(name, file)
    if not Path(name).is_dir():
        try:
            return Path(hf_hub_download(name, file))
        except EntryNotFoundError:
            return None
    if not path.is_file():
        return None
    if not stays_within(path):
        raise ValueError(f"{path} is not allowed: it is a link out of the folder")
    return path


def _training(name: str) -> dict[str, Any]:
    """The training record in a model's folder; empty if there is none."""
    file = _beside(name, TRAINING)
    if file is None:
        return {}
    local = ("pretrained", "dataset", "distill_from")
    return {
        key: public_name(value) if key in local and isinstance(value, str) else value
        for key, value in read_object(file).items()
    }


def _tuning(name: str, config: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The tuning record in a model's folder, and its files; empty if it has other settings."""
    found = {one: _beside(name, one) for one in TUNED}
    files = {one: file.read_bytes() for one, file in found.items() if file is not None}
    record = {} if (file := found[TUNING]) is None else read_object(file)
    settings = record.get("settings")
    own = isinstance(settings, dict) and all(
        getattr(config, str(key), None) == value for key, value in settings.items()
    )
    return (record, files) if own else ({}, {})


def _picture(model: MCTFViTForImageClassification, processor: Any, source: str) -> bytes:
    """Draw up to four images beside their fused tokens, as a PNG file, and print their names."""
    images = open_images(source, 4, exactly=False)
    print(f"The card shows {'; '.join(images)}")
    seen = fused_tokens(model, processor, images.values())
    pairs = [(enlarge(tokens.view), tokens.picture()) for tokens in seen]
    per_row = 2 if len(pairs) % 2 == 0 else 1
    captions = ["original", f"{seen[0].num_tokens} -> {seen[0].tokens_left} tokens"] * per_row
    rows = [sum(pairs[i : i + per_row], ()) for i in range(0, len(pairs), per_row)]
    file = io.BytesIO()
    contact_sheet(captions, rows).save(file, format="PNG")
    return file.getvalue()


def _origin(name: str, training: dict[str, Any], repo_id: str) -> str | None:
    """Hub id that a model was trained from or, without a training record, is loaded from."""
    if training:
        return _hub_id(training.get("pretrained"))
    return None if Path(name).exists() or name == repo_id else _hub_id(name)


def _hub_id(name: object) -> str | None:
    """The name, if it may be an id on the Hub."""
    try:
        check_repo_id(str(name))
    except ValueError:
        return None
    return str(name)
