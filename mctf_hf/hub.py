"""Saving models so that they load anywhere, and uploading them to the Hub."""

import errno
import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import PreTrainedModel

from .checks import check_weights
from .files import drafts
from .model_folder import (
    RECORD,
    check_fit,
    check_folder,
    digest,
    held_back,
    load_image_processor,
    loadable_files,
    recorded_code,
    stale_files,
)

__all__ = [
    "check_folder",
    "check_repo_id",
    "load_image_processor",
    "loadable_files",
    "push",
    "save",
]

logger = logging.getLogger(__name__)


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # organisation/name; a local path may look the same
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save(
    model: PreTrainedModel,
    image_processor: Any,
    folder: str | os.PathLike,
    *,
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Save a model, its code and its image processor; if that fails, leave the folder unchanged.

    All files are first written to a draft folder and then moved one by one, the configuration last.
    Files of an earlier save that the new one lacks are removed: weights, records about these
    weights, and code that was not changed since. All other files stay.

    Args:
        files: contents of additional files by name, such as ``README.md``.

    Returns:
        The folder.

    Raises:
        FileExistsError: see :func:`check_folder`.
        ValueError: for a model that others could not load, or whose weights are not finite.
        OSError: if the folder cannot be written, for example because the disk is full.
    """
    check_weights(model, "the model")
    folder = check_folder(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with drafts(folder, last="config.json") as draft:
            model.save_pretrained(draft)
            image_processor.save_pretrained(draft)
            for name, content in (files or {}).items():
                data = content if isinstance(content, bytes) else content.encode()
                Path(draft, name).write_bytes(data)
            try:
                loadable_files(draft)
            except ValueError as error:
                raise ValueError(str(error).replace(str(draft), str(folder))) from error
            code = {file.name: digest(file) for file in draft.glob("*.py")}
            Path(draft, RECORD).write_text(json.dumps(code, indent=2) + "\n")
            names = os.listdir(draft)
            earlier = recorded_code(folder)
    except BaseException as error:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        if isinstance(error, SafetensorError) or getattr(error, "errno", None) in _FULL:
            message = f"{folder} was not written, and its files are unchanged: {error}"
            raise OSError(message) from error
        raise
    for name in {*stale_files(os.listdir(folder), names), *earlier} - set(names):
        if not (folder / name).is_dir():
            (folder / name).unlink(missing_ok=True)
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
    """Upload a model's folder to the Hub in one commit.

    The repository and the branch are created if they do not exist. Large files are uploaded first
    and belong to no revision until the commit. A push that fails leaves every revision unchanged,
    and the next push does not send these files again. The commit also removes weights of an earlier
    push that the folder lacks, and the records about them.

    Args:
        folder: folder that :func:`save` wrote. Its files are uploaded, but not its subfolders,
            hidden files and the files of :func:`held_back`; a warning lists the last.
        repo_id: ``organisation/name``.
        private: whether to make a new repository private.
        revision: branch to commit to.
        message: commit message.
        api: Hub client, with address and token; unset, the default client.

    Raises:
        ValueError: for a folder that cannot be loaded, or an existing public repository where a
            private one is asked for.
        ConnectionError: if the Hub rejects the push or cannot be reached.
    """
    check_repo_id(repo_id)
    additions = [CommitOperationAdd(file.name, file) for file in loadable_files(folder)]
    check_fit(Path(folder))
    if held := held_back(folder):
        logger.warning("not uploaded, because they may be private: %s", ", ".join(held))
    api = api or HfApi()
    head, made = None, False
    try:
        _create_if_missing(api, repo_id, private)
        head = _latest_commit(api, repo_id, revision)
        existing = revision if head else None
        api.preupload_lfs_files(repo_id, additions, revision=existing)
        present = api.list_repo_files(repo_id, revision=existing)
        stale = stale_files(present, {addition.path_in_repo for addition in additions})
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
    """Raise ValueError unless ``repo_id`` is a valid ``organisation/name`` of the Hub."""
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repo_id={repo_id!r} is not allowed: it must be organisation/name")


def _create_if_missing(api: HfApi, repo_id: str, private: bool) -> None:
    """Create the repository if it does not exist; raise ValueError for an unwanted public one."""
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


def _latest_commit(api: HfApi, repo_id: str, revision: str) -> str | None:
    """Hash of the latest commit of a branch; ``None`` if the branch does not exist."""
    try:
        return api.repo_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        return None


def _explained(error: Exception, where: str) -> str:
    """Error message with the state of the branch, the reason of the failure and advice."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    reason = " ".join(line.strip() for line in str(cause).split("\n") if line.strip())
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status is None and (found := re.search(r"\b(4\d\d) [A-Z]", reason)):  # Xet: no response
        status = int(found[1])
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
    """Describe a branch after a failed push; delete it if this push only created it."""
    if head is None and not made:
        return "was not changed"
    try:
        now = _latest_commit(api, repo_id, revision)
        if made and now == _latest_commit(api, repo_id, "main"):
            api.delete_branch(repo_id, branch=revision)
            return "was not made"
    except HTTPError:
        return "was not changed, as far as can be told"
    return "was not changed" if now == head else f"is now at {now}"
