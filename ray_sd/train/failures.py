"""Failures of a run, in words."""

import torch
import torch.distributed
from ray.train import TrainingFailedError

from ray_sd.errors import ArtifactError, RaySdError, first_line
from ray_sd.train.checkpoint import storage_reason
from ray_sd.train.storage import RunFolder


def in_words(error: TrainingFailedError, run: RunFolder) -> RaySdError:
    """The failure that was meant for a person, else what failed in one line: not that others lost their connection to it."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]
    for cause in causes:
        if isinstance(cause, RaySdError):
            return cause
    goes_on = f"checkpoints are in {run.path}, and resume=true goes on from the last"
    cause = min(causes, key=lambda cause: (not isinstance(cause, torch.OutOfMemoryError), _is_of_connection(cause)))
    if isinstance(cause, torch.OutOfMemoryError):
        return RaySdError(
            f"a GPU's memory was not enough: {first_line(cause)}; {goes_on}, with trainer.gradient_checkpointing=true, "
            "a smaller trainer.micro_batch_size or a higher trainer.zero.stage"
        )
    if isinstance(cause, OSError):
        return ArtifactError(f"{run.path} cannot be written: {storage_reason(cause)}; {goes_on}")
    reason = str(cause).strip().splitlines()
    return RaySdError(f"training stopped: {reason[-1] if reason else type(cause).__name__}; {goes_on}")


def _is_of_connection(cause: BaseException) -> bool:
    """Whether a worker failed because another had."""
    return isinstance(cause, torch.distributed.DistError) or any(
        word in str(cause) for word in ("Connection closed", "Connection reset", "gloo", "NCCL")
    )
