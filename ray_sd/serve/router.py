"""Which replica of a model draws a picture: one that has its adapters in memory, and otherwise the one with the least to do."""

import random
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica


class AdapterRouter(ConsistentHashRouter):
    """Ray's router by sessions, where a request's session is its adapters.

    Ray's own sends requests without a session to replicas by chance, and all of one session to one replica, whatever waits there.
    Here the first go to the less busy of two replicas, as everywhere else in Ray Serve, and the second to the next
    replica of the ring once theirs has a whole batch more to do than it.
    """

    def initialize_state(self, *, batch: int, **settings: Any) -> None:
        """batch: pictures that take a step together."""
        super().initialize_state(**settings)
        self._batch = batch

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None:
            return ranks
        if not pending_request.metadata.session_id:
            return [
                random.sample(candidate_replicas, min(2, len(candidate_replicas)))
            ]  # of which the less busy is taken
        least = min(map(self._requests, ranks), default=0)
        return sorted(ranks, key=lambda rank: self._requests(rank) >= least + self._batch)

    def _requests(self, rank: list[RunningReplica]) -> int:
        """That a replica has, as far as is known here; where nothing is known it is asked before it gets another."""
        return self.replica_queue_len_cache.get(rank[0].replica_id) or 0
