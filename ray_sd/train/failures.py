"""Failures of a run, in words."""

import torch
import torch.distributed
from ray.train import TrainingFailedError

from ray_sd.errors import ArtifactError, RaySdError, first_line
from ray_sd.train.checkpoint import storage_reason
from ray_sd.train.storage import RunFolder


def in_words(error: TrainingFailedError, run: RunFolder) -> RaySdError:
    """The failure that was meant for a person, else what failed in one line."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    cause = cause_of(failures)
    if isinstance(cause, RaySdError):
        return cause
    goes_on = going_on(run)
    if isinstance(cause, torch.OutOfMemoryError):
        return RaySdError(
            f"a GPU's memory was not enough: {first_line(cause)}; {goes_on}, with trainer.gradient_checkpointing=true, "
            "a smaller trainer.micro_batch_size or a higher trainer.zero.stage"
        )
    if isinstance(cause, OSError):
        return ArtifactError(f"{run.path} cannot be written: {storage_reason(cause)}; {goes_on}")
    return RaySdError(f"training stopped: {reason_of(cause)}; {goes_on}")


def going_on(run: RunFolder) -> str:
    """How a run that stopped goes on, in words."""
    try:
        begins_again = not run.checkpoints()
    except OSError:  # what its storage holds is not known
        begins_again = False
    if begins_again:
        return f"no checkpoint was stored in {run.path} yet, so resume=true begins it again"
    return f"checkpoints are in {run.path}, and resume=true goes on from the last"


def cause_of(failures: list[Exception]) -> BaseException:
    """Of workers' failures the one that was meant for a person, else what failed: not that others lost their connection to it."""
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]
    kinds = (RaySdError, torch.OutOfMemoryError)
    return min(causes, key=lambda cause: (*(not isinstance(cause, kind) for kind in kinds), _is_of_connection(cause)))


def reason_of(cause: BaseException) -> str:
    """The last line of what it says."""
    lines = str(cause).strip().splitlines()
    return lines[-1] if lines else type(cause).__name__


def _is_of_connection(cause: BaseException) -> bool:
    """Whether a worker failed because another had."""
    return isinstance(cause, torch.distributed.DistError) or any(
        word in str(cause) for word in ("Connection closed", "Connection reset", "gloo", "NCCL")
    )
