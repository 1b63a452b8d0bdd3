"""Write the parquet files beside this script from scikit-learn's handwritten digits."""

import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits

TRAIN_IMAGES = 1297


def png(digit: np.ndarray) -> bytes:
    """An 8x8 image of 17 grey levels as PNG."""
    file = io.BytesIO()
    Image.fromarray(np.round(digit * 255 / 16).astype(np.uint8)).save(file, "png", optimize=True)
    return file.getvalue()


def main(folder: Path) -> None:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list("0123456789"))})
    for split, rows in (("train", order[:TRAIN_IMAGES]), ("test", order[TRAIN_IMAGES:])):
        columns = {
            "image": [{"bytes": png(digits.images[row]), "path": None} for row in rows],
            "label": [int(digits.target[row]) for row in rows],
        }
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


if __name__ == "__main__":
    main(Path(__file__).parent)
