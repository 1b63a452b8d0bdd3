"""``mctf sweep``: compares fusion methods at several budgets by their loss on real images."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from mctf_hf.candidates import Candidate, FittedCandidate, budget_of, meet
from mctf_hf.checks import check_range
from mctf_hf.files import replace, write_text
from mctf_hf.judging import Judge, Verdict, judge

from .measuring import machine_name
from .models import load, parse
from .options import parser_of, read, refuse
from .paths import check_output
from .verdicts import csv_of, draw, measure_speed, methods_of, open_judge, table_of


def main(args: Sequence[str]) -> None:
    """Read the command line and run :func:`sweep`."""
    models = {
        "nargs": "+",
        "help": "NAME[,setting=value…]: a folder or Hub id. One that fuses by itself is a row of "
        "its own, with its setting at its own cost.",
    }
    parser = parser_of("sweep", sweep, models=models)
    settings, given = read(parser, args)
    if not settings["speed"]:
        refuse(given, {"batch_size", "rounds"}, "without --speed")
    sweep(**settings)


def sweep(
    models: list[str],
    images: str,
    budgets: str = "0.85,0.7,0.56,0.45",
    methods: str | None = None,
    labels: bool = False,
    split: str | None = None,
    num_images: int | None = None,
    speed: bool = False,
    batch_size: int = 16,
    rounds: int = 10,
    output: str | None = None,
    plot: str | None = None,
) -> None:
    """Compare fusion methods at several budgets by their loss on real images.

    The loss is measured against the labels, or against the model without fusion.

    Args:
        models: the models, as :func:`main` describes them.
        images: folder of images, dataset folder or dataset id on the Hub.
        budgets: shares of the multiply-accumulates without fusion, such as 0.7,0.56.
        methods: some of mctf,mctf_present,tome,pitome,diffrate,token_mergence,evit. If unset, all
            that suit the model. With own, only each model's own setting.
        labels: measure accuracy with the labels of the images.
        split: split of the dataset. If unset, test (without labels: test, validation or the first).
        num_images: number of evenly spaced images to use. If unset, all.
        speed: also measure speed.
        batch_size: number of images per call, for the speed.
        rounds: number of timings of each setting; the median is used.
        output: CSV file to write.
        plot: PNG file to draw.
    """
    check_range(1, num_images=num_images, batch_size=batch_size, rounds=rounds)
    fractions = _fractions(budgets)
    for file, suffix in ((output, ".csv"), (plot, ".png")):
        if file is not None:
            check_output(file, suffix)
    console = Console()
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[Verdict]] = {}
    for words in models:
        model, processor = load(words)
        chosen = () if methods == "own" else methods_of(methods, model)
        judging = open_judge(model, processor, images, num_images, labels=labels, split=split)
        found = _verdicts(judging, chosen, fractions)
        every = [verdict for curve in found.values() for verdict in curve]
        if speed:
            measure_speed(judging, every, batch_size=batch_size, rounds=rounds)
        where = f"; speed in batches of {batch_size}, {machine_name()}" if speed else ""
        title = f"{words}, {len(judging)} images of {images}{where}"
        console.print(table_of(every, title))
        rows += [{"model": words} | verdict.row() for verdict in every]
        several = len(models) > 1
        curves |= {f"{parse(words)[0]}, {k}" if several else k: v for k, v in found.items()}
    if output is not None:
        write_text(output, csv_of(rows))
    if plot is not None:
        picture = draw(curves, f"{', '.join(models)} on {images}")
        replace(plot, lambda draft: draft.write_bytes(picture))


def _fractions(budgets: str) -> list[float]:
    """Parse budgets as shares of the cost, largest first."""
    try:
        fractions = sorted(map(float, budgets.split(",")), reverse=True)
    except ValueError:
        fractions = []
    if not fractions or not all(0 < fraction < 1 for fraction in fractions):
        raise ValueError(
            f"budgets={budgets!r} is not allowed: they must be above 0 and below 1, as in 0.7,0.56"
        )
    return fractions


def _verdicts(
    judging: Judge, methods: Sequence[str], fractions: Sequence[float]
) -> dict[str, list[Verdict]]:
    """Verdicts of each method at the budgets that it can meet, and of the model's own setting."""
    model, described = judging.model, judging.described
    found: dict[str, list[Verdict]] = {"unfused": [judge(judging, "unfused", None)]}
    if any(model.config.tokens_fused(described.num_tokens)):
        own = FittedCandidate(Candidate("own"), {}, described.of(model.config))
        found["own"] = [judge(judging, "own", own)]
    for method in methods:
        for fraction in fractions:
            try:
                budget = budget_of(model, fraction, described)
                setting = meet(model, Candidate.untuned(method), budget, described)
            except ValueError as error:
                print(f"left out: {error}")
                continue
            found.setdefault(method, []).append(judge(judging, method, setting))
    return found
