"""Model folders that load anywhere, and their way to the Hub."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
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

# How the weights were trained, and what was measured of them, by settings' names.
TRAINING, EVALUATION = "training.json", "evaluation.json"

# Weights, and what describes them and must not outlive them.
_STALE = re.compile(r"model.*\.safetensors(\.index\.json)?|training\.json|evaluation\.json")


def save(
    model: PreTrainedModel,
    image_processor: Any,
    folder: str | os.PathLike,
    *,
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a model, its code and its image processor to a folder, or leave the folder as it was.

    Everything is written beside the folder first and then moved file by file, the configuration
    last. Weights of an earlier save that the new one lacks, and what was recorded of them, are
    removed; nothing else is.

    Args:
        files: contents of further files by name, such as ``README.md``.

    Returns:
        The folder.

    Raises:
        FileExistsError: see :func:`check_folder`.
    """
    folder = check_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as draft:
        model.save_pretrained(draft)
        image_processor.save_pretrained(draft)
        for name, content in (files or {}).items():
            data = content if isinstance(content, bytes) else content.encode()
            Path(draft, name).write_bytes(data)
        names = sorted(os.listdir(draft), key=lambda name: (name == "config.json", name))
        folder.mkdir(exist_ok=True)
        for name in names:
            os.replace(Path(draft, name), folder / name)
    for file in folder.iterdir():
        if _STALE.fullmatch(file.name) and file.name not in names:
            file.unlink()
    return folder


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
    validate_repo_id(repo_id)
    additions = [CommitOperationAdd(file.name, file) for file in loadable_files(folder)]
    api = api or HfApi()
    head, made = None, False
    try:
        _open(api, repo_id, private)
        head = _head(api, repo_id, revision)
        existing = revision if head else None
        api.preupload_lfs_files(repo_id, additions, revision=existing)
        new = {addition.path_in_repo for addition in additions}
        stale = [
            CommitOperationDelete(name)
            for name in api.list_repo_files(repo_id, revision=existing)
            if _STALE.fullmatch(name) and name not in new
        ]
        if head is None:
            api.create_branch(repo_id, branch=revision)
            made = True
        return api.create_commit(
            repo_id,
            [*additions, *stale],
            commit_message=message,
            revision=revision,
            parent_commit=head,
        )
    except (HTTPError, RuntimeError, ConnectionError) as error:
        state = _state(api, repo_id, revision, head, made)
        where = f"{repo_id}, revision {revision}, {state}"
        raise ConnectionError(_explained(error, where)) from error


def loadable_files(folder: str | os.PathLike) -> list[Path]:
    """The files of a model's folder, by name, hidden ones left out.

    Raises:
        ValueError: if a file is missing without which nobody can load it.
    """
    folder = Path(folder)
    names = {file.name for file in folder.glob("*") if file.is_file()}
    missing = sorted({"config.json", "preprocessor_config.json"} - names)
    if not any(name.endswith(".safetensors") for name in names):
        missing.append("model.safetensors")
    if not missing:
        classes = json.loads((folder / "config.json").read_text()).get("auto_map", {})
        missing = sorted({f"{name.split('.')[0]}.py" for name in classes.values()} - names)
        if not classes:
            missing = ["the auto_map of config.json"]
    if missing:
        raise ValueError(
            f"{folder} is not a model's folder that loads anywhere: {', '.join(missing)} missing. "
            "mctf_hf.hub.save writes one"
        )
    return [folder / name for name in sorted(names) if not name.startswith(".")]


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
    if status in (401, 403) or isinstance(cause, RepositoryNotFoundError):
        advice = "Is the token right, and may it write there? `hf auth login` or HF_TOKEN sets it"
    elif status in (409, 412):
        advice = "Somebody else changed it meanwhile: look at what it has and push again"
    elif status is not None and status < 500:
        advice = "The Hub does not accept this push"
    else:
        advice = "Push again: files that have arrived are not sent twice"
    return f"{where}: {reason.rstrip('.')}. {advice}"


def _state(api: HfApi, repo_id: str, revision: str, head: str | None, made: bool) -> str:
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
