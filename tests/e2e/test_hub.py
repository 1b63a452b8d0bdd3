"""To the Hub with the real command, and from there into a process that never heard of us."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import HfApi, ModelCard, constants
from PIL import Image
from torch import Tensor
from transformers import ViTForImageClassification, ViTImageProcessorPil

from cli.evaluation import plain_model
from cli.main import main
from mctf_hf import MCTFViTForImageClassification
from mctf_hf.cost import describe, multiply_accumulates
from mctf_hf.hub import push, save
from mctf_hf.model_card import make_card
from mctf_hf.model_folder import RECORD
from tests.helpers import DIGITS, fit_words, tiny_model
from tests.local_hub import LocalHub
from tests.strangers import OF_STRANGERS
from tests.warm import COMMAND, Warm, warm_commands

pytestmark = pytest.mark.timeout(300)

TOKEN = "hf_good"
REPO = "org/deit-s-mctf"
CODE = {
    "attention.py",
    "configuration_mctf.py",
    "anatomy.py",
    "downloads.py",
    "files.py",
    "fused_encoder.py",
    "fused_layer.py",
    "limits.py",
    "modeling_mctf.py",
    "schedule.py",
    "fusion.py",
    "kernels.py",
    "matching.py",
    "modeling_mctf_vit.py",
    "own_reducers.py",
    "records.py",
    "reducers.py",
    "dependencies.py",
    "pairing.py",
    "selection.py",
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

LOAD = """
import sys

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


@pytest.fixture(scope="module")
def running_hub() -> Iterator[LocalHub]:
    with LocalHub(tokens={TOKEN}) as hub:
        yield hub


@pytest.fixture
def hub(running_hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub that holds nothing."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    running_hub.begin()
    yield running_hub
    running_hub.check()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def user(running_hub: LocalHub, home: Path) -> Iterator[Warm]:
    with warm_commands(running_hub.environment(home / "user", TOKEN)) as warm:
        yield warm


@pytest.fixture
def mctf(hub: LocalHub, home: Path, user: Warm) -> Callable[..., subprocess.CompletedProcess]:
    """Commands of a user of this Hub with an empty cache, each in a process of its own."""
    shutil.rmtree(home / "user", ignore_errors=True)
    return partial(user.run, COMMAND)


@pytest.fixture(scope="module")
def anybody(running_hub: LocalHub, home: Path) -> Iterator[Warm]:
    with Warm(OF_STRANGERS, running_hub.environment(home / "stranger")) as warm:
        yield warm


@pytest.fixture
def stranger(hub: LocalHub, home: Path, anybody: Warm) -> Warm:
    """Processes of somebody without this library, with one cache that is empty."""
    shutil.rmtree(home / "stranger", ignore_errors=True)
    return anybody


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    folder = tmp_path_factory.mktemp("saved") / "model"
    return save(tiny_model(r=7, num_labels=10), processor, folder)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def api(hub: LocalHub, token: str = TOKEN) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def load(
    stranger: Warm, images: Tensor, revision: str = "", options: str = ""
) -> subprocess.CompletedProcess:
    """Load the repository in a process without this library; the results lie in ``found.pt``."""
    torch.save(images, "images.pt")
    Path("found.pt").unlink(missing_ok=True)
    code = LOAD.replace("**pinned", f"**pinned, {options}")
    return stranger.run(code, REPO, revision, "images.pt", "found.pt")


@torch.no_grad()
def check(done: subprocess.CompletedProcess, images: Tensor, r: int) -> None:
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load("found.pt")
    model = tiny_model(r=r, num_labels=10)
    assert found["r"] == r
    assert torch.equal(found["logits"], model(images).logits)
    assert torch.equal(found["hidden"], model.vit(images).last_hidden_state)


def test_pushed_measured_and_loaded_by_a_stranger(
    hub: LocalHub,
    mctf: Callable[..., subprocess.CompletedProcess],
    stranger: Warm,
    folder: Path,
    images: Tensor,
) -> None:
    words = ["--license", "apache-2.0", "--dataset", DIGITS, "--max-images", "40", "--rounds", "2"]
    words += ["--picture", DIGITS]
    shas = []
    for r in (7, 3):
        done = mctf("push", f"{folder},r={r}", REPO, *words, "--batch-size", "4")
        assert done.returncode == 0, done.stderr
        assert f"The card shows row 0 of {DIGITS}, split test; row 125 of" in done.stdout
        assert set(hub.files(REPO)) == FILES
        shas.append(hub.repos[REPO].branches["main"])
        assert f"revision='{shas[-1]}' pins it" in done.stdout
    made = [path for method, path in hub.requests if method == "POST" and "/commit/" in path]
    assert len(made) == 2 and len(hub.repos[REPO].commits) == 3  # with that of the new repository

    check(load(stranger, images), images, r=3)
    check(load(stranger, images, shas[0]), images, r=7)
    card_is_true(hub, stranger)


def test_commands_take_ids_of_the_hub(
    hub: LocalHub,
    mctf: Callable[..., subprocess.CompletedProcess],
    folder: Path,
    tiny_folder: Path,
) -> None:
    push(folder, REPO, private=True, api=api(hub))
    api(hub).create_repo("org/plain")
    api(hub).upload_folder(repo_id="org/plain", folder_path=tiny_folder)
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


def test_training_and_measurements_are_told_as_they_were(
    hub: LocalHub,
    mctf: Callable[..., subprocess.CompletedProcess],
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    """From ``fit`` by ``push`` to the card, and again from the Hub to another repository."""
    few = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "5"]
    done = mctf(*fit_words(tmp_path, tiny_folder), *few)
    assert done.returncode == 0, done.stderr[-3000:]
    words = ["--license", "mit", "--dataset", DIGITS, "--max-images", "100", "--rounds", "1"]
    done = mctf("push", tmp_path / "model", REPO, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert "Finetuned with token-reduction consistency" in card.text
    for row in ("pretrained | `tiny-vit`", "dataset | `digits`", "r_max | `3`", "epochs | `1`"):
        assert f"| {row} |" in card.text
    published = b"".join(hub.files(REPO).values())
    assert str(tmp_path).encode() not in published and DIGITS.encode() not in published
    assert card.data.base_model is None and card.data.datasets is None  # no id of the Hub

    model = MCTFViTForImageClassification.from_pretrained(tmp_path / "model").eval()
    rows = load_dataset(DIGITS, split="test").select(range(0, 500, 5))
    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "model")
    pixels = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")
    evaluation = json.loads(hub.files(REPO)["evaluation.json"])
    fused = (evaluation["own"], *evaluation["others"])
    for row in (evaluation["plain"], *fused):
        with torch.no_grad():
            predicted = model(**pixels, r=row["r"]).logits.argmax(-1)
        right = (predicted == torch.tensor(rows["label"][:])).float().mean().item()
        assert row["accuracy"] == pytest.approx(right, abs=1.5 / len(rows))
        cost = multiply_accumulates(model.config, r=row["r"])
        cost = cost if row in fused else describe(model.config).unfused
        assert row["gmacs"] == pytest.approx(cost / 1e9)

    record = json.loads(hub.files(REPO)["training.json"])
    record["dataset"], record["pretrained"] = "org/set", "/somebody/else/base"
    api(hub).upload_file(
        path_or_fileobj=json.dumps(record).encode(), path_in_repo="training.json", repo_id=REPO
    )
    done = mctf("push", f"{REPO},r=2", "org/other", "--license", "mit", "--rounds", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    again = ModelCard(hub.files("org/other")["README.md"].decode())
    assert again.data.datasets == ["org/set"] and "| pretrained | `base` |" in again.text
    assert "Finetuned with token-reduction consistency" in again.text
    assert "training.json" in hub.files("org/other")


@pytest.mark.parametrize(
    ("training", "told"),
    [
        (None, "\n## Training\n\nNot recorded.\n"),
        ({"config": {"hidden_size": 4}, "r_max": 0}, "\nTrained from scratch:\n"),
        ({"pretrained": "org/a", "r_max": 0}, "\nFinetuned:\n"),
        ({"pretrained": "org/a", "r_max": 2}, "\nFinetuned with token-reduction consistency (sec"),
    ],
)
def test_the_card_says_of_the_training_what_is_known(training: dict | None, told: str) -> None:
    card = make_card(REPO, tiny_model().config, license="mit", training=training)
    assert told in card.text


def test_the_plain_model_is_that_of_transformers(images: Tensor) -> None:
    model = tiny_model(r=7, skip_unread=False)
    plain = plain_model(model)
    assert type(plain) is ViTForImageClassification
    with torch.no_grad():
        assert torch.equal(plain(images).logits, model(images, r=0).logits)


def card_is_true(hub: LocalHub, stranger: Warm) -> None:
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

    Image.effect_noise((40, 50), 80).save("photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    # Older releases hide this name where torchvision is missing, though it works without.
    code = "\n".join(blocks).replace(
        "from transformers import AutoImageProcessor, ",
        "from transformers.models.auto.image_processing_auto import AutoImageProcessor\n"
        "from transformers import ",
    )
    done = stranger.run(code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "LABEL_" in done.stdout and "tensor(" in done.stdout
    picture = Path("card.png")
    picture.write_bytes(hub.files(REPO)["fused_tokens.png"])
    assert min(Image.open(picture).size) > 200


def test_a_dry_run_writes_what_would_go_up_and_sends_nothing(
    hub: LocalHub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["--license", "mit", "--rounds", "1", "--batch_size", "2", "--base_model", "org/base"]
    main(["push", str(folder), REPO, *words, "--dry-run", str(tmp_path / "draft")])
    shown = capsys.readouterr().out
    expected = FILES - {".gitattributes", "fused_tokens.png"}  # no images were named to show
    written = {path.name for path in (tmp_path / "draft").iterdir()}
    assert written == {*expected, RECORD}
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


def test_weights_of_an_earlier_push_do_not_stay(hub: LocalHub, folder: Path) -> None:
    model = MCTFViTForImageClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    shard = min(folder.glob("model-*.safetensors"))
    (folder / "model_ema.safetensors").write_bytes(shard.read_bytes())
    (folder / "handler.py").write_text("mine = True")
    push(folder, REPO, api=api(hub))
    shards = {name for name in hub.files(REPO) if re.fullmatch(r"model-.*\.safetensors", name)}
    assert len(shards) > 2 and "model.safetensors.index.json" in hub.files(REPO)
    (folder / "handler.py").unlink()
    save(model, ViTImageProcessorPil.from_pretrained(folder), folder)
    push(folder, REPO, api=api(hub))
    names = set(hub.files(REPO))
    assert not names & shards and "model.safetensors.index.json" not in names
    assert {"model.safetensors", "model_ema.safetensors", "handler.py"} <= names


def test_a_card_does_not_outlive_what_was_measured(
    hub: LocalHub, folder: Path, tmp_path: Path
) -> None:
    described = {"README.md": "old", "evaluation.json": "{}", "fused_tokens.png": b"old"}
    processor = ViTImageProcessorPil.from_pretrained(folder)
    draft = save(tiny_model(r=2), processor, tmp_path / "draft", files=described)
    push(draft, REPO, api=api(hub))
    save(tiny_model(r=3), processor, draft)
    assert not set(described) & {path.name for path in draft.iterdir()}
    (draft / "README.md").write_text("mine")
    save(tiny_model(r=4), processor, draft)
    assert (draft / "README.md").read_text() == "mine"  # nothing was measured with it
    (draft / "README.md").unlink()
    push(draft, REPO, api=api(hub))
    assert not set(described) & set(hub.files(REPO))


@pytest.mark.parametrize("revision", ["main", "fast"])
def test_an_upload_that_breaks_off_changes_nothing_and_can_be_repeated(
    hub: LocalHub,
    stranger: Warm,
    folder: Path,
    images: Tensor,
    revision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
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
    if revision == "main":  # the same commit is as good
        check(load(stranger, images), images, r=7)

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


def test_a_card_that_the_hub_refuses_leaves_no_branch(hub: LocalHub, folder: Path) -> None:
    push(folder, REPO, api=api(hub))
    before = dict(hub.repos[REPO].branches)
    (folder / "README.md").write_text("---\nbase_model: a b c\n---\n")
    with pytest.raises(ValueError, match="base_model"):
        push(folder, REPO, revision="fast", api=api(hub))
    assert hub.repos[REPO].branches == before


@pytest.mark.parametrize(
    ("told", "advice"),
    [
        ("HTTP status client error (403 Forbidden), domain: https://x", "Is the token right"),
        ("HTTP status client error (429 Too Many Requests)", "Push again"),
        ("connection reset by peer", "Push again"),
    ],
)
def test_errors_of_xet_come_without_a_response(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch, told: str, advice: str
) -> None:
    client = api(hub)

    def fail(*words: object, **options: object) -> None:
        raise ConnectionError(told)

    monkeypatch.setattr(client, "preupload_lfs_files", fail)
    with pytest.raises(ConnectionError, match=f"was not changed: .*{advice}"):
        push(folder, REPO, api=client)


def test_a_failed_push_keeps_what_was_measured(
    hub: LocalHub, mctf: Callable[..., subprocess.CompletedProcess], folder: Path
) -> None:
    hub.refuse_commits(403, times=1)
    asked = ["--private", "--revision", "dev", "--message", "It's $HOME"]
    done = mctf("push", folder, REPO, "--license", "mit", "--rounds", "1", *asked)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (command,) = re.findall(r"^mctf (push .*)$", done.stderr, re.MULTILINE)
    words = shlex.split(command)
    done = mctf(*words)
    assert done.returncode == 0, done.stderr
    kept = Path(words[1])
    measured = Path(kept, "evaluation.json").read_bytes()
    assert hub.files(REPO, "dev")["evaluation.json"] == measured
    assert set(hub.files(REPO)) == {".gitattributes"} and hub.repos[REPO].private
    assert hub.repos[REPO].commits[hub.repos[REPO].branches["dev"]].title == asked[-1]
    shutil.rmtree(kept.parent)


def test_columns_of_a_dataset_can_be_named(
    hub: LocalHub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = load_dataset(DIGITS, split="test").select(range(20))
    rows = rows.add_column("coarse", rows["label"][:]).cast_column("coarse", rows.features["label"])
    rows.to_parquet(tmp_path / "set" / "test.parquet")
    words = ["push", str(folder), REPO, "--license", "mit", "--rounds", "1"]
    words += ["--dataset", str(tmp_path / "set"), "--dry-run", str(tmp_path / "draft")]
    with pytest.raises(SystemExit):
        main(words)
    assert "label_column is not set" in capsys.readouterr().err
    main([*words, "--label-column", "coarse"])
    assert json.loads((tmp_path / "draft" / "evaluation.json").read_text())["num_images"] == 20


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
    hub: LocalHub, stranger: Warm, folder: Path, images: Tensor
) -> None:
    push(folder, REPO, api=api(hub))
    old = hub.repos[REPO].branches["main"]
    check(load(stranger, images), images, r=7)
    changed = tiny_model(r=3, num_labels=10)
    changed.classifier.bias.data += 1
    save(changed, ViTImageProcessorPil.from_pretrained(folder), folder)
    push(folder, REPO, api=api(hub))

    hub.corrupt_downloads(".safetensors", times=1)
    damaged = load(stranger, images)
    assert damaged.returncode == 1 and not hub.faults
    message = damaged.stderr.strip().splitlines()[-1]
    assert re.match(f"OSError: model.safetensors of {REPO} arrived damaged: its SHA-256", message)
    assert message.endswith("removed from the cache: load the model again")
    check(load(stranger, images, old), images, r=7)
    hub.corrupt_downloads(".safetensors", times=1)
    forced = load(stranger, images, options="force_download=True")
    assert forced.returncode == 1 and not hub.faults and "arrived damaged" in forced.stderr
    again = load(stranger, images)
    assert again.returncode == 0, again.stderr[-3000:]
    with torch.no_grad():
        expected = changed(images).logits
    assert torch.equal(torch.load("found.pt")["logits"], expected)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("preprocessor_config.json", "preprocessor_config.json missing"),
        ("model.safetensors", "model.safetensors missing"),
        ("modeling_mctf_vit.py", "modeling_mctf_vit.py missing"),
        ("fusion.py", "fusion.py missing"),
    ],
)
def test_a_folder_that_would_not_load_is_not_pushed(
    hub: LocalHub, folder: Path, missing: str, message: str
) -> None:
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=message):
        push(folder, REPO, api=api(hub))
    assert not hub.requests


def test_a_shard_that_is_missing_is_told(hub: LocalHub, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="40KB")
    shard = max(folder.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} missing"):
        push(folder, REPO, api=api(hub))


@pytest.mark.parametrize("name", ["noorg", "bad id!", "a/b/c"])
def test_an_id_that_is_none_is_refused_at_once(
    hub: LocalHub, folder: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ValueError, match=name):
        push(folder, name, api=api(hub))
    with pytest.raises(SystemExit):
        main(["push", str(folder), name, "--license", "mit", "--dry-run", "draft"])
    assert name in capsys.readouterr().err and not Path("draft").exists()


def test_a_model_without_its_head_is_not_pushed(
    hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    headless = save(tiny_model(r=7).vit, ViTImageProcessorPil(), tmp_path / "headless")
    with pytest.raises(SystemExit):
        main(["push", str(headless), REPO, "--license", "mit", "--rounds", "1"])
    shown = capsys.readouterr()
    assert "missing: ['classifier.bias', 'classifier.weight']" in shown.err
    assert "Measuring" not in shown.out and not hub.requests


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "license=None is not allowed"),
        (["--license", "Apache 2.0"], "license='Apache 2.0' is not allowed"),
        (
            ["--license", "mit", "--dataset", DIGITS, "--max_images", "0"],
            "max_images=0 is not allowed",
        ),
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
