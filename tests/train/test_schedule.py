import pytest

from ray_sd.config.trainer import ConstantSchedule, CosineSchedule, LinearSchedule
from ray_sd.train.schedule import learning_rate_factor


def test_warm_up_rises_to_the_peak():
    factor = learning_rate_factor(ConstantSchedule(warmup_steps=4), max_steps=10)
    assert [factor(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_linear_falls_to_its_floor():
    factor = learning_rate_factor(LinearSchedule(min_ratio=0.1), max_steps=100)
    assert factor(0) == 1.0
    assert factor(50) == pytest.approx(0.55)
    assert factor(99) == pytest.approx(0.109)


def test_cosine_restarts_at_the_peak_in_every_cycle():
    factor = learning_rate_factor(CosineSchedule(warmup_steps=10, num_cycles=3, min_ratio=0.2), max_steps=310)
    for start in (10, 110, 210):
        assert factor(start) == pytest.approx(1.0)
        assert factor(start + 50) == pytest.approx(0.6)
        assert factor(start + 99) == pytest.approx(0.2, abs=1e-3)


def test_one_cosine_cycle_never_rises():
    factor = learning_rate_factor(CosineSchedule(), max_steps=50)
    values = [factor(step) for step in range(50)]
    assert values == sorted(values, reverse=True)
