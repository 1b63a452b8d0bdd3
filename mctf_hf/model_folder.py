"""Contents of a model's folder, and checks that others can load it."""

import ast
import hashlib
import os
import re
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

# Older releases hide the top-level name without torchvision, which this class does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .checks import check_processor
from .configuration_mctf import check_exists
from .files import WEIGHTS, is_plain_name, read_index, read_object
from .loading import load_reported
from .reducers import REDUCERS
from .registry import BACKBONES, Backbone

# Records of training and measurements, the picture and the model card.
TRAINING, EVALUATION = "training.json", "evaluation.json"
PICTURE, CARD = "fused_tokens.png", "README.md"
# Record, table and picture of the search for the fusion setting.
TUNING, TUNING_TABLE, TUNING_PICTURE = "tuning.json", "tuning.csv", "tuning.png"
TUNED = (TUNING, TUNING_TABLE, TUNING_PICTURE)
PROCESSOR = "preprocessor_config.json"
RECORD = ".mctf_hf.json"  # digests of the saved code files, by name
_LFS = b"version https://git-lfs"
# Files that must not be published: keys, certificates and passwords; training states, because their
# pickles run code. In lower case.
_PRIVATE = (
    *("*.pem", "*.key", "*.crt", "*.cer", "*.der", "*.p12", "*.pfx", "*.jks", "*.kdbx", "*.ppk"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*credentials*", "*secret*", "*password*"),
    *(".env", ".env.*", "*.env", ".netrc", ".pypirc", ".git-credentials", "token", "*.token"),
    *("*.ckpt", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
    *("training_args.bin", "trainer_state.json"),
)


def load_image_processor(name: str) -> Any:
    """Load the image processor of a folder or Hub id, without torchvision and without its own code.

    Raises:
        OSError: if there is no image processor.
        ValueError: if it needs code of its own, or one of its settings is not allowed.
    """
    check_exists(name)
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # settings of other types than transformers expects
        raise ValueError(f"the image processor of {name} can't be made: {error}") from error
    return check_processor(processor, name)


def recorded_code(folder: Path) -> set[str]:
    """Names of the code files that an earlier save wrote to a folder and nobody has changed."""
    try:
        record = read_object(folder / RECORD)
    except (OSError, ValueError):
        return set()
    names = {name for name in record if is_plain_name(name) and name.endswith(".py")}
    files = [folder / name for name in names]
    files = [file for file in files if file.is_file() and not file.is_symlink()]
    return {file.name for file in files if digest(file) == record[file.name]}


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def stale_files(present: Collection[str], new: Collection[str]) -> list[str]:
    """Files of earlier weights that new ones do not replace: shards, and records about the weights.

    The card and the picture count only if a file of measurements is present.
    """
    records = {TRAINING, EVALUATION, *TUNED} | ({CARD, PICTURE} if EVALUATION in present else set())
    return sorted(
        name for name in present if name not in new and (name in records or WEIGHTS.fullmatch(name))
    )


def check_folder(folder: str | os.PathLike, *, alone: bool = False) -> Path:
    """Return the folder if a model may be saved there.

    Args:
        alone: whether to reject other files that would stay in the folder, as before a push.

    Raises:
        FileExistsError: for a file, a folder with files but no model, or such other files.
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
    """Visible files that saving a model to the folder neither replaces nor removes."""
    modules = {file.name for file in Path(__file__).parent.glob("*.py")}
    usual = {"config.json", PROCESSOR, TRAINING, EVALUATION, CARD, PICTURE, *TUNED}
    own = usual | modules | recorded_code(folder)
    names = sorted(file.name for file in folder.glob("*") if not file.is_dir())
    seen = [name for name in names if not name.startswith(".")]
    return [name for name in seen if name not in own and not WEIGHTS.fullmatch(name)]


def loadable_files(folder: str | os.PathLike) -> list[Path]:
    """The files of a model's folder that are uploaded, sorted by name.

    Folders, hidden files and the files of :func:`held_back` are not uploaded.

    Raises:
        ValueError: if others could not load the model: a file is missing, has wrong contents, or is
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
    """Names of files in a folder that are not uploaded: keys, passwords, training states."""
    names = sorted(file.name for file in Path(folder).glob("*") if not file.is_dir())
    names = [name for name in names if not name.endswith(".py")]
    return [name for name in names if any(fnmatch(name.lower(), kind) for kind in _PRIVATE)]


def stays_within(file: Path) -> bool:
    """Whether a file is not a link out of its folder."""
    return file.resolve().is_relative_to(file.parent.resolve())


def _known_backbone(settings: dict[str, Any]) -> Backbone | None:
    """Backbone of a configuration; ``None`` if it needs the code in its folder."""
    known = str(settings.get("reduction")) in REDUCERS
    return BACKBONES.get(str(settings.get("model_type"))) if known else None


def _check_config(file: Path) -> None:
    """Raise ValueError for a configuration of this library that cannot be read."""
    settings = read_object(file)
    backbone = _known_backbone(settings)
    if backbone is None:
        return
    try:
        backbone.config.from_dict(settings)
    except Exception as error:  # a file may contain anything
        raise ValueError(f"{file} makes no configuration: {error}") from error


def check_fit(folder: Path) -> None:
    """Raise ValueError if weights of a model of this library are missing or of another shape."""
    settings = read_object(folder / "config.json")
    backbone = _known_backbone(settings)
    if backbone is None:
        return
    known = (backbone.model, backbone.classifier, *backbone.further)
    saved = [one for one in known if one.__name__ in (settings.get("architectures") or ())]
    for model_class in saved:
        _, misfits = load_reported(model_class, folder)
        if wrong := sorted({*misfits.missing, *misfits.misshapen}):
            raise ValueError(
                f"{folder} is not allowed: weights are missing, or of another shape than the model "
                f"that config.json describes: {', '.join(wrong[:3])}"
            )


def _check_image_processor(file: Path) -> None:
    """Raise ValueError for an image processor of transformers that cannot be loaded."""
    if "auto_map" in read_object(file):
        return  # it needs the code in the folder
    try:
        load_image_processor(str(file.parent))
    except Exception as error:
        raise ValueError(f"{file} makes no image processor: {error}") from error


def _weights(folder: Path) -> set[str]:
    """Names of a model's weight files; those that exist are checked.

    Raises:
        ValueError: for a weight file that is damaged or incomplete.
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
    """Raise ValueError unless a weight file is complete and contains the named weights."""
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
    """The classes in the ``auto_map`` of a JSON file, each as ``module.Class``.

    Raises:
        ValueError: for an entry of another form.
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
    """File names of the modules that define the classes, and of all modules that these import.

    Raises:
        ValueError: for a module that is not valid Python, or that transformers would not fetch.
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
    """All modules in the folder that a file imports, and those of them that transformers finds."""
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
