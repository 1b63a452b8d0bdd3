"""The releases of transformers that models of this library run on, whatever else they import."""

import transformers
from packaging.version import Version

OLDEST = "5.10.1"

if Version(transformers.__version__).release < Version(OLDEST).release:
    raise ImportError(
        f"this model needs transformers {OLDEST} or newer, and {transformers.__version__} is "
        "installed: pip install --upgrade transformers"
    )
