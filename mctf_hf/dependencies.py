"""Checks that the installed releases of other libraries can run the models of this library."""

import dis
import inspect
import pkgutil
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import transformers

OLDEST = "5.10.2"


def check_names(library: str, private: Mapping[str, Sequence[str]]) -> None:
    """Check that private names of another library that are overridden or called still exist.

    Without this check, overriding a method that the library no longer calls would fail silently.

    Args:
        library: name of the installed package, or ``Python``.
        private: names by the class or module that has them; ``__init__`` may create them.

    Raises:
        ImportError: for the first name that is missing.
    """
    for owner, names in private.items():
        for name in names:
            if not _has(owner, name):
                release = platform.python_version() if library == "Python" else version(library)
                raise ImportError(
                    f"{library} {release} has no {owner}.{name}, which this library needs: install "
                    f"another release of {library}"
                )


def _has(path: str, name: str) -> bool:
    try:
        owner = pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return False
    if hasattr(owner, name) or name in getattr(owner, "__annotations__", ()):
        return True
    made = inspect.unwrap(owner.__init__)
    steps = dis.get_instructions(made) if inspect.isfunction(made) else ()
    return any(step.opname == "STORE_ATTR" and step.argval == name for step in steps)


def _numbers(version: str) -> list[int]:
    """``5.10.2rc1`` and ``5.10.2.dev0`` -> ``[5, 10, 2]``."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


if _numbers(transformers.__version__) < _numbers(OLDEST):
    raise ImportError(
        f"this model needs transformers {OLDEST} or newer, and {transformers.__version__} is "
        "installed: pip install --upgrade transformers"
    )
check_names(
    "torch",
    {"torch.nn.Module": ("_forward_hooks", "_forward_pre_hooks", "_replicate_for_data_parallel")},
)
check_names(
    "transformers",
    {
        "transformers.PreTrainedConfig": ("_attn_implementation", "_auto_class"),
        "transformers.PreTrainedModel": (
            "_auto_class",
            "_from_config",
            "_init_weights",
            "_keys_to_ignore_on_load_unexpected",
            "_load_pretrained_model",
            "_no_split_modules",
            "_supports_flash_attn",
            "_supports_flex_attn",
        ),
        "transformers.utils.output_capturing": ("_active_collector",),
    },
)
