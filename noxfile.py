"""The tests that depend on transformers, with its oldest supported release and with the newest.

``nox`` runs both, each in an environment of its own.
"""

from pathlib import Path

import nox

# What transformers can break: loading, the model, training, the Hub.
TESTS = (
    "tests/test_configuration.py",
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
    "tests/test_rates.py",
    "tests/test_reducers.py",
    "tests/test_visualization.py",
    "tests/e2e/test_hub.py",
)


@nox.session
@nox.parametrize("transformers", ["==5.10.2", ""], ids=["5.10", "newest"])
def compatibility(session: nox.Session, transformers: str) -> None:
    """Run them; further arguments go to pytest."""
    pins = {
        line
        for line in Path("constraints.txt").read_text().splitlines()
        if not line.lower().startswith(("transformers=", "huggingface_hub=", "tokenizers="))
    }
    constraints = Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("\n".join(sorted(pins)))
    session.install("-c", constraints, "setuptools", "torch")
    session.install(
        "-c", constraints, "--no-build-isolation", "-e", ".[dev]", f"transformers{transformers}"
    )
    session.run("pytest", *(session.posargs or TESTS))
