"""What the cluster has, and what comes back to it."""

import pytest
import ray
import ray._private.state
from ray.core.generated.autoscaler_pb2 import ClusterConfig
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from waiting import wait_for

from ray_sd.cluster import give_back_of_dead, has_gpus, is_one_machine, possible_resources


def test_a_cluster_is_one_machine_while_no_other_is_alive(ray_cluster: None, monkeypatch: pytest.MonkeyPatch):
    assert is_one_machine()
    [node] = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [node, node | {"Alive": False}])
    assert is_one_machine()
    monkeypatch.setattr(ray, "nodes", lambda: [node, node])
    assert not is_one_machine()


def test_what_a_dead_actor_holds_is_given_back_and_nothing_else(ray_cluster: None):
    class Controller:
        def reserve(self, cpus: int) -> None:
            ray.get(placement_group([{"CPU": cpus}]).ready())

    mine, living, dead = placement_group([{"CPU": 1}]), *(ray.remote(num_cpus=0)(Controller).remote() for _ in range(2))
    ray.get([mine.ready(), living.reserve.remote(1), dead.reserve.remote(2)])
    assert give_back_of_dead() == 2
    ray.kill(dead)
    wait_for(lambda: give_back_of_dead() == 1)
    wait_for(lambda: ray.available_resources().get("CPU") == 2)
    assert placement_group_table(mine)["state"] == "CREATED"
    remove_placement_group(mine)
    ray.kill(living)
    wait_for(lambda: give_back_of_dead() == 0 and ray.available_resources().get("CPU") == 4)


def test_what_an_autoscaler_may_start_counts(ray_cluster: None, monkeypatch: pytest.MonkeyPatch):
    assert possible_resources()["CPU"] == 4
    assert not has_gpus()
    config = ClusterConfig()
    config.node_group_configs.add(name="workers", resources={"CPU": 8, "GPU": 2}, max_count=3)
    monkeypatch.setattr(ray._private.state.state, "get_cluster_config", lambda: config)
    assert (possible_resources()["CPU"], possible_resources()["GPU"]) == (24, 6)
    assert has_gpus()
    assert not is_one_machine()
