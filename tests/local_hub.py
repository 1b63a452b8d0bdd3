"""A small Hugging Face Hub on loopback, for tests that push and load with the real client.

It speaks the endpoints that ``huggingface_hub`` and ``transformers`` call for models: accounts,
repositories, branches, tags, listings, commits, and large files by the basic transfer of the LFS
protocol. As on the Hub, large files lie at another host (here by its name only), which refuses
requests that carry a token. There are no pull requests, rights of organisations or Xet storage.

The client prefers Xet where ``hf_xet`` is installed, and reads ``HF_HUB_DISABLE_XET``,
``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HOME`` once, when it is imported. A push or load as a user
does it therefore belongs in a subprocess with :meth:`LocalHub.environment`. In the tests' own
process ``HfApi(endpoint=hub.url, token=...)`` will do, and uploads there need
``huggingface_hub.constants.HF_HUB_DISABLE_XET`` set. The client tries a cut upload again up to five
times, after 1, 2, 4, 8 and 8 seconds; a cut download after one second, and a commit never.

    with LocalHub(tokens={"hf_good"}) as hub:
        hub.cut_uploads(times=1, after_bytes=1000)
        subprocess.run([...], env=hub.environment(tmp_path / "home", "hf_good"), check=True)
        assert not hub.faults  # it has happened
        assert hub.files("org/name")["config.json"] == expected
"""

import base64
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

LARGE = ("*.safetensors", "*.bin", "*.onnx", "*.png", "*.parquet")
LARGEST_REGULAR = 10 * 2**20
ATTRIBUTES = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LARGE).encode()
USER = "tester"


class Refusal(Exception):
    """A request that is answered with an error; the client tells errors by their ``code``."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = ""):
        self.status, self.message = status, message
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.headers = {name: value for name, value in headers.items() if value}


@dataclass(frozen=True)
class File:
    data: bytes = field(repr=False)
    large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What stands for a large file in git."""
        version = "version https://git-lfs.github.com/spec/v1"
        return f"{version}\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def blob(self) -> str:
        """What git calls it."""
        data = self.pointer if self.large else self.data
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob

    def described(self, oid: str, sha256: str) -> dict[str, Any]:
        """What listings say of it, which have their own words for its two hashes."""
        size = len(self.data)
        lfs = {sha256: self.sha256, "size": size, "pointerSize": len(self.pointer)}
        return {oid: self.blob, "size": size, **({"lfs": lfs} if self.large else {})}


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, File]

    def entries(self) -> dict[str, dict[str, Any]]:
        """What listings say of every file and folder, by its path."""
        found: dict[str, dict[str, Any]] = {}
        for path, file in sorted(self.files.items()):
            for folder in map(str, list(PurePosixPath(path).parents)[:-1]):
                oid = hashlib.sha1(f"{self.sha} {folder}".encode()).hexdigest()
                found[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            found[path] = {"type": "file", "path": path, **file.described("oid", "oid")}
        return found


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def add(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch)
        content = [len(self.commits), parent, title, [(path, files[path].blob) for path in files]]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, files)
        self.branches[branch] = sha
        return self.commits[sha]


@dataclass
class Fault:
    kind: str
    times: float
    suffix: str = ""
    after_bytes: int | None = None
    status: int = 0


class LocalHub:
    """The server, while its ``with`` block lasts.

    Attributes:
        url: the address that ``HF_ENDPOINT`` names; ``storage`` is that of the large files.
        tokens: those that may write, and read private repositories.
        repos: the state, by ``"org/name"``.
        objects: the large files that were uploaded, by the sha256 of their bytes.
        requests: method and path of every request, to the storage too.
        faults: those that have yet to happen.
    """

    def __init__(self, tokens: set[str]):
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.bugs: list[BaseException] = []
        self.lock = threading.RLock()
        self.is_open = True
        self.server = _Server(self)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.is_open = False
        self.server.shutdown()
        self.server.server_close()
        if error is None and self.bugs:
            raise self.bugs[0]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a subprocess whose Hub this is, with a cache and token of its own."""
        foreign = re.compile("HF_|HUGGING|TRANSFORMERS_|.*_PROXY$", re.IGNORECASE)
        own = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        own |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return own if token is None else {**own, "HF_TOKEN": token}

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The bytes of every file of a repository, by its path."""
        return {path: it.data for path, it in self.repos[name].commit(revision).files.items()}

    def cut_uploads(self, times: float, after_bytes: int) -> None:
        """Close the connection of the next uploads of large files after so many bytes."""
        self.faults.append(Fault("cut upload", times, after_bytes=after_bytes))

    def cut_commits(self, times: float) -> None:
        """Close the connection of the next commits when half of one was read."""
        self.faults.append(Fault("cut commit", times))

    def refuse_commits(self, status: int, times: float) -> None:
        """Answer the next commits with an error."""
        self.faults.append(Fault("refuse commit", times, status=status))

    def corrupt_downloads(self, suffix: str, times: float) -> None:
        """Flip bytes in the last quarter of the next downloads of files named so."""
        self.faults.append(Fault("corrupt", times, suffix))

    def truncate_downloads(self, suffix: str, times: float) -> None:
        """Close the connection halfway through the next downloads of files named so."""
        self.faults.append(Fault("truncate", times, suffix))

    def take_fault(self, kind: str, path: str = "") -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.kind == kind and path.endswith(fault.suffix):
                    fault.times -= 1
                    self.faults = [it for it in self.faults if it.times > 0]
                    return fault
        return None

    def apply(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        """Do one operation of a commit to the files it shall have."""
        path = value["path"]
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.objects:
                raise Refusal(400, f"{path} points to an LFS object that was not uploaded")
            files[path] = File(self.objects[value["oid"]], large=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = f"{path.rstrip('/')}/" if key == "deletedFolder" else None
            gone = [name for name in files if name == path or (folder and name.startswith(folder))]
            if not gone:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Refusal(400, f"{key} is not a known operation of a commit")


def errors_of_card(data: Any) -> list[str]:
    """What the Hub has against the metadata of a model card."""
    if not isinstance(data, dict):
        return ["the yaml metadata is not a mapping"]
    errors = []
    for key in ("base_model", "datasets"):
        value = data.get(key) or []
        for name in value if isinstance(value, list) else [value]:
            try:
                validate_repo_id(name)
            except HFValidationError:
                errors.append(f'"{key}" with value "{name}" is not valid')
    if "model-index" in data:
        try:
            model_index_to_eval_results(data["model-index"])
        except (KeyError, TypeError, ValueError) as error:
            errors.append(f'"model-index" is not valid: {error!r}')
    return errors


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: LocalHub):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.bugs.append(error)
            super().handle_error(request, client_address)


REPO = "/api/models/(?P<name>[^/]+/[^/]+)"
AT = "/(?P<revision>[^/]+)"
ROUTES: list[tuple[list[str], re.Pattern[str], Callable[..., None]]] = []


def route(methods: str, pattern: str) -> Callable:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        ROUTES.append((methods.split(), re.compile(pattern), function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is two writes, its headers and its body
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def serve(self) -> None:
        self.hub = self.server.hub
        self.address, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        self.hub.requests.append((self.command, self.address))
        try:
            if self.hub.is_open and self.read_body():
                self.answer()
            else:
                self.close_connection = True
        except Refusal as refusal:
            self.reply({"error": refusal.message}, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def read_body(self) -> bool:
        """Read what was sent, so that the next request finds its start; False if it was cut."""
        length = int(self.headers.get("Content-Length") or 0)
        fault = None
        if self.command == "PUT":
            fault = self.hub.take_fault("cut upload")
        elif self.command == "POST" and re.fullmatch(f"{REPO}/commit{AT}", self.address):
            fault = self.hub.take_fault("cut commit")
        if fault is not None:
            part = length // 2 if fault.after_bytes is None else fault.after_bytes
            self.rfile.read(min(part, length))
            return False
        self.body = self.rfile.read(length)
        return len(self.body) == length

    def answer(self) -> None:
        for methods, pattern, function in ROUTES:
            match = pattern.fullmatch(self.address)
            if match and self.command in methods:
                given = {name: unquote(part or "") for name, part in match.groupdict().items()}
                return function(self, **given)
        raise Refusal(404, f"{self.command} {self.address} is not served here")

    def reply(self, payload: Any = b"", status: int = 200, headers: Any = (), sent: Any = None):
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        kind = "application/octet-stream" if data is payload else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, **dict(headers)}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])

    def reply_file(self, data: bytes, path: str, headers: dict[str, str]) -> None:
        is_download = self.command == "GET"
        if is_download and self.hub.take_fault("corrupt", path):
            at = len(data) * 3 // 4
            data = data[:at] + bytes(255 - byte for byte in data[at : at + 9]) + data[at + 9 :]
        status, sent, size = 200, None, len(data)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
            if start >= stop:
                return self.reply(status=416, headers={"Content-Range": f"bytes */{size}"})
            status, data = 206, data[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        if is_download and self.hub.take_fault("truncate", path):
            sent, self.close_connection = len(data) // 2, True
        self.reply(data, status, {"Accept-Ranges": "bytes", **headers}, sent)

    def token(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if scheme == "Bearer" else None

    def check_writing(self) -> None:
        if self.token() is None:
            # The client takes any 401 of a repository for this code, but at https addresses only.
            code = "" if self.address.startswith("/api/repos/") else "RepoNotFound"
            raise Refusal(401, "Invalid username or password.", code)
        if self.token() not in self.hub.tokens:
            raise Refusal(403, "You don't have the rights to write with this token")

    def repo(self, name: str, writing: bool = False) -> Repo:
        known = self.token() in self.hub.tokens
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not known):
            raise Refusal(404 if known else 401, "Repository not found", "RepoNotFound")
        if writing:
            self.check_writing()
        return repo

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        if self.token() not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        access = {"accessToken": {"displayName": "tests", "role": "write"}}
        self.reply({"type": "user", "name": USER, "orgs": [], "auth": access})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        block = REGEX_YAML_BLOCK.search(json.loads(self.body)["content"])
        if block is None:
            said = {"warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
            return self.reply(said)
        try:
            errors = errors_of_card(yaml.safe_load(block.group(2)))
        except yaml.YAMLError as error:
            errors = [f"the yaml metadata can't be read: {error}"]
        self.reply({"errors": [{"message": it} for it in errors]}, 400 if errors else 200)

    @route("POST", "/api/repos/create")
    def create_repo(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if asked.get("type", "model") != "model":
            raise Refusal(400, "only models are served here")
        self.check_writing()
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            return self.reply({**url, "error": "You already created this model repo"}, 409)
        repo = Repo(private=asked.get("visibility") == "private" or asked.get("private") is True)
        repo.add("main", "initial commit", {".gitattributes": File(ATTRIBUTES)})
        self.hub.repos[name] = repo
        self.reply(url)

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        self.repo(name, writing=True)
        del self.hub.repos[name]
        self.reply()

    @route("GET", f"{REPO}/auth-check(?P<write>/write)?")
    def auth_check(self, name: str, write: str) -> None:
        self.repo(name, writing=bool(write))
        self.reply()

    @route("GET", f"{REPO}(/revision{AT})?")
    def info(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        commit = repo.commit(revision or "main")
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            for sibling in siblings:
                sibling |= commit.files[sibling["rfilename"]].described("blobId", "sha256")
        about = {"id": name, "sha": commit.sha, "private": repo.private, "siblings": siblings}
        self.reply(about)

    @route("GET", f"{REPO}/tree{AT}(/(?P<folder>.+))?")
    def tree(self, name: str, revision: str, folder: str) -> None:
        commit = self.repo(name).commit(revision)
        entries = commit.entries()
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound", commit.sha)
        prefix = f"{folder}/" if folder else ""
        below = [path for path in entries if path.startswith(prefix)]
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            below = [path for path in below if "/" not in path.removeprefix(prefix)]
        self.reply([entries[path] for path in below])

    @route("POST", f"{REPO}/paths-info{AT}")
    def paths_info(self, name: str, revision: str) -> None:
        entries = self.repo(name).commit(revision).entries()
        paths = parse_qs(self.body.decode()).get("paths", [])
        self.reply([entries[path] for path in paths if path in entries])

    @route("GET", f"{REPO}/refs")
    def refs(self, name: str) -> None:
        repo = self.repo(name)
        answer: dict[str, list] = {"branches": [], "tags": [], "converts": []}
        for kind, folder in (("branches", "heads"), ("tags", "tags")):
            for ref, sha in getattr(repo, kind).items():
                full = f"refs/{folder}/{ref}"
                answer[kind].append({"name": ref, "ref": full, "targetCommit": sha})
        self.reply(answer)

    @route("POST", f"{REPO}/branch/(?P<branch>[^/]+)")
    def create_branch(self, name: str, branch: str) -> None:
        repo = self.repo(name, writing=True)
        if branch in repo.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = repo.commit(json.loads(self.body).get("startingPoint", "main")).sha
        self.reply()

    @route("DELETE", f"{REPO}/branch/(?P<branch>[^/]+)")
    def delete_branch(self, name: str, branch: str) -> None:
        repo = self.repo(name, writing=True)
        if branch == "main":
            raise Refusal(403, "Cannot delete the default branch")
        if repo.branches.pop(branch, None) is None:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        self.reply()

    @route("POST", f"{REPO}/tag{AT}")
    def create_tag(self, name: str, revision: str) -> None:
        repo, tag = self.repo(name, writing=True), json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise Refusal(409, f"Reference already exists: refs/tags/{tag}")
        repo.tags[tag] = repo.commit(revision).sha
        self.reply()

    @route("POST", f"{REPO}/preupload{AT}")
    def preupload(self, name: str, revision: str) -> None:
        present = self.repo(name, writing=True).commit(revision).files
        files = json.loads(self.body)["files"]
        for file in files:
            path = file["path"]
            large = file["size"] > LARGEST_REGULAR or any(fnmatch(path, it) for it in LARGE)
            file |= {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in present:
                file["oid"] = present[path].etag
        self.reply({"files": files})

    @route("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def lfs_batch(self, name: str) -> None:
        self.repo(name, writing=True)
        objects = json.loads(self.body)["objects"]
        for it in objects:
            if it["oid"] not in self.hub.objects:
                it["actions"] = {"upload": {"href": f"{self.hub.storage}/lfs/{it['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    @route("GET HEAD PUT", "/lfs/(?P<oid>[0-9a-f]{64})(/(?P<path>.+))?")
    def lfs_object(self, oid: str, path: str) -> None:
        if self.token() is not None:
            raise Refusal(400, "a token was sent to the storage, which takes none")
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refusal(400, "the bytes are not those that were announced")
            self.hub.objects[oid] = self.body
            return self.reply()
        if oid not in self.hub.objects:
            raise Refusal(404, "there is no such object")
        self.reply_file(self.hub.objects[oid], path, {"ETag": f'"{oid}"'})

    @route("POST", f"{REPO}/commit{AT}")
    def commit(self, name: str, revision: str) -> None:
        repo = self.repo(name, writing=True)
        if fault := self.hub.take_fault("refuse commit"):
            raise Refusal(fault.status, "this commit was refused")
        if "create_pr" in self.query:
            raise Refusal(400, "there are no pull requests here")
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        with self.hub.lock:
            if revision not in repo.branches:
                raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = repo.commit(revision)
            if header["value"].get("parentCommit", head.sha) != head.sha:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for operation in operations:
                self.hub.apply(files, operation["key"], operation["value"])
            sha = repo.add(revision, header["value"]["summary"], files).sha
        self.reply({"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    @route("GET HEAD", f"/(?P<name>[^/]+/[^/]+)/resolve{AT}/(?P<path>.+)")
    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self.repo(name).commit(revision)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit.sha)
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"'}
        if not file.large:
            return self.reply_file(file.data, path, headers)
        headers["Location"] = f"{self.hub.storage}/lfs/{file.sha256}/{quote(path)}"
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        self.reply(b"", 302, headers)
