"""The search for settings of fusion, and the comparison of methods, through their commands."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

from cli.main import main
from cli.verdicts import table_of
from mctf_hf import MCTFViTForImageClassification, fuse_tokens, tuning
from mctf_hf.candidates import METHODS, Candidate, Dial, budget_of, meet, methods_for
from mctf_hf.cost import describe, multiply_accumulates
from mctf_hf.judging import Judge, applied, judge
from mctf_hf.model_folder import TUNING_PICTURE
from mctf_hf.tuning import Search, tune
from tests.helpers import DIGITS, tiny_model


def pictures(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fraction", [0.8, 0.7, 0.6])
def test_every_method_meets_a_budget(method: str, fraction: float) -> None:
    model = tiny_model(min_tokens=1)
    budget = budget_of(model, fraction)
    setting = meet(model, Candidate.untuned(method), budget)
    assert setting.cost <= budget
    with applied(model, setting.settings):
        assert multiply_accumulates(model.config) == setting.cost
        assert model.config.reduction == METHODS[method].fixed["reduction"]
    assert setting.cost > 0.9 * budget
    weights = (0.0, 2.0, 0.0, 1.0, 1.0)
    spread = meet(model, Candidate(method, setting.candidate.settings, weights), budget)
    with applied(model, spread.settings):
        fused = model.config.tokens_fused(65)
    assert fused[0] == fused[2] == 0 < min(fused[1], fused[3]) and spread.cost <= budget


def test_a_budget_that_cannot_be_met() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"GMACs cannot be met by tome, which leaves 0\.\d+ of 0"):
        meet(model, Candidate.untuned("tome"), budget_of(model, 0.1))
    for budget in (0, 1, 1.5, True, float("nan")):
        with pytest.raises(
            ValueError, match=f"budget={budget!r} is not allowed: it must be above 0"
        ):
            budget_of(model, budget)


def test_settings_turn_back_and_forth() -> None:
    for method in METHODS.values():
        for dial in method.dials:
            assert dial.value(dial.turned(dial.untuned)) == dial.untuned
    temperature = Dial("tau_info", 20.0, high=0.1, inverse=True)
    assert temperature.value(0.0) == 0.0 and temperature.turned(0.0) == 0.0
    assert temperature.value(1.0) == 10.0


def test_models_that_restore_drop_nothing() -> None:
    assert "diffrate" in methods_for(tiny_model()) and "diffrate" not in methods_for(encoder())


def encoder() -> Any:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=4
    )
    return fuse_tokens(Dinov2Model(config).eval())


@torch.no_grad()
def test_losses_by_hand() -> None:
    model = tiny_model(r=8)
    images, labels = pictures(), torch.arange(24) % 5
    plain = model(images, r=0).logits
    judging = Judge(model, images)
    assert torch.equal(judging.unfused, plain)
    before = model.config.to_dict()
    fused = judging.outputs({"reduction": "tome", "r": 6})
    assert model.config.to_dict() == before
    p, q = plain.softmax(1), fused.softmax(1)
    torch.testing.assert_close(judging.loss(fused), (p * (p / q).log()).sum(1))
    assert torch.equal(judging.agreement(fused), fused.argmax(1) == plain.argmax(1))
    assert judging.right(fused) is None
    labelled = Judge(model, images, labels)
    expected = -q.log()[torch.arange(24), labels]
    torch.testing.assert_close(labelled.loss(fused), expected)
    torch.testing.assert_close(labelled.change(fused), judging.loss(fused))
    assert torch.equal(labelled.right(fused), fused.argmax(1) == labels)


@torch.no_grad()
def test_losses_of_an_encoder_by_hand() -> None:
    model = encoder()
    judging = Judge(model, pictures())
    plain = model(pictures(), r=0).pooler_output
    fused = judging.outputs({"reduction": "mctf", "r": 8})
    cosines = torch.nn.functional.cosine_similarity(plain, fused)
    torch.testing.assert_close(judging.loss(fused), 1 - cosines)
    assert judging.agreement(plain).all()
    unit = torch.nn.functional.normalize(plain)
    nearest = (unit @ unit.T - 2 * torch.eye(24)).argmax(1)
    moved = plain.roll(1, 0)  # each where the one before it is, which is nearest then
    assert torch.equal(judging.agreement(moved), nearest == torch.arange(24).roll(1))
    verdict = judge(judging, "plain", None)
    assert verdict.fraction == 1 and float(verdict.loss.abs().max()) < 1e-6


def test_a_search_finds_what_is_better_and_keeps_to_its_budget() -> None:
    model = tiny_model(min_tokens=1)
    searching, ranking = Judge(model, pictures(40)[::2]), Judge(model, pictures(40)[1::2])
    found = tune(searching, ranking, 0.6, methods_for(model), trials=30)
    untuned = [verdict for verdict in found.ranking if verdict.name in METHODS]
    assert len(untuned) == len(METHODS)
    losses = [float(verdict.loss.mean()) for verdict in found.ranking]
    assert losses == sorted(losses) and found.best is found.ranking[0]
    assert found.best.name.startswith("tuned")
    assert all(verdict.fraction <= 0.6 for verdict in found.ranking)
    assert {verdict.name for verdict in found.ranking} >= {"tuned 1", "tuned 2", *METHODS}


@pytest.mark.parametrize("method", ["mctf_present", "token_mergence"])
def test_a_search_begins_with_a_known_setting(method: str) -> None:
    model = tiny_model(min_tokens=1)
    weights = (0.0, 1.0, 2.0, 1.0, 0.5)
    known = meet(model, Candidate(method, {}, weights), budget_of(model, 0.7))
    with applied(model, known.settings):
        start = Candidate.of(model.config, 65)
    assert start is not None and start.method == method
    assert meet(model, start, budget_of(model, 0.7)).cost == known.cost
    judging = Judge(model, pictures())
    search = Search(judging, ["tome"], budget_of(model, 0.7), trials=4, start=start)
    search.run()
    tried = [trial.user_attrs["candidate"]["method"] for trial in search.exploring.trials]
    assert tried[:2] == [method, "tome"] and len(search.refining.trials) == 1
    found = tune(judging, judging, 0.7, ["tome"], trials=4, start=start)
    assert {verdict.name for verdict in found.ranking} >= {"start", "tome", "tuned 1"}
    assert Candidate.of(tiny_model(r=0).config, 65) is None


@pytest.mark.parametrize("method", ["tome", "diffrate"])
def test_a_model_of_two_layers_is_tuned(method: str) -> None:
    """Of which only the first one can fuse anything that is read."""
    model = tiny_model(num_hidden_layers=2, min_tokens=1)
    judging = Judge(model, pictures())
    found = tune(judging, judging, 0.5, [method], trials=12)
    assert found.best.fraction <= 0.5 and found.best.setting.settings["r"][0] > 0


@pytest.mark.parametrize("trials", [3, 20])
def test_an_interrupted_search_ends_the_same(
    trials: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It breaks off in the middle of a trial, again and again."""
    model = tiny_model(min_tokens=1)
    judging, budget = Judge(model, pictures(40)), budget_of(model, 0.7)
    methods = ("mctf_present", "tome", "token_mergence")
    monkeypatch.setattr(tuning, "CHUNK", 8)
    whole = Search(judging, methods, budget, storage=tmp_path / "whole", trials=trials)
    whole.run()
    calls, outputs = 0, judging.outputs

    def break_off(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 13 == 0:
            raise KeyboardInterrupt
        return outputs(*args)

    monkeypatch.setattr(judging, "outputs", break_off)
    interrupted = 0
    while True:
        search = Search(judging, methods, budget, storage=tmp_path / "broken", trials=trials)
        try:
            search.run()
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted
    for part in ("exploring", "refining"):
        tried = [getattr(one, part).trials for one in (search, whole)]
        assert [one.value for one in tried[0]] == [one.value for one in tried[1]]
    found = [[one.settings for one in done.finalists()] for done in (search, whole)]
    assert found[0] == found[1] and found[0]
    with pytest.raises(ValueError, match="is of another search, whose seed was 0 and not 1: name"):
        Search(judging, methods, budget, storage=tmp_path / "broken", trials=trials, seed=1)


WORDS = ["--images", DIGITS, "--num_images", "24"]


def test_the_command_tunes_a_model(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", str(tiny_folder), *WORDS, "--budget", "0.7", "--trials", "12"]
    words += ["--methods", "tome,mctf_present,token_mergence", "--output", "tuned"]
    main(words)
    shown = " ".join(capsys.readouterr().out.split())
    assert "12 images to search on, 12 to rank on" in shown
    assert "12 of 12 tried, least loss" in shown and "written: tuned" in shown
    record = json.loads(Path("tuned/tuning.json").read_text())
    assert record["budget"] == 0.7 and record["num_images"] == [12, 12]
    with open("tuned/tuning.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["setting"] for row in rows} >= {"tome", "mctf_present", "token_mergence", "tuned 1"}
    assert all(float(row["fraction"]) <= 0.7 for row in rows)
    assert [float(row["loss"]) for row in rows] == sorted(float(row["loss"]) for row in rows)
    assert float(rows[0]["more_loss"]) == 0
    with Image.open("tuned/tuning.png") as picture:
        assert picture.width > 300
    model = MCTFViTForImageClassification.from_pretrained("tuned")
    for name, value in record["settings"].items():
        assert getattr(model.config, name) == value
    plain = MCTFViTForImageClassification.from_pretrained(tiny_folder)
    cost = multiply_accumulates(model.config) / describe(plain.config).unfused
    assert 0.65 < cost <= 0.7
    before = Path("tuned/tuning.json").read_text()
    main(words)  # everything is in the study
    assert Path("tuned/tuning.json").read_text() == before
    again = ["tune", "tuned", *WORDS, "--budget", "0.6", "--trials", "3", "--output", "again"]
    main([*again, "--methods", "tome", "--precision", "bf16-true"])
    settings = [
        row["setting"] for row in json.loads(Path("again/tuning.json").read_text())["ranking"]
    ]
    assert "start" in settings


def test_a_card_tells_how_the_setting_was_found(tiny_folder: Path) -> None:
    words = ["tune", str(tiny_folder), *WORDS, "--budget", "0.7", "--trials", "2"]
    main([*words, "--methods", "tome", "--output", "tuned"])
    push = ["org/model", "--license", "mit", "--rounds", "1", "--batch_size", "2"]
    main(["push", "tuned", *push, "--dry-run", "draft"])
    card = Path("draft/README.md").read_text()
    assert "## How the setting was found" in card and "(budget 0.7)" in card
    record = json.loads(Path("tuned/tuning.json").read_text())
    for row in record["ranking"]:
        assert f"| `{row['setting']}` | {row['gmacs']:.4g} | {row['loss']:.5f} |" in card
    for name in ("tuning.json", "tuning.csv", "tuning.png"):
        assert Path("draft", name).read_bytes() == Path("tuned", name).read_bytes()
    main(["push", "tuned,r=3", *push, "--dry-run", "other"])
    assert "was found" not in Path("other/README.md").read_text()
    assert not Path("other/tuning.json").exists()


def test_a_table_tells_losses_to_five_digits_with_their_errors() -> None:
    judging = Judge(tiny_model(), pictures())
    setting = meet(judging.model, Candidate.untuned("tome"), budget_of(judging.model, 0.8))
    table = table_of([judge(judging, "tome", setting)], "title")
    row = {column.header: next(iter(column.cells)) for column in table.columns}
    assert row["setting"] == "tome" and re.fullmatch(r"0\.\d{3}", row["of cost"])
    assert re.fullmatch(r"\d+\.\d{5} ± \d+\.\d{5}", row["loss"])
    assert re.fullmatch(r"\d+\.\d{2} ± \d+\.\d{2}", row["agreement %"])


def test_the_command_tunes_for_a_loss_and_by_labels(tiny_folder: Path) -> None:
    words = ["tune", str(tiny_folder), *WORDS, "--trials", "4", "--methods", "tome"]
    main([*words, "--max_loss", "99", "--labels", "true", "--output", "tuned"])
    record = json.loads(Path("tuned/tuning.json").read_text())
    assert record["labels"] and record["max_loss"] == 99
    _, cheapest = record["ranking"][:2]
    assert cheapest["fraction"] <= 0.6


def test_the_command_tunes_for_a_speed(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tune", str(tiny_folder), *WORDS, "--trials", "3", "--methods", "tome"]
    words += ["--batch_size", "8", "--rounds", "1"]
    with FlopCounterMode(display=False) as counter:  # of a machine whose time is its work
        clock = SimpleNamespace(perf_counter=counter.get_total_flops)
        monkeypatch.setattr("cli.measuring.time", clock)
        main([*words, "--speed", "1.3", "--output", "tuned"])
        with pytest.raises(SystemExit):
            main([*words, "--speed", "50", "--output", "faster"])
    assert "speed=50.0 is not reached on this machine" in capsys.readouterr().err
    assert not Path("faster").exists()
    record = json.loads(Path("tuned/tuning.json").read_text())
    assert record["speed"] == 1.3
    assert max(row.get("speed", 0) for row in record["ranking"]) >= 1.3
    rows = [(row["setting"], row["gmacs"]) for row in record["ranking"]]
    assert len(set(rows)) == len(rows)


def test_a_picture_shows_the_budgets_that_can_be_met(flat_folder: Path) -> None:
    words = ["tune", str(flat_folder), *WORDS, "--trials", "2", "--methods", "tome"]
    main([*words, "--budget", "0.8", "--output", "tuned"])  # two layers cannot go down to 0.4
    assert Path("tuned", TUNING_PICTURE).exists()


def test_a_part_of_a_judge_is_a_judge_of_these_images() -> None:
    model, labels = tiny_model(), torch.arange(24) % 5
    whole = Judge(model, pictures(), labels)
    part, own = whole.part(slice(1, None, 2)), Judge(model, pictures()[1::2], labels[1::2])
    setting = meet(model, Candidate.untuned("tome"), budget_of(model, 0.8))
    found, expected = (judge(one, "tome", setting) for one in (part, own))
    assert len(part) == 12 and len(whole) == 24
    torch.testing.assert_close(found.loss, expected.loss)
    assert torch.equal(found.agreement, expected.agreement)
    assert torch.equal(found.right, expected.right)


def test_the_command_sweeps(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", f"{tiny_folder},r=4", *WORDS, "--budgets", "0.8,0.6", "--labels", "true"]
    main([*words, "--speed", "true", "--rounds", "1", "--output", "sweep.csv", "--plot", "s.png"])
    with open("sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows[:2]] == ["unfused", "own"]
    for method in METHODS:
        assert [float(row["fraction"]) <= budget for row, budget in zip(
            [row for row in rows if row["setting"] == method], (0.8, 0.6), strict=True
        )] == [True, True]  # fmt: skip
    assert all(0 <= float(row["accuracy"]) <= 100 and float(row["speed"]) > 0 for row in rows)
    for row in rows:  # of the same images, so that the difference is that of the means
        lost = float(row["accuracy"]) - float(rows[0]["accuracy"])
        assert float(row["difference"]) == pytest.approx(lost, abs=1e-4)
        assert float(row["difference_error"]) <= 2 * float(row["accuracy_error"])
    with Image.open("s.png") as picture:
        assert picture.width > 1000
    capsys.readouterr()
    main(["sweep", str(tiny_folder), *WORDS, "--budgets", "0.05", "--methods", "mctf"])
    shown = capsys.readouterr().out
    assert "left out: a budget of" in shown and "agreement" in shown
    main(["sweep", f"{tiny_folder},r=4", *WORDS, "--methods", "own", "--output", "own.csv"])
    with open("own.csv", newline="") as file:
        assert [row["setting"] for row in csv.DictReader(file)] == ["unfused", "own"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"budget=None, speed=None, max_loss=None is not allowed: give exactly one"),
        (["--budget", "0.5", "--speed", "2"], "budget=0.5, speed=2.0, max_loss=None is not allow"),
        (["--budget", "1.5"], "budget=1.5 is not allowed: it must be above 0 and below 1"),
        (["--budget", "0.05"], "a budget of .* GMACs cannot be met by"),
        (["--budget", "0.5", "--methods", "mtf"], "methods='mtf' is not allowed: 'mtf' is none of"),
        (["--budget", "0.5", "--trials", "0"], "trials=0 is not allowed: it must be at least 1"),
        (
            ["--budget", "0.5", "--num_images", "3"],
            "num_images=3 is not allowed: it must be at least 4",
        ),
        (["--budget", "0.5", "--split", "no"], "has no split 'no': it has t"),
        (["--budget", "0.5", "--rounds", "2"], "--rounds is not allowed without --speed"),
        (["--budget", "0.5", "--study", "no/s"], "study='no/s' cannot be written"),
    ],
)
def test_mistakes_are_told(
    words: list[str], message: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["tune", str(tiny_folder), *WORDS, "--output", "tuned", *words])
    assert re.search(message, capsys.readouterr().err)
    assert not Path("tuned").exists()


def test_an_empty_folder_and_a_model_without_layers_are_told(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    words = ["--output", "tuned", "--budget", "0.5"]
    with pytest.raises(SystemExit):
        main(["tune", str(tiny_folder), "--images", "empty", *words])
    assert "empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tune", "empty", *WORDS, *words])
    assert "empty" in capsys.readouterr().err
