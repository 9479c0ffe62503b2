"""Going on: what a run writes down of itself, whether it can go on, and from which checkpoint."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_sd.config import ExperimentConfig
from ray_sd.config.dump import dump
from ray_sd.config.identity import is_identity
from ray_sd.config.overrides import value_at
from ray_sd.config.paths import absolute_paths
from ray_sd.data import PreparedData
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.train.checkpoint import INDEX, check_optimizer, check_whole, parse_index, storage_reason
from ray_sd.train.optimizers import build_rule
from ray_sd.train.recovery import newest_whole, recover
from ray_sd.train.storage import RunFolder

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
END = b"\n...\n"
"""How YAML says that a document ends here."""
DATA = "data.json"
"""Says which rows a run learns from, so that a resumed one tells where they are others."""


@dataclass(frozen=True)
class Beginning:
    """Where a run begins, and where it goes on."""

    origin: str | None
    """Checkpoint of another run that this one began with."""
    checkpoint: str | None
    """Checkpoint to start from where Ray Train finds none of this run's by itself."""


def find_beginning(config: ExperimentConfig, run: RunFolder) -> Beginning:
    """Where a run begins as its configuration says, which is told as it was given; a run that goes on is mended for that.

    Raises ConfigError where there is nothing to go on from, where its name is taken, and where it would be another run, and
    ArtifactError where a checkpoint of another run is damaged.
    """
    if config.resume is True:
        with _in_words(run):
            stored = stored_config(run)
        if stored is None:
            reason = f"; {run.path} has no {CONFIG} and no checkpoint that is whole" if run.used() else ""
            raise ConfigError(f"resume: there is no run '{config.name}' in {config.storage_path}{reason}")
        check_unchanged(config, stored)
        origin = stored["resume"] if isinstance(stored.get("resume"), str) else None
        checkpoint = recover(run, origin, draws=config.trainer.validation.draws)
        if checkpoint == origin is not None:
            _whole_index(origin)
        return Beginning(origin, checkpoint)
    if run.used():
        raise ConfigError(
            f"name: the run '{config.name}' exists in {run.path}; go on with it by resume=true, or choose another name=…"
        )
    if config.resume is False:
        return Beginning(None, None)
    located = str(absolute_paths(config).resume)
    origin = located if "://" in located else str(Path(located).resolve())
    index = _whole_index(origin)
    check_optimizer(index, build_rule(config.trainer.optimizer).kind, origin)
    step = index["step"]
    if step >= config.trainer.max_steps:
        raise ConfigError(f"resume: {config.resume} has finished {step} steps; set trainer.max_steps above that")
    return Beginning(origin, origin)


def stored_config(run: RunFolder) -> dict | None:
    """The configuration of a run that began, from its newest checkpoint where its own file is damaged or gone.

    None where there is none. Raises ArtifactError where it is damaged and no checkpoint has it.
    """
    content = run.read(CONFIG)
    stored, reason = (None, "is gone") if content is None else _parse_config(content)
    if reason is None:
        return stored
    for name in run.checkpoints():
        try:
            found = parse_index(run.read(f"{name}/{INDEX}") or b"", name)["config"]
        except ArtifactError:
            continue
        logger.warning("resume: %s/%s %s; taking the settings that %s was stored with", run.path, CONFIG, reason, name)
        return found
    if content is not None and stored is None:
        raise ArtifactError(f"resume: {run.path}/{CONFIG} {reason}")
    return stored


def _parse_config(content: bytes) -> tuple[dict | None, str | None]:
    """The settings, as far as they can be read, and what is wrong with them."""
    try:
        stored = yaml.safe_load(content)
    except yaml.YAMLError as error:
        return None, f"is damaged: {' '.join(str(error).split())}"
    if not isinstance(stored, dict):
        return None, "is damaged: it holds no settings"
    if content.endswith(END):
        return stored, None  # what it lacks, the version that wrote it did not know
    missing = [name for name in ExperimentConfig.model_fields if name not in stored]
    if missing:
        return stored, f"is cut off: it has no {missing[0]}"
    return stored, None if content.endswith(b"\n") else "is cut off in its last line"


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


def _whole_index(checkpoint: str) -> dict:
    """The index of another run's checkpoint, local or behind a URI.

    Raises ConfigError for what is none, and ArtifactError for one that is not whole; both name the newest there that is.
    """
    folder, _, name = checkpoint.rstrip("/").rpartition("/")
    other = RunFolder(folder or "/", name)
    try:
        return check_whole(other.location())
    except OSError as error:
        raise ArtifactError(f"resume: {checkpoint} cannot be read: {storage_reason(error)}") from error
    except ArtifactError as error:
        # A run's folder may have been given in place of a checkpoint's.
        beside = RunFolder(*folder.rpartition("/")[::2])
        hints = [f"; take {run.path}/{whole}" for run in (other, beside) if (whole := newest_whole(run)[0]) is not None]
        kind = ConfigError if other.read(INDEX) is None else ArtifactError
        raise kind(f"resume: {error}{hints[0] if hints else ''}") from error


@contextmanager
def _in_words(run: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"resume: {run.path} cannot be read or written: {storage_reason(error)}") from error


def write_config(config: ExperimentConfig, run: RunFolder) -> None:
    """Write down what a run is, for those that go on with it."""
    content = (dump(config.model_dump(mode="json")) + "...\n").encode()
    if run.read(CONFIG) != content:  # a disk that is full again would take what is there
        run.write(CONFIG, content)


def note_data(data: PreparedData, run: RunFolder) -> None:
    """Write down which rows a run learns from, and tell where a resumed one had others, or where that is not known."""
    with _in_words(run):
        _note_data(data, run)


def _note_data(data: PreparedData, run: RunFolder) -> None:
    now = {"fingerprint": data.fingerprint, "rows": data.train.num_rows}
    content = run.read(DATA)
    before = None if content is None else _parse_data(content)
    if before == now:
        return
    if before is not None:
        logger.warning(
            "resume: the data are not what they were (%d rows to train on, now %d); the run goes on with them, in an order "
            "of its own",
            before["rows"],
            now["rows"],
        )
    elif content is not None or run.checkpoints():
        reason = "gone" if content is None else "damaged"
        logger.warning(
            "resume: %s/%s is %s, so whether the data are what they were is not known", run.path, DATA, reason
        )
    run.write(DATA, json.dumps(now).encode())


def _parse_data(content: bytes) -> dict | None:
    """What `note_data` wrote; None where it is damaged."""
    try:
        found = json.loads(content)
    except ValueError:
        return None
    is_whole = (
        isinstance(found, dict) and isinstance(found.get("fingerprint"), str) and isinstance(found.get("rows"), int)
    )
    return found if is_whole else None
