"""The log of a deployment's replicas."""

import logging

from ray import serve
from ray.serve.exceptions import RayServeException

from ray_sd.cluster import SERVE_LOGGER


class _ServesLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        serves = logging.getLogger(SERVE_LOGGER)
        if serves.isEnabledFor(record.levelno):
            serves.handle(record)


def log_with_serve() -> None:
    """Let what ray_sd logs in a replica's process stand among Ray Serve's own lines; otherwise it is in no file."""
    try:
        serve.get_replica_context()
    except RayServeException:
        return  # another process, whose log is its own
    ours = logging.getLogger("ray_sd")
    if not any(isinstance(handler, _ServesLog) for handler in ours.handlers):
        ours.addHandler(_ServesLog())
        ours.setLevel(logging.INFO)
