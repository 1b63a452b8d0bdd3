"""Model folders that load anywhere, and their way to the Hub."""

import ast
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from fnmatch import fnmatch
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
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports

# Older releases hide the top-level name where torchvision is missing, though this needs none.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .checks import check_processor, check_weights
from .configuration_mctf import check_exists
from .files import WEIGHTS, drafts, is_plain_name, read_index, read_object
from .reducers import REDUCERS
from .registry import BACKBONES

logger = logging.getLogger(__name__)

# How the weights were trained, what was measured of them, what was drawn, and the page of it all.
TRAINING, EVALUATION = "training.json", "evaluation.json"
PICTURE, CARD = "fused_tokens.png", "README.md"
# How the setting of fusion was found.
TUNING, TUNING_TABLE, TUNING_PICTURE = "tuning.json", "tuning.csv", "tuning.png"
TUNED = (TUNING, TUNING_TABLE, TUNING_PICTURE)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # organisation/name; a local path may look the same
PROCESSOR = "preprocessor_config.json"
RECORD = ".mctf_hf.json"  # digests of the code that was saved, by name
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LFS = b"version https://git-lfs"
# What nobody means to publish: keys, certificates and passwords; states of a training, whose
# pickles run code. In lower case.
_PRIVATE = (
    *("*.pem", "*.key", "*.crt", "*.cer", "*.der", "*.p12", "*.pfx", "*.jks", "*.kdbx", "*.ppk"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*credentials*", "*secret*", "*password*"),
    *(".env", ".env.*", "*.env", ".netrc", ".pypirc", ".git-credentials", "token", "*.token"),
    *("*.ckpt", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("training_args.bin", "trainer_state.json"),
)


def load_image_processor(name: str) -> Any:
    """The image processor of a folder or Hub id, which needs no torchvision and runs no code of it.

    Raises:
        OSError: if there is none.
        ValueError: if it cannot be had without running code of its own, or if one of its settings
            is not allowed.
    """
    check_exists(name)
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

    Everything is written to a draft first and then moved file by file, the configuration last.
    Removed are weights of an earlier save that the new one lacks, what was recorded of them, and
    code that an earlier save has written, by its record, and nobody has changed; nothing else is.

    Args:
        files: contents of further files by name, such as ``README.md``.

    Returns:
        The folder.

    Raises:
        FileExistsError: see :func:`check_folder`.
        ValueError: for a model that would not load anywhere, or whose weights are not finite.
        OSError: if it cannot be written, for one because the disk is full.
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
            code = {file.name: _digest(file) for file in draft.glob("*.py")}
            Path(draft, RECORD).write_text(json.dumps(code, indent=2) + "\n")
            names = os.listdir(draft)
            earlier = _recorded(folder)
    except BaseException as error:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        if isinstance(error, SafetensorError) or getattr(error, "errno", None) in _FULL:
            told = f"{folder} was not written, and what lay there is untouched: {error}"
            raise OSError(told) from error
        raise
    for name in {*_stale(os.listdir(folder), names), *earlier} - set(names):
        if not (folder / name).is_dir():
            (folder / name).unlink(missing_ok=True)
    return folder


def _recorded(folder: Path) -> set[str]:
    """Code that an earlier save has written to a folder, as far as it is what was written."""
    try:
        record = read_object(folder / RECORD)
    except (OSError, ValueError):
        return set()
    names = {name for name in record if is_plain_name(name) and name.endswith(".py")}
    files = [folder / name for name in names]
    files = [file for file in files if file.is_file() and not file.is_symlink()]
    return {file.name for file in files if _digest(file) == record[file.name]}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _stale(present: Collection[str], new: Collection[str]) -> list[str]:
    """Files of earlier weights that new ones do not replace: shards, and what was said of them.

    A card and a picture count only beside the measurements that they were made with.
    """
    told = {TRAINING, EVALUATION, *TUNED} | ({CARD, PICTURE} if EVALUATION in present else set())
    return sorted(
        name for name in present if name not in new and (name in told or WEIGHTS.fullmatch(name))
    )


def check_folder(folder: str | os.PathLike, *, alone: bool = False) -> Path:
    """The folder, if a model may be saved there.

    Args:
        alone: whether no file may stay there that is not the new model's, as before a push.

    Raises:
        FileExistsError: if it is a file, or holds files but no model, or others beside it.
    """
    folder = Path(folder)
    occupied = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if occupied and not (folder / "config.json").is_file():
        raise FileExistsError(
            f"{folder} holds something else than a model: name a new folder or that of a model"
        )
    if alone and (foreign := _foreign(folder)):
        raise FileExistsError(
            f"{folder} holds files that are not the model's and would go up with it "
            f"({', '.join(foreign)}): remove them, or name another folder"
        )
    return folder


def _foreign(folder: Path) -> list[str]:
    """Files that neither are replaced by a model that is saved to a folder nor removed."""
    modules = {file.name for file in Path(__file__).parent.glob("*.py")}
    usual = {"config.json", PROCESSOR, TRAINING, EVALUATION, CARD, PICTURE, *TUNED}
    own = usual | modules | _recorded(folder)
    names = sorted(file.name for file in folder.glob("*") if not file.is_dir())
    seen = [name for name in names if not name.startswith(".")]
    return [name for name in seen if name not in own and not WEIGHTS.fullmatch(name)]


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
        folder: as :func:`save` writes it; all files that lie in it go up but hidden ones and
            those that :func:`held_back` names, which a warning tells.
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
    _check_fit(Path(folder))
    if held := held_back(folder):
        logger.warning("held back, for they may be private: %s", ", ".join(held))
    api = api or HfApi()
    head, made = None, False
    try:
        _open(api, repo_id, private)
        head = _latest_commit(api, repo_id, revision)
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
    """The files of a model's folder that go up, by name.

    Hidden files and folders do not, nor does what :func:`held_back` names.

    Raises:
        ValueError: if nobody could load it: a file is missing, or is not what it should be, or is
            a link out of the folder.
    """
    folder = Path(folder)
    files = {file.name: file for file in sorted(folder.glob("*")) if file.is_file()}
    files = {name: file for name, file in files.items() if not name.startswith(".")}
    for file in files.values():
        if not stays_within(file):
            raise ValueError(
                f"{file} is not allowed: it is a link out of the folder, to {file.resolve()}. Put "
                "a copy in its place, or remove it"
            )
    missing = {"config.json", PROCESSOR} - files.keys()
    code = set()
    for name in {"config.json", PROCESSOR} - missing:
        classes = _classes(files[name])
        code |= _code(folder, classes)
        if name == "config.json" and not classes:
            missing.add("the auto_map of config.json")
    missing |= (code | _weights(folder)) - files.keys()
    if missing:
        raise ValueError(
            f"{folder} is not a model's folder that loads anywhere: {', '.join(sorted(missing))} "
            "missing. mctf_hf.hub.save writes one"
        )
    _check_config(files["config.json"])
    _check_image_processor(files[PROCESSOR])
    held = held_back(folder)
    return [file for name, file in files.items() if name not in held]


def held_back(folder: str | os.PathLike) -> list[str]:
    """Names of files in a folder that do not go up: keys, passwords, states of a training."""
    names = sorted(file.name for file in Path(folder).glob("*") if not file.is_dir())
    names = [name for name in names if not name.endswith(".py")]
    return [name for name in names if any(fnmatch(name.lower(), kind) for kind in _PRIVATE)]


def stays_within(file: Path) -> bool:
    """Whether a file lies in its folder, and is no link to elsewhere."""
    return file.resolve().is_relative_to(file.parent.resolve())


def _check_config(file: Path) -> None:
    """Raise ValueError unless a configuration of this library can be read."""
    settings = read_object(file)
    backbone = BACKBONES.get(str(settings.get("model_type")))
    if backbone is None or str(settings.get("reduction")) not in REDUCERS:
        return  # it takes the code beside it
    try:
        backbone.config.from_dict(settings)
    except Exception as error:  # of any kind, for what a file says may be anything
        raise ValueError(f"{file} makes no configuration: {error}") from error


def _check_fit(folder: Path) -> None:
    """Raise ValueError unless the weights of a model of this library are all there and fit it."""
    settings = read_object(folder / "config.json")
    backbone = BACKBONES.get(str(settings.get("model_type")))
    if backbone is None or str(settings.get("reduction")) not in REDUCERS:
        return
    known = (backbone.model, backbone.classifier, *backbone.further)
    saved = [one for one in known if one.__name__ in (settings.get("architectures") or ())]
    for model_class in saved:
        _, report = model_class.from_pretrained(
            folder, ignore_mismatched_sizes=True, output_loading_info=True
        )
        misshapen = {name for name, *_ in report["mismatched_keys"]}
        if wrong := sorted({*report["missing_keys"], *misshapen}):
            raise ValueError(
                f"{folder} is not allowed: weights are missing, or of another shape than the model "
                f"that config.json describes: {', '.join(wrong[:3])}"
            )


def _check_image_processor(file: Path) -> None:
    """Raise ValueError unless an image processor of transformers can be read."""
    if "auto_map" in read_object(file):
        return  # it takes the code beside it
    try:
        load_image_processor(str(file.parent))
    except Exception as error:
        raise ValueError(f"{file} makes no image processor: {error}") from error


def _weights(folder: Path) -> set[str]:
    """Names of the files of a model's weights, of which those that are there are sound.

    Raises:
        ValueError: for one that is not.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    holds: dict[str, set[str]] = {single.name: set()}
    if index.exists():
        names = read_index(index)
        holds = {name: set() for name in names.values()}
        for weight, name in names.items():
            holds[name].add(weight)
    for name, weights in holds.items():
        if (folder / name).is_file():
            _check_weights(folder / name, weights)
    return set(holds)


def _check_weights(file: Path, weights: Collection[str]) -> None:
    """Raise ValueError unless a file of weights is whole and has those of some names."""
    with file.open("rb") as content:
        if content.read(len(_LFS)) == _LFS:
            raise ValueError(
                f"{file} is a pointer of Git LFS and no weights: `git lfs pull` fetches them"
            )
    try:
        with safe_open(file, "pt") as found:
            names = set(found.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} holds no weights, or not all of them: {error}") from error
    if not names or not names.issuperset(weights):
        lacking = sorted(set(weights) - names) or ["any weight"]
        raise ValueError(f"{file} lacks {', '.join(lacking[:3])}")


def _classes(file: Path) -> set[str]:
    """The classes that the ``auto_map`` of a JSON file names, each as ``module.Class``.

    Raises:
        ValueError: for one that is no class of a module in the folder.
    """
    auto_map = read_object(file).get("auto_map", {})
    values = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    for one in flat:
        if not (one is None or (isinstance(one, str) and re.fullmatch(r"\w+\.\w+", one))):
            raise ValueError(
                f"{file} is not allowed: auto_map names {one!r}, which is no class of a module in "
                "the folder"
            )
    return {one for one in flat if one is not None}


def _code(folder: Path, classes: Collection[str]) -> set[str]:
    """Names of the modules that hold some classes, and of all that these import.

    Raises:
        ValueError: for a module that is no Python, or imports what transformers does not find.
    """
    new = {reference.split(".")[0] for reference in classes}
    found, fetched = set(), set(new)
    while new:
        found |= new
        present = [file for name in new if (file := folder / f"{name}.py").is_file()]
        new = set()
        for file in present:
            imported, seen = _relative_imports(file)
            fetched |= seen
            new |= imported | seen
        new -= found
    if found != fetched:
        raise ValueError(
            f"{folder} is not allowed: transformers would not fetch {', '.join(found - fetched)}, "
            "of which no module imports a name, as in from .module import name"
        )
    return {f"{name}.py" for name in found}


def _relative_imports(file: Path) -> tuple[set[str], set[str]]:
    """The modules beside it that a module imports, and those of them that transformers sees."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
        seen = set(get_relative_imports(file))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{file} is no Python that could be run: {error}") from error
    imported = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            above = "." * (node.level - 1)
            names = [node.module] if node.module else [name.name for name in node.names]
            imported |= {f"{above}{name}" for name in names}
    for module in imported | seen:
        if not module.isidentifier():
            raise ValueError(f"{file} is not allowed: it imports .{module}, which is not beside it")
    return imported, seen


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


def _latest_commit(api: HfApi, repo_id: str, revision: str) -> str | None:
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
        now = _latest_commit(api, repo_id, revision)
        if made and now == _latest_commit(api, repo_id, "main"):
            api.delete_branch(repo_id, branch=revision)
            return "was not made"
    except HTTPError:
        return "was not changed, as far as can be told"
    return "was not changed" if now == head else f"is now at {now}"
