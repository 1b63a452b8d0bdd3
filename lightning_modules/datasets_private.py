"""Uses of private names of ``datasets``."""

from datasets import Dataset

from mctf_hf.dependencies import check_names

check_names("datasets", {"datasets.Dataset": ("_fingerprint",)})


def fingerprint(rows: Dataset) -> str:
    """Text that differs between datasets with different images."""
    return rows._fingerprint
