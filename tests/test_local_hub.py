"""The Hub of the other tests, driven by the real client."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, close_session, get_session
from huggingface_hub.utils.sha import git_hash
from torch import Tensor
from transformers import ViTImageProcessorPil

from mctf_hf.hub import save
from tests.helpers import tiny_model
from tests.local_hub import LocalHub

WEIGHTS = bytes(range(256)) * 400
CONFIG = b"{}"
TransportError = sys.modules[type(get_session()).__module__].TransportError

PUSH = """
import sys
from huggingface_hub import HfApi

for folder in sys.argv[1:]:
    print(HfApi().upload_folder(repo_id="org/tiny", folder_path=folder).oid)
"""

# What a stranger runs: this library can't be imported there.
LOAD = """
import sys

sys.modules["mctf_hf"] = sys.modules["cli"] = sys.modules["lightning_modules"] = None
import torch
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

given, results, *revisions = sys.argv[1:]
found = {}
for revision in revisions:
    model = AutoModelForImageClassification.from_pretrained(
        "org/tiny", revision=revision, trust_remote_code=True
    ).eval()
    with torch.no_grad():
        found[revision] = model(torch.load(given)).logits
found["module"] = type(model).__module__
found["processor"] = AutoImageProcessor.from_pretrained("org/tiny", backend="pil").size["height"]
torch.save(found, results)
"""


@pytest.fixture(autouse=True)
def own_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    close_session()  # which has read the proxies of the environment


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with LocalHub(tokens={"hf_good"}) as hub:
        yield hub


@pytest.fixture
def api(hub: LocalHub) -> HfApi:
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.create_repo("org/tiny")
    return api


def push(api: HfApi, files: dict[str, bytes], **settings: str) -> str:
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit("org/tiny", operations, commit_message="push", **settings).oid


def pull(api: HfApi, path: str, cache: Path, **settings: str) -> bytes:
    return Path(api.hf_hub_download("org/tiny", path, cache_dir=cache, **settings)).read_bytes()


def test_two_revisions_come_back_as_they_were_pushed(
    hub: LocalHub, api: HfApi, tmp_path: Path
) -> None:
    first = push(api, {"config.json": CONFIG, "deep/model.safetensors": WEIGHTS})
    second = push(api, {"config.json": b"[]", "deep/model.safetensors": WEIGHTS[::-1]})
    for revision, config, weights in (
        (None, b"[]", WEIGHTS[::-1]),
        (first, CONFIG, WEIGHTS),
        (second, b"[]", WEIGHTS[::-1]),
    ):
        assert pull(api, "config.json", tmp_path / "cache", revision=revision) == config
        folder = Path(
            api.snapshot_download("org/tiny", revision=revision, cache_dir=tmp_path / "b")
        )
        assert (folder / "config.json").read_bytes() == config
        assert (folder / "deep" / "model.safetensors").read_bytes() == weights
    assert hub.files("org/tiny", first)["config.json"] == CONFIG
    assert hub.repos["org/tiny"].commits[second].parent == first
    assert first != second
    assert len(first) == 40


def test_listings_tell_sizes_and_the_hashes_of_git_and_lfs(api: HfApi) -> None:
    push(api, {"config.json": CONFIG, "deep/model.safetensors": WEIGHTS})
    assert sorted(api.list_repo_files("org/tiny")) == [
        ".gitattributes",
        "config.json",
        "deep/model.safetensors",
    ]
    folder, config, weights, *none = api.get_paths_info(
        "org/tiny", ["deep", "config.json", "deep/model.safetensors", "nowhere"]
    )
    assert (folder.path, none) == ("deep", [])
    # What `git hash-object` says of a file with these two characters.
    assert config.blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"
    assert (config.size, config.lfs) == (2, None)
    sha256 = CommitOperationAdd("it", WEIGHTS).upload_info.sha256.hex()
    assert (weights.lfs.sha256, weights.lfs.size, weights.size) == (sha256, 102400, 102400)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 102400\n"
    assert weights.blob_id == git_hash(pointer.format(sha256).encode())
    assert [it.path for it in api.list_repo_tree("org/tiny", "deep")] == ["deep/model.safetensors"]
    assert "deep" in {it.path for it in api.list_repo_tree("org/tiny")}
    details = {it.rfilename: it for it in api.model_info("org/tiny", files_metadata=True).siblings}
    assert details["deep/model.safetensors"].lfs.sha256 == sha256
    assert details["config.json"].blob_id == config.blob_id


def test_what_has_not_changed_is_not_uploaded_again(hub: LocalHub, api: HfApi) -> None:
    first = push(api, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    before = len(hub.requests)
    assert push(api, {"config.json": CONFIG, "model.safetensors": WEIGHTS}) == first
    again = push(api, {"config.json": CONFIG, "copy.safetensors": WEIGHTS})
    assert set(hub.files("org/tiny", again)) - set(hub.files("org/tiny", first)) == {
        "copy.safetensors"
    }
    assert "PUT" not in [method for method, _ in hub.requests[before:]]


def test_branches_and_tags(api: HfApi, tmp_path: Path) -> None:
    first = push(api, {"config.json": CONFIG})
    api.create_branch("org/tiny", branch="feature/r8", revision=first)
    api.create_tag("org/tiny", tag="v1", revision="feature/r8")
    second = push(api, {"config.json": b"[]"}, revision="feature/r8")
    heads = {"main": first, "feature/r8": second, "v1": first}
    for revision, sha in heads.items():
        assert api.model_info("org/tiny", revision=revision).sha == sha
    assert pull(api, "config.json", tmp_path, revision="feature/r8") == b"[]"
    refs = api.list_repo_refs("org/tiny")
    assert {it.name: it.target_commit for it in [*refs.branches, *refs.tags]} == heads
    for create in (
        lambda: api.create_branch("org/tiny", branch="feature/r8"),
        lambda: api.create_tag("org/tiny", tag="v1"),
        lambda: api.create_repo("org/tiny"),
    ):
        with pytest.raises(HfHubHTTPError, match="already") as caught:
            create()
        assert caught.value.response.status_code == 409
    api.create_branch("org/tiny", branch="feature/r8", exist_ok=True)
    assert api.create_repo("org/tiny", exist_ok=True).repo_id == "org/tiny"
    api.delete_branch("org/tiny", branch="feature/r8")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/tiny", revision="feature/r8")
    assert api.model_info("org/tiny", revision=second).sha == second


def test_files_and_folders_are_deleted(hub: LocalHub, api: HfApi) -> None:
    push(api, {"a.json": CONFIG, "ab.json": CONFIG, "deep/a.json": CONFIG, "deeper.json": CONFIG})
    api.create_commit(
        "org/tiny",
        [CommitOperationDelete("a.json"), CommitOperationDelete("deep/")],
        commit_message="less",
    )
    assert set(hub.files("org/tiny")) == {".gitattributes", "ab.json", "deeper.json"}
    api.delete_repo("org/tiny")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/tiny")


def test_writing_takes_a_token_that_is_known(hub: LocalHub, api: HfApi) -> None:
    before = push(api, {"config.json": CONFIG})
    for token, status in ((False, 401), ("hf_wrong", 403)):
        stranger = HfApi(endpoint=hub.url, token=token)
        for write in (
            lambda api=stranger: push(api, {"model.safetensors": WEIGHTS}),
            lambda api=stranger: push(api, {"config.json": b"[]"}),
            lambda api=stranger: api.create_repo("org/other"),
            lambda api=stranger: api.create_branch("org/tiny", branch="other"),
            lambda api=stranger: api.create_tag("org/tiny", tag="other"),
            lambda api=stranger: api.delete_branch("org/tiny", branch="main"),
            lambda api=stranger: api.delete_repo("org/tiny"),
        ):
            with pytest.raises(HfHubHTTPError) as caught:
                write()
            assert caught.value.response.status_code == status
        assert stranger.model_info("org/tiny").sha == before
        check = f"{hub.url}/api/models/org/tiny/auth-check"
        headers = build_hf_headers(token=token)
        assert get_session().get(check, headers=headers).status_code == 200
        assert get_session().get(f"{check}/write", headers=headers).status_code == status
    # What the client takes a missing token for, at the address of the real Hub.
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=False).create_tag("org/tiny", tag="other")
    assert list(hub.repos) == ["org/tiny"]
    assert (hub.repos["org/tiny"].branches, hub.repos["org/tiny"].tags) == ({"main": before}, {})
    assert not hub.objects
    assert api.whoami()["name"] == "tester"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.url, token="hf_wrong").whoami()


def test_private_repositories_are_hidden_from_strangers(hub: LocalHub, tmp_path: Path) -> None:
    api = HfApi(endpoint=hub.url, token="hf_good")
    api.create_repo("org/tiny", private=True)
    push(api, {"model.safetensors": WEIGHTS})
    # The storage has no part in this: it would refuse the token, were it sent there.
    assert pull(api, "model.safetensors", tmp_path) == WEIGHTS
    address = next(path for method, path in hub.requests if method == "PUT")
    told = get_session().get(hub.storage + address, headers={"Authorization": "Bearer hf_good"})
    assert told.status_code == 400
    for token in (False, "hf_wrong"):
        stranger = HfApi(endpoint=hub.url, token=token)
        for read in (
            lambda api=stranger: api.model_info("org/tiny"),
            lambda api=stranger: pull(api, "config.json", tmp_path / "other"),
        ):
            with pytest.raises(RepositoryNotFoundError) as caught:
                read()
            assert caught.value.response.status_code == 401


def test_what_is_missing_raises_the_errors_of_the_client(api: HfApi, tmp_path: Path) -> None:
    sha = push(api, {"config.json": CONFIG})
    with pytest.raises(RepositoryNotFoundError) as caught:
        api.hf_hub_download("org/nowhere", "config.json", cache_dir=tmp_path)
    assert caught.value.response.status_code == 404
    for lost in ("nowhere", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            pull(api, "config.json", tmp_path, revision=lost)
        with pytest.raises(RevisionNotFoundError):
            push(api, {"config.json": b"[]"}, revision=lost)
    with pytest.raises(RevisionNotFoundError):
        push(api, {"config.json": b"[]"}, revision=sha)  # a commit is no branch
    with pytest.raises(RemoteEntryNotFoundError) as caught_entry:
        pull(api, "nowhere.json", tmp_path)
    assert caught_entry.value.response.headers["X-Repo-Commit"] == sha
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("org/tiny", "nowhere"))


def test_a_download_goes_on_from_where_it_was(hub: LocalHub, api: HfApi) -> None:
    push(api, {"config.json": b"0123456789", "model.safetensors": WEIGHTS})
    for name, data in (("config.json", b"0123456789"), ("model.safetensors", WEIGHTS)):
        url = f"{hub.url}/org/tiny/resolve/main/{name}"
        file = io.BytesIO(data[:4])
        file.seek(4)
        http_get(url, file, resume_size=4, expected_size=len(data))
        assert file.getvalue() == data
        part = get_session().get(url, headers={"Range": "bytes=2-5"})
        assert (part.status_code, part.content) == (206, data[2:6])
        assert part.headers["Content-Range"] == f"bytes 2-5/{len(data)}"
        assert get_session().get(url, headers={"Range": f"bytes={len(data)}-"}).status_code == 416


def test_an_upload_that_was_cut_is_tried_again(hub: LocalHub, api: HfApi) -> None:
    hub.cut_uploads(times=1, after_bytes=1000)
    push(api, {"model.safetensors": WEIGHTS})
    assert [method for method, _ in hub.requests].count("PUT") == 2
    assert hub.files("org/tiny")["model.safetensors"] == WEIGHTS
    assert not hub.faults


def test_a_commit_that_was_cut_or_refused_changes_nothing(hub: LocalHub, api: HfApi) -> None:
    before = push(api, {"config.json": CONFIG})
    changes = {"config.json": b"[]", "model.safetensors": WEIGHTS}

    hub.cut_commits(times=1)
    with pytest.raises(TransportError):
        push(api, changes)
    assert not hub.faults
    assert api.model_info("org/tiny").sha == before

    for status in (409, 403):
        hub.refuse_commits(status=status, times=1)
        with pytest.raises(HfHubHTTPError, match="this commit was refused") as caught:
            push(api, changes)
        assert caught.value.response.status_code == status
        assert api.model_info("org/tiny").sha == before

    after = push(api, changes)
    assert len(hub.repos["org/tiny"].commits) == 3
    assert hub.files("org/tiny", before)["config.json"] == CONFIG
    assert hub.files("org/tiny", after)["config.json"] == b"[]"


def test_a_commit_is_whole_or_not_at_all(hub: LocalHub, api: HfApi) -> None:
    before = push(api, {"config.json": CONFIG})
    config = CommitOperationAdd("config.json", b"[]")
    weights = CommitOperationAdd("model.safetensors", WEIGHTS)
    api.preupload_lfs_files("org/tiny", [weights])
    hub.objects.clear()
    with pytest.raises(BadRequestError, match="model.safetensors points to an LFS object that was"):
        api.create_commit("org/tiny", [config, weights], commit_message="without its weights")
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        gone = CommitOperationDelete("nowhere.json")
        api.create_commit("org/tiny", [config, gone], commit_message="without what it deletes")
    initial = hub.repos["org/tiny"].commits[before].parent
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        push(api, {"config.json": b"[]"}, parent_commit=initial)
    assert caught.value.response.status_code == 412
    assert api.model_info("org/tiny").sha == before
    assert hub.files("org/tiny")["config.json"] == CONFIG
    assert push(api, {"config.json": b"[]"}, parent_commit=before) != before


def test_corrupt_downloads_have_the_right_size_and_another_end(
    hub: LocalHub, api: HfApi, tmp_path: Path
) -> None:
    push(api, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    hub.corrupt_downloads(".safetensors", times=1)
    assert pull(api, "config.json", tmp_path / "bad") == CONFIG
    data = pull(api, "model.safetensors", tmp_path / "bad")
    assert data != WEIGHTS
    assert len(data) == len(WEIGHTS)
    assert data[: len(data) * 3 // 4] == WEIGHTS[: len(data) * 3 // 4]
    assert not hub.faults
    assert pull(api, "model.safetensors", tmp_path / "good") == WEIGHTS


def test_a_download_that_was_cut_goes_on(hub: LocalHub, api: HfApi, tmp_path: Path) -> None:
    push(api, {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    hub.truncate_downloads(".safetensors", times=1)
    assert pull(api, "config.json", tmp_path) == CONFIG
    assert len(hub.faults) == 1
    before = len(hub.requests)
    assert pull(api, "model.safetensors", tmp_path) == WEIGHTS
    assert [method for method, _ in hub.requests[before:]] == ["HEAD", "GET", "GET"]
    assert not hub.faults


def test_model_cards_are_checked(api: HfApi) -> None:
    results = {"task": {"type": "image-classification"}, "metrics": []}
    for metadata, message in (
        ("a: [", "can't be read"),
        ("only words", "not a mapping"),
        ("base_model: /tmp/my model", '"base_model" with value "/tmp/my model"'),
        (json.dumps({"model-index": [{"name": "it", "results": [results]}]}), "model-index"),
    ):
        with pytest.raises(ValueError, match=message):
            push(api, {"README.md": f"---\n{metadata}\n---\n# Tiny".encode()})
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        push(api, {"README.md": b"# Tiny"})
    push(api, {"README.md": b"---\nbase_model: org/base\n---\n# Tiny"})


def test_the_environment_has_no_token_and_no_hub_of_another(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "https_proxy"):
        monkeypatch.setenv(name, "1")
    environment = hub.environment(tmp_path)
    assert not {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "https_proxy"} & set(
        environment
    )
    assert (environment["HF_ENDPOINT"], environment["HF_HOME"]) == (hub.url, str(tmp_path))
    assert hub.environment(tmp_path, "hf_good")["HF_TOKEN"] == "hf_good"


def test_a_hub_that_breaks_or_has_ended_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(json.JSONDecodeError), LocalHub(tokens=set()) as hub:
        with pytest.raises(TransportError):
            get_session().post(f"{hub.url}/api/validate-yaml", content=b"not JSON")
        assert "JSONDecodeError" in capfd.readouterr().err
        assert get_session().get(f"{hub.url}/api/nowhere").status_code == 404
    with pytest.raises(TransportError):
        get_session().get(f"{hub.url}/api/nowhere")


@torch.no_grad()
def test_a_model_is_pushed_and_loaded_by_a_stranger(
    hub: LocalHub, api: HfApi, tmp_path: Path, images: Tensor
) -> None:
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    models = {r: tiny_model(r=r) for r in (7, 3)}
    folders = [save(model, processor, tmp_path / str(r)) for r, model in models.items()]
    torch.save(images, tmp_path / "images.pt")

    hub.cut_uploads(times=1, after_bytes=1000)
    pushed = subprocess.run(
        [sys.executable, "-c", PUSH, *folders],
        env=hub.environment(tmp_path / "home", "hf_good"),
        check=True,
        capture_output=True,
        text=True,
    )
    assert not hub.faults
    first, second = pushed.stdout.split()
    for sha, folder in ((first, folders[0]), (second, folders[1]), ("main", folders[1])):
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert files.items() <= hub.files("org/tiny", sha).items()
        snapshot = Path(api.snapshot_download("org/tiny", revision=sha, cache_dir=tmp_path / "hub"))
        assert {name: (snapshot / name).read_bytes() for name in files} == files

    loading = [tmp_path / "images.pt", tmp_path / "out.pt", "main", first]
    subprocess.run(
        [sys.executable, "-c", LOAD, *loading], env=hub.environment(tmp_path / "empty"), check=True
    )
    found = torch.load(tmp_path / "out.pt")
    assert torch.equal(found["main"], models[3](images).logits)
    assert torch.equal(found[first], models[7](images).logits)
    assert found["module"].startswith("transformers_modules.org.tiny.")
    assert found["processor"] == 32
