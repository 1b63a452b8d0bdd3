"""Branches and tags come and go."""

import json

from tests.local_hub.request import Request
from tests.local_hub.routing import AT, REPO, route
from tests.local_hub.state import Refusal


@route("POST", f"{REPO}/branch/(?P<branch>[^/]+)")
def create_branch(request: Request, name: str, branch: str) -> None:
    repo = request.repo(name, writing=True)
    if branch in repo.branches:
        raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
    start = json.loads(request.body).get("startingPoint", "main")
    repo.branches[branch] = repo.commit(start).sha
    request.reply()


@route("DELETE", f"{REPO}/branch/(?P<branch>[^/]+)")
def delete_branch(request: Request, name: str, branch: str) -> None:
    repo = request.repo(name, writing=True)
    if branch == "main":
        raise Refusal(403, "Cannot delete the default branch")
    if repo.branches.pop(branch, None) is None:
        raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    request.reply()


@route("POST", f"{REPO}/tag{AT}")
def create_tag(request: Request, name: str, revision: str) -> None:
    repo, tag = request.repo(name, writing=True), json.loads(request.body)["tag"]
    if tag in repo.tags:
        raise Refusal(409, f"Reference already exists: refs/tags/{tag}")
    repo.tags[tag] = repo.commit(revision).sha
    request.reply()
