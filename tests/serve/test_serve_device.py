"""How a model lies on its device: layout, compiled blocks, and how many rows memory holds."""

import platform
import resource
from pathlib import Path

import pytest
import torch
from orders import SAME, draw
from tiny_models import difference, tiny_config

from ray_sd.config.serve import BatchingConfig, ServedModel
from ray_sd.errors import ConfigError
from ray_sd.generate import ImageRequest
from ray_sd.models import load_model
from ray_sd.serve.adapter_folder import AdapterFolder
from ray_sd.serve.adapters import LoadedAdapters
from ray_sd.serve.device import FEW, MORE, ROWS, place, rows_in, rows_that_fit
from ray_sd.serve.engine import Engine
from ray_sd.serve.order import Order

ORDERS = [
    Order(ImageRequest("a cat", seed=1, num_inference_steps=3)),
    Order(ImageRequest("a cat", seed=1, num_inference_steps=3, adapters=(("lora", 1.0),))),
    Order(ImageRequest("a cat", seed=1, num_inference_steps=3, adapters=(("wide", 0.5), ("lora", 1.0)))),
]


@pytest.mark.parametrize("setting", ["channels_last", pytest.param("compile", marks=pytest.mark.slow)])
def test_pictures_are_the_same_in_another_layout_and_compiled(build, tiny: Path, adapter_folder: Path, setting: str):
    expected = draw(build(), ORDERS)
    served = ServedModel.model_validate({"settings": ["model=any"], "threads": 1, setting: True})
    model = place(load_model(tiny_config(tiny)), served)
    engine = Engine(model, LoadedAdapters(model, AdapterFolder(adapter_folder), 2**30), BatchingConfig(result_cache=0))
    try:
        # One after another: adapters come to blocks that are compiled already, and go again.
        for _ in range(2):
            for order, picture in zip(ORDERS, expected, strict=True):
                assert difference(draw(engine, [order])[0], picture) <= SAME
    finally:
        engine.close()
        torch.compiler.reset()
    assert min(difference(expected[0], other) for other in expected[1:]) > 10 * SAME
    compiled = [part for part in model.unet.modules() if part._compiled_call_impl is not None]
    assert bool(compiled) == (setting == "compile")
    layouts = {part.is_contiguous(memory_format=torch.channels_last) for part in convolutions(model.unet)}
    assert layouts == {setting == "channels_last"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep what is freed or not as they like")
def test_what_a_step_frees_is_there_for_the_next(tiny: Path):
    served = ServedModel.model_validate({"settings": ["model=any"]})
    threads = torch.get_num_threads()
    place(load_model(tiny_config(tiny)), served)
    torch.set_num_threads(threads)
    pages = 8 * 2**20 * 16 // resource.getpagesize()  # of what a step takes below

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        _ = [torch.ones(2**20, 4) for _ in range(8)]
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    assert min(faults() for _ in range(4)) < pages / 100  # the first find nothing that was freed, or not enough


def convolutions(module: torch.nn.Module) -> list[torch.Tensor]:
    """Weights that have more than one layout."""
    return [weight for weight in module.parameters() if weight.dim() == 4 and min(weight.shape[1:]) > 1]


def test_compiling_without_a_compiler_is_refused_in_words(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    served = ServedModel.model_validate({"settings": ["model=any"], "compile": True})
    with pytest.raises(
        ConfigError, match="compile: on CPUs torch compiles by no-such-compiler, which this machine does"
    ):
        place(load_model(tiny_config(tiny)), served)


@pytest.mark.parametrize(("of_a_row", "always", "free", "rows"), [(100, 50, 1050, 10), (100, 0, 199, 2), (10, 5, 0, 2)])
def test_rows_are_those_that_memory_has_room_for(of_a_row: int, always: int, free: int, rows: int):
    few, more = (always + pictures * ROWS * of_a_row for pictures in (FEW, MORE))
    assert rows_in(free, few, more) == rows


def test_on_a_cpu_only_the_settings_limit_rows(tiny: Path):
    assert rows_that_fit(load_model(tiny_config(tiny)), BatchingConfig(), 0) is None


@pytest.mark.gpu
def test_on_a_gpu_rows_follow_from_its_memory(tiny: Path):
    model = place(load_model(tiny_config(tiny)), ServedModel.model_validate({"settings": ["model=any"]}))
    rows = rows_that_fit(model, BatchingConfig(), 0)
    assert rows is not None
    total = torch.cuda.mem_get_info()[1]
    fewer = rows_that_fit(model, BatchingConfig(), total // 2)
    assert fewer is not None
    assert 0.3 < fewer / rows < 0.7
