"""Amount that the teacher of token-reduction consistency reduces (MCTF, arXiv 2403.10030, 3.4)."""

from typing import Any

import numpy as np
import torch

from .modeling_mctf_vit import MCTFViTConfig


def teacher_r(seed: int, step: int, r_max: int) -> int:
    """The teacher's r in a step, the same in every process: uniform in {0, …, r_max - 1}."""
    generator = torch.Generator().manual_seed(mix_seed(seed, step, 0))
    return int(torch.randint(r_max, (), generator=generator))


def teacher_amount(config: MCTFViTConfig, limit: int, seed: int, step: int) -> dict[str, Any]:
    """Amount that the teacher reduces in a step, the same in every process.

    Args:
        limit: see :func:`teacher_limit`.

    Returns:
        Arguments of the model, with one value per layer: ``r``, uniform in {0, …, limit - 1}, but
        never more than the student's; or ``keep_rate``, which is rate + (1 - rate) * share, from
        the student's rate and one share for all layers, uniform in (0, 1].
    """
    if not _by_rate(config):
        drawn = teacher_r(seed, step, limit)
        return {"r": [min(drawn, fused) for fused in config.tokens_fused(config.num_tokens())]}
    generator = torch.Generator().manual_seed(mix_seed(seed, step, 0))
    share = 1 - float(torch.rand((), generator=generator))
    return {"keep_rate": [rate + (1 - rate) * share for rate in config.kept_by_layer()]}


def _by_rate(config: MCTFViTConfig) -> bool:
    return config.reducer_class is not None and config.reducer_class.amount == "keep_rate"


def teacher_limit(config: MCTFViTConfig, r_max: int | None) -> int:
    """Exclusive limit of the teacher's r: ``r_max``, or half of the most that a layer fuses.

    For a method with ``keep_rate``, it is 1 with a teacher and 0 without.

    Raises:
        ValueError: if the teacher could fuse more than the student.
    """
    most = max(config.tokens_fused(config.num_tokens()))
    if _by_rate(config):
        if r_max not in (None, 0):
            raise ValueError(
                f"r_max={r_max!r} is not allowed with reduction={config.reduction!r}, whose "
                "teacher keeps more by its keep_rate: it must be 0 (no teacher), or unset"
            )
        return int(most > 0 and r_max is None)
    if r_max is None:
        return most // 2
    if not 0 <= r_max <= most:
        raise ValueError(
            f"r_max={r_max!r} is not allowed: it must be at least 0 (no teacher) and at most "
            f"{most}, "
            "what the student's layers fuse"
        )
    return r_max


def check_compiled(config: MCTFViTConfig, setting: str, otherwise: str) -> None:
    """Raise ValueError, with advice, if the teacher needs a new compiled program in each step."""
    if _by_rate(config):
        raise ValueError(
            f"{setting} is not allowed with reduction={config.reduction!r}, whose teacher keeps "
            f"another number of tokens in each step: leave it out, or {otherwise}"
        )


def r_max_of(config: MCTFViTConfig, limit: int) -> int | None:
    """The ``r_max`` for which :func:`teacher_limit` returns this limit."""
    return None if limit and _by_rate(config) else limit


def mix_seed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
