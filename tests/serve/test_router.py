"""Which replica a request goes to, by its adapters and by what replicas have to do."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest

from ray_sd.serve.router import AdapterRouter

BATCH = 8


@dataclass(frozen=True)
class Replica:
    """As much of a replica as is looked at."""

    replica_id: ReplicaID
    max_ongoing_requests: int = 1000


def chosen(sessions: list[str], requests: Mapping[str, int]) -> list[str]:
    """Where requests of these adapters go, one after the other.

    requests: of each replica, those that it has; they stay as they are.
    """

    async def choose() -> list[str]:
        router = AdapterRouter(
            DeploymentID("model-tiny"), DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
        )
        router.initialize_state(batch=BATCH)
        replicas = [Replica(ReplicaID(name, DeploymentID("model-tiny"))) for name in requests]
        router._replicas = {replica.replica_id: replica for replica in replicas}
        router._rebuild_ring(frozenset(router._replicas))
        for replica in replicas:
            router.on_new_queue_len_info(replica.replica_id, requests[replica.replica_id.unique_id])
        found = []
        for number, session in enumerate(sessions):
            request = PendingRequest([], {}, RequestMetadata("id", f"id-{number}", session_id=session))
            for rank in await router.choose_replicas(replicas, request):
                if replica := await router._select_from_candidate_replicas(rank, 0):
                    found.append(replica.replica_id.unique_id)
                    break
        return found

    return asyncio.run(choose())


def test_requests_with_the_same_adapters_go_to_one_replica():
    idle = dict.fromkeys("abcd", 0)
    names = [f"pet{number}" for number in range(40)]
    first, again = chosen(names, idle), chosen(names, idle)
    assert first == again
    assert set(first) == set(idle)
    fewer = dict(zip(names, chosen(names, dict.fromkeys("abc", 0)), strict=True))
    assert all(fewer[name] == place for name, place in zip(names, first, strict=True) if place != "d")


def test_a_replica_with_a_batch_more_to_do_than_another_gives_requests_away():
    [home] = chosen(["pet"], dict.fromkeys("abc", 0))
    for busy, stays in ((BATCH - 1, True), (BATCH, False), (10 * BATCH, False)):
        [place] = chosen(["pet"], dict.fromkeys("abc", 0) | {home: busy})
        assert (place == home) == stays
    assert chosen(["pet"], dict.fromkeys("abc", 50)) == [home]


def test_requests_without_adapters_go_to_the_less_busy_of_two():
    places = Counter(chosen([""] * 200, {"a": 0, "b": 0, "c": 5}))
    assert places["c"] == 0
    assert min(places["a"], places["b"]) > 40
