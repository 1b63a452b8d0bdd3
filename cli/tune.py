"""``mctf tune``: finds the fusion setting that loses least at a budget, without training."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mctf_hf.candidates import Candidate, FittedCandidate, budget_of, meet, untuned
from mctf_hf.checks import check_range
from mctf_hf.hub import check_folder, save
from mctf_hf.judging import Judge, Verdict, judge
from mctf_hf.model_card import public_name
from mctf_hf.model_folder import TUNING, TUNING_PICTURE, TUNING_TABLE
from mctf_hf.tuning import Tuned, tune

from .models import load
from .options import parser_of, read, refuse
from .verdicts import csv_of, draw, measure_speed, methods_of, open_judge, table_of

# Budgets to try for max_loss, largest first.
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# Budgets of the picture; at each, every method is run on the ranking images.
PICTURED = (0.85, 0.7, 0.55, 0.4)


def main(args: Sequence[str]) -> None:
    """Read the command line and run :func:`tune_model`."""
    model = {
        "help": "NAME[,setting=value…]: a folder or Hub id. If it fuses by itself, the search "
        "begins with how it does.",
    }
    parser = parser_of("tune", tune_model, model=model)
    settings, given = read(parser, args)
    if settings["speed"] is None:
        refuse(given, {"batch_size", "rounds"}, "without --speed")
    tune_model(**settings)


def tune_model(
    model: str,
    images: str,
    output: str,
    budget: float | None = None,
    speed: float | None = None,
    max_loss: float | None = None,
    methods: str | None = None,
    labels: bool = False,
    split: str | None = None,
    num_images: int = 400,
    trials: int = 200,
    seed: int = 0,
    study: str | None = None,
    precision: Literal["32-true", "bf16-true"] = "32-true",
    batch_size: int = 16,
    rounds: int = 10,
) -> None:
    """Find the fusion setting that loses least at a budget, without training. Labels are optional.

    Without labels, the loss is how far fusion moves a model's outputs. Give exactly one of budget,
    speed and max_loss. Half of the images are used for the search, the others for the reported
    ranking. If a search was interrupted, run the same command again to continue it.

    Args:
        model: the model, as :func:`main` describes it.
        images: folder of images, dataset folder or dataset id on the Hub.
        output: folder to write. It contains the model with the best setting, the ranking
            (tuning.csv), a picture of the methods at several budgets (tuning.png), and a record.
        budget: share of the multiply-accumulates without fusion.
        speed: speed relative to the model without fusion, measured on this machine.
        max_loss: percentage points of accuracy (with labels) or of agreement with the model without
            fusion that may be lost. The cheapest such setting is found.
        methods: some of mctf,mctf_present,tome,pitome,diffrate,token_mergence,evit. If unset, all
            that suit the model.
        labels: use the cross-entropy with the images' labels as the loss.
        split: split of the dataset. If unset, test (without labels: test, validation or the first).
        num_images: number of evenly spaced images to use.
        trials: number of settings to try, at each of the budgets that max_loss tries.
        seed: random seed of the search.
        study: file that stores the search. If unset, OUTPUT.study.
        precision: precision of the search and of the picture; bf16-true is up to three times as
            fast on processors with bfloat16. The ranking is in float32.
        batch_size: number of images per call, for the speed.
        rounds: number of timings of each setting; the median is used.
    """
    import optuna  # noqa: F401  # if not installed, fail before the work

    goals = {"budget": budget, "speed": speed, "max_loss": max_loss}
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"{', '.join(f'{k}={v!r}' for k, v in goals.items())} is not allowed: give exactly one"
        )
    _check("budget", budget, 0, 1)
    _check("speed", speed, 1, 100)
    _check("max_loss", max_loss, 0, 100)
    check_range(1, trials=trials, batch_size=batch_size, rounds=rounds)
    check_range(4, num_images=num_images)
    folder = check_folder(output)
    storage = Path(study or f"{output.rstrip('/')}.study")
    if not storage.resolve().parent.is_dir():
        raise FileNotFoundError(
            f"study={str(storage)!r} cannot be written: its folder does not exist"
        )

    console = Console()
    loaded, processor = load(model)
    chosen = methods_of(methods, loaded)
    judging = open_judge(loaded, processor, images, num_images, labels=labels, split=split)
    searching, ranking = judging.part(slice(0, None, 2)), judging.part(slice(1, None, 2))
    drawing = ranking
    if precision == "bf16-true":
        low = copy.deepcopy(loaded).bfloat16()
        searching = Judge(low, searching.pixel_values, searching.labels)
        drawing = Judge(low, ranking.pixel_values, ranking.labels)
    console.print(f"{len(searching)} images to search on, {len(ranking)} to rank on")

    def timed(verdicts: Sequence[Verdict]) -> None:
        measure_speed(ranking, verdicts, batch_size=batch_size, rounds=rounds)

    start = Candidate.of(loaded.config, searching.described.num_tokens)

    def search(fraction: float, start: Candidate | None = start) -> Tuned:
        with _Bar(console, f"{fraction:.3f} of the cost", trials) as progress:
            return tune(
                searching, ranking, fraction, chosen, trials=trials, storage=storage, seed=seed,
                start=start, progress=progress,
            )  # fmt: skip

    if budget is not None:
        tuned = search(budget)
    elif speed is not None:
        tuned = _for_speed(speed, ranking, search, timed)
    else:
        assert max_loss is not None
        tuned = _for_loss(max_loss, search)
    best = tuned.best
    assert best.setting is not None
    title = f"{model}: {len(ranking)} images of {images} that the search has not seen"
    console.print(table_of([tuned.unfused, *tuned.ranking], title, best))
    curves = _curves(drawing, best, chosen)
    record = {
        "images": public_name(images),
        "num_images": [len(searching), len(ranking)],
        "labels": labels,
        "trials": trials,
        "seed": seed,
        **given,
        "settings": best.setting.settings,
        "ranking": [verdict.row(best) for verdict in (tuned.unfused, *tuned.ranking)],
    }
    for name, value in best.setting.settings.items():
        setattr(loaded.config, name, value)
    files: dict[str, str | bytes] = {
        TUNING: json.dumps(record, indent=2) + "\n",
        TUNING_TABLE: csv_of([verdict.row(best) for verdict in tuned.ranking]),
        TUNING_PICTURE: draw(curves, title),
    }
    save(loaded, processor, folder, files=files)
    console.print(f"{best.name}: {best.setting.settings}\nwritten: {folder}", highlight=False)


def _check(name: str, value: float | None, above: float, below: float) -> None:
    if value is not None and not above < value < below:
        raise ValueError(
            f"{name}={value!r} is not allowed: it must be above {above} and below {below}"
        )


class _Bar:
    """A progress bar of a search, updated after each trial; without a terminal, printed lines."""

    def __init__(self, console: Console, what: str, trials: int):
        self.console, self.what, self.trials = console, what, trials
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Callable[[int, float], None]:
        self.bar.start()
        task = self.bar.add_task(self.what, total=self.trials)

        def progress(done: int, best: float) -> None:
            self.bar.update(task, completed=done, description=f"{self.what}, loss {best:.5f}")
            if not self.console.is_terminal and (done % 25 == 0 or done == self.trials):
                print(
                    f"{self.what}: {done} of {self.trials} tried, least loss {best:.5f}", flush=True
                )

        return progress

    def __exit__(self, *args: Any) -> None:
        self.bar.stop()


def _for_speed(
    speed: float,
    ranking: Judge,
    search: Callable[[float], Tuned],
    timed: Callable[[Sequence[Verdict]], None],
) -> Tuned:
    """Find the best setting whose measured speed is at least ``speed``.

    Raises:
        ValueError: if no setting is as fast.
    """
    fraction = _fraction_for(speed, ranking, timed)
    tuned = search(fraction)
    timed(tuned.ranking)
    verdict = tuned.ranking[0]
    while (verdict.ratio or 0) < speed:  # reduce more with the same candidate
        assert verdict.setting is not None and verdict.ratio is not None
        fraction = verdict.fraction * min(0.98, verdict.ratio / speed)
        candidate = verdict.setting.candidate
        setting = _meet(speed, verdict.ratio, ranking, candidate, fraction)
        verdict = judge(ranking, verdict.name, setting)
        timed([verdict])
    if verdict is not tuned.ranking[0]:
        tuned.ranking.append(verdict)
    fast = [verdict for verdict in tuned.ranking if (verdict.ratio or 0) >= speed]
    best = min(fast, key=lambda verdict: float(verdict.loss.mean()))
    return Tuned(best, tuned.ranking, tuned.unfused)


def _fraction_for(
    speed: float, ranking: Judge, timed: Callable[[Sequence[Verdict]], None]
) -> float:
    """The share of the cost at which ToMe, the method that chooses fastest, reaches ``speed``."""
    low, high, ratio = 0.1, 1.0, 1.0
    for _ in range(5):
        middle = math.sqrt(low * high)
        setting = _meet(speed, ratio, ranking, Candidate.untuned("tome"), middle)
        timed([verdict := judge(ranking, "tome", setting)])
        assert verdict.ratio is not None
        ratio = verdict.ratio
        low, high = (low, middle) if ratio < speed else (middle, high)
    return low


def _meet(
    speed: float, ratio: float, ranking: Judge, candidate: Candidate, fraction: float
) -> FittedCandidate:
    """The settings of a candidate at a share of the cost; ``ratio`` is the speed reached so far."""
    budget = budget_of(ranking.model, fraction, ranking.described)
    try:
        return meet(ranking.model, candidate, budget, ranking.described)
    except ValueError as error:
        raise ValueError(
            f"speed={speed!r} is not reached on this machine, which reached {ratio:.2f}: {error}"
        ) from error


def _for_loss(max_loss: float, search: Callable[..., Tuned]) -> Tuned:
    """Find the cheapest setting within a loss, by searches at falling budgets.

    Each search starts from the best candidate of the previous one.
    """
    found: Tuned | None = None
    start: dict[str, Any] = {}
    for fraction in BUDGETS:
        try:
            tuned = search(fraction, **start)
        except ValueError:
            if found is None:
                raise
            break  # no method can reduce as much
        if lost(tuned.best, tuned.unfused) > max_loss:
            break
        found = tuned
        assert tuned.best.setting is not None
        start = {"start": tuned.best.setting.candidate}
    if found is None:
        raise ValueError(
            f"max_loss={max_loss!r} cannot be kept: at {BUDGETS[0]} of the cost "
            f"{lost(tuned.best, tuned.unfused):.2f} points are lost"
        )
    return found


def lost(verdict: Verdict, unfused: Verdict) -> float:
    """Percentage points of accuracy, or without labels of agreement, that fusion loses."""
    kept = verdict.agreement if verdict.right is None else verdict.right
    whole = unfused.agreement if unfused.right is None else unfused.right
    return 100 * float(whole.float().mean() - kept.float().mean())


def _curves(drawing: Judge, best: Verdict, methods: Sequence[str]) -> dict[str, list[Verdict]]:
    """Verdicts of the best setting and of the untuned methods at several budgets."""
    assert best.setting is not None
    model, described = drawing.model, drawing.described
    curves = {"unfused": [judge(drawing, "unfused", None)], "tuned": [best]}
    for fraction in PICTURED:
        budget = budget_of(model, fraction, described)
        with suppress(ValueError):  # this candidate cannot reduce as much
            same = meet(model, best.setting.candidate, budget, described)
            curves["tuned"].append(judge(drawing, "tuned", same))
        others: dict[str, FittedCandidate] = {}
        with suppress(ValueError):  # nor can any method
            others = untuned(model, methods, budget, described)
        for method, setting in others.items():
            curves.setdefault(method, []).append(judge(drawing, method, setting))
    return curves
