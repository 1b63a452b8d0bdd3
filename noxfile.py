"""Sessions in their own environments: tests with other library versions, and an audit."""

from pathlib import Path

import nox

# Tests of what these libraries can break: loading, the model, data, training, the Hub.
TESTS = (
    "tests/test_configuration.py",
    "tests/test_data.py",
    "tests/test_encoders.py",
    "tests/test_ecosystem.py",
    "tests/test_export.py",
    "tests/test_families.py",
    "tests/test_finetuning.py",
    "tests/test_fused_models.py",
    "tests/test_loading.py",
    "tests/test_losses.py",
    "tests/test_modeling_mctf_vit.py",
    "tests/test_own_reducers.py",
    "tests/test_private_names.py",
    "tests/test_rates.py",
    "tests/test_recipe.py",
    "tests/test_reducers.py",
    "tests/test_resuming.py",
    "tests/test_runs.py",
    "tests/test_skip_unread.py",
    "tests/test_streaming.py",
    "tests/test_visualization.py",
    "tests/test_watching.py",
    "tests/e2e/test_hub.py",
)


OLDEST = ("torch==2.7.*", "transformers==5.10.2", "lightning==2.6.0", "datasets==4.0.0")
NEWEST = ("torch", "transformers", "lightning", "datasets")
# Packages whose pins are dropped: these libraries, and those that must match their versions.
LOOSE = (*NEWEST, "huggingface_hub", "tokenizers", "dill", "fsspec", "multiprocess")


@nox.session
@nox.parametrize("versions", [OLDEST, NEWEST], ids=["oldest", "newest"])
def compatibility(session: nox.Session, versions: tuple[str, ...]) -> None:
    """Run TESTS, or pytest with the given arguments."""
    pins = [
        line
        for line in Path("constraints.txt").read_text().splitlines()
        if line.partition("==")[0].lower() not in LOOSE
    ]
    constraints = Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("\n".join(pins))
    session.install("-c", constraints, "setuptools", versions[0])
    session.install("-c", constraints, "--no-build-isolation", "-e", ".[dev]", *versions)
    session.run("pytest", *(session.posargs or TESTS))


@nox.session
def audit(session: nox.Session) -> None:
    """Check the pinned packages for known vulnerabilities."""
    session.install("pip-audit")
    session.run("pip-audit", "--strict", "--no-deps", "--disable-pip", "-r", "constraints.txt")
