"""Ray Train's trainer, as runs here start it: sooner, and with fewer processes.

Imports no torch, as neither does Ray Train's controller, which unpickles this, before its workers are on their way.
"""

from contextlib import suppress
from importlib import import_module
from threading import Thread
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from ray_sd.cluster.quiet import quiet_controller

TORCH = "ray.train.torch.config"
NOT_STARTED = (PlacementGroupCleanerCallback, DatasetsCallback)
"""Each starts an actor, for as long as a run takes.

The one gives back what a killed controller holds, and asks every second whether it lives. Ray does so when the driver ends;
before, it is done by `give_back_of_dead`. The other hands out data sets of the driver's, where workers here make their own.
"""


class Trainer(DataParallelTrainer):
    """What `ray.train.torch.TorchTrainer` is. Takes no data sets."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings, backend_config=TorchInWorkers())
        self._controller: Any = None

    def abort(self) -> None:
        """End the run and its workers. After an interruption, from which `fit` returns without having done so."""
        if self._controller is not None:
            with suppress(RayActorError):  # of a controller that has ended itself
                ray.get(self._controller.abort.remote())

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray Train's would end the process, without a word."""
        self._controller = controller

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        return [_Start(), *(callback for callback in callbacks if not isinstance(callback, NOT_STARTED))]


class TorchInWorkers(BackendConfig):
    """`ray.train.torch.TorchConfig`, which is imported when workers have started."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _TorchBackend

    @property
    def train_func_context(self) -> Any:
        return _torch_config().train_func_context


class _TorchBackend(Backend):
    """Has Ray Train's own do all of it."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        config = _torch_config()
        config.backend_cls().on_start(worker_group, config)

    def on_training_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        config = _torch_config()
        config.backend_cls().on_training_start(worker_group, config)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        config = _torch_config()
        config.backend_cls().on_shutdown(worker_group, config)


class _Start(ControllerCallback):
    """In the controller, before it starts workers, which takes seconds in which it has nothing to do."""

    def after_controller_start(self, train_run_context: Any) -> None:
        quiet_controller()
        Thread(target=import_module, args=(TORCH,), daemon=True).start()


def _torch_config() -> Any:
    return import_module(TORCH).TorchConfig()
