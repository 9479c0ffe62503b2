"""Ray: joining or starting it, what it has, what it must be told, and whatever else is used of its own parts."""

from ray_sd.cluster.checkpoints import SNAPSHOT, CheckpointList
from ray_sd.cluster.connection import connect, connect_while_importing, names_cluster
from ray_sd.cluster.environment import training_environment, tuning_environment
from ray_sd.cluster.pace import rest_between_steps
from ray_sd.cluster.quiet import (
    OWNER_IS_GONE,
    SERVE_LOGGER,
    quiet_data,
    quiet_serve,
    quiet_tokens,
    quiet_trial,
    quiet_tune,
    quiet_worker,
    training_log_level,
)
from ray_sd.cluster.resources import give_back_of_dead, has_gpus, is_one_machine, possible_resources

__all__ = [
    "OWNER_IS_GONE",
    "SERVE_LOGGER",
    "SNAPSHOT",
    "CheckpointList",
    "connect",
    "connect_while_importing",
    "give_back_of_dead",
    "has_gpus",
    "is_one_machine",
    "names_cluster",
    "possible_resources",
    "quiet_data",
    "quiet_serve",
    "quiet_tokens",
    "quiet_trial",
    "quiet_tune",
    "quiet_worker",
    "rest_between_steps",
    "training_environment",
    "training_log_level",
    "tuning_environment",
]
