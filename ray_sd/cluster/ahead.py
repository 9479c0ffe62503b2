"""Actors that Ray Train and Ray Data start one after another when a run comes to need them."""


def start_ahead() -> None:
    """Start them now, on this machine, where a run will begin in seconds. They are found there by their names."""
    # Here, since this takes a second to import.
    from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
    from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_autoscaling_coordinator()
    get_or_create_stats_actor()
    get_or_create_actor_location_tracker()
