"""Folders of strangers: saving stays in the folder, and what goes to the Hub is looked at first."""

import hashlib
import json
import re
import resource
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard, constants
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from cli.main import main
from mctf_hf import MCTFViTForImageClassification, fuse_tokens
from mctf_hf.hub import push, save
from mctf_hf.model_card import make_card
from mctf_hf.model_folder import RECORD, held_back
from tests.helpers import TINY, tiny_model
from tests.local_hub import LocalHub

REPO = "org/model"
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
DRY = ["--license", "mit", "--rounds", "1", "--batch-size", "1", "--dry-run"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(r=7), PROCESSOR, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*words: object, **options: object) -> None:
        raise AssertionError("the Hub was called")

    monkeypatch.setattr("mctf_hf.hub.HfApi", called)


def refusal(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The message with which a command line is refused."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    told = capsys.readouterr()
    assert stopped.value.code == 1 and "Traceback" not in told.err
    assert "Measuring" not in told.out
    return told.err


def outside(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.parent.glob("*") if file.is_file())
    return {file.name: file.read_bytes() for file in files}


HOSTILE: list[Any] = [
    {"AutoTokenizer": "{outside}/precious.X"},
    {"AutoTokenizer": "../precious.X"},
    {"AutoTokenizer": ["{outside}/precious.X", None], "AutoConfig": 7, "AutoModel": {"a": []}},
    ["{outside}/precious.X"],
    "{outside}/precious.X",
]
COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "save": lambda model, output: save(tiny_model(r=3), PROCESSOR, output),
    "convert": lambda model, output: main(["convert", str(model), "--output", str(output)]),
    "push": lambda model, output: main(["push", str(model), REPO, *DRY, str(output)]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_saving_touches_nothing_outside_whatever_a_config_names(
    command: str, folder: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious.py"
    precious.write_text("# precious")
    before = outside(folder)
    output = tmp_path / "output"
    output.mkdir()
    for auto_map in HOSTILE if command == "save" else HOSTILE[:1]:
        text = json.dumps({"auto_map": auto_map}).replace("{outside}", str(tmp_path))
        (output / "config.json").write_text(text)
        COMMANDS[command](folder, output)
        assert outside(folder) == before
        MCTFViTForImageClassification.from_pretrained(output)


@pytest.mark.parametrize("content", ["[]", "null", "", "{", '"x"', "1e999", "[" * 100_000])
def test_a_config_that_is_none_is_written_over(content: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content)
    save(tiny_model(r=3), PROCESSOR, tmp_path / "model")
    assert MCTFViTForImageClassification.from_pretrained(tmp_path / "model").config.r == 3


def test_only_code_that_was_written_by_its_record_goes(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.py"
    names = ("changed.py", "mine.py", "left.py", "link.py")
    for file in (precious, *(folder / name for name in names[:-1])):
        file.write_text("# old")
    (folder / "link.py").symlink_to(precious)
    record = json.loads((folder / RECORD).read_text())
    (folder / "reducers.py").write_text("# changed by hand, and written again")
    of_old = hashlib.sha256(b"# old").hexdigest()
    hostile = {str(precious): of_old, "../precious.py": of_old, "link.py": of_old, "..": of_old}
    hostile |= {"changed.py": "0123", "left.py": of_old, "mine.py": ["list"], "config.json": of_old}
    (folder / RECORD).write_text(json.dumps({**record, **hostile}))
    save(tiny_model(r=3), PROCESSOR, folder)
    assert precious.read_text() == "# old" and (folder / "link.py").is_symlink()
    assert {name for name in names if (folder / name).exists()} == {*names} - {"left.py"}
    assert "changed by hand" not in (folder / "reducers.py").read_text()


def test_a_failing_save_leaves_no_folder(tmp_path: Path) -> None:
    class Fickle(ViTImageProcessorPil):
        def save_pretrained(self, *words: Any, **options: Any) -> Any:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save(tiny_model(), Fickle(), tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=[1000, 100_000])
def full_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """A limit on the size of files, which code or weights meet first."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (request.param, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_folder(
    folder: Path, full_disk: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for place in (folder, tmp_path / "new"):
        told = refusal(capsys, "convert", folder, "--output", place)
        assert f"error: {place} was not written, and its files are unchanged" in told
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_folder_in_the_place_of_a_file_is_told_before_anything_is_replaced(folder: Path) -> None:
    before = (folder / "config.json").read_text()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="safetensors"):
        save(tiny_model(r=3), PROCESSOR, folder)
    assert (folder / "config.json").read_text() == before


@pytest.mark.parametrize("fused", [False, True])
def test_save_pretrained_replaces_links(fused: bool, tmp_path: Path) -> None:
    model: Any = tiny_model(r=3)
    if fused:
        model = fuse_tokens(ViTForImageClassification(ViTConfig(**TINY)), r=3)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "model").mkdir()
    names = ["config.json", "model.safetensors"]
    names += ["token_fusion.json"] if fused else ["modeling_mctf_vit.py"]
    for name in (*names, "notes.md"):
        (tmp_path / "model" / name).symlink_to(precious)
    model.save_pretrained(tmp_path / "model")
    assert precious.read_text() == "precious" and (tmp_path / "model" / "notes.md").is_symlink()
    assert not any((tmp_path / "model" / name).is_symlink() for name in names)


# What else is in a folder, and why it is not pushed.
def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _link(name: str, target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder.parent / "secret.txt").write_text("{}")
        (folder / name).symlink_to(target)

    return change


def _write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def _set(name: str, **settings: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**known, **settings}))

    return change


def _index(weight_map: Any) -> Callable[[Path], Any]:
    content = json.dumps({"metadata": {}, "weight_map": weight_map})
    return _write("model.safetensors.index.json", content)


UNFIT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a link out": (_link("notes.txt", "../secret.txt"), "notes.txt is not allowed: it is a link"),
    "a card that is a link": (_link("README.md", "/etc/hostname"), "README.md is not allowed"),
    "code that is a link": (_link("fusion.py", "../secret.txt"), "fusion.py is not allowed"),
    "empty weights": (_write("model.safetensors", ""), "model.safetensors holds no weights"),
    "half of the weights": (_truncate, "model.safetensors holds no weights, or not all"),
    "a pointer": (
        _write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a pointer of Git LFS",
    ),
    "no Python": (_write("fusion.py", "def f(:\n"), "fusion.py is no Python"),
    "nested Python": (_write("fusion.py", "(" * 10_000), "fusion.py is no Python"),
    "code of elsewhere": (_write("fusion.py", "from ..x import y"), "it imports ..x"),
    "code unseen": (_write("fusion.py", "from . import x"), "would not fetch x"),
    "no processor": (_write("preprocessor_config.json", "{}"), "makes no image processor"),
    "half a processor": (_write("preprocessor_config.json", '{"a'), "cannot be read as JSON"),
    "a processor in a list": (_write("preprocessor_config.json", "[]"), "it holds a list"),
    "a size of words": (
        _set("preprocessor_config.json", size="large"),
        "preprocessor_config.json makes no image processor",
    ),
    "a config in a list": (_write("config.json", "[]"), "config.json is not allowed: it holds a"),
    "a config of null": (_write("config.json", "null"), "config.json is not allowed: it holds nu"),
    "a config of wrong values": (_set("config.json", r="many"), "makes no configuration: "),
    "code by its path": (_set("config.json", auto_map={"AutoModel": "/a/b.C"}), "names '/a/b.C'"),
    "another's code": (_set("config.json", auto_map={"AutoModel": "a/b--c.D"}), "'a/b--c.D'"),
    "a number as class": (_set("config.json", auto_map={"AutoModel": [7]}), "auto_map names 7"),
    "no auto_map": (_set("config.json", auto_map=None), "the auto_map of config.json missing"),
    "an index of nothing": (_index(None), "weight_map is to name a file of the folder"),
    "an index in a list": (_index(["a"]), "weight_map is to name a file of the folder"),
    "weights of elsewhere": (_index({"a": "../model.safetensors"}), "weight_map is to name"),
    "another model's weights": (
        _set("config.json", intermediate_size=48),
        "weights are missing, or of another shape than the model that config.json describes: vit.",
    ),
    "weights that lack": (
        _index({"nothing": "model.safetensors"}),
        "safetensors lacks nothing",
    ),
}


@pytest.mark.parametrize("fault", UNFIT)
def test_a_folder_that_does_not_load_or_leads_elsewhere_is_not_pushed(
    fault: str, folder: Path, no_hub: None, capsys: pytest.CaptureFixture
) -> None:
    change, message = UNFIT[fault]
    change(folder)
    assert message in refusal(capsys, "push", folder, REPO, "--as-is")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with LocalHub(tokens={"hf_good"}) as hub:
        yield hub


def test_keys_and_states_are_held_back_and_told(
    folder: Path, hub: LocalHub, caplog: pytest.LogCaptureFixture
) -> None:
    private = [".env", "prod.env", "server.PEM", "id_ed25519", "last.ckpt", "optimizer.pt"]
    private += ["my_credentials.json", "tls.key", "training_args.bin", "trainer_state.json"]
    for name in (*private, "notes.txt", ".hidden"):
        (folder / name).write_text("x")
    push(folder, REPO, api=HfApi(endpoint=hub.url, token="hf_good"))
    assert not set(hub.files(REPO)) & {*private, ".hidden", RECORD}
    assert "notes.txt" in hub.files(REPO)
    assert held_back(folder) == sorted(private)
    assert all(name in caplog.text for name in private)


def test_a_draft_keeps_no_foreign_files(
    folder: Path, tmp_path: Path, no_hub: None, capsys: pytest.CaptureFixture
) -> None:
    draft = save(tiny_model(r=2), PROCESSOR, tmp_path / "draft", files={"evaluation.json": "{}"})
    (draft / "diary.txt").write_text("mine")
    told = refusal(capsys, "push", folder, REPO, *DRY, draft)
    assert "would go up with it (diary.txt): remove them" in told
    (draft / "diary.txt").unlink()
    main(["push", str(folder), REPO, *DRY, str(draft)])
    assert json.loads((draft / "config.json").read_text())["r"] == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--as-is", "--dry-run", "draft"], "--dry-run is not allowed beside --as-is"),
        (["--as-is", "--license", "mit"], "--license is not allowed beside --as-is"),
        (["--as-is", "--rounds", "10"], "--rounds is not allowed beside --as-is"),
        (
            ["--as-is", "--picture", "a.png", "--dataset", "x"],
            "--dataset, --picture is not allowed beside --as-is",
        ),
        (["--license", "mit", "--split", "test"], "--split is not allowed without --dataset"),
        (["--license", "mit", "--max_images=3"], "--max-images is not allowed without --dataset"),
        (["--license", "mit", "--base-model", "<b>"], "base_model='<b>' is not allowed"),
        (["--license", "mit", "--base-model", "a/b\nlicense: x"], "is not allowed"),
    ],
)
def test_options_that_contradict_or_do_nothing_are_refused(
    words: list[str], message: str, folder: Path, no_hub: None, capsys: pytest.CaptureFixture
) -> None:
    assert message in refusal(capsys, "push", folder, REPO, *words)
    assert not Path("draft").exists()


def test_a_dry_run_prints_the_command_that_pushes_it(
    folder: Path, no_hub: None, capsys: pytest.CaptureFixture
) -> None:
    words = ["--private", "--revision", "dev", "--message", "It's new"]
    main(["push", str(folder), REPO, *words, *DRY, "a draft"])
    told = capsys.readouterr().out
    (line,) = re.findall(r"^mctf (push .*)", told, re.MULTILINE)
    assert shlex.split(line) == ["push", "a draft", REPO, "--as-is", *words]


NASTY = "a` | <script>alert(1)</script>\n---\nlicense: evil\n# [x](javascript:y) \u202e\ud800"


def test_text_of_strangers_is_code_in_the_card() -> None:
    training: dict[str, Any] = {
        "pretrained": NASTY,
        NASTY: 1,
        "dataset": ["a", {NASTY: None}],
        "empty": "",
        "r_max": {"x": NASTY},
        "config": True,
        "long": "x" * 10_000,
    }
    card = make_card(REPO, tiny_model(r=7).config, license="mit", training=training)
    assert (
        ModelCard(str(card)).data.to_dict()
        == make_card(REPO, tiny_model(r=7).config, license="mit").data.to_dict()
    )
    table = card.text.split("## Training")[1].split("## Limits")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(training)
    for row in rows:
        assert re.fullmatch(r"\| ([\w./-]+|`[^`|]+`) \| `[^`|]+` \|", row)
        assert len(row) < 500
    text = re.sub("`[^`\n]*`", "", table)
    assert "<" not in text and "evil" not in text and "javascript" not in text
    str(card).encode()


@pytest.mark.parametrize("record", ["[]", "null", "3", "{"])
def test_a_training_record_that_is_none_is_told(
    record: str, folder: Path, no_hub: None, capsys: pytest.CaptureFixture
) -> None:
    (folder / "training.json").write_text(record)
    assert "training.json" in refusal(capsys, "push", folder, REPO, *DRY, "draft")
    assert not Path("draft").exists()


def test_a_training_record_of_any_types_makes_a_card(folder: Path, no_hub: None) -> None:
    record = {
        "pretrained": 7,
        "dataset": [NASTY],
        "config": None,
        "r_max": {},
        "x": float("nan"),
    }
    (folder / "training.json").write_text(json.dumps(record))
    main(["push", str(folder), REPO, *DRY, "draft"])
    assert ModelCard.load("draft/README.md").data.base_model is None


def test_a_training_record_that_is_a_link_is_not_published(
    folder: Path, tmp_path: Path, no_hub: None, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "aws.json").write_text('{"key": "AKIA"}')
    (folder / "training.json").symlink_to(tmp_path / "aws.json")
    assert "it is a link out of the folder" in refusal(capsys, "push", folder, REPO, *DRY, "draft")
    assert not Path("draft").exists()
