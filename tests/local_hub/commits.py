"""A commit: which of its files are large, where those go, and what becomes of the branch."""

import base64
import json
from fnmatch import fnmatch
from typing import Any

from tests.local_hub.request import Request
from tests.local_hub.routing import AT, COMMIT, REPO, route
from tests.local_hub.state import File, Refusal

LARGE = ("*.safetensors", "*.bin", "*.onnx", "*.png", "*.parquet")
LARGEST_REGULAR = 10 * 2**20
ATTRIBUTES = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LARGE).encode()


@route("POST", f"{REPO}/preupload{AT}")
def preupload(request: Request, name: str, revision: str) -> None:
    present = request.repo(name, writing=True).commit(revision).files
    files = json.loads(request.body)["files"]
    for file in files:
        path = file["path"]
        large = file["size"] > LARGEST_REGULAR or any(fnmatch(path, it) for it in LARGE)
        file |= {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if path in present:
            file["oid"] = present[path].etag
    request.reply({"files": files})


@route("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
def lfs_batch(request: Request, name: str) -> None:
    request.repo(name, writing=True)
    objects = json.loads(request.body)["objects"]
    for it in objects:
        if it["oid"] not in request.hub.objects:
            it["actions"] = {"upload": {"href": f"{request.hub.storage}/lfs/{it['oid']}"}}
    request.reply({"transfer": "basic", "objects": objects})


@route("POST", COMMIT)
def commit(request: Request, name: str, revision: str) -> None:
    hub, repo = request.hub, request.repo(name, writing=True)
    if fault := hub.take_fault("refuse commit"):
        raise Refusal(fault.status, "this commit was refused")
    if "create_pr" in request.query:
        raise Refusal(400, "there are no pull requests here")
    header, *operations = (json.loads(line) for line in request.body.splitlines())
    with hub.lock:
        if revision not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = repo.commit(revision)
        if header["value"].get("parentCommit", head.sha) != head.sha:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            apply(operation["key"], operation["value"], files, hub.objects)
        sha = repo.add(revision, header["value"]["summary"], files).sha
    request.reply({"commitOid": sha, "commitUrl": f"{hub.url}/{name}/commit/{sha}"})


def apply(
    key: str, value: dict[str, Any], files: dict[str, File], objects: dict[str, bytes]
) -> None:
    """Do one operation of a commit to the files it shall have."""
    path = value["path"]
    if key == "file":
        files[path] = File(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in objects:
            raise Refusal(400, f"{path} points to an LFS object that was not uploaded")
        files[path] = File(objects[value["oid"]], large=True)
    elif key in ("deletedFile", "deletedFolder"):
        folder = f"{path.rstrip('/')}/" if key == "deletedFolder" else None
        gone = [name for name in files if name == path or (folder and name.startswith(folder))]
        if not gone:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise Refusal(400, f"{key} is not a known operation of a commit")
