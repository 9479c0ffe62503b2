"""What the cluster has, and what is given back to it."""

import ray
import ray._private.state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group


def possible_resources() -> dict[str, float]:
    """CPUs, GPUs and so on that the cluster has, or can have once its autoscaler has started every node it may."""
    possible = _autoscaled_resources() or {}
    now = ray.cluster_resources()
    return {name: max(possible.get(name, 0), now.get(name, 0)) for name in {*possible, *now}}


def has_gpus() -> bool:
    """Whether the cluster has a GPU, or its autoscaler can start a node that has."""
    return possible_resources().get("GPU", 0) > 0


def is_one_machine() -> bool:
    """Whether the cluster is one node and stays it, so that this process shares its cores with all others."""
    return sum(node["Alive"] for node in ray.nodes()) == 1 and _autoscaled_resources() is None


def give_back_of_dead() -> int:
    """Give back what actors of this driver hold that are dead. Returns how many placement groups are still held by living ones.

    Ray gives back what an actor reserved when the whole job ends. Ray Train does so earlier, but not where its controller
    dies while workers start.
    """
    job, held = ray.get_runtime_context().get_job_id(), 0
    for written in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(written)
        by_actor = group.creator_actor_id != ray.ActorID.nil().binary()
        if group.creator_job_id.hex() != job or not by_actor or group.state == PlacementGroupTableData.REMOVED:
            continue
        if group.creator_actor_dead:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
        else:
            held += 1
    return held


def _autoscaled_resources() -> dict[str, float] | None:
    """What the cluster has with every node that its autoscaler may start; None where there is no autoscaler."""
    return ray._private.state.state.get_max_resources_from_cluster_config()
