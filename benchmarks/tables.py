"""Tables for the documentation, from files that ``mctf benchmark --output`` wrote.

    python benchmarks/tables.py FOLDER > tables.md

Prints one table per JSON file, with the environment of the measurement. If a *sliced* model was
measured (an upper bound), each model of its batch size shows its share of the sliced speed.
"""

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = ("batch", "model", "GMACs", "images/s", "peak MiB", "ratio", "efficiency")


def row(found: dict[str, Any], ceilings: dict[int, float]) -> list[str]:
    """The cells of the row of a model."""
    cells = [
        str(found["batch_size"]),
        f"`{found['model']}`",
        f"{found['gmacs']:.3f}",
        f"{found['images_per_second']:.{1 if found['images_per_second'] > 1 else 3}f}",
        f"{found['peak_memory_mib']:.1f}",
        f"{found['ratio']:.2f}x",
        f"{found['efficiency']:.2f}",
    ]
    if ceilings:
        ceiling = ceilings.get(found["batch_size"])
        cells.append("" if ceiling is None else f"{found['images_per_second'] / ceiling:.2f}")
    return cells


def table(measured: dict[str, Any]) -> str:
    """The table of one file in Markdown."""
    results = measured["results"]
    ceilings = {
        one["batch_size"]: one["images_per_second"]
        for one in results
        if one["model"].endswith(",sliced")
    }
    heads = [*COLUMNS, *["of sliced"] * bool(ceilings)]
    aligned = ["---" if head == "model" else "---:" for head in heads]
    lines = [heads, aligned, *(row(one, ceilings) for one in results)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(folder: str) -> None:
    """Print the tables of all files in a folder."""
    for file in sorted(Path(folder).glob("*.json")):
        measured = json.loads(file.read_text())
        said = ", ".join(f"{name} {value}" for name, value in measured["environment"].items())
        print(f"## {file.stem}\n\n{said}\n\n{table(measured)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
