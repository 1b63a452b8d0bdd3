"""Processes that have nothing of this library, as those of people who load what it saved."""

import atexit
import functools
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.warm import Warm

# What a stranger runs: this library can't be imported there.
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mctf_hf", "lightning_modules", "cli", "mctf_cli"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
"""
# What takes them most of their time.
OF_STRANGERS = (
    BLOCKED
    + """
import torch
import transformers.models.vit.modeling_vit
from transformers import AutoModel, AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
"""
)
STRANGER = """
import sys

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

given, results, *folders = sys.argv[1:]
images = torch.load(given)


def load(auto, folder):
    return auto.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
def look(folder):
    classifier = load(AutoModelForImageClassification, folder)
    classifier.save_pretrained(folder + "-resaved")
    return {
        "logits": classifier(images).logits,
        "resaved": load(AutoModelForImageClassification, folder + "-resaved")(images).logits,
        "hidden": load(AutoModel, folder)(images).last_hidden_state,
        "weights": classifier.state_dict(),
        "r": AutoConfig.from_pretrained(folder, trust_remote_code=True).r,
        "processor": type(AutoImageProcessor.from_pretrained(folder)).__name__,
        "module": type(classifier).__module__,
    }


torch.save([look(folder) for folder in folders], results)
"""


def environment_of_a_stranger(home: Path) -> dict[str, str]:
    """A process that has none of this one's environment, but as many threads."""
    return {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PATH": "/usr/bin:/bin",
    }


@functools.cache
def _warm() -> Warm:
    home = tempfile.TemporaryDirectory()
    warm = Warm(OF_STRANGERS, environment_of_a_stranger(Path(home.name)))
    atexit.register(warm.__exit__)
    atexit.register(home.cleanup)
    return warm


def run_as_stranger(code: str, *arguments: Any, status: int = 0) -> subprocess.CompletedProcess:
    """Run code in a process without this library, which has a cache for all such processes."""
    done = _warm().run(code, *arguments)
    assert done.returncode == status, done.stderr[-3000:]
    return done


def load_as_stranger(
    folders: Sequence[Path], images: Tensor, tmp_path: Path
) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess]:
    """What one process without this library makes of folders, and what it says."""
    torch.save(images, tmp_path / "images.pt")
    done = run_as_stranger(STRANGER, tmp_path / "images.pt", tmp_path / "out.pt", *folders)
    found = torch.load(tmp_path / "out.pt")
    assert all(one["module"].startswith("transformers_modules.") for one in found)
    return found, done
