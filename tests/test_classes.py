"""Classes of a model and of a dataset, by their names."""

import json
from pathlib import Path

import pytest

from cli.main import main
from mctf_hf.classes import check_classes
from tests.helpers import DIGITS, tiny_model

ANIMALS = ["ape", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]


def configured(names: list[str]) -> object:
    return tiny_model(num_labels=len(names), id2label=dict(enumerate(names))).config


@pytest.mark.parametrize(
    ("own", "names", "message"),
    [
        (ANIMALS, ANIMALS[::-1], "'jay', 'ibis', .* the model 'ape', .* the same in another order"),
        (ANIMALS, [str(i) for i in range(10)], "'0', '1', .* the model 'ape', .* 10 of 10 differ"),
        (ANIMALS, ["ape", "bee", "dog", "yak", *ANIMALS[4:]], "2 of 10 differ, class 2 is 'dog' h"),
        (
            ANIMALS,
            ANIMALS[:4],
            r"the data has 4 classes \(.*\), and the model has 10 .* set num_labels=4 fo",
        ),
    ],
)
def test_other_classes_are_named(own: list[str], names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_classes(configured(own), names, "the model", "the data")


@pytest.mark.parametrize(
    ("own", "names"),
    [
        (["tench, Tinca tinca", "great_white shark"], ["Tench", "Great White Shark"]),
        ([f"LABEL_{i}" for i in range(10)], ANIMALS),
        (ANIMALS, [f"n{i:08}" for i in range(10)]),
        (["crane", "cat", "crane"], ["crane", "cat", "crane"]),
    ],
)
def test_the_same_classes_in_other_words(own: list[str], names: list[str]) -> None:
    check_classes(configured(own), names, "the model", "the data")


def test_every_command_that_counts_what_is_right_compares_names(
    tiny_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    folder = Path("animals")
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    named = {
        "id2label": dict(enumerate(ANIMALS)),
        "label2id": {n: i for i, n in enumerate(ANIMALS)},
    }
    (folder / "config.json").write_text(json.dumps({**config, **named}))
    lightning = [
        "--model.pretrained=animals", f"--data.dataset={DIGITS}", "--data.num_workers=0",
        "--trainer.accelerator=cpu", "--trainer.default_root_dir=.",
    ]  # fmt: skip
    for words in (
        ["test", *lightning],
        ["validate", *lightning],
        ["fit", *lightning, "--model.r=6"],
        ["benchmark", "animals", "--batch_sizes=1", f"--accuracy={DIGITS}"],
        [
            "push",
            "animals",
            "org/animals",
            "--license=mit",
            f"--dataset={DIGITS}",
            "--dry-run=draft",
        ],
    ):
        with pytest.raises(SystemExit):
            main(words)
        told = capsys.readouterr().err
        assert "'0', '1', '2', '3' …, and the model 'ape', 'bee', 'cat', 'dog' …" in told, words
        assert "set num_labels=10 for a new head" in told
    assert not Path("draft").exists()
