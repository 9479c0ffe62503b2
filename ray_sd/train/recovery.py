"""Recovery: the checkpoint from which a run goes on, whatever has happened to its folder, and what is mended for that."""

import logging

from ray_sd.cluster import SNAPSHOT, CheckpointList
from ray_sd.errors import ArtifactError
from ray_sd.train.checkpoint import OtherFormatError, check_whole, storage_reason
from ray_sd.train.storage import PICTURES, RunFolder, pictures_of, step_of
from ray_sd.train.trackers import latest_metrics, read_history

logger = logging.getLogger(__name__)


def recover(run: RunFolder, origin: str | None, *, draws: bool) -> str | None:
    """Make a run go on from its newest whole checkpoint, and return that, else the origin.

    What is newer and not whole is moved aside, and Ray Train's list ends with that checkpoint. A warning says what was wrong.
    draws: whether pictures come with checkpoints; those that Ray Train was not told of are then drawn yet.
    Raises ArtifactError where nothing but checkpoints of another version is left, and where nothing can be mended.
    """
    try:
        newest, broken = newest_whole(run)
        other_version = next((error for error in broken.values() if isinstance(error, OtherFormatError)), None)
        if newest is None and other_version is not None:
            raise other_version
        wrong = [f"{error}; it is kept as {run.set_aside(name)}" for name, error in broken.items()]
        wrong += _mend_list(run, newest, broken, draws=draws)
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


def _mend_list(run: RunFolder, newest: str | None, broken: dict[str, ArtifactError], *, draws: bool) -> list[str]:
    """Have Ray Train's list end with the newest whole checkpoint; returns what was wrong beside those that are `broken`."""
    content, names = run.read(SNAPSHOT), run.checkpoints()[::-1]
    if content is None:
        listed, wrong = None, [] if newest is None else [f"{SNAPSHOT} is gone"]
    else:
        try:
            listed = CheckpointList.parse(content)
            gone = [name for name in listed.names() if name not in names and name not in broken]
            wrong = [f"{run.path}/{name} is gone" for name in gone]
        except ValueError as error:
            listed, wrong = None, [f"{SNAPSHOT} {error}"]
    if newest is None:
        if content is not None:
            run.delete(SNAPSHOT)
    elif listed is None or wrong or broken or listed.last() != newest:
        if not wrong and not broken:
            wrong = [f"{SNAPSHOT} does not end with {newest}"]
        # What Ray Train was not told of each, the history knows: a run that was at its end will not report it again.
        history = read_history(run)
        measured = {name: latest_metrics(history, step_of(name)) for name in names}
        drawn = run.names(PICTURES)
        undrawn = [name for name in names if draws and f"{pictures_of(step_of(name))}.png" not in drawn]
        run.write(SNAPSHOT, CheckpointList.of(measured, listed, undrawn).to_json())
    return wrong
