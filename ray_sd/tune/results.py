"""What is known of a sweep: its trials, kept in one file that its driver rewrites, and the table that they make in the end."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from statistics import fmean
from typing import Any, Literal, get_args

import pyarrow as pa

from ray_sd.config.metrics import UNTRAINED

Status = Literal["pending", "running", "finished", "stopped", "failed"]
"""`stopped` by the scheduler, because others were better."""
STEP = "step"
"""Key of a report: its finished steps."""
NOTABLE = 0.05
"""Share of a value by which one must be better to be worth a word."""


@dataclass(frozen=True)
class Pictures:
    """What the weights of one report drew."""

    step: int
    sheet: str
    """All of them on one contact sheet."""
    singles: tuple[str, ...] = ()
    """Each by itself, one for each prompt, in the order of prompts; none of clips and enlargements."""


@dataclass
class Trial:
    """One setting of what is swept, and one run of it (with `num_seeds`, one of its runs)."""

    id: str
    """Name of its run below the sweep's `trials/`."""
    settings: dict[str, Any]
    """What it was given of what is swept, by path. Of a conditional path only where it applies."""
    seed: int
    """Seed of its run; trials of the same settings differ in it."""
    is_base: bool = False
    """Whether its settings are those of the experiment without the sweep."""
    status: Status = "pending"
    reason: str = ""
    """Why it was stopped or failed, in one line."""
    reports: list[dict[str, float]] = field(default_factory=list)
    """Metrics in the order of steps, each with `step`."""
    seconds: float = 0.0
    """How long it ran, over all its starts."""
    run: str = ""
    """Folder of its run."""
    pictures: list[Pictures] = field(default_factory=list)
    """Of every report that drew any, in the order of steps."""
    adapter: str | None = None
    """Folder of its adapter, once it is finished."""

    def last(self, metric: str) -> float | None:
        """The newest finite value of a metric; None where there is none."""
        values = (report.get(metric) for report in reversed(self.reports))
        return next((value for value in values if value is not None and isfinite(value)), None)

    @property
    def step(self) -> int:
        """Finished steps at the newest report."""
        return int(self.reports[-1][STEP]) if self.reports else 0


@dataclass(frozen=True)
class Objective:
    """What a sweep looks for."""

    metric: str
    mode: Literal["min", "max"]

    def cost(self, value: float) -> float:
        """A value turned so that less is better."""
        return value if self.mode == "min" else -value


@dataclass
class Sweep:
    """A sweep as it stands."""

    name: str
    objectives: tuple[Objective, ...]
    """One, or two that are traded against each other."""
    paths: tuple[str, ...]
    """What is swept, in the order of the preset."""
    log_paths: tuple[str, ...]
    """Those of them whose distribution is logarithmic."""
    max_steps: int
    """Steps of a trial that is not stopped."""
    prompts: tuple[str, ...]
    """What the trials' pictures show."""
    trials: list[Trial] = field(default_factory=list)
    finished: bool = False
    """Whether no trial is left to run."""
    seconds: float = 0.0
    """How long it ran, over all its starts; 0 where nobody measured it."""

    def front(self) -> list[Trial]:
        """Trials that no other beats in every objective, from the best in the first on. Of one objective just the best.

        Only trials that trained to their end count, where there are any: a stopped one was measured too early to compare.
        One that failed never counts.
        """
        ended = self._comparable()
        costs = {trial.id: self._costs(trial) for trial in ended}
        front = [trial for trial in ended if not any(_dominates(costs[other.id], costs[trial.id]) for other in ended)]
        front.sort(key=lambda trial: costs[trial.id][0])
        return front if len(self.objectives) > 1 else front[:1]

    def counts(self) -> dict[Status, int]:
        """How many trials there are of each status, of those that there are any of."""
        found = [trial.status for trial in self.trials]
        return {status: found.count(status) for status in get_args(Status) if status in found}

    def best(self) -> Trial | None:
        """The trial that wins: first of the front. Where settings ran with several seeds, those with the best mean of the first
        objective win, by their best run."""
        groups: dict[str, list[Trial]] = {}
        for trial in self._comparable():
            groups.setdefault(json.dumps(trial.settings, sort_keys=True, default=str), []).append(trial)
        if all(len(trials) == 1 for trials in groups.values()):
            return next(iter(self.front()), None)
        winners = min(groups.values(), key=lambda trials: fmean(self._costs(trial)[0] for trial in trials))
        return min(winners, key=self._costs)

    def turning_point(self, trial: Trial) -> tuple[int, float] | None:
        """Step and value at which a trial was best in the first objective, where that is notably better than its last."""
        goal = self.objectives[0]
        given = [(report[STEP], report.get(goal.metric)) for report in trial.reports]
        known = [(step, value) for step, value in given if value is not None and isfinite(value)]
        if not known:
            return None
        step, value = min(known, key=lambda report: goal.cost(report[1]))
        last = known[-1][1]
        return (int(step), value) if goal.cost(last) - goal.cost(value) > NOTABLE * abs(last) else None

    def untrained(self, trial: Trial) -> tuple[float, bool] | None:
        """The first objective's value before a trial's first step, and whether the trial is worse in the end; None where it was
        not measured."""
        goal = self.objectives[0]
        before, last = trial.last(f"{UNTRAINED}{goal.metric}"), trial.last(goal.metric)
        return None if before is None or last is None else (before, goal.cost(last) > goal.cost(before))

    def _comparable(self) -> list[Trial]:
        """Those of which every objective is known and that came as far as any did."""
        known = [trial for trial in self.trials if self._costs(trial) and trial.status != "failed"]
        return [trial for trial in known if trial.status == "finished"] or known

    def _costs(self, trial: Trial) -> tuple[float, ...]:
        """Of every objective; none where any has no value."""
        values = [(goal, trial.last(goal.metric)) for goal in self.objectives]
        costs = tuple(goal.cost(value) for goal, value in values if value is not None)
        return costs if len(costs) == len(values) else ()

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, content: bytes) -> "Sweep":
        data = json.loads(content)
        trials = [Trial(**trial | {"pictures": _pictures(trial["pictures"])}) for trial in data.pop("trials")]
        objectives = tuple(Objective(**goal) for goal in data.pop("objectives"))
        tuples: dict[str, Any] = {name: tuple(data.pop(name)) for name in ("paths", "log_paths", "prompts")}
        return cls(trials=trials, objectives=objectives, **tuples, **data)


def trials_table(sweep: Sweep, metrics: Sequence[str] | None = None) -> pa.Table:
    """One row a trial: its settings by path, the last value of every metric, status, reason, steps, seconds and folders."""
    names = metrics or list(
        dict.fromkeys(name for trial in sweep.trials for report in trial.reports for name in report)
    )
    columns: dict[str, list[Any]] = {
        "trial": [trial.id for trial in sweep.trials],
        "status": [trial.status for trial in sweep.trials],
        "reason": [trial.reason for trial in sweep.trials],
        "is_base": [trial.is_base for trial in sweep.trials],
        "seed": [trial.seed for trial in sweep.trials],
        "step": [trial.step for trial in sweep.trials],
        "seconds": [trial.seconds for trial in sweep.trials],
    }
    columns |= {path: _of_one_type([trial.settings.get(path) for trial in sweep.trials]) for path in sweep.paths}
    columns |= {name: [trial.last(name) for trial in sweep.trials] for name in names if name != "step"}
    columns |= {"run": [trial.run for trial in sweep.trials], "adapter": [trial.adapter for trial in sweep.trials]}
    return pa.table(columns)


def _pictures(written: list[dict[str, Any]]) -> list[Pictures]:
    return [Pictures(one["step"], one["sheet"], tuple(one["singles"])) for one in written]


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether the first costs are nowhere more than the others, and somewhere less."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _of_one_type(values: list[Any]) -> list[Any]:
    """As they are where Arrow can hold them in one column, else as text (`null` and `lora`, a list and a number)."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or (len(kinds) == 1 and kinds <= {str, bool}):
        return [float(value) if float in kinds and value is not None else value for value in values]
    return [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
