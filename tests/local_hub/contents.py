"""The bytes of files: of a repository, and of the storage of large ones."""

import hashlib
import re
from urllib.parse import quote

from tests.local_hub.request import Request
from tests.local_hub.routing import AT, route
from tests.local_hub.state import Refusal


@route("GET HEAD", f"/(?P<name>[^/]+/[^/]+)/resolve{AT}/(?P<path>.+)")
def resolve(request: Request, name: str, revision: str, path: str) -> None:
    commit = request.repo(name).commit(revision)
    if path not in commit.files:
        raise Refusal(404, "Entry not found", "EntryNotFound", commit.sha)
    file = commit.files[path]
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"'}
    if not file.large:
        return reply_file(request, file.data, path, headers)
    headers["Location"] = f"{request.hub.storage}/lfs/{file.sha256}/{quote(path)}"
    headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
    request.reply(b"", 302, headers)


@route("GET HEAD PUT", "/lfs/(?P<oid>[0-9a-f]{64})(/(?P<path>.+))?")
def lfs_object(request: Request, oid: str, path: str) -> None:
    objects = request.hub.objects
    if request.token() is not None:
        raise Refusal(400, "a token was sent to the storage, which takes none")
    if request.command == "PUT":
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "the bytes are not those that were announced")
        objects[oid] = request.body
        return request.reply()
    if oid not in objects:
        raise Refusal(404, "there is no such object")
    reply_file(request, objects[oid], path, {"ETag": f'"{oid}"'})


def reply_file(request: Request, data: bytes, path: str, headers: dict[str, str]) -> None:
    """Answer with a file or the range of it that was asked for, damaged if it shall be."""
    is_download = request.command == "GET"
    if is_download and request.hub.take_fault("corrupt", path):
        at = len(data) * 3 // 4
        data = data[:at] + bytes(255 - byte for byte in data[at : at + 9]) + data[at + 9 :]
    status, sent, size = 200, None, len(data)
    if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
        start, stop = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
        if start >= stop:
            return request.reply(status=416, headers={"Content-Range": f"bytes */{size}"})
        status, data = 206, data[start:stop]
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    if is_download and request.hub.take_fault("truncate", path):
        sent, request.close_connection = len(data) // 2, True
    request.reply(data, status, {"Accept-Ranges": "bytes", **headers}, sent)
