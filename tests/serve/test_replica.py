"""A replica without Ray around it."""

import asyncio
import io
import json
import logging
from pathlib import Path

import pytest
from orders import SAME
from PIL import Image
from tiny_models import difference, tiny_config

from ray_sd.config import GenerateConfig
from ray_sd.config.load import validate
from ray_sd.draw.generation import draw
from ray_sd.errors import ArtifactError, RequestError
from ray_sd.generate import ImageRequest
from ray_sd.media.pictures import read_parameters
from ray_sd.models import load_model
from ray_sd.serve.adapter_folder import AdapterFolder
from ray_sd.serve.adapters import LoadedAdapters
from ray_sd.serve.engine import Engine
from ray_sd.serve.errors import of_failure
from ray_sd.serve.messages import PictureEvent, PictureJob, Unloaded
from ray_sd.serve.order import DeadlineError, StoppedError
from ray_sd.serve.replica import ModelReplica, failure_of


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


def test_jobs_generate_draws_a_picture_again_by_what_its_file_says(tiny: Path, adapter_folder: Path, tmp_path: Path):
    model = [f"model.base={tiny}", "model.name=tiny", "model.scheduler.sampler=ddim"]
    replica = ModelReplica("served", {"settings": model, "threads": 1}, str(adapter_folder))
    request = ImageRequest(
        "a (red)1.8 cat",
        "a (bad)0.5 dog",
        seed=7,
        num_inference_steps=3,
        guidance_scale=3.0,
        prompt_weighting=True,
        scheduler="euler",
        adapters=(("lora", 0.5),),
        height=64,
        width=96,
    )

    async def drawn() -> bytes:
        return [event.content async for event in replica.draw(PictureJob((request,)))][-1]

    content = asyncio.run(drawn())
    told = read_parameters(io.BytesIO(content))
    assert str(tiny.parent) not in str(told)
    [adapter] = told.pop("adapters")
    settings = {name: value for name, value in told.items() if name in GenerateConfig.model_fields}
    settings |= {
        "model": {"name": told["model"], "base": tiny.parent / told["base"], "scheduler": {"sampler": told["sampler"]}},
        "adapter": adapter_folder / adapter["name"],
        "adapter_scale": adapter["weight"],
        "output": tmp_path,
    }
    config = validate(json.loads(json.dumps(settings, default=str)), GenerateConfig)
    assert difference(Image.open(draw(config).pictures[0]), Image.open(io.BytesIO(content))) <= SAME


@pytest.mark.parametrize(
    ("error", "status", "code", "words"),
    [
        (
            StoppedError(),
            503,
            "replica_lost",
            "the replica of 'tiny' that was asked has stopped, and another one comes",
        ),
        (RequestError("too wide", param="size"), 400, None, "too wide"),
        (DeadlineError("too late"), 504, "deadline_exceeded", "too late"),
        (ArtifactError("/srv/models has no weights"), 500, "internal_error", "the log of the server says why"),
        (KeyError("/srv/models"), 500, "internal_error", "the log of the server says why"),
    ],
)
def test_only_what_a_request_did_wrong_is_its_fault(error: Exception, status: int, code: str | None, words: str):
    told = of_failure(failure_of(error, "tiny", retry_after=3.0))
    assert (told.status, told.code) == (status, code)
    assert words in told.message
    assert "/srv" not in told.message
    assert ("Retry-After" in told.headers) == (status == 503)


def test_a_replica_whose_engine_has_stopped_says_so_at_once_to_whoever_asks(
    tiny: Path, replica: ModelReplica, monkeypatch: pytest.MonkeyPatch
):
    model = load_model(tiny_config(tiny))
    engine = Engine(model, LoadedAdapters(model, AdapterFolder(None), 0))
    engine.close()
    monkeypatch.setattr(replica, "_engine", engine)

    async def told() -> list[PictureEvent]:
        return [event async for event in replica.draw(PictureJob((ImageRequest("a cat"),)))]

    [event] = asyncio.run(told())
    assert (event.kind, of_failure(event.values).status) == ("failed", 503)
    failed = asyncio.run(replica.load_adapter("pet"))
    assert failed is not None
    assert of_failure(failed).status == 503
    assert asyncio.run(replica.unload_adapter("pet")) == Unloaded(0, 0, 1.0)


def test_logs_of_other_processes_stay_as_they_are(replica: ModelReplica):
    assert logging.getLogger("ray_sd").handlers == []
