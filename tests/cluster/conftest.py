"""Ray's loggers, which tests set."""

import logging
from collections.abc import Iterator

import pytest

from ray_sd.cluster.quiet import CONTROLLER_LOGGER, DATA_LOGGERS, SERVE_LOGGER, TRIAL_LOGGER, TUNE_LOGGERS


@pytest.fixture
def levels() -> Iterator[None]:
    """Ray's loggers are then as they were."""
    loggers = [
        logging.getLogger(name)
        for name in ("", "ray", CONTROLLER_LOGGER, *DATA_LOGGERS, TRIAL_LOGGER, *TUNE_LOGGERS, SERVE_LOGGER)
    ]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)
