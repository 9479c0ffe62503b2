"""Going on: what a run writes down of itself, whether it can go on, and from which checkpoint."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import yaml

from ray_sd.config import ExperimentConfig
from ray_sd.config.identity import is_identity
from ray_sd.config.overrides import value_at
from ray_sd.config.paths import absolute_paths
from ray_sd.data import PreparedData
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.train.checkpoint import INDEX, check_optimizer, is_whole, parse_index
from ray_sd.train.optimizers import build_rule
from ray_sd.train.storage import RunFolder

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
DATA = "data.json"
"""Says which rows a run learns from, so that a resumed one tells where they are others."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of checkpoints."""


@dataclass(frozen=True)
class Beginning:
    """Where a run begins, and where it goes on."""

    origin: str | None
    """Checkpoint of another run that this one began with."""
    checkpoint: str | None
    """Checkpoint to start from where Ray Train finds none of this run's by itself."""


def find_beginning(config: ExperimentConfig, run: RunFolder) -> Beginning:
    """Where a run begins as its configuration says, which is told as it was given.

    Raises ConfigError where there is nothing to go on from, where its name is taken, and where it would be another run.
    """
    if config.resume is True:
        stored = stored_config(run)
        if stored is None:
            raise ConfigError(f"resume: there is no run '{config.name}' in {config.storage_path}")
        check_unchanged(config, stored)
        origin = stored["resume"] if isinstance(stored.get("resume"), str) else None
        return Beginning(origin, _mend(run) or origin)
    if run.used():
        raise ConfigError(
            f"name: the run '{config.name}' exists in {run.path}; go on with it by resume=true, or choose another name=…"
        )
    if config.resume is False:
        return Beginning(None, None)
    located = str(absolute_paths(config).resume)
    origin = located if "://" in located else str(Path(located).resolve())
    index = _read_index(origin)
    check_optimizer(index, build_rule(config.trainer.optimizer).kind, origin)
    step = index["step"]
    if step >= config.trainer.max_steps:
        raise ConfigError(f"resume: {config.resume} has finished {step} steps; set trainer.max_steps above that")
    return Beginning(origin, origin)


def stored_config(run: RunFolder) -> dict | None:
    """The configuration of a run that began; None where there is none."""
    content = run.read(CONFIG)
    if content is None:
        return None
    try:
        stored = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ArtifactError(f"resume: {run.path}/{CONFIG} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(stored, dict):
        raise ArtifactError(f"resume: {run.path}/{CONFIG} is damaged: it holds no settings")
    return stored


def check_unchanged(config: ExperimentConfig, stored: dict) -> None:
    """Refuse to go on with a run under settings that would make it another run; tell what else has changed."""
    now = config.model_dump(mode="json")
    changed = [path for path in differences(stored, now) if path != "resume"]
    other_run = [path for path in changed if is_identity(path, ExperimentConfig)]
    if other_run:
        raise ConfigError(
            "\n".join(
                f"resume: {path} was {value_at(stored, path)} and is {value_at(now, path)}; set it back, "
                f"or start another run with name=… resume={config.storage_path}/{config.name}/checkpoint-…"
                for path in other_run
            )
        )
    for path in changed:
        logger.info("resume: %s was %s and is %s", path, value_at(stored, path), value_at(now, path))


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Paths of the values that differ."""
    if not (isinstance(left, dict) and isinstance(right, dict)):
        return [] if left == right else [path]
    keys = dict.fromkeys([*left, *right])
    below = [differences(left.get(key), right.get(key), f"{path}.{key}" if path else key) for key in keys]
    return [difference for differences in below for difference in differences]


def _read_index(checkpoint: str) -> dict:
    """The index of a checkpoint folder, local or behind a URI."""
    folder, _, name = checkpoint.rstrip("/").rpartition("/")
    content = RunFolder(folder, name).read(INDEX)
    if content is None:
        raise ConfigError(f"resume: {checkpoint} is no checkpoint folder; it has no {INDEX}")
    return parse_index(content, checkpoint)


def _mend(run: RunFolder) -> str | None:
    """Make a run resumable whose list of checkpoints is cut off; returns the newest whole checkpoint then.

    Ray Train writes that list in place, so a disk that is full takes it, though the checkpoints are there.
    """
    content = run.read(SNAPSHOT)
    if content is None:
        return None
    try:
        json.loads(content)
    except ValueError:
        run.delete(SNAPSHOT)
        for name in run.checkpoints():
            found = ray.train.Checkpoint(f"{run.path}/{name}")
            with found.as_directory() as folder:
                if is_whole(Path(folder)):
                    logger.warning("%s was cut off; going on from %s", SNAPSHOT, name)
                    return found.path
    return None


def write_config(config: ExperimentConfig, run: RunFolder) -> None:
    """Write down what a run is, for those that go on with it."""
    content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode()
    if run.read(CONFIG) != content:  # a disk that is full again would take what is there
        run.write(CONFIG, content)


def note_data(data: PreparedData, run: RunFolder) -> None:
    """Write down which rows a run learns from, and tell where a resumed one had others."""
    now = {"fingerprint": data.fingerprint, "rows": data.train.num_rows}
    content = run.read(DATA)
    before = json.loads(content) if content is not None else now
    if before == now:
        if content is not None:
            return
    else:
        logger.warning(
            "resume: the data are not what they were (%d rows to train on, now %d); the run goes on with them, in an order "
            "of its own",
            before["rows"],
            now["rows"],
        )
    run.write(DATA, json.dumps(now).encode())
