"""Model folders that load anywhere, and their way to the Hub."""

import json
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
)
from huggingface_hub.errors import (
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

# Older releases hide the top-level name where torchvision is missing, though this needs none.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .checks import check_processor, check_weights
from .files import drafts

# How the weights were trained, what was measured of them, what was drawn, and the page of it all.
TRAINING, EVALUATION = "training.json", "evaluation.json"
PICTURE, CARD = "fused_tokens.png", "README.md"

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # organisation/name; a local path may look the same
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def load_image_processor(name: str) -> Any:
    """The image processor of a folder or Hub id, which needs no torchvision and runs no code of it.

    Raises:
        OSError: if there is none.
        ValueError: if it cannot be had without running code of its own, or if one of its settings
            is not allowed.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # settings of other types than transformers expects
        raise ValueError(f"the image processor of {name} can't be made: {error}") from error
    return check_processor(processor, name)


def save(
    model: PreTrainedModel,
    image_processor: Any,
    folder: str | os.PathLike,
    *,
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a model, its code and its image processor to a folder, or leave the folder as it was.

    Everything is written beside the folder first and then moved file by file, the configuration
    last. Weights and code of an earlier save that the new one lacks, and what was recorded of
    them, are removed; nothing else is.

    Args:
        files: contents of further files by name, such as ``README.md``.

    Returns:
        The folder.

    Raises:
        FileExistsError: see :func:`check_folder`.
        ValueError: for a model that would not load anywhere, or whose weights are not finite.
    """
    check_weights(model, "the model")
    folder = check_folder(folder)
    code = _code(folder, _classes(folder).values())
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with drafts(folder, last="config.json") as draft:
            model.save_pretrained(draft)
            image_processor.save_pretrained(draft)
            for name, content in (files or {}).items():
                data = content if isinstance(content, bytes) else content.encode()
                Path(draft, name).write_bytes(data)
            loadable_files(draft)
            names = os.listdir(draft)
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise
    for name in {*_stale(os.listdir(folder), names), *code} - set(names):
        (folder / name).unlink(missing_ok=True)
    return folder


def _stale(present: Collection[str], new: Collection[str]) -> list[str]:
    """Files of earlier weights that new ones do not replace: shards, and what was said of them.

    A card and a picture count only beside the measurements that they were made with.
    """
    told = {TRAINING, EVALUATION} | ({CARD, PICTURE} if EVALUATION in present else set())
    return sorted(
        name for name in present if name not in new and (name in told or _WEIGHTS.fullmatch(name))
    )


def check_folder(folder: str | os.PathLike) -> Path:
    """The folder, if a model may be saved there.

    Raises:
        FileExistsError: if it is a file, or holds files but no model.
    """
    folder = Path(folder)
    occupied = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if occupied and not (folder / "config.json").exists():
        raise FileExistsError(
            f"{folder} holds something else than a model: name a new folder or that of a model"
        )
    return folder


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str = "main",
    message: str = "Upload a model with token fusion",
    api: HfApi | None = None,
) -> CommitInfo:
    """Put a model's folder on the Hub, in one commit.

    The repository is made if it does not exist, and the branch likewise. Large files go up first;
    they belong to no revision until the commit is made, so a push that breaks off leaves every
    revision as it was, and the next one finds them there. Weights of an earlier push that the
    folder lacks, and what was recorded of them, are removed by the same commit.

    Args:
        folder: as :func:`save` writes it; all files that lie in it go up but hidden ones.
        repo_id: ``organisation/name``.
        private: make a new repository private.
        revision: branch to commit to.
        message: of the commit.
        api: client of the Hub, with its address and its token; unset, the usual one.

    Raises:
        ValueError: for a folder that would not load, or a public repository where a private one
            is asked for.
        ConnectionError: if the Hub refuses the push or can't be reached.
    """
    check_repo_id(repo_id)
    additions = [CommitOperationAdd(file.name, file) for file in loadable_files(folder)]
    api = api or HfApi()
    head, made = None, False
    try:
        _open(api, repo_id, private)
        head = _head(api, repo_id, revision)
        existing = revision if head else None
        api.preupload_lfs_files(repo_id, additions, revision=existing)
        present = api.list_repo_files(repo_id, revision=existing)
        stale = _stale(present, {addition.path_in_repo for addition in additions})
        if head is None:
            api.create_branch(repo_id, branch=revision)
            made = True
        return api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message=message,
            revision=revision,
            parent_commit=head,
        )
    except (HTTPError, RuntimeError, ConnectionError) as error:
        where = f"{repo_id}, revision {revision}, {_undo(api, repo_id, revision, head, made)}"
        raise ConnectionError(_explained(error, where)) from error
    except BaseException:
        _undo(api, repo_id, revision, head, made)
        raise


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless it is ``organisation/name``, as the Hub wants it."""
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repo_id={repo_id!r} is not allowed: it is organisation/name")


def loadable_files(folder: str | os.PathLike) -> list[Path]:
    """The files of a model's folder, by name, hidden ones left out.

    Raises:
        ValueError: if a file is missing without which nobody can load it.
    """
    folder = Path(folder)
    names = {file.name for file in folder.glob("*") if file.is_file()}
    missing = {"config.json", "preprocessor_config.json"} - names
    if "config.json" in names:
        classes = _classes(folder)
        missing |= _code(folder, classes.values()) - names
        if not classes:
            missing.add("the auto_map of config.json")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        missing |= set(json.loads(index.read_text())["weight_map"].values()) - names
    elif "model.safetensors" not in names:
        missing.add("model.safetensors")
    if missing:
        raise ValueError(
            f"{folder} is not a model's folder that loads anywhere: {', '.join(sorted(missing))} "
            "missing. mctf_hf.hub.save writes one"
        )
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def _classes(folder: Path) -> dict[str, str]:
    """The ``auto_map`` of a folder; empty where there is none."""
    config = folder / "config.json"
    return json.loads(config.read_text()).get("auto_map", {}) if config.exists() else {}


def _code(folder: Path, classes: Collection[str]) -> set[str]:
    """Names of the modules that hold some classes, and of all that these import."""
    found: set[str] = set()
    for name in {f"{reference.split('.')[0]}.py" for reference in classes}:
        found.add(name)
        if (folder / name).exists():
            try:
                found |= {Path(file).name for file in get_relative_import_files(folder / name)}
            except FileNotFoundError as error:
                found.add(Path(error.filename).name)
    return found


def _open(api: HfApi, repo_id: str, private: bool) -> None:
    """See that the repository is there."""
    try:
        public = not api.repo_info(repo_id).private
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private or None)
        return
    if private and public:
        raise ValueError(
            f"private={private!r} is not allowed: {repo_id} exists and is public. Change that in "
            "its settings on the Hub, or name another repository"
        )


def _head(api: HfApi, repo_id: str, revision: str) -> str | None:
    """The commit that a branch is at, ``None`` if there is no such branch."""
    try:
        return api.repo_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        return None


def _explained(error: Exception, where: str) -> str:
    """What went wrong on the way to the Hub, what was pushed to is now, and what to do about it."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    reason = " ".join(line.strip() for line in str(cause).split("\n") if line.strip())
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status is None and (told := re.search(r"\b(4\d\d) [A-Z]", reason)):  # Xet's have no response
        status = int(told[1])
    if status in (401, 403) or isinstance(cause, RepositoryNotFoundError):
        advice = "Is the token right, and may it write there? `hf auth login` or HF_TOKEN sets it"
    elif status in (409, 412):
        advice = "Somebody else changed it meanwhile: look at what it has and push again"
    elif status is None or status in (408, 429) or status >= 500:
        advice = "Push again: files that have arrived are not sent twice"
    else:
        advice = "The Hub does not accept this push"
    return f"{where}: {reason.rstrip('.')}. {advice}"


def _undo(api: HfApi, repo_id: str, revision: str, head: str | None, made: bool) -> str:
    """What has become of a branch by a push that failed; one that was made for it goes again."""
    if head is None and not made:
        return "was not changed"
    try:
        now = _head(api, repo_id, revision)
        if made and now == _head(api, repo_id, "main"):
            api.delete_branch(repo_id, branch=revision)
            return "was not made"
    except HTTPError:
        return "was not changed, as far as can be told"
    return "was not changed" if now == head else f"is now at {now}"
