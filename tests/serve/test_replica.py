"""A replica without Ray around it."""

import asyncio
import logging
from pathlib import Path

import pytest

from ray_sd.generate import ImageRequest
from ray_sd.serve.messages import PictureJob
from ray_sd.serve.replica import ModelReplica


@pytest.fixture(scope="module")
def replica(tiny: Path) -> ModelReplica:
    settings = [f"model.base={tiny}", "model.name=tiny_served", "model.scheduler.sampler=ddim"]
    return ModelReplica("tiny", {"settings": settings, "threads": 1}, None)


@pytest.mark.parametrize(("progress", "kinds"), [(False, ["done"]), (True, ["queued", "step", "step", "step", "done"])])
def test_steps_are_told_to_those_alone_who_ask_for_them(replica: ModelReplica, progress: bool, kinds: list[str]):
    job = PictureJob((ImageRequest("a cat", num_inference_steps=3, seed=int(progress)),), progress=progress)

    async def told() -> list[str]:
        return [event.kind async for event in replica.draw(job)]

    assert asyncio.run(told()) == kinds


def test_logs_of_other_processes_stay_as_they_are(replica: ModelReplica):
    assert logging.getLogger("ray_sd").handlers == []
