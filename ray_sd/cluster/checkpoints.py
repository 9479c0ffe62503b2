"""The list of a run's checkpoints that Ray Train keeps."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Where Ray Train lists a run's checkpoints. It writes in place, so that a full disk takes it."""


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
    def of(
        cls,
        measured: Mapping[str, dict[str, Any]],
        before: Optional["CheckpointList"],
        undrawn: Collection[str] = (),
    ) -> "CheckpointList":
        """Of these checkpoints, with what was known of each, else with what was measured.

        measured: by their names, `checkpoint-00000004` and the like, the oldest first. undrawn: names of those that have no
        pictures, which Ray Train has drawn of what was not known before.
        """
        from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
            _CheckpointManagerState,
            _TrainingResultState,
        )

        known = {} if before is None else {one.checkpoint_dir_name: one for one in before.state.checkpoint_results}
        results = [
            known.get(name) or _TrainingResultState(checkpoint_dir_name=name, metrics=metrics)
            for name, metrics in measured.items()
        ]
        # Pictures of a checkpoint that were not drawn yet.
        pending = [(one, True) for one in results if one.checkpoint_dir_name in {*undrawn} - known.keys()]
        if before is not None:
            pairs = zip(before.state.pending_training_results, before.state.pending_validation_specs, strict=True)
            pending += [(result, spec) for result, spec in pairs if result.checkpoint_dir_name in measured]
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
