"""Whatever the files of a folder say: a message, nothing outside touched, and no memory taken."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ViTImageProcessorPil

from cli.main import main
from mctf_hf.hub import save
from tests.helpers import tiny_model

pytestmark = pytest.mark.timeout(300)

INDEX = "model.safetensors.index.json"
MOST = 2**30  # bytes
PRECIOUS = "{outside}/precious"  # a file that is not the folder's
# Commands, of the hostile FOLDER, of a SOUND one and of a NEW one; with how many examples.
COMMANDS = {
    "convert FOLDER --output NEW": 15,
    "convert SOUND --output FOLDER": 5,
    "push FOLDER org/model --license mit --rounds 1 --batch-size 1 --dry-run NEW": 10,
    "push SOUND org/model --license mit --rounds 1 --batch-size 1 --dry-run FOLDER": 3,
    "push FOLDER org/model --as-is": 20,
}

VALUES = st.recursive(
    st.one_of(
        st.sampled_from([None, True, False, 0, -1, 1, 2, 7, 65, 10**6, 10**9, 2**63, -(10**400)]),
        st.sampled_from([0.5, 1e-30, 1e30, float("inf"), float("nan")]),
        st.sampled_from(["", "x", "mctf", "vit", "tome", "auto:0.5", "a/b--c.D", "\x00", "\ud800"]),
        st.sampled_from([PRECIOUS, f"{PRECIOUS}.X", "../precious", "../precious.X", ".", ".."]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["0", "height", "AutoModel", "x", "../precious"]), inner),
    ),
    max_leaves=4,
)
JUNK = st.sampled_from(["", "{", "[" * 100_000, "1e999", "\ufeff{}", "9" * 5000, "{}", "\udcff"])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that are read, its weights in parts."""
    size = {"height": 32, "width": 32}
    processor = ViTImageProcessorPil(size=size, do_center_crop=True, crop_size=size)
    training = json.dumps({"pretrained": "org/a", "dataset": "org/b", "r_max": 4, "config": None})
    row = {"setting": "mctf", "gmacs": 0.1, "loss": 0.1, "accuracy": 9.5}
    tuning = json.dumps({"settings": {}, "budget": 0.5, "images": "photos", "ranking": [row]})
    folder = tmp_path_factory.mktemp("sound") / "model"
    records = {"training.json": training, "tuning.json": tuning}
    save(tiny_model(r=7), processor, folder, files=records)
    model = tiny_model(r=7)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


@st.composite
def harm(draw: st.DrawFn, keys: dict[str, list[str]]) -> tuple[str, str | dict[str, Any]]:
    """A file, and the text that it holds or the entries that it gets."""
    file = draw(st.sampled_from(sorted(keys)))
    if draw(st.integers(0, 3)) == 0:
        return file, draw(JUNK | VALUES.map(json.dumps))
    entries = keys[file] + ["auto_map", "fusion_layers", "num_labels", "quantization_config"]
    return file, draw(st.dictionaries(st.sampled_from(entries), VALUES, min_size=1, max_size=2))


@contextmanager
def memory(most: int) -> Iterator[None]:
    """At most so many bytes beside what the process has."""
    status = Path("/proc/self/status").read_text()
    (has,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (has * 1024 + most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_hostile_folders(
    command: str,
    sound: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*words: object, **options: object) -> None:
        raise ConnectionError("no Hub")

    monkeypatch.setattr("mctf_hf.hub.HfApi", unreachable)
    files = ["config.json", "preprocessor_config.json", "training.json", "tuning.json"]
    files += [INDEX, ".mctf_hf.json"]
    keys = {file: list(json.loads((sound / file).read_text())) for file in files}
    before = contents(sound)
    for name in ("precious", "precious.py", "precious.safetensors"):
        (tmp_path / name).write_text("{}")
    outside = contents(tmp_path)

    @settings(
        max_examples=COMMANDS[command],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(harm(keys))
    def hostile(harmed: tuple[str, str | dict[str, Any]]) -> None:
        folder, new = tmp_path / "folder", tmp_path / "new"
        for place in (folder, new):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(sound, folder)
        file, content = harmed
        if isinstance(content, dict):
            content = json.dumps({**json.loads((folder / file).read_text()), **content})
        text = content.replace("{outside}", str(tmp_path))
        (folder / file).write_text(text, encoding="utf-8", errors="surrogateescape")
        places = {"FOLDER": str(folder), "SOUND": str(sound), "NEW": str(new)}
        words = [places.get(word, word) for word in command.split()]
        status: Any = 0
        with memory(MOST):
            try:
                main(words)
            except SystemExit as stopped:
                status = stopped.code
        told = capsys.readouterr().err
        assert status in (0, 1) and "Traceback" not in told, told
        assert not status or "mctf: error: " in told
        for unforeseen in ("not foreseen", "memory", "allocate"):
            assert unforeseen not in told, told
        assert contents(tmp_path) == outside and contents(sound) == before

    hostile()
