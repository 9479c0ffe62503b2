"""Joining or starting Ray, what it has, what it must be told, and whatever else is used of its own parts."""

import json
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from threading import Lock
from typing import TYPE_CHECKING, Optional

import ray
import ray._private.state
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.annotations import RayDeprecationWarning
from ray.util.placement_group import PlacementGroup, remove_placement_group

from ray_sd.config.logs import LOG, tells_all
from ray_sd.errors import RaySdError, first_line

if TYPE_CHECKING:
    from ray.data import DataContext
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState
    from ray.train.v2.api.callback import RayTrainCallback

CHDIR, PRINT_PATCH, ADDRESS = "RAY_CHDIR_TO_TRIAL_DIR", "RAY_TRAIN_ENABLE_PRINT_PATCH", "RAY_ADDRESS"
UV_RUN, HIDES_GPUS = "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
STARTS, FEW_STARTS = "RAY_worker_maximum_startup_concurrency", 4
LOOKS, WATCHER = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
WAITS = "RAY_TRAIN_COLLECTIVE_WARN_INTERVAL_S"
TUNE_WRITES = "TUNE_GLOBAL_CHECKPOINT_S"
"""Seconds between what Ray Tune writes down of a sweep."""
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
CLEANER = "PlacementGroupCleaner"
CONTROLLER_LOGGERS = (
    "ray.train.v2._internal.callbacks.placement_group_callback",
    "ray.train.v2._internal.callbacks.backend_setup",
)
"""They print tracebacks where that actor is slow to end, and where a worker is gone, which is told in words."""
DRIVER_IS_GONE, OWNER_IS_GONE = "Failed to push error to driver", "its owner has died"
"""What processes print, and what actors are said to have died of, whose trial was stopped."""
PRINTS = "ray_print_logs"
"""What prints here the lines of other processes."""
SERVE_LOGGER, SERVE_SAYS = "ray.serve", "RAY_SERVE_LOG_TO_STDERR"
TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Where Ray Train lists a run's checkpoints. It writes in place, so that a full disk takes it."""
STARTS_SLOWLY = "timed out during startup"
"""Words of the plain exception in which Ray says that it did not start in time."""
STEP_SECONDS = 0.05
"""How long Ray Data's scheduling loop rests."""

logger = logging.getLogger(__name__)
_lock = Lock()
_users: Counter[str] = Counter()
"""How many runs and sweeps of this process need each variable."""
_before: dict[str, str | None] = {}
"""Values of these that the caller had."""


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS` or of a running `ray start`; without one, start Ray on this machine.

    Raises RaySdError where that cluster does not answer, or Ray does not start.
    """
    if ray.is_initialized():
        return
    # Ray would otherwise re-create the driver's environment for every worker when the driver runs under `uv run`.
    os.environ.setdefault(UV_RUN, "0")
    # Ray would otherwise leave every GPU visible to processes that asked for none.
    os.environ.setdefault(HIDES_GPUS, "1")
    # Ray would otherwise warn of four processes for each that it starts at once, which is as many as there are cores.
    if (os.cpu_count() or 1) < FEW_STARTS and not tells_all():
        os.environ.setdefault(STARTS, str(FEW_STARTS))
    quiet_tokens()
    _start()
    quiet_others()
    resources = ray.cluster_resources()
    logger.info("Ray: %g CPUs, %g GPUs", resources.get("CPU", 0), resources.get("GPU", 0))


def connect_while_importing(module: str) -> None:
    """`connect`, and import a module that takes seconds, too, and imports nothing of Ray: two threads must not import the same.

    What is raised is told by `connect` first.
    """
    with ThreadPoolExecutor(1) as beside:
        imported = beside.submit(import_module, module)
        connect()
        imported.result()


def _start() -> None:
    try:
        ray.init(logging_level=logging.INFO if tells_all() else logging.WARNING)
    except ConnectionError as error:
        raise RaySdError(
            f"no Ray cluster answers at {os.environ.get(ADDRESS, 'the address of the last `ray start` here')}; set {ADDRESS} to "
            f"one that does, or to 'local' for Ray on this machine ({first_line(error)})"
        ) from error
    except Exception as error:
        if STARTS_SLOWLY not in str(error):
            raise
        raise RaySdError(
            "Ray did not start within half a minute, which is what it gives itself; is this machine very busy?"
        ) from error


def quiet_tokens() -> None:
    """Keep Ray from warning that it is secured, which it is by itself; that it is not is told as before."""
    if not tells_all():
        logging.getLogger(TOKEN_LOGGER).addFilter(_is_no_reassurance)


def _is_no_reassurance(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Token authentication is enabled")


def names_cluster() -> bool:
    """Whether the caller's `RAY_ADDRESS` names a cluster, whatever runs under way have set."""
    with _lock:
        return (_before if _users[ADDRESS] else os.environ).get(ADDRESS) is not None


@contextmanager
def training_environment() -> Iterator[None]:
    """While it lasts, Ray Train starts processes with the environment that its runs need; the caller's is then as it was."""
    # Here, since this takes seconds to import, and processes that only read have no use for it.
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    needed = {
        # Workers would be moved into a folder of their own, where relative paths of the configuration lead nowhere.
        CHDIR: "0",
        # What workers print would be logged, and so tear progress bars, which travel as printed lines.
        PRINT_PATCH: os.environ.get(PRINT_PATCH, "0"),
        # An actor gives the workers' share of the cluster back when all else of a run was killed. It looks for Ray on its
        # machine, and where there is another one, too, finds none or the wrong one: then the share is lost.
        ADDRESS: ray.get_runtime_context().gcs_address,
        # How often the controller looks at workers: one that reports waits until it has looked, and so does the end of a run.
        LOOKS: os.environ.get(LOOKS, "0.25"),
        # After a minute it warns that a run waits for the pictures of its last checkpoints, which may take longer on CPUs.
        WAITS: os.environ.get(WAITS, "600"),
    }
    if tells_all():
        needed[LOG] = os.environ[LOG]
    if is_one_machine():
        # A process more at each start, which waits for the loss of a node: here the run is lost with it.
        needed[WATCHER] = os.environ.get(WATCHER, "0")
    ENV_VARS_TO_PROPAGATE.update(needed)
    with _environment(needed):
        yield


@contextmanager
def tuning_environment() -> Iterator[None]:
    """While it lasts, Ray Tune starts trials as sweeps need them, and shows nothing itself; the caller's is then as it was."""
    needed = {
        # Trials would be moved into folders of their own, where relative paths of the configuration lead nowhere.
        CHDIR: "0",
        # Tables and event files of its own: ours are the record and each run's trackers.
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        # Its newer output draws a box and names its folder however little it is asked to say.
        "RAY_AIR_NEW_OUTPUT": "0",
        TUNE_WRITES: os.environ.get(TUNE_WRITES, "5"),
    }
    if tells_all():
        from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

        needed[LOG] = os.environ[LOG]
        ENV_VARS_TO_PROPAGATE.add(LOG)
    with _environment(needed):
        yield


@contextmanager
def _environment(needed: dict[str, str]) -> Iterator[None]:
    """Variables of this process while anyone needs them; what the caller had comes back when the last has left.

    Each would otherwise take for the caller's what another, in another thread, has set.
    """
    with _lock:
        for name, value in needed.items():
            if not _users[name]:
                _before[name] = os.environ.get(name)
            _users[name] += 1
            os.environ[name] = value
    try:
        yield
    finally:
        with _lock:
            for name in needed:
                _users[name] -= 1
                if not _users[name]:
                    before = _before.pop(name)
                    if before is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = before


def possible_resources() -> dict[str, float]:
    """CPUs, GPUs and so on that the cluster has, or can have once its autoscaler has started every node it may."""
    possible = _autoscaled_resources() or {}
    now = ray.cluster_resources()
    return {name: max(possible.get(name, 0), now.get(name, 0)) for name in {*possible, *now}}


def has_gpus() -> bool:
    """Whether the cluster has a GPU, or its autoscaler can start a node that has."""
    return possible_resources().get("GPU", 0) > 0


def is_one_machine() -> bool:
    """Whether the cluster is one node and stays it, so that this process shares its cores with all others."""
    return sum(node["Alive"] for node in ray.nodes()) == 1 and _autoscaled_resources() is None


def give_back_of_dead() -> int:
    """Give back what actors of this driver hold that are dead. Returns how many placement groups are still held by living ones.

    Ray gives back what an actor reserved when the whole job ends. Ray Train does so earlier, but not where its controller
    dies while workers start.
    """
    job, held = ray.get_runtime_context().get_job_id(), 0
    for written in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(written)
        by_actor = group.creator_actor_id != ray.ActorID.nil().binary()
        if group.creator_job_id.hex() != job or not by_actor or group.state == PlacementGroupTableData.REMOVED:
            continue
        if group.creator_actor_dead:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
        else:
            held += 1
    return held


def _autoscaled_resources() -> dict[str, float] | None:
    """What the cluster has with every node that its autoscaler may start; None where there is no autoscaler."""
    return ray._private.state.state.get_max_resources_from_cluster_config()


@dataclass(frozen=True)
class CheckpointList:
    """What Ray Train knows of a run's checkpoints, the oldest first, and goes on from when it starts again."""

    state: "_CheckpointManagerState"

    @classmethod
    def parse(cls, content: bytes) -> "CheckpointList":
        """Raises ValueError, in words, for what Ray Train would stumble on."""
        from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

        try:
            found = json.loads(content)
        except ValueError as error:
            raise ValueError("is cut off or no JSON" if content else "is empty") from error
        try:
            state = _CheckpointManagerState.model_validate(found)
        except ValueError as error:
            version = found.get("ray_version") if isinstance(found, dict) else None
            raise ValueError(f"is not as this version of Ray has it (it says {version})") from error
        listed = cls(state)
        pending = {result.checkpoint_dir_name for result in state.pending_training_results}
        counts = len(state.checkpoint_results), len(state.pending_training_results)
        is_whole = counts == (len(state.checkpoint_report_indices), len(state.pending_validation_specs))
        if not is_whole or not pending <= {*listed.names()} or listed.last() not in {None, *listed.names()}:
            raise ValueError("contradicts itself")
        return listed

    @classmethod
    def of(cls, names: list[str], before: Optional["CheckpointList"]) -> "CheckpointList":
        """Of these checkpoints, `checkpoint-00000004` and the like, with what was known of them."""
        from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
            _CheckpointManagerState,
            _TrainingResultState,
        )

        known = {} if before is None else {one.checkpoint_dir_name: one for one in before.state.checkpoint_results}
        results = [
            known.get(name)
            or _TrainingResultState(checkpoint_dir_name=name, metrics={"step": int(name.partition("-")[2])})
            for name in names
        ]
        # Pictures of a checkpoint that were not drawn yet.
        pending = (
            []
            if before is None
            else [
                (result, spec)
                for result, spec in zip(
                    before.state.pending_training_results, before.state.pending_validation_specs, strict=True
                )
                if result.checkpoint_dir_name in names
            ]
        )
        return cls(
            _CheckpointManagerState(
                checkpoint_results=results,
                checkpoint_report_indices=list(range(len(results))),
                latest_checkpoint_result=results[-1],
                pending_training_results=[result for result, _ in pending],
                pending_validation_specs=[spec for _, spec in pending],
                current_report_index=len(results),
                validated_checkpoint_dir_names=[] if before is None else before.state.validated_checkpoint_dir_names,
                timed_out_validation_checkpoint_dir_names=[],
                failed_validation_checkpoint_dir_names=[],
            )
        )

    def names(self) -> list[str]:
        return [result.checkpoint_dir_name for result in self.state.checkpoint_results]

    def last(self) -> str | None:
        """The one to go on from."""
        latest = self.state.latest_checkpoint_result
        return None if latest is None else latest.checkpoint_dir_name

    def to_json(self) -> bytes:
        return self.state.model_dump_json().encode()


def rest_between_steps(context: "DataContext") -> None:
    """Let Ray Data's scheduling loop rest between its steps. context: a data set's.

    The loop waits for blocks, but not while it holds blocks back: then it takes a whole core, and the interpreter lock of
    the process that it runs in.
    """
    # Here, since this takes a second to import, and most that need a cluster have no use for it.
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pace(ExecutionCallback):
        def on_execution_step(self, executor: object) -> None:
            time.sleep(STEP_SECONDS)

    context.custom_execution_callback_classes.append(Pace)


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

    The actor that gives a run's share of the cluster back warns wherever Ray is slow to tell whether the run's controller
    lives, and has no logger that is configured; what a stopped trial's processes cannot tell it is printed by Ray's core.
    """
    if tells_all():
        return
    for name, tell in list(global_worker_stdstream_dispatcher.handlers):
        if name == PRINTS:
            global_worker_stdstream_dispatcher.remove_handler(PRINTS)
            global_worker_stdstream_dispatcher.add_handler(PRINTS, partial(_tell_of_others, tell))


def _tell_of_others(tell: Callable[[dict], None], lines: dict) -> None:
    if lines.get("actor_name") == CLEANER:
        return
    told = [line for line in lines["lines"] if DRIVER_IS_GONE not in line]
    if told:
        tell(lines | {"lines": told})


def quiet_controller() -> "RayTrainCallback":
    """A callback of Ray Train that keeps its controller from tracebacks that nobody can do anything about."""
    # Here, since this takes seconds to import.
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class Quiet(ControllerCallback):
        def after_controller_start(self, train_run_context: object) -> None:
            for name in CONTROLLER_LOGGERS:
                _quiet(name, logging.CRITICAL)

    return Quiet()


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
