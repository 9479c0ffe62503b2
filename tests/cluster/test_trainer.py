"""What Ray Train starts beside a run's workers."""

from ray.train.torch import TorchTrainer

from ray_sd.cluster.trainer import Trainer


def test_no_actor_asks_all_the_time_whether_the_controller_lives():
    own, usual = (
        {type(callback).__name__ for callback in kind(print)._create_default_callbacks()}
        for kind in (Trainer, TorchTrainer)
    )
    assert usual - own == {"PlacementGroupCleanerCallback"}
