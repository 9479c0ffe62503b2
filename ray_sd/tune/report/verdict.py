"""What a sweep has shown, in a few sentences."""

from collections.abc import Sequence

from ray_sd.tune.report.grid import ranked
from ray_sd.tune.report.seeds import Interval, seed_intervals
from ray_sd.tune.report.words import count, number
from ray_sd.tune.results import Objective, Sweep, Trial

SAME = 0.0005
"""Relative difference up to which two values count as the same: it would be written as 0.0 %."""


def verdict(sweep: Sweep) -> list[str]:
    """Who wins, by how much against the experiment's own settings, and how sure that is."""
    best = sweep.best()
    if best is None:
        return [_why_none(sweep)]
    values = " and ".join(f"{goal.metric} {_value(best, goal)}" for goal in sweep.objectives)
    verb = "wins" if sweep.finished else "leads so far"
    sentences = [f"Trial {best.id} {verb} with {values} at step {best.step}."]
    front = sweep.front()
    if len(sweep.objectives) > 1 and best is front[0]:  # with several seeds the best mean wins, which need not be there
        others = len(front) - 1
        sentences.append(
            f"It is the best in {sweep.objectives[0].metric} of those that no trial beats in both; {count(others, 'other')} "
            f"{'is' if others == 1 else 'are'} better in {sweep.objectives[1].metric}."
            if others
            else "No trial beats it in either."
        )
    sentences += _against_base(sweep, best)
    sentences += _against_untrained(sweep, best)
    sentences += _earlier(sweep, best)
    for goal in sweep.objectives[:1]:
        sentences += _over_seeds(seed_intervals(sweep, goal), best, goal)
    return sentences


def base_of(sweep: Sweep) -> Trial | None:
    """The trial of the experiment's own settings, of several with different seeds the best."""
    return next((trial for trial in ranked(sweep) if trial.is_base), None)


def _why_none(sweep: Sweep) -> str:
    if not sweep.trials:
        return "No trial has begun." if not sweep.finished else "No trial was run."
    if all(trial.status == "failed" for trial in sweep.trials):
        return "All trials failed; the table says why."
    metrics = " and ".join(goal.metric for goal in sweep.objectives)
    return f"No trial has a value of {metrics}{'' if sweep.finished else ' yet'}."


def _against_base(sweep: Sweep, best: Trial) -> list[str]:
    base = base_of(sweep)
    if best.is_base:
        return ["These are the experiment's own settings: nothing else that was tried is better."]
    if base is None:
        return []
    parts = []
    for goal in sweep.objectives:
        old, new = base.last(goal.metric), best.last(goal.metric)
        if old is not None and new is not None:
            parts.append(f"{goal.metric} {number(old)}{_difference(old, new)}")
    if not parts:
        return [f"The experiment's own settings have no value to compare with: trial {base.id} is {base.status}."]
    early = "" if base.status == "finished" else f" at step {base.step}"
    return [f"The experiment's own settings, trial {base.id}, came to {' and '.join(parts)}{early}."]


def _against_untrained(sweep: Sweep, best: Trial) -> list[str]:
    untrained = sweep.untrained(best)
    if untrained is None:
        return []
    value, is_worse = untrained
    sentence = f"Without training {sweep.objectives[0].metric} is {number(value)}"
    return [f"{sentence}, which is better: this training did harm." if is_worse else f"{sentence}."]


def _earlier(sweep: Sweep, best: Trial) -> list[str]:
    turned = sweep.turning_point(best)
    if turned is None:
        return []
    step, value = turned
    return [
        f"At step {step} its {sweep.objectives[0].metric} was {number(value)}, better than in the end: fewer steps may do "
        f"(trainer.max_steps={step})."
    ]


def _difference(old: float, new: float) -> str:
    if abs(new - old) <= SAME * abs(old):
        return " (the winner's is the same)"
    if old == 0:
        return ""
    return f" (the winner's is {abs(new - old) / abs(old) * 100:.1f} % {'lower' if new < old else 'higher'})"


def _over_seeds(intervals: Sequence[Interval], best: Trial, goal: Objective) -> list[str]:
    several = [one for one in intervals if one.half_width is not None]
    own = next((one for one in several if best in one.trials), None)
    if own is None:
        return []
    sentence = f"Over its {count(len(own.values), 'seed')} {goal.metric} is {_mean(own)}"
    base = next((one for one in several if one.is_base and one is not own), None)
    sentence += f", over those of the experiment's own settings {_mean(base)}" if base else ""
    first = intervals[0]
    if first is not own:
        sentence += f"; the best mean, {_mean(first)}, is that of trial {first.trials[0].id}"
    return [f"{sentence} (mean, with a 95 % interval)."]


def _mean(interval: Interval) -> str:
    return number(interval.mean) + ("" if interval.half_width is None else f" ± {number(interval.half_width, 2)}")


def _value(trial: Trial, goal: Objective) -> str:
    value = trial.last(goal.metric)
    return "unknown" if value is None else number(value)
