"""What is in a repository."""

from typing import Any
from urllib.parse import parse_qs

from tests.local_hub.request import Request
from tests.local_hub.routing import AT, REPO, route
from tests.local_hub.state import Refusal


@route("GET", f"{REPO}(/revision{AT})?")
def info(request: Request, name: str, revision: str) -> None:
    repo = request.repo(name)
    commit = repo.commit(revision or "main")
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
    if "blobs" in request.query:
        for sibling in siblings:
            sibling |= commit.files[sibling["rfilename"]].described("blobId", "sha256")
    about = {"id": name, "sha": commit.sha, "private": repo.private, "siblings": siblings}
    request.reply(about)


@route("GET", f"{REPO}/tree{AT}(/(?P<folder>.+))?")
def tree(request: Request, name: str, revision: str, folder: str) -> None:
    commit = request.repo(name).commit(revision)
    entries = commit.entries()
    if folder and entries.get(folder, {}).get("type") != "directory":
        raise Refusal(404, f"{folder} does not exist", "EntryNotFound", commit.sha)
    prefix = f"{folder}/" if folder else ""
    below = [path for path in entries if path.startswith(prefix)]
    if request.query.get("recursive", ["false"])[0].lower() != "true":
        below = [path for path in below if "/" not in path.removeprefix(prefix)]
    request.reply([entries[path] for path in below])


@route("POST", f"{REPO}/paths-info{AT}")
def paths_info(request: Request, name: str, revision: str) -> None:
    entries = request.repo(name).commit(revision).entries()
    paths = parse_qs(request.body.decode()).get("paths", [])
    request.reply([entries[path] for path in paths if path in entries])


@route("GET", f"{REPO}/refs")
def refs(request: Request, name: str) -> None:
    repo = request.repo(name)
    answer: dict[str, list] = {"branches": [], "tags": [], "converts": []}
    for kind, folder in (("branches", "heads"), ("tags", "tags")):
        for ref, sha in getattr(repo, kind).items():
            full = f"refs/{folder}/{ref}"
            answer[kind].append({"name": ref, "ref": full, "targetCommit": sha})
    request.reply(answer)
