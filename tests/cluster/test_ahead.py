"""What is started before it is needed."""

import ray.util

from ray_sd.cluster.ahead import start_ahead


def test_it_is_found_by_name_when_it_is_needed(ray_cluster: None):
    start_ahead()
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert {"AutoscalingCoordinator", "datasets_stats_actor", "ActorLocationTracker"} <= names
