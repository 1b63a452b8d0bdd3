"""What is private in other libraries and is gone is told at once, by name."""

import importlib
import re
from importlib.metadata import version

import pytest


@pytest.mark.parametrize(
    ("module", "library", "owner", "name"),
    [
        (
            "mctf_hf.release",
            "transformers",
            "transformers.PreTrainedModel",
            "_load_pretrained_model",
        ),
        ("mctf_hf.torch_private", "torch", "torch._inductor", "aoti_load_package"),
    ],
)
def test_a_private_name_that_is_gone_is_told_by_library_and_version(
    module: str, library: str, owner: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needing = importlib.import_module(module)
    monkeypatch.delattr(f"{owner}.{name}")
    with pytest.raises(
        ImportError, match=re.escape(f"{library} {version(library)} has no {owner}.{name}")
    ):
        importlib.reload(needing)
