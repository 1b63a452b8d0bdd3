"""The search for the fusion setting with the least loss within a budget.

It needs no training and no labels: a good setting has outputs near those of the model without
fusion. Optuna (arXiv 1907.10902) runs trials of candidates (:mod:`.candidates`) in two parts:
first, a tree-structured Parzen estimator proposes methods and settings; then a hill climb from the
best candidate moves tokens between layers. Candidates are judged on a few hundred images, poor ones
on fewer (Wilcoxon's signed-rank test). The best are ranked on images that the search has not seen.
"""

import contextlib
import functools
import hashlib
import json
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .candidates import (
    FALLING,
    HINTS,
    METHODS,
    MOST_WEIGHT,
    Candidate,
    FittedCandidate,
    budget_of,
    meet,
    untuned,
)
from .extras import needed_by
from .judging import CHUNK, Judge, Verdict, judge

if TYPE_CHECKING:
    import optuna

Progress = Callable[[int, float], None]

# Fraction of the trials for methods and settings; the rest are for the layers.
_EXPLORING = 0.4
# Size of a step in the second part; all numbers are in [0, 1].
STEP = 0.1
# Fraction of these steps that turn a dial; the others move tokens between layers.
TURNS = 0.3
LAYER = "layer "
# Images per mean loss that the pruner gets; it needs several of these means.
GROUP = 4
# Number of candidates that are ranked on other images.
FINALISTS = 8


class Search:
    """A search for the setting with the least loss within a budget; it can be resumed.

    Args:
        judging: judge with the images of the search.
        methods: names in :data:`.candidates.METHODS`; methods that miss the budget are left out.
        budget: multiply-accumulates of one image.
        trials: number of candidates to try.
        storage: file of the study, with which a later search with the same arguments continues;
            unset, nothing is stored.
        seed: random seed of the proposals.
        start: candidate to try first, such as the best of another search.

    Raises:
        ValueError: for a budget that none of the methods can meet, or a study of another search.
        ModuleNotFoundError: without Optuna.
    """

    def __init__(
        self,
        judging: Judge,
        methods: Sequence[str],
        budget: int,
        *,
        trials: int,
        storage: Path | None = None,
        seed: int = 0,
        start: Candidate | None = None,
    ):
        with needed_by("tuning"):
            import optuna

        self.judging, self.budget, self.trials, self.seed = judging, budget, trials, seed
        self.num_layers = judging.described.num_layers
        self.untuned = untuned(judging.model, methods, budget, judging.described)
        self.methods = tuple(self.untuned)
        hints = [hint for hint in HINTS if hint.method in self.methods]
        self.guesses = [*map(Candidate.untuned, self.methods), *hints]
        self.start = start
        backend = None
        if storage is not None:
            from optuna.storages import journal

            lock = journal.JournalFileOpenLock(str(storage))  # unlike the other, needs no links
            backend = optuna.storages.JournalStorage(
                journal.JournalFileBackend(str(storage), lock_obj=lock)
            )
        with _quiet():
            self.exploring, self.refining = (
                optuna.create_study(
                    study_name=f"{part} at {budget} multiply-accumulates",
                    storage=backend,
                    load_if_exists=True,
                    pruner=optuna.pruners.WilcoxonPruner(p_threshold=0.05),
                )
                for part in ("methods", "layers")
            )
        self._recognise(storage)

    def _recognise(self, storage: Path | None) -> None:
        """Raise ValueError if the study is of another model, other images or another search."""
        judging = self.judging
        own = {
            "model": type(judging.model).__name__,
            "outputs": hashlib.sha256(judging.unfused.numpy().round(2).tobytes()).hexdigest(),
            "labels": judging.labels is not None,
            "methods": list(self.methods),
            "trials": self.trials,
            "seed": self.seed,
            "start": None if self.start is None else json.loads(json.dumps(asdict(self.start))),
        }
        for name, value in own.items():
            known = self.exploring.user_attrs.get(name, value)
            if known != value:
                raise ValueError(
                    f"the study in {storage} is of another search, whose {name} was {known!r} and "
                    f"not {value!r}: name another file, or remove it"
                )
            self.exploring.set_user_attr(name, value)

    def run(self, progress: Progress = lambda done, best: None) -> None:
        """Start or resume the search, until all candidates are tried.

        Args:
            progress: called after each trial with the number of trials and the least loss so far.
        """
        trials, start = self.trials, self.start
        guesses = len(self.guesses) + (start is not None)
        explored = 0 if start is not None else round(_EXPLORING * trials)
        exploring = min(trials, max(guesses, explored))
        with _quiet():
            for number in self._left(self.exploring, exploring):
                self.exploring.sampler = _estimator(len(self.guesses), self.seed + number)
                if number == 0 and start is not None:
                    self._try(self.exploring, None, lambda trial: start)
                else:
                    guess = self._guess(number - (start is not None))
                    self._try(self.exploring, guess, self._explore)
                progress(number + 1, self._least())
            if exploring == trials or not self._judged():
                return
            for number in self._left(self.refining, trials - exploring):
                best = self._numbers(self._judged()[0])
                guess = {name: value for name, value in best.items() if isinstance(value, float)}
                if number:  # the pruner compares the other trials with the first
                    guess = _moved(guess, random.Random(f"{self.seed} {number}"))
                self._try(self.refining, guess, functools.partial(self._refine, best))
                progress(exploring + number + 1, self._least())

    def _left(self, study: "optuna.Study", trials: int) -> Iterator[int]:
        """Numbers of the trials still to do; an interrupted trial comes first."""
        while True:
            known = study.get_trials(deepcopy=False)
            number = sum(trial.state.is_finished() for trial in known)
            if number >= trials:
                return
            yield number

    def _guess(self, number: int) -> dict[str, Any] | None:
        """Numbers of a guess with which the search of methods begins; ``None`` after the last."""
        if number >= len(self.guesses):
            return None
        method, settings = self.guesses[number].method, self.guesses[number].settings
        guess: dict[str, Any] = {"method": method}
        for dial in METHODS[method].dials:
            guess[f"{method}.{dial.name}"] = dial.turned(settings[dial.name])
        if "r" in self.untuned[method].settings:
            slope = 0.5 if number < len(self.methods) else FALLING
            guess |= {f"{method}.first": METHODS[method].first_layer, f"{method}.slope": slope}
        return guess

    def _explore(self, trial: "optuna.Trial") -> Candidate:
        """Propose any method, with its settings; two numbers describe its layers."""
        method = trial.suggest_categorical("method", self.methods)
        settings = {}
        for dial in METHODS[method].dials:
            name = f"{method}.{dial.name}"
            if dial.choices:
                settings[dial.name] = trial.suggest_categorical(name, dial.choices)
            else:
                settings[dial.name] = dial.value(trial.suggest_float(name, 0, 1))
        untuned = self.untuned[method].settings
        if "keep_rate" in untuned:
            return Candidate(
                method, settings, tuple(float(rate < 1) for rate in untuned["keep_rate"])
            )
        first = trial.suggest_int(f"{method}.first", 0, min(3, self.num_layers - 1))
        slope = 2 * trial.suggest_float(f"{method}.slope", 0, 1) - 1
        middle = max(1.0, (self.num_layers - 1 - first) / 2)
        weights = [
            0.0 if layer < first else 1 + slope * ((layer - first) / middle - 1)
            for layer in range(self.num_layers)
        ]
        return Candidate(method, settings, tuple(weights))

    def _numbers(self, trial: Any) -> dict[str, Any]:
        """A candidate as numbers, which the second part changes, and choices, which it keeps."""
        candidate = self._candidate(trial)
        numbers: dict[str, Any] = {"method": candidate.method}
        for dial in METHODS[candidate.method].dials:
            numbers[dial.name] = dial.turned(candidate.settings[dial.name])
        weights = list(candidate.weights or ())
        if self.judging.described.num_read is not None:
            weights.pop()  # the tokens that the last layer would fuse are not read
        for layer, weight in enumerate(weights):
            numbers[f"{LAYER}{layer}"] = min(1.0, weight / MOST_WEIGHT)
        return numbers

    def _refine(self, best: dict[str, Any], trial: "optuna.Trial") -> Candidate:
        """Propose the best method, with other numbers and another count in each layer."""
        turned: dict[str, Any] = {
            name: trial.suggest_float(name, 0, 1) if isinstance(value, float) else value
            for name, value in best.items()
        }
        method = turned["method"]
        settings = {dial.name: dial.value(turned[dial.name]) for dial in METHODS[method].dials}
        parts = (turned.get(f"{LAYER}{layer}", 0.0) for layer in range(self.num_layers))
        weights = [MOST_WEIGHT * part for part in parts]
        return Candidate(method, settings, tuple(weights))

    def _try(
        self,
        study: "optuna.Study",
        guess: dict[str, Any] | None,
        propose: Callable[["optuna.Trial"], Candidate],
    ) -> None:
        """Judge one candidate: that of an interrupted trial, a guess, or a new one."""
        import optuna

        begun = [one for one in study.get_trials(deepcopy=False) if not one.state.is_finished()]
        if begun and begun[0].state == optuna.trial.TrialState.RUNNING:
            trial = optuna.Trial(study, begun[0]._trial_id)
        else:
            if guess is not None and not begun:
                study.enqueue_trial(guess)
            trial = study.ask()
        candidate = propose(trial)
        trial.set_user_attr("candidate", asdict(candidate))
        try:
            setting = self._meet(candidate)
        except ValueError:  # these layers cannot lose enough tokens
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return
        losses: list[Tensor] = []
        for start in range(0, len(self.judging), CHUNK):
            outputs = self.judging.outputs(setting.settings, start, start + CHUNK)
            losses.append(self.judging.loss(outputs, start))
            for number, group in enumerate(losses[-1].split(GROUP)):
                trial.report(float(group.mean()), start // GROUP + number)
            if trial.should_prune():
                break
        loss = torch.cat(losses)
        trial.set_user_attr("images", len(loss))
        # A pruned candidate reports its loss so far, as the pruner's documentation advises.
        study.tell(trial, float(loss.mean()))

    def _meet(self, candidate: Candidate) -> FittedCandidate:
        return meet(self.judging.model, candidate, self.budget, self.judging.described)

    def _judged(self) -> list[Any]:
        """Trials whose candidates were judged on all images, best first."""
        every = [*self.exploring.get_trials(False), *self.refining.get_trials(False)]
        finished = [one for one in every if one.value is not None]
        whole = [one for one in finished if one.user_attrs["images"] == len(self.judging)]
        return sorted(whole, key=lambda trial: trial.value)

    def _least(self) -> float:
        judged = self._judged()
        return judged[0].value if judged else math.nan

    def _candidate(self, trial: Any) -> Candidate:
        found = trial.user_attrs["candidate"]
        return Candidate(found["method"], found["settings"], tuple(found["weights"]))

    def finalists(self, count: int = FINALISTS) -> list[FittedCandidate]:
        """The best different candidates that were judged on all images, best first."""
        found: dict[str, FittedCandidate] = {}
        for trial in self._judged():
            setting = self._meet(self._candidate(trial))
            found.setdefault(json.dumps(setting.settings, sort_keys=True), setting)
            if len(found) == count:
                break
        return list(found.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Optuna's messages about trials and its warnings about experimental features."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", "The reported value is ignored")  # of resumed trials
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _estimator(startup: int, seed: int) -> "optuna.samplers.BaseSampler":
    """Sampler of methods and settings; with a seed per trial, interruptions change nothing."""
    import optuna

    return optuna.samplers.TPESampler(
        multivariate=True, group=True, n_startup_trials=startup, seed=seed
    )


def _moved(numbers: dict[str, float], draw: random.Random) -> dict[str, float]:
    """A step of the hill climb: move part of a layer's weight to another layer, or turn a dial."""
    moved = dict(numbers)
    layers = [name for name in numbers if name.startswith(LAYER)]
    dials = [name for name in numbers if not name.startswith(LAYER)]
    if dials and (len(layers) < 2 or draw.random() < TURNS):
        dial = draw.choice(dials)
        moved[dial] = min(1.0, max(0.0, moved[dial] + draw.gauss(0, STEP)))
        return moved
    if len(layers) < 2:
        return moved
    giving = draw.choice([name for name in layers if moved[name] > 0])
    taking = draw.choice([name for name in layers if name != giving])
    part = min(moved[giving], 1 - moved[taking], draw.uniform(0.2, 2) * STEP)
    moved[giving] -= part
    moved[taking] += part
    return moved


@dataclass
class Tuned:
    """Result of a search.

    Attributes:
        best: best verdict on images that the search has not seen.
        ranking: verdicts on these images, least loss first, including untuned methods.
        unfused: verdict on the model without fusion.
    """

    best: Verdict
    ranking: list[Verdict]
    unfused: Verdict


def tune(
    searching: Judge,
    ranking: Judge,
    fraction: float,
    methods: Sequence[str],
    *,
    trials: int = 200,
    storage: Path | None = None,
    seed: int = 0,
    start: Candidate | None = None,
    progress: Progress = lambda done, best: None,
) -> Tuned:
    """Find the setting with the least loss within a budget.

    Args:
        searching: judge with the images of the search.
        ranking: judge with other images, on which the best candidates are ranked.
        fraction: budget, as a fraction of the model's cost without fusion.
        methods, storage, seed, start: see :class:`Search`.
        trials: number of candidates to try.
        progress: see :meth:`Search.run`.

    Raises:
        ValueError: see :class:`Search`.
    """
    budget = budget_of(searching.model, fraction, searching.described)
    search = Search(
        searching, methods, budget, trials=trials, storage=storage, seed=seed, start=start
    )
    search.run(progress)
    verdicts = [
        judge(ranking, f"tuned {place + 1}", setting)
        for place, setting in enumerate(search.finalists())
    ]
    verdicts += [judge(ranking, method, setting) for method, setting in search.untuned.items()]
    if start is not None:
        with contextlib.suppress(ValueError):  # it cannot meet the budget
            setting = meet(ranking.model, start, budget, ranking.described)
            verdicts.append(judge(ranking, "start", setting))
    verdicts.sort(key=lambda verdict: float(verdict.loss.double().mean()))
    return Tuned(verdicts[0], verdicts, judge(ranking, "unfused", None))
