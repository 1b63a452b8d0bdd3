"""What a release says of itself agrees: versions, dates, and what the workflows test."""

import re
from typing import Any

import yaml

from tests.helpers import REPOSITORY

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
WORKFLOWS = REPOSITORY / ".github" / "workflows"


def workflow(name: str) -> dict[str, Any]:
    return yaml.load((WORKFLOWS / name).read_text(), yaml.BaseLoader)  # `on` is no truth value


def test_the_version_is_one() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_changelog_tells_of_releases_newest_first() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    first, *released = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert first == "[Unreleased]"
    named = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", one) for one in released]
    assert all(named), released
    versions = [tuple(map(int, one.groups()[:3])) for one in named if one]
    assert versions == sorted(versions, reverse=True)
    assert all(version <= tuple(map(int, PROJECT["version"].split("."))) for version in versions)
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_workflows_test_every_python_and_the_oldest_versions() -> None:
    tested = workflow("tests.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: "
    names = [one.removeprefix(prefix) for one in PROJECT["classifiers"] if prefix in one]
    assert tested == [name for name in names if name[-1].isdigit()]
    assert PROJECT["requires-python"] == f">={tested[0]}"
    nox = (REPOSITORY / "noxfile.py").read_text()
    oldest = dict(re.findall(r'"(torch|transformers|lightning|datasets)==([\d.]+?)\.?[*0]?"', nox))
    extras = PROJECT["optional-dependencies"]
    requirements = " ".join([*PROJECT["dependencies"], *extras["train"], *extras["cli"]])
    lowest = dict(re.findall(r"(\w+)>=([\d.]+)", requirements))
    required = {name: lowest[name] for name in ("torch", "transformers", "lightning", "datasets")}
    assert oldest.keys() == required.keys()
    for name, version in oldest.items():
        assert f"{required[name]}.".startswith(f"{version}."), name
    ids = workflow("tests.yml")["jobs"]["compatibility"]["strategy"]["matrix"]["versions"]
    assert ids == ["oldest", "newest"] and 'ids=["oldest", "newest"]' in nox


def test_a_release_needs_no_password_and_comes_from_a_tag() -> None:
    release = workflow("release.yml")
    assert release["on"] == {"push": {"tags": ["v*"]}}
    publish = release["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "build"
    assert not any("password" in step.get("with", {}) for step in publish["steps"])
    assert "secrets." not in (WORKFLOWS / "release.yml").read_text()


def test_workflows_run_targets_that_there_are() -> None:
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for file in (*WORKFLOWS.glob("*.yml"), *REPOSITORY.glob("*.md")):
        used = set(re.findall(r"(?:^|`|run: )make (\w+)", file.read_text(), re.MULTILINE))
        assert used <= targets, file


def test_issue_forms_ask_for_what_helps() -> None:
    for file in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(file.read_text())
        if file.stem == "config":
            continue
        assert {"name", "description", "body"} <= set(form)
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids)) and all(
            field["attributes"]["label"] for field in form["body"]
        )
