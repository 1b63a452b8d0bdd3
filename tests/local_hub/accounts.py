"""Who asks, what is theirs, and what the Hub says of a card before it is there."""

import json
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from tests.local_hub.commits import ATTRIBUTES
from tests.local_hub.request import Request
from tests.local_hub.routing import REPO, route
from tests.local_hub.state import File, Refusal, Repo

USER = "tester"


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> None:
    if request.token() not in request.hub.tokens:
        raise Refusal(401, "Invalid credentials in Authorization header")
    access = {"accessToken": {"displayName": "tests", "role": "write"}}
    request.reply({"type": "user", "name": USER, "orgs": [], "auth": access})


@route("GET", f"{REPO}/auth-check(?P<write>/write)?")
def auth_check(request: Request, name: str, write: str) -> None:
    request.repo(name, writing=bool(write))
    request.reply()


@route("POST", "/api/repos/create")
def create_repo(request: Request) -> None:
    asked = json.loads(request.body)
    name = f"{asked.get('organization') or USER}/{asked['name']}"
    if asked.get("type", "model") != "model":
        raise Refusal(400, "only models are served here")
    request.check_writing()
    url = {"url": f"{request.hub.url}/{name}"}
    if name in request.hub.repos:
        return request.reply({**url, "error": "You already created this model repo"}, 409)
    repo = Repo(private=asked.get("visibility") == "private" or asked.get("private") is True)
    repo.add("main", "initial commit", {".gitattributes": File(ATTRIBUTES)})
    request.hub.repos[name] = repo
    request.reply(url)


@route("DELETE", "/api/repos/delete")
def delete_repo(request: Request) -> None:
    asked = json.loads(request.body)
    name = f"{asked.get('organization') or USER}/{asked['name']}"
    request.repo(name, writing=True)
    del request.hub.repos[name]
    request.reply()


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> None:
    block = REGEX_YAML_BLOCK.search(json.loads(request.body)["content"])
    if block is None:
        said = {"warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        return request.reply(said)
    try:
        errors = errors_of_card(yaml.safe_load(block.group(2)))
    except yaml.YAMLError as error:
        errors = [f"the yaml metadata can't be read: {error}"]
    request.reply({"errors": [{"message": it} for it in errors]}, 400 if errors else 200)


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
