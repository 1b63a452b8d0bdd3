"""What the command line says: of itself, of what is mistyped, of what nobody foresaw."""

import logging
import os
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

import cli.visualize
import mctf_hf
from cli.commands import COMMANDS
from cli.main import main
from tests.helpers import DIGITS, REPOSITORY


def refused(capsys: pytest.CaptureFixture, *words: str, status: int = 1) -> list[str]:
    """The lines on stderr of a command that fails."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == status
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown.splitlines()


def python(*words: str, **options: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, *words], text=True, env=environment, **options)


def test_what_it_says_of_itself_takes_no_library() -> None:
    code = """
import sys
import warnings
from cli.main import main
for words in (["--help"], ["--version"], ["benchmrk"], []):
    try:
        main(words)
    except SystemExit as stopped:
        assert stopped.code == 2
print({"torch", "transformers", "lightning", "datasets", "numpy"} & set(sys.modules))
"""
    done = python("-c", code, capture_output=True)
    assert done.returncode == 0, done.stderr
    *overview, number, imported = done.stdout.splitlines()
    listed = {line.split()[0] for line in overview if line.startswith("  ") and line.split()}
    assert listed >= set(COMMANDS)
    assert number == f"mctf {version('mctf-hf')}" and mctf_hf.__version__ == version("mctf-hf")
    assert imported == "set()"
    assert done.stderr.count("fit, validate, test, predict, demo, benchmark, benchmark-data") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["benchmrk", "m"], "there is no command 'benchmrk': did you mean 'benchmark'?"),
        (["--hlp"], "there is no command '--hlp': did you mean '--help'?"),
        (["frobnicate"], "there is no command 'frobnicate'\nThe commands: fit, validate, test, "),
        (
            ["fit", "--model.lerning_rate", "1"],
            "there is no option --model.lerning_rate: did you mean --model.learning_rate?",
        ),
        (["benchmark", "m", "--rouds=3"], "there is no option --rouds: did you mean --rounds?"),
        (["benchmark", "m", "--rounds", "x"], "rounds=x is not allowed: it must be int"),
        (["benchmark", "m", "--threads", "x"], "threads=x is not allowed: it must be int or null"),
        (["fit", "--optimizer", "SGD", "--optimizer.lrr", "3"], "Option 'lrr' is not accepted"),
        (["fit", "--trainer.callbacks", "foo.Bar"], "foo.Bar: No module named 'foo'"),
        (["fit", "--config", "nowhere.yaml"], "File does not exist"),
        (["push", "m"], "the following arguments are required: repo_id"),
        (["export", "m"], "the following arguments are required: output"),
        (["demo", "--fast"], "there is no option --fast"),
    ],
)
def test_what_is_mistyped_is_told_with_the_nearest(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    lines = refused(capsys, *words, status=2)
    assert len(lines) == 2 and message in "\n".join(lines)


def test_a_mistyped_setting_of_a_file_is_told_with_the_nearest(
    capsys: pytest.CaptureFixture,
) -> None:
    Path("run.yaml").write_text("model: {lerning_rate: 1}")
    first, _ = refused(capsys, "fit", "--config", "run.yaml", status=2)
    assert "--model.lerning_rate: did you mean --model.learning_rate?" in first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["benchmark", "m,r=[1,2"],
            "r='[1' is not allowed: it must be a number, a word, or a list",
        ),
        (["benchmark", "m,r={1: ["], "r='{1: [' is not allowed"),
        (["benchmark", "m,redction=tome"], "did you mean 'reduction'?"),
        (["benchmark", "m,r=1,r=2"], "setting 'r' of 'm,r=1,r=2' is given twice"),
        (["benchmark", ",r=1"], "',r=1' names no model"),
        (["--import"], "--import: name a module, or its file"),
        (["--import", "nowhere.py", "fit"], "--import nowhere.py: there is no such file"),
        (["--import", "no.where", "fit"], "No module named 'no'. It is looked for in /"),
        (["--import", "broken.py", "fit"], "--import broken.py: SyntaxError: "),
        (["--import", "./json.py", "fit"], "another module is called 'json': rename the file"),
    ],
)
def test_what_cannot_be_meant_is_told_in_a_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    Path("broken.py").write_text("def x(:\n")
    Path("json.py").write_text("")
    lines = refused(capsys, *words)
    assert len(lines) == 2 and message in lines[0] and "MCTF_DEBUG=1" in lines[1]


def test_the_file_of_a_module_is_imported(capsys: pytest.CaptureFixture) -> None:
    Path("mine").mkdir()
    Path("mine", "of_my_own.py").write_text("print('imported')")
    before = sys.path.copy()
    main(["--import", "./mine/of_my_own.py", "--version"])
    assert capsys.readouterr().out.splitlines() == ["imported", f"mctf {version('mctf-hf')}"]
    assert sys.path == before


@pytest.mark.parametrize(
    "error",
    [KeyError("weight_map"), AssertionError(), TypeError("not so"), MemoryError(), ValueError()],
)
def test_what_nobody_foresaw_is_told_with_the_words_of_the_command(
    error: Exception, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli.visualize, "main", fail)
    words = ["visualize", "my model,r=3", "--images", "photos"]
    first, second = refused(capsys, *words)
    assert first.startswith(f"mctf: error: {type(error).__name__}") and str(error) in first
    assert "mctf visualize 'my model,r=3' --images photos" in second and "MCTF_DEBUG=1" in second
    monkeypatch.setenv("MCTF_DEBUG", "1")
    with pytest.raises(type(error)):
        main(words)


def test_of_another_processs_error_its_last_words_are_told(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: list[str]) -> None:
        raise ValueError(
            "Caught ValueError in DataLoader worker process 0.\n"
            'Original Traceback (most recent call last):\n  File "a.py", line 3, in b\n    c()\n'
            "ValueError: row 3 holds no image\n"
        )

    monkeypatch.setattr(cli.visualize, "main", fail)
    assert refused(capsys, "visualize")[0] == "mctf: error: row 3 holds no image"


def test_an_interrupt_ends_it_with_a_word(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(words: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.visualize, "main", interrupt)
    assert refused(capsys, "visualize", status=130) == ["mctf: interrupted"]


def test_nobody_reading_on_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = python("-m", "cli.main", "--help", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 1 and not done.stderr


def test_what_others_tell_in_vain_is_kept_back_while_a_command_runs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("huggingface_hub.repocard")

    def tell(words: list[str]) -> None:
        assert os.environ["KINETO_LOG_LEVEL"] == "99"
        logger.warning("Repo card metadata block was not found. Setting CardData to empty.")
        logger.warning("The card is broken")
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated", stacklevel=1)
        warnings.warn("the disk is nearly full", stacklevel=1)

    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    monkeypatch.setattr(cli.visualize, "main", tell)
    with pytest.warns(UserWarning) as warned:
        main(["visualize"])
    assert [str(one.message) for one in warned] == ["the disk is nearly full"]
    assert caplog.messages == ["The card is broken"]
    logger.warning("Repo card metadata block was not found")
    assert len(caplog.messages) == 2 and "KINETO_LOG_LEVEL" not in os.environ


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["benchmark", "deit_t", "--split", "test"], "--split is not allowed without --accuracy"),
        (["benchmark", "deit_t", "--max-images", "9"], "--max-images is not allowed without --acc"),
        (
            ["benchmark", "MODEL,slice=4", "--batch-sizes", "1,4", "--rounds", "1"],
            "slice=4 of 'MODEL,slice=4' has no effect on batches of at most 4 images",
        ),
        (["export", "MODEL", "--output", "o.pt2", "--rounds", "3"], "--rounds is not allowed with"),
        (
            ["export", "MODEL", "--output", "o.pt2", "--batch-size", "64", "--count", "20"],
            "batch_size=64 has no effect with count=20",
        ),
        (["export", "MODEL", "--output", "folder.pt2"], "folder.pt2 cannot be written: it is a fo"),
        (["benchmark", "MODEL", "--output", "folder.json"], "folder.json cannot be written: it is"),
        (["benchmark", "MODEL", "--plot", "no/where.png"], "its folder does not exist"),
        (
            ["visualize", "MODEL", "--images", "photos", "--output", "folder.png"],
            "folder.png cannot be written: it is a folder",
        ),
        (
            ["test", "--model.pretrained", "MODEL", "--model.num_labels", "7"],
            "num_labels=7 is not allowed with MODEL, which has 10 classes",
        ),
    ],
)
def test_what_contradicts_or_has_no_effect_is_refused_before_the_work(
    words: list[str], message: str, tiny_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    Path("MODEL").symlink_to(tiny_folder)
    for suffix in (".pt2", ".json", ".png"):
        Path(f"folder{suffix}").mkdir()
    before = sorted(Path().rglob("*"))
    assert message in "\n".join(refused(capsys, *words))
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("option", ["test_split", "predict_folder", "eval_batch_size"])
def test_the_input_pipeline_is_not_timed_with_settings_that_it_has_no_use_for(
    option: str, capsys: pytest.CaptureFixture
) -> None:
    first, _ = refused(capsys, "benchmark-data", f"--data.{option}", "1", status=2)
    assert f"there is no option --data.{option}" in first


def test_the_file_of_a_run_tests_what_came_of_it(
    tiny_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    config = str(REPOSITORY / "configs" / "digits_base.yaml")  # from scratch, of ten classes
    main(
        ["test", "--config", config, "--model.pretrained", str(tiny_folder), "--data.dataset",
         DIGITS, "--trainer.limit_test_batches", "1", "--trainer.logger", "false"]
    )  # fmt: skip
    assert "test/accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["/no/where", "./nowhere", "../nowhere", "~/nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_taken_for_no_id_on_the_hub(
    name: str, capsys: pytest.CaptureFixture
) -> None:
    for words in (
        ["visualize", name, "--images", DIGITS, "--output", "o.png"],
        ["benchmark", f"{name},r=3"],
        ["export", name, "--output", "o.pt2"],
        ["push", name, "org/name", "--license", "mit"],
        ["fit", "--model.pretrained", name, "--data.dataset", DIGITS],
        ["test", "--model.pretrained", name, "--data.dataset", DIGITS],
    ):
        assert f"{name}: there is no such folder" in "\n".join(refused(capsys, *words))
    assert "there is no such f" in refused(capsys, "convert", name, "--output", "o")[0]


def test_a_folder_without_a_model_is_told_as_such(capsys: pytest.CaptureFixture) -> None:
    Path("empty").mkdir()
    for words in (
        ["visualize", "empty", "--images", DIGITS, "--output", "o.png"],
        ["benchmark", "empty"],
        ["convert", "empty", "--output", "o"],
        ["push", "empty", "org/name", "--license", "mit"],
        ["fit", "--model.pretrained", "empty", "--data.dataset", DIGITS],
    ):
        assert "empty has no config.json" in "\n".join(refused(capsys, *words))
    assert "did you mean 'deit_s'?" in refused(capsys, "benchmark", "deits")[0]


def test_an_index_of_weights_that_names_none_is_told(
    tiny_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    Path("m").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(tiny_folder / name, "m")
    Path("m", "model.safetensors.index.json").write_text('{"metadata": {}}')
    for words in (["benchmark", "m"], ["benchmark", "m,r=2"], ["convert", "m", "--output", "o"]):
        assert "its weight_map is to name a file" in refused(capsys, *words)[0]
