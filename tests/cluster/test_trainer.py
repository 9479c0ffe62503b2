"""What Ray Train starts for a run."""

import subprocess
import sys

import pytest
from ray.train.torch import TorchConfig, TorchTrainer

from ray_sd.cluster.trainer import TorchInWorkers, Trainer, _TorchBackend


def test_a_run_has_neither_an_actor_that_asks_for_its_controller_nor_one_that_hands_out_data():
    own, usual = (
        [type(callback).__name__ for callback in kind(print)._create_default_callbacks()]
        for kind in (Trainer, TorchTrainer)
    )
    assert set(usual) - set(own) == {"PlacementGroupCleanerCallback", "DatasetsCallback"}


def test_workers_are_set_up_as_for_torch(monkeypatch: pytest.MonkeyPatch):
    done = []
    backend, group = TorchConfig().backend_cls, object()
    for name in ("on_start", "on_training_start", "on_shutdown"):
        monkeypatch.setattr(
            backend, name, lambda self, workers, config, name=name: done.append((name, workers, config))
        )
        getattr(_TorchBackend(), name)(group, TorchInWorkers())
    assert done == [(name, group, TorchConfig()) for name in ("on_start", "on_training_start", "on_shutdown")]
    assert _TorchBackend.share_cuda_visible_devices == backend.share_cuda_visible_devices
    assert TorchInWorkers().train_func_context is TorchConfig().train_func_context


def test_the_controller_unpickles_it_without_torch():
    program = (
        "import pickle, sys; from ray_sd.cluster import trainer; "
        "pickle.loads(pickle.dumps((trainer.TorchInWorkers(), trainer._TorchBackend(), trainer._Start()))); "
        "assert 'torch' not in sys.modules; trainer._Start().after_controller_start(None); import ray.train.torch"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
