"""What a sweep's settings may be."""

import pytest

from ray_sd.config import SweepConfig
from ray_sd.config.load import load_config
from ray_sd.errors import ConfigError

DISTRIBUTIONS = [
    ("{}", "no distribution; give one of: choice, grid, uniform, loguniform, randint, around"),
    ("{choice: [1], grid: [2]}", "choice and grid together; give one of them"),
    ("{loguniform: [1, 2], around: 3}", "loguniform and around together; give one of them"),
    ("{choice: []}", "choice names no value"),
    ("{grid: []}", "grid names no value"),
    ("{uniform: [0.2, 0.1]}", "uniform: 0.2 is not below 0.1"),
    ("{loguniform: [0.1, 0.1]}", "loguniform: 0.1 is not below 0.1"),
    ("{randint: [4, 2]}", "randint: 4 is not below 2"),
    ("{loguniform: [0, 1]}", "loguniform: 0 has no logarithm; begin above 0"),
]


def problems(*settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(["sweep=learning_rate", *settings], SweepConfig)
    return str(caught.value)


@pytest.mark.parametrize(("distribution", "words"), DISTRIBUTIONS)
def test_a_bad_distribution_is_told_by_its_path(distribution: str, words: str):
    found = problems(f"sweep.space.trainer.learning_rate={distribution}")
    assert found == f"sweep.space.trainer.learning_rate: {words}"


@pytest.mark.parametrize(
    ("distribution", "words"),
    [
        ("{around: 1}", ".around: '1' is out of range; it must be more than 1.0"),
        ("{uniform: [1, 2, 3]}", ".uniform: [1, 2, 3] is no list of 2 numbers or null"),
        ("{lognormal: [1, 2]}", ".lognormal: no such setting; did you mean 'loguniform'?"),
        ("{randint: [1.5, 2]}", ".randint[0]: '1.5' is no whole number"),
    ],
)
def test_what_is_no_distribution_is_told_by_its_path(distribution: str, words: str):
    assert problems(f"sweep.space.trainer.learning_rate={distribution}") == f"sweep.space.trainer.learning_rate{words}"


def test_a_population_has_no_limit_after_which_nothing_begins():
    assert problems("sweep.scheduler=pbt", "sweep.time_limit=10") == (
        "sweep: scheduler pbt begins all trials together, which time_limit would part; set trainer.max_steps"
    )
