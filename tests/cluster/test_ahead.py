"""What is started before it is needed."""

import time

import ray
import ray.util

from ray_sd.cluster.ahead import start_ahead

NAMES = {"AutoscalingCoordinator", "datasets_stats_actor", "ActorLocationTracker"}


def test_it_is_found_by_name_when_it_is_needed(ray_cluster: None):
    for actor in started():  # by what ran here before
        ray.kill(ray.get_actor(**actor))
    while started():
        time.sleep(0.05)
    start_ahead()
    assert {actor["name"] for actor in started()} == NAMES


def started() -> list[dict[str, str]]:
    return [actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["name"] in NAMES]
