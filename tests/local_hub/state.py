"""What a Hub keeps: repositories of commits of files."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any


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
