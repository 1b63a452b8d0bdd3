"""What is private in other libraries and is gone is told at once, by name."""

import importlib
import pkgutil
import platform
import re
from importlib.metadata import version

import pytest

AVERAGING = "lightning.pytorch.callbacks.WeightAveraging"


@pytest.mark.parametrize(
    ("module", "library", "owner", "name"),
    [
        ("cli.argparse_private", "Python", "argparse._ArgumentGroup", "_group_actions"),
        (
            "cli.lightning_cli_private",
            "lightning",
            "lightning.pytorch.cli.LightningCLI",
            "_parse_ckpt_path",
        ),
        ("lightning_modules.datasets_private", "datasets", "datasets.Dataset", "_fingerprint"),
        ("lightning_modules.lightning_private", "lightning", AVERAGING, "_swap_models"),
        ("lightning_modules.lightning_private", "lightning", AVERAGING, "_average_model"),
        (
            "mctf_hf.dependencies",
            "transformers",
            "transformers.PreTrainedModel",
            "_load_pretrained_model",
        ),
        ("mctf_hf.torch_private", "torch", "torch._inductor", "aoti_load_package"),
    ],
)
def test_a_private_name_that_is_gone_is_told_with_library_and_version(
    module: str, library: str, owner: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needing = importlib.import_module(module)
    if hasattr(pkgutil.resolve_name(owner), name):
        monkeypatch.delattr(f"{owner}.{name}")
    else:  # made by __init__
        monkeypatch.setattr(f"{owner}.__init__", lambda self: None)
    release = platform.python_version() if library == "Python" else version(library)
    told = re.escape(f"{library} {release} has no {owner}.{name}, which this library needs")
    with pytest.raises(ImportError, match=told):
        importlib.reload(needing)
