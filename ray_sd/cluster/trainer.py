"""Ray Train's trainer, as runs here start it."""

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback


class Trainer(TorchTrainer):
    """Starts no actor that gives back what a killed controller holds: a process more, which asks Ray every second.

    Ray does so when the driver ends; before, it is done by `give_back_of_dead`.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]
