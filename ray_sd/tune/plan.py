"""A sweep before it begins: what is checked of it, and what its first trials will be."""

from ray_sd.config import SweepConfig
from ray_sd.config.words import no_such
from ray_sd.errors import ConfigError
from ray_sd.train.monitor import metric_names
from ray_sd.tune.search import SETTINGS, STARTUP_TRIALS, SettingsSearch
from ray_sd.tune.space import Space, shown


def check_plan(config: SweepConfig) -> Space:
    """What a sweep tries. Raises ConfigError for a space or metrics that cannot be."""
    space = Space(config)
    space.check()
    known = metric_names(config.experiment)
    for metric in config.metrics:
        if metric not in known:
            raise ConfigError(f"sweep.metric: {no_such('metric', metric, known)}")
    return space


def plan(config: SweepConfig) -> str:
    """The ranges, and the first trials as the search will draw them, in lines. Raises ConfigError as `check_plan` does."""
    space = check_plan(config)
    lines = ["what is tried:"]
    for path, one in space.distributions.items():
        conditions = "".join(f", when {other} is {shown(value)}" for other, value in (one.when or {}).items())
        lines.append(f"  {path}: {one.kind} {', '.join(map(shown, one.values))}{conditions}")
    lines.append(f"the first of {config.sweep.num_trials} trials:")
    search = SettingsSearch(
        space, config.model_copy(update={"sweep": config.sweep.model_copy(update={"num_seeds": 1})}), None
    )
    for number in range(STARTUP_TRIALS):
        drawn = search.suggest(str(number))
        if isinstance(drawn, dict):
            settings = " ".join(f"{path}={shown(value)}" for path, value in drawn[SETTINGS].items())
            lines.append(f"  {number + 1}: {settings}{' (the experiment)' if drawn[SETTINGS] == space.base() else ''}")
    return "\n".join(lines)
