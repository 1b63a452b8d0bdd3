"""The built wheel, in environments that hold what it asks for and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PathDistribution, distribution
from pathlib import Path
from zipfile import Path as ZipPath

import pytest
from packaging.requirements import Requirement

from cli.commands import COMMANDS, FINETUNING
from tests.helpers import DIGITS, REPOSITORY
from tests.strangers import environment_of_a_stranger

README = (REPOSITORY / "README.md").read_text()
CORE = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "pillow"}
TRAINING = {*FINETUNING, "benchmark-data", "embed"}
# What extras bring, but for accelerate and scipy, which transformers loads where they are.
REST = {
    "datasets", "gradio", "jsonargparse", "kornia", "lightning", "matplotlib", "onnx",
    "onnxruntime", "onnxscript", "optuna", "pyarrow", "rich", "tensorboard",
    "torchmetrics", "wandb",
}  # fmt: skip

# Runs commands of `mctf` in one process, and prints what each of them said on stderr.
COMMAND_LINE = """
import contextlib, io, json, sys
import mctf_hf

loaded = sorted({name.partition(".")[0] for name in sys.modules})
from mctf_cli.main import main

told = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main(words)
            status = 0
        except SystemExit as stopped:
            status = stopped.code or 0
    told.append((status, said.getvalue()))
print(json.dumps([loaded, told]))
"""


def tool(*words: object) -> subprocess.CompletedProcess:
    """Run a module of this environment, which does not see the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the wheel and the source archive."""
    source = tmp_path_factory.mktemp("source")
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copy(path, source)
        elif path.name in ("cli", "lightning_modules", "mctf_hf"):
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    done = tool("build", "--no-isolation", source)
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


def metadata(wheel: Path) -> PathDistribution:
    (folder,) = (path for path in ZipPath(wheel).iterdir() if path.name.endswith(".dist-info"))
    return PathDistribution(folder)


def needed(wheel: Path, extras: Sequence[str]) -> set[str]:
    """The distributions that a wheel and some of its extras need, and those that they need."""
    own = metadata(wheel)
    wanted, seen = [(own.name, extra) for extra in ("", *extras)], set()
    while wanted:
        name, extra = one = wanted.pop()
        if one in seen:
            continue
        seen.add(one)
        for text in (own if name == own.name else distribution(name)).requires or ():
            needs = Requirement(text)
            if needs.marker is None or needs.marker.evaluate({"extra": extra}):
                wanted += [(needs.name, more) for more in ("", *needs.extras)]
    return {name for name, _ in seen} - {own.name}


def link(python: Path, wheel: Path, *extras: str) -> Path:
    """Let a virtual environment find what a wheel and some of its extras need."""
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    for name in needed(wheel, extras):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(found.locate_file(top)))
    return python


def run(python: Path, *words: object, home: Path) -> str:
    done = subprocess.run(
        [str(python), *map(str, words)],
        capture_output=True,
        text=True,
        env=environment_of_a_stranger(home) | {"MPLCONFIGDIR": str(home.parent / "matplotlib")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands(python: Path, words: Iterable[list[str]], home: Path) -> list[tuple[int, str]]:
    """The exit status of commands and what they say on stderr."""
    out = run(python, "-c", COMMAND_LINE, json.dumps(list(words)), home=home)
    loaded, told = json.loads(out.splitlines()[-1])
    assert not REST & set(loaded), "the library by itself loads nothing of its extras"
    return [tuple(one) for one in told]


@pytest.fixture(scope="module")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python with the library and its extras left out."""
    folder = tmp_path_factory.mktemp("alone") / "venv"
    python = folder / "bin" / "python"
    assert tool("venv", "--without-pip", folder).returncode == 0
    done = tool("pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    return link(python, wheel)


@pytest.fixture
def with_extras(alone: Path, wheel: Path, tmp_path: Path) -> Callable[..., Path]:
    """Python with some extras, too."""

    def made(*extras: str) -> Path:
        shutil.copytree(alone.parents[1], tmp_path / "venv", symlinks=True)
        return link(tmp_path / "venv" / "bin" / "python", wheel, *extras)

    return made


def test_what_is_built_is_fit_for_the_index(built: Path) -> None:
    files = sorted(map(str, built.iterdir()))
    done = tool("twine", "check", "--strict", *files)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout


def test_the_library_needs_torch_and_what_is_around_it(wheel: Path) -> None:
    requirements = [Requirement(text) for text in metadata(wheel).requires or ()]
    assert {one.name for one in requirements if one.marker is None} == CORE
    users = {one.name for one in requirements if one.marker and 'extra == "dev"' not in str(one)}
    assert users >= REST
    tops = {path.name for path in ZipPath(wheel).iterdir()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "lightning_modules", "mctf_cli", "mctf_hf",
    }  # fmt: skip
    assert (ZipPath(wheel) / "mctf_cli/examples/cat.jpg").exists()


# Imports whose extra is not there, and what each says.
IMPORTS = """
for line in (
    "from lightning_modules import MCTFFinetuner",
    "from mctf_hf.export import import_onnx; import_onnx()",
):
    try:
        exec(line)
    except ModuleNotFoundError as error:
        print(error)
"""


def test_the_readmes_first_example_runs_with_the_library_alone(
    alone: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    first, second = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:2]
    code = (first + second).replace("facebook/deit-small-patch16-224", str(tiny_folder))
    *_, training, onnx = run(alone, "-c", code + IMPORTS, home=tmp_path).splitlines()
    assert (tmp_path / "deit-small-mctf" / "model.safetensors").exists()
    assert training.startswith("lightning_modules needs ")
    assert training.endswith(", which is not installed: pip install 'mctf-hf[train]'")
    assert onnx == "ONNX needs onnx, which is not installed: pip install 'mctf-hf[onnx]'"


def test_a_command_without_its_extra_tells_which_one(alone: Path, tmp_path: Path) -> None:
    needing = [command for command in COMMANDS if command != "completion"]
    told = commands(alone, [[command, "--help"] for command in needing], tmp_path)
    for command, (status, said) in zip(needing, told, strict=True):
        extra = "train" if command in TRAINING else "cli"
        assert status == 1 and said.startswith(f"mctf: error: mctf {command} needs ")
        assert f"is not installed: pip install 'mctf-hf[{extra}]'\n" in said


def test_commands_run_with_the_extra_that_they_name(
    with_extras: Callable[..., Path], flat_folder: Path, tmp_path: Path
) -> None:
    python = with_extras("cli")
    model, images = str(flat_folder), ["--images", DIGITS]
    run_by_it = [
        ["visualize", f"{model},r=4", *images, "--output", "fused.png"],
        ["benchmark", f"{model},r=4", "--rounds", "1", "--accuracy", DIGITS, "--max-images", "8"],
        ["convert", f"{model},r=4", "--output", "made"],
        ["export", f"{model},r=4", "--output", "made.pt2", *images, "--count", "3"],
        ["push", "--help"],
        ["sweep", "--help"],
        ["neighbours", "--help"],
    ]
    others = {
        "fit": "train", "benchmark-data": "train", "embed": "train", "demo": "train",
        "tune": "tune", "export": "onnx", "web": "web",
    }  # fmt: skip
    words = {"tune": [model, *images, "--output", "t", "--budget", "0.8"]}
    words["export"] = [model, "--output", "made.onnx"]
    words["web"] = [model]
    refused = [[command, *words.get(command, ())] for command in others]
    told = commands(python, [*run_by_it, *refused], tmp_path)
    failed = [said for status, said in told[: len(run_by_it)] if status]
    assert not failed
    for extra, (status, said) in zip(others.values(), told[len(run_by_it) :], strict=True):
        assert status == 1 and f"is not installed: pip install 'mctf-hf[{extra}]'\n" in said


@pytest.mark.parametrize(
    ("extras", "several"),
    [
        (
            ["train"],
            [
                ["fit", "--model.pretrained", "MODEL", "--data.dataset", DIGITS, "--model.r", "4",
                 "--data.num_workers", "0", "--trainer.max_steps", "1", "--export.folder", "made",
                 "--trainer.limit_val_batches", "1"],
                ["embed", "MODEL,r=4", "--images", f"{DIGITS}/test.parquet",
                 "--output", "made_vectors", "--num-workers", "0"],
            ],
        ),
        (
            ["cli", "onnx", "tune"],
            [
                ["tune", "MODEL", "--images", DIGITS, "--num-images", "4", "--budget", "0.8",
                 "--trials", "2", "--methods", "tome", "--output", "made"],
                ["export", "MODEL", "--output", "made.onnx", "--images", DIGITS],
            ],
        ),
        (["web"], [["web", "MODEL", "--images", DIGITS, "--space", "made"]]),
    ],
)  # fmt: skip
def test_extras_are_enough_for_what_they_are_named_for(
    extras: list[str],
    several: list[list[str]],
    with_extras: Callable[..., Path],
    flat_folder: Path,
    tmp_path: Path,
) -> None:
    python = with_extras(*extras)
    words = [[word.replace("MODEL", str(flat_folder)) for word in words] for words in several]
    told = commands(python, words, tmp_path)
    assert not [said for status, said in told if status]
    assert list(tmp_path.glob("made*"))
