"""Recovery: the checkpoint from which a run goes on, whatever has happened to its folder, and what is mended for that."""

import json
import logging

from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState, _TrainingResultState

from ray_sd.errors import ArtifactError
from ray_sd.train.checkpoint import OtherFormatError, check_whole, storage_reason
from ray_sd.train.storage import RunFolder

logger = logging.getLogger(__name__)

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of checkpoints, which it writes in place, so that a full disk takes it."""


def recover(run: RunFolder, origin: str | None) -> str | None:
    """Make a run go on from its newest whole checkpoint, and return that, else the origin.

    What is newer and not whole is moved aside, and Ray Train's list ends with that checkpoint. A warning says what was wrong.
    Raises ArtifactError where nothing but checkpoints of another version is left, and where nothing can be mended.
    """
    try:
        newest, broken = newest_whole(run)
        other_version = next((error for error in broken.values() if isinstance(error, OtherFormatError)), None)
        if newest is None and other_version is not None:
            raise other_version
        wrong = [f"{error}; it is kept as {run.set_aside(name)}" for name, error in broken.items()]
        wrong += _mend_list(run, newest, broken)
    except OSError as error:
        raise ArtifactError(f"resume: {run.path} cannot be read or mended: {storage_reason(error)}") from error
    checkpoint = origin if newest is None else f"{run.path}/{newest}"
    if wrong:
        goes_on = "no whole checkpoint is left, so it begins again at step 0"
        if checkpoint is not None:
            goes_on = f"going on from {checkpoint}"
        logger.warning("resume: %s; %s", "; ".join(wrong), goes_on)
    return checkpoint


def newest_whole(run: RunFolder) -> tuple[str | None, dict[str, ArtifactError]]:
    """Name of the newest checkpoint that has all its parts, and what is wrong with those that are newer."""
    broken: dict[str, ArtifactError] = {}
    for name in run.checkpoints():
        try:
            check_whole(run.location(name))
        except ArtifactError as error:
            broken[name] = error
        else:
            return name, broken
    return None, broken


def _mend_list(run: RunFolder, newest: str | None, broken: dict[str, ArtifactError]) -> list[str]:
    """Have Ray Train's list end with the newest whole checkpoint; returns what was wrong beside those that are `broken`."""
    content, names = run.read(SNAPSHOT), run.checkpoints()[::-1]
    if content is None:
        listed, wrong = None, [] if newest is None else [f"{SNAPSHOT} is gone"]
    else:
        try:
            listed = _read_list(content)
            gone = [result.checkpoint_dir_name for result in listed.checkpoint_results]
            wrong = [f"{run.path}/{name} is gone" for name in gone if name not in names and name not in broken]
        except ValueError as error:
            listed, wrong = None, [f"{SNAPSHOT} {error}"]
    if newest is None:
        if content is not None:
            run.delete(SNAPSHOT)
    elif listed is None or wrong or broken or _last(listed) != newest:
        if not wrong and not broken:
            wrong = [f"{SNAPSHOT} does not end with {newest}"]
        run.write(SNAPSHOT, _list_of(names, listed).model_dump_json().encode())
    return wrong


def _read_list(content: bytes) -> _CheckpointManagerState:
    """Raises ValueError, in words, for what Ray Train would stumble on."""
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError("is cut off or no JSON" if content else "is empty") from error
    try:
        listed = _CheckpointManagerState.model_validate(found)
    except ValueError as error:
        version = found.get("ray_version") if isinstance(found, dict) else None
        raise ValueError(f"is not as this version of Ray has it (it says {version})") from error
    names = {result.checkpoint_dir_name for result in listed.checkpoint_results}
    pending = {result.checkpoint_dir_name for result in listed.pending_training_results}
    counts = len(listed.checkpoint_results), len(listed.pending_training_results)
    is_whole = counts == (len(listed.checkpoint_report_indices), len(listed.pending_validation_specs))
    if not is_whole or not pending <= names or _last(listed) not in {None, *names}:
        raise ValueError("contradicts itself")
    return listed


def _last(listed: _CheckpointManagerState) -> str | None:
    latest = listed.latest_checkpoint_result
    return None if latest is None else latest.checkpoint_dir_name


def _list_of(names: list[str], listed: _CheckpointManagerState | None) -> _CheckpointManagerState:
    """Ray Train's list of these checkpoints, the oldest first, with what was listed of them."""
    before = {} if listed is None else {one.checkpoint_dir_name: one for one in listed.checkpoint_results}
    results = [
        before.get(name)
        or _TrainingResultState(checkpoint_dir_name=name, metrics={"step": int(name.partition("-")[2])})
        for name in names
    ]
    # Pictures of a checkpoint that were not drawn yet.
    pending = (
        []
        if listed is None
        else list(zip(listed.pending_training_results, listed.pending_validation_specs, strict=True))
    )
    pending = [(result, spec) for result, spec in pending if result.checkpoint_dir_name in names]
    return _CheckpointManagerState(
        checkpoint_results=results,
        checkpoint_report_indices=list(range(len(results))),
        latest_checkpoint_result=results[-1],
        pending_training_results=[result for result, _ in pending],
        pending_validation_specs=[spec for _, spec in pending],
        current_report_index=len(results),
        validated_checkpoint_dir_names=[] if listed is None else listed.validated_checkpoint_dir_names,
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
