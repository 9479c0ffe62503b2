"""How many replicas there are to be, and what changes while they serve."""

from types import SimpleNamespace

import pytest

from ray_sd.config.load import validate
from ray_sd.config.serve import Replicas, ServedModel
from ray_sd.errors import ConfigError
from ray_sd.serve.live import with_changes
from ray_sd.serve.scaling import QUEUED_STEPS, StepsPolicy, replica_options


@pytest.mark.parametrize(
    ("queued", "expected"), [([], 0), ([0.0], 0), ([100.0], 1), ([101.0], 2), ([300.0, 10.0], 4), ([0.0, 1.0], 1)]
)
def test_as_many_replicas_are_wanted_as_the_steps_of_all_need(queued: list[float], expected: int):
    context = SimpleNamespace(aggregated_metrics={QUEUED_STEPS: dict(enumerate(queued))})
    assert StepsPolicy(100)(context) == (expected, {})


def test_before_any_replica_has_told_none_more_are_wanted():
    assert StepsPolicy(100)(SimpleNamespace(aggregated_metrics=None)) == (0, {})


def test_serve_is_told_a_number_or_how_to_find_one():
    assert replica_options(Replicas(min=2)) == {"num_replicas": 2}
    [(name, config)] = replica_options(Replicas(min=1, max=3, steps=50, upscale_delay=2)).items()
    assert name == "autoscaling_config"
    assert (config.min_replicas, config.max_replicas, config.upscale_delay_s) == (1, 3, 2)
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert isinstance(policy, StepsPolicy)
    context = SimpleNamespace(aggregated_metrics={QUEUED_STEPS: {"a": 120.0}})
    assert policy(context)[0] == 3


def test_only_what_may_change_does_and_is_checked():
    served = validate({"settings": ["model=emoji"], "batching": {"max_rows": 4, "patience": 3}}, ServedModel)
    changed = with_changes(served, {"batching": {"max_rows": 8}}, ("batching",))
    assert (changed.batching.max_rows, changed.batching.patience) == (8, 3)
    with pytest.raises(ConfigError, match="user_config.threads: only batching can change without a restart"):
        with_changes(served, {"threads": 2}, ("batching",))
    with pytest.raises(ConfigError, match=r"batching.max_row: no such setting; did you mean 'max_rows'"):
        with_changes(served, {"batching": {"max_row": 8}}, ("batching",))
