"""To the Hub with the real command, and from there into a process that never heard of us."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from PIL import Image
from torch import Tensor
from transformers import ViTImageProcessorPil

from cli.main import main
from mctf_hf import MCTFViTForImageClassification
from mctf_hf.hub import push, save
from tests.conftest import DIGITS, tiny_model
from tests.e2e.test_commands import mctf
from tests.local_hub import LocalHub
from tests.test_loading import BLOCKED

pytestmark = pytest.mark.timeout(300)

TOKEN = "hf_good"
REPO = "org/deit-s-mctf"
CODE = {
    "attention.py",
    "configuration_mctf.py",
    "downloads.py",
    "fusion.py",
    "matching.py",
    "modeling_mctf_vit.py",
    "reducers.py",
}
FILES = CODE | {
    ".gitattributes",
    "README.md",
    "config.json",
    "evaluation.json",
    "fused_tokens.png",
    "model.safetensors",
    "preprocessor_config.json",
}

STRANGER = (
    BLOCKED
    + """
import torch
from transformers import AutoModel, AutoModelForImageClassification

repo, revision, given, results = sys.argv[1:]
images = torch.load(given)
pinned = {"revision": revision} if revision else {}
classifier = AutoModelForImageClassification.from_pretrained(
    repo, trust_remote_code=True, **pinned
).eval()
encoder = AutoModel.from_pretrained(repo, trust_remote_code=True, **pinned).eval()
with torch.no_grad():
    torch.save({
        "logits": classifier(images).logits,
        "hidden": encoder(images).last_hidden_state,
        "r": classifier.config.r,
    }, results)
"""
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with LocalHub(tokens={TOKEN}) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return save(tiny_model(r=7, num_labels=10), processor, tmp_path / "model")


def api(hub: LocalHub, token: str = TOKEN) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def load(
    hub: LocalHub, home: Path, images: Tensor, revision: str = ""
) -> subprocess.CompletedProcess:
    """Load the repository in a process without this library; the results lie beside ``home``."""
    given, results = home.with_suffix(".images"), home.with_suffix(".results")
    torch.save(images, given)
    return subprocess.run(
        [sys.executable, "-c", STRANGER, REPO, revision, given, results],
        env=hub.environment(home),
        capture_output=True,
        text=True,
    )


@torch.no_grad()
def check(done: subprocess.CompletedProcess, home: Path, images: Tensor, r: int) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(home.with_suffix(".results"))
    model = tiny_model(r=r, num_labels=10)
    assert found["r"] == r
    assert torch.equal(found["logits"], model(images).logits)
    assert torch.equal(found["hidden"], model.vit(images).last_hidden_state)


def test_pushed_measured_and_loaded_by_a_stranger(
    hub: LocalHub,
    folder: Path,
    tmp_path: Path,
    images: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--license", "apache-2.0", "--dataset", DIGITS, "--max-images", "40", "--rounds", "2"]
    for name, value in hub.environment(tmp_path / "home", TOKEN).items():
        monkeypatch.setenv(name, value)
    shas = []
    for r in (7, 3):
        done = mctf("push", f"{folder},r={r}", REPO, *words, "--batch-size", "4")
        assert done.returncode == 0, done.stderr
        assert set(hub.files(REPO)) == FILES
        shas.append(hub.repos[REPO].branches["main"])
        assert f"revision='{shas[-1]}' pins it" in done.stdout
    made = [path for method, path in hub.requests if method == "POST" and "/commit/" in path]
    assert len(made) == 2 and len(hub.repos[REPO].commits) == 3  # with that of the new repository

    check(load(hub, tmp_path / "latest", images), tmp_path / "latest", images, r=3)
    check(load(hub, tmp_path / "pinned", images, shas[0]), tmp_path / "pinned", images, r=7)
    card_is_true(hub, tmp_path)


def test_commands_take_ids_of_the_hub(
    hub: LocalHub,
    folder: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push(folder, REPO, private=True, api=api(hub))
    api(hub).create_repo("org/plain")
    api(hub).upload_folder(repo_id="org/plain", folder_path=tiny_folder)
    for name, value in hub.environment(tmp_path / "home", TOKEN).items():
        monkeypatch.setenv(name, value)
    for words in (
        ["benchmark", "org/plain", f"{REPO},r=3", "--rounds", "1", "--batch_sizes", "[2]",
         "--output", "speed.json"],
        ["visualize", REPO, "org/plain,r=6", "--images", DIGITS, "--output", "fused.png"],
        ["push", "org/plain,r=5", "org/new", "--license", "mit", "--rounds", "1"],
    ):  # fmt: skip
        done = mctf(*words)
        assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(Path("speed.json").read_text())["results"]
    assert [row["model"] for row in measured] == ["org/plain", f"{REPO},r=3"]
    assert measured[1]["gmacs"] < measured[0]["gmacs"]
    assert Image.open("fused.png").size[0] > 3 * 400
    assert json.loads(hub.files("org/new")["config.json"])["r"] == 5
    assert ModelCard(hub.files("org/new")["README.md"].decode()).data.base_model == "org/plain"


def card_is_true(hub: LocalHub, tmp_path: Path) -> None:
    """Its metadata say what was measured, and its code runs for a stranger as it stands."""
    text = hub.files(REPO)["README.md"].decode()
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-classification" and "mctf" in card.data.tags
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    evaluation = json.loads(hub.files(REPO)["evaluation.json"])
    own, plain = evaluation["own"], evaluation["plain"]
    assert results == pytest.approx(
        {
            "accuracy": own["accuracy"],
            "gmacs": own["gmacs"],
            "images_per_second": own["images_per_second"],
            "speedup": own["images_per_second"] / plain["images_per_second"],
        },
        abs=1e-4,
    )
    assert evaluation["num_images"] == 40 and evaluation["dataset"] == "digits"
    for row in (plain, own, *evaluation["others"]):
        assert f"| {row['name']} | {row['gmacs']:.3f} | {100 * row['accuracy']:.2f}% |" in text
    assert len(evaluation["others"]) >= 3

    Image.effect_noise((40, 50), 80).save(tmp_path / "photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    # Older releases hide this name where torchvision is missing, though it works without.
    code = "\n".join(blocks).replace(
        "from transformers import AutoImageProcessor, ",
        "from transformers.models.auto.image_processing_auto import AutoImageProcessor\n"
        "from transformers import ",
    )
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + code],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "snippets"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "LABEL_" in done.stdout and "tensor(" in done.stdout
    picture = tmp_path / "card.png"
    picture.write_bytes(hub.files(REPO)["fused_tokens.png"])
    assert min(Image.open(picture).size) > 200


def test_a_dry_run_writes_what_would_go_up_and_sends_nothing(
    hub: LocalHub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--license", "mit", "--rounds", "1", "--batch_size", "2", "--base_model", "org/base"]
    main(["push", str(folder), REPO, *words, "--dry-run", str(tmp_path / "draft")])
    shown = capsys.readouterr().out
    expected = FILES - {".gitattributes", "fused_tokens.png"}  # there were no images to show
    assert {path.name for path in (tmp_path / "draft").iterdir()} == expected
    assert all(name in shown for name in expected)
    assert f"Would go to {REPO}, revision main" in shown
    assert not hub.requests
    card = ModelCard.load(tmp_path / "draft" / "README.md")
    assert card.data.base_model == "org/base" and "base_model:" in str(card)
    assert "accuracy" not in {result.metric_type for result in card.data.eval_results}
    assert "not measured" in card.text
    push(tmp_path / "draft", REPO, api=api(hub))
    assert set(hub.files(REPO)) == {*expected, ".gitattributes"}


def test_a_branch_of_its_own_and_a_private_repository(hub: LocalHub, folder: Path) -> None:
    push(folder, REPO, private=True, revision="fast", api=api(hub))
    repo = hub.repos[REPO]
    assert repo.private and set(repo.branches) == {"main", "fast"}
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert set(hub.files(REPO, "fast")) >= CODE | {"model.safetensors"}

    api(hub).create_repo("org/open")
    with pytest.raises(ValueError, match="private=True is not allowed: org/open exists and is pub"):
        push(folder, "org/open", private=True, api=api(hub))
    assert set(hub.files("org/open")) == {".gitattributes"}


def test_weights_of_an_earlier_push_do_not_stay(hub: LocalHub, folder: Path, tmp_path) -> None:
    model = MCTFViTForImageClassification.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "handler.py").write_text("mine = True")
    push(folder, REPO, api=api(hub))
    shards = {name for name in hub.files(REPO) if re.fullmatch(r"model-.*\.safetensors", name)}
    assert len(shards) > 2 and "model.safetensors.index.json" in hub.files(REPO)
    (folder / "handler.py").unlink()
    save(model, ViTImageProcessorPil.from_pretrained(folder), folder)
    push(folder, REPO, api=api(hub))
    names = set(hub.files(REPO))
    assert not names & shards and "model.safetensors.index.json" not in names
    assert {"model.safetensors", "handler.py"} <= names


@pytest.mark.parametrize("revision", ["main", "fast"])
def test_an_upload_that_breaks_off_changes_nothing_and_can_be_repeated(
    hub: LocalHub, folder: Path, tmp_path: Path, images: Tensor, revision: str
) -> None:
    push(folder, REPO, api=api(hub))
    before = dict(hub.repos[REPO].branches)
    changed = MCTFViTForImageClassification.from_pretrained(folder, r=3)
    changed.classifier.bias.data += 1
    save(changed, ViTImageProcessorPil.from_pretrained(folder), folder)
    if revision == "main":
        hub.cut_uploads(times=6, after_bytes=1000)  # the client tries six times
        advice = "Push again: files that have arrived are not sent twice"
    else:
        hub.cut_commits(times=1)
        advice = "revision fast, was not made"
    with pytest.raises(ConnectionError, match=advice) as broken:
        push(folder, REPO, revision=revision, api=api(hub))
    assert not hub.faults
    assert REPO in str(broken.value) and "\n" not in str(broken.value)
    assert hub.repos[REPO].branches == before
    check(load(hub, tmp_path / "old", images), tmp_path / "old", images, r=7)

    sent = len([path for method, path in hub.requests if method == "PUT"])
    push(folder, REPO, revision=revision, api=api(hub))
    sent_again = len([path for method, path in hub.requests if method == "PUT"]) - sent
    assert sent_again == (1 if revision == "main" else 0)
    assert (
        hub.files(REPO, revision)["model.safetensors"]
        == Path(folder, "model.safetensors").read_bytes()
    )


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (409, "Somebody else changed it meanwhile"),
        (412, "Somebody else changed it meanwhile"),
        (403, "Is the token right, and may it write there"),
        (400, "The Hub does not accept this push"),
        (500, "Push again"),
    ],
)
def test_a_commit_that_is_refused(hub: LocalHub, folder: Path, status: int, advice: str) -> None:
    push(folder, REPO, api=api(hub))
    before = dict(hub.repos[REPO].branches)
    save(tiny_model(r=2, num_labels=10), ViTImageProcessorPil.from_pretrained(folder), folder)
    for revision in ("main", "fast"):
        hub.refuse_commits(status, times=1)
        with pytest.raises(ConnectionError, match=f"{REPO}, revision {revision}, .*{advice}"):
            push(folder, REPO, revision=revision, api=api(hub))
        assert not hub.faults and hub.repos[REPO].branches == before
    push(folder, REPO, api=api(hub))
    assert json.loads(hub.files(REPO)["config.json"])["r"] == 2


def test_a_wrong_token_and_a_hub_that_is_not_there(hub: LocalHub, folder: Path) -> None:
    with pytest.raises(ConnectionError, match="was not changed: .*Is the token right"):
        push(folder, REPO, api=api(hub, "hf_wrong"))
    assert not hub.repos
    push(folder, REPO, api=api(hub))
    before = dict(hub.repos[REPO].branches)
    with pytest.raises(ConnectionError, match="was not changed: .*Is the token right"):
        push(folder, REPO, api=api(hub, "hf_wrong"))
    assert hub.repos[REPO].branches == before
    with pytest.raises(ConnectionError, match="was not changed: .*Push again"):
        push(folder, REPO, api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))


def test_what_changed_meanwhile_is_not_overwritten(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folder, REPO, api=api(hub))
    save(tiny_model(r=2, num_labels=10), ViTImageProcessorPil.from_pretrained(folder), folder)
    client = api(hub)
    send = client.create_commit

    def too_late(*words: object, **options: object) -> object:
        api(hub).upload_file(path_or_fileobj=b"theirs", path_in_repo="x.txt", repo_id=REPO)
        return send(*words, **options)

    monkeypatch.setattr(client, "create_commit", too_late)
    with pytest.raises(ConnectionError, match="is now at .*Somebody else changed it"):
        push(folder, REPO, api=client)
    assert hub.files(REPO)["x.txt"] == b"theirs"
    assert json.loads(hub.files(REPO)["config.json"])["r"] == 7


def test_a_damaged_download_is_told_and_repaired_by_loading_again(
    hub: LocalHub, folder: Path, tmp_path: Path, images: Tensor
) -> None:
    push(folder, REPO, api=api(hub))
    old = hub.repos[REPO].branches["main"]
    home = tmp_path / "home"
    check(load(hub, home, images), home, images, r=7)
    changed = tiny_model(r=3, num_labels=10)
    changed.classifier.bias.data += 1
    save(changed, ViTImageProcessorPil.from_pretrained(folder), folder)
    push(folder, REPO, api=api(hub))

    hub.corrupt_downloads(".safetensors", times=1)
    damaged = load(hub, home, images)
    assert damaged.returncode == 1 and not hub.faults
    message = damaged.stderr.strip().splitlines()[-1]
    assert re.match(f"OSError: model.safetensors of {REPO} arrived damaged: its SHA-256", message)
    assert message.endswith("removed from the cache: load the model again")
    check(load(hub, home, images, old), home, images, r=7)
    again = load(hub, home, images)
    assert again.returncode == 0, again.stderr[-3000:]
    with torch.no_grad():
        expected = changed(images).logits
    assert torch.equal(torch.load(home.with_suffix(".results"))["logits"], expected)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("preprocessor_config.json", "preprocessor_config.json missing"),
        ("model.safetensors", "model.safetensors missing"),
        ("modeling_mctf_vit.py", "modeling_mctf_vit.py missing"),
    ],
)
def test_a_folder_that_would_not_load_is_not_pushed(
    hub: LocalHub, folder: Path, missing: str, message: str
) -> None:
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=message):
        push(folder, REPO, api=api(hub))
    assert not hub.requests


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "license"),
        (["--license", "mit", "--max_images", "0"], "max_images=0 is not allowed"),
        (["--license", "mit", "--dataset", "/nowhere"], "/nowhere"),
        (["--license", "mit", "--dataset", DIGITS, "--split", "val"], "has no split 'val'"),
        (["--license", "mit", "--dry-run", DIGITS], "holds something else than a model"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured_or_sent(
    hub: LocalHub,
    folder: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(folder), REPO, *words])
    assert stopped.value.code in (1, 2)
    shown = capsys.readouterr()
    assert message in shown.err and "Measuring" not in shown.out
    assert not hub.requests
