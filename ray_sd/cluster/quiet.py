"""What Ray prints and logs that nobody can do anything about, each kept quiet at its source."""

import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray.util.annotations import RayDeprecationWarning

from ray_sd.config.logs import tells_all

if TYPE_CHECKING:
    from ray.data import DataContext

DATA_LOGGERS = {
    "ray.data": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
    "ray.data.exceptions": logging.CRITICAL,
}
"""They say at INFO that an execution starts, at WARNING that there is no progress bar, and at ERROR what is raised anyway."""
TRIAL_LOGGER = "ray.train._internal.storage"
"""It says of each checkpoint of a trial at INFO that it was created, and they hold no more than where the run's own are."""
TUNE_LOGGERS = ("ray.tune.analysis.experiment_analysis", "ray.tune.utils.util")
"""In the end the one looks for files that sweeps do not write, and warns of each trial; the other warns where a step of Tune's
loop takes half a second, as one does that starts or ends a trial on a machine that is at work."""
CONTROLLER_LOGGER = "ray.train.v2._internal.callbacks.backend_setup"
"""It prints a traceback where a worker is gone, which is told in words."""
DRIVER_IS_GONE, OWNER_IS_GONE = "Failed to push error to driver", "its owner has died"
"""What processes print, and what actors are said to have died of, whose trial was stopped."""
PRINTS = "ray_print_logs"
"""What prints here the lines of other processes."""
SERVE_LOGGER, SERVE_SAYS = "ray.serve", "RAY_SERVE_LOG_TO_STDERR"
TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"


def quiet_tokens() -> None:
    """Keep Ray from warning that it is secured, which it is by itself; that it is not is told as before."""
    if not tells_all():
        logging.getLogger(TOKEN_LOGGER).addFilter(_is_no_reassurance)


def _is_no_reassurance(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Token authentication is enabled")


def quiet_data(context: "DataContext") -> None:
    """Keep Ray Data from progress bars, and from telling what nobody can do anything about. context: of a data set."""
    for name, level in DATA_LOGGERS.items():
        _quiet(name, level)
    context.enable_progress_bars = False
    # It has no other name yet for how often an actor is started again.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
    # It asks twice a minute for a setting that says how much memory an encoder takes.
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1


def training_log_level() -> str:
    """From which level Ray Train's controller and workers are heard.

    At INFO they tell of each checkpoint four times, and of each state that a run passes.
    """
    return "DEBUG" if tells_all() else "WARNING"


def quiet_others() -> None:
    """Keep lines of other processes that nobody can do anything about from this terminal. To be called once Ray is joined.

    What a stopped trial's processes cannot tell it is printed by Ray's core.
    """
    if tells_all():
        return
    for name, tell in list(global_worker_stdstream_dispatcher.handlers):
        if name == PRINTS:
            global_worker_stdstream_dispatcher.remove_handler(PRINTS)
            global_worker_stdstream_dispatcher.add_handler(PRINTS, partial(_tell_of_others, tell))


def _tell_of_others(tell: Callable[[dict], None], lines: dict) -> None:
    told = [line for line in lines["lines"] if DRIVER_IS_GONE not in line]
    if told:
        tell(lines | {"lines": told})


def quiet_controller() -> None:
    """Keep Ray Train's controller from tracebacks that nobody can do anything about, in its process."""
    _quiet(CONTROLLER_LOGGER, logging.CRITICAL)


def quiet_worker() -> None:
    """Keep Ray Train from telling of each report, in a training worker."""
    # Here, since this takes seconds to import. Its logger is named by its file, so that the level of the others is not its own.
    from ray.train.v2._internal.execution import context

    _quiet(context.logger.name, logging.WARNING)


def quiet_trial() -> None:
    """Keep Ray Tune from telling of each checkpoint, in a trial's process."""
    _quiet(TRIAL_LOGGER, logging.WARNING)


def quiet_serve() -> None:
    """Keep Ray Serve from telling of every deployment and request; its files hold it. To be called before Ray is joined."""
    if tells_all():
        return
    os.environ.setdefault(SERVE_SAYS, "0")  # which processes read that Ray starts on this machine
    _quiet(SERVE_LOGGER, logging.WARNING)


def quiet_tune() -> None:
    """Keep Ray Tune from warnings that nobody can do anything about."""
    if tells_all():
        return
    for name in TUNE_LOGGERS:
        _quiet(name, logging.ERROR)
    # A trial is a run with workers and data of its own, which cannot take over another's.
    warnings.filterwarnings("ignore", "Consider boosting PBT performance by enabling `reuse_actors`", UserWarning)


def _quiet(name: str, level: int) -> None:
    """Hear a logger of Ray's from this level on, unless everything is to be heard."""
    if not tells_all():
        logging.getLogger(name).setLevel(level)
