"""What `mctf` tells of its commands: fast, what people use first, and for shells to complete."""

import re
import resource
import subprocess
import sys

import pytest

from cli.commands import COMMANDS
from cli.main import main
from tests.helpers import REPOSITORY


def shown(capsys: pytest.CaptureFixture, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert not stopped.value.code
    return capsys.readouterr().out


def options(text: str) -> set[str]:
    return set(re.findall(r"^ +(?:-\w[^,]*, )?(--[\w.]+)", text, re.MULTILINE))


def test_help_takes_less_than_a_second() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert set(COMMANDS) <= set(done.stdout.split())
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1


def test_help_begins_with_what_people_use(capsys: pytest.CaptureFixture) -> None:
    brief, everything = (shown(capsys, "fit", one) for one in ("--help", "--help_all"))
    assert len(brief) < len(everything) / 6 and len(brief.splitlines()) < 150
    assert options(brief) < options(everything) and len(options(everything)) > 120
    listed = re.findall(r"^  --(\w+)\.", brief, re.MULTILINE)
    assert list(dict.fromkeys(listed))[:3] == ["model", "data", "trainer"]
    assert {"--model.r", "--data.dataset", "--export.folder", "--ckpt_path"} <= options(brief)
    assert "`mctf fit --help_all` shows all of them" in brief
    assert shown(capsys, "fit", "--help-all") == everything


def test_help_tells_what_has_an_effect_in_a_command(capsys: pytest.CaptureFixture) -> None:
    brief = options(shown(capsys, "predict", "--help"))
    assert {"--data.predict_folder", "--predictions.path", "--model.pretrained"} <= brief
    assert not {"--model.learning_rate", "--data.dataset", "--export.folder"} & brief


def test_a_shell_completes_commands_and_options(capsys: pytest.CaptureFixture) -> None:
    main(["completion", "zsh"])
    first, script = capsys.readouterr().out.split("\n", 1)
    assert "bashcompinit" in first  # and then zsh knows what bash does

    def completed(*words: str) -> list[str]:
        ask = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _mctf"
        code = f'{script}\n{ask}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("mctf", "be") == ["benchmark", "benchmark-data"]
    assert completed("mctf", "fit", "--model.pre") == ["--model.pretrained"]
    assert completed("mctf", "visualize", "m", "--o") == ["--output"]
    assert completed("mctf", "visualize", "photos/") == []  # files, by the shell itself
