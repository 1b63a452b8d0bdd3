"""Which attention is faster on this machine: with an attention map, or by a kernel without one.

    python benchmarks/attention.py

For each dtype and number of heads, tokens and images, the table shows the time of the kernel
divided by the time with a map. :data:`mctf_hf.attention.FASTER_BY_MAP` is based on such a table.
"""

import statistics

import torch
from torch import Tensor
from torch.nn import functional as F

from cli.measuring import seconds_in_rounds
from mctf_hf.attention import Attention, is_faster_by_map

HEADS = (3, 6, 12)
TOKENS = (21, 65, 101, 197, 257, 577, 1025)
IMAGES = (1, 2, 4, 16)
CHANNELS = 64  # per head
LARGEST = 2**27  # maximum number of entries of a map


def by_map(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in three operators, for query, key and value of (b, h, n, d)."""
    rows = Attention(query, key, None, CHANNELS**-0.5).rows()
    return torch.bmm(rows.flatten(0, 1), value.flatten(0, 1))


def by_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in one operator."""
    return F.scaled_dot_product_attention(query, key, value)


@torch.inference_mode()
def main() -> None:
    """Print a table for each dtype; a star marks where this library chooses the map."""
    for dtype in (torch.float32, torch.bfloat16):
        print(f"\n{dtype}\n| heads | tokens | {' | '.join(f'{b} images' for b in IMAGES)} |")
        print("|---|---|" + "---:|" * len(IMAGES))
        for heads in HEADS:
            for tokens in TOKENS:
                shown = []
                for images in IMAGES:
                    if images * heads * tokens**2 > LARGEST:
                        shown.append("")
                        continue
                    made = torch.randn(3, images, tokens, heads, CHANNELS, dtype=dtype)
                    parts = made.transpose(2, 3).unbind()
                    runs = [lambda p=parts: by_kernel(*p), lambda p=parts: by_map(*p)]
                    kernel, own = map(statistics.median, seconds_in_rounds(runs, rounds=15))
                    chosen = is_faster_by_map(heads, tokens, made[0].flatten(2))
                    shown.append(f"{kernel / own:.2f}{'*' if chosen else ''}")
                print(f"| {heads} | {tokens} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
