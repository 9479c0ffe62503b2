"""Estimates of memory against what torch's allocator counts, and against what others measured at full size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.methods import build_method
from ray_sd.models import load_model
from ray_sd.train.activations import Activations, fake_batch, measure_activations
from ray_sd.train.engine import cast_frozen
from ray_sd.train.memory import GIB, Estimates, Parts, moments, resident

FULL_SIZE = ["experiment=smoke", "trainer=default", "trainer.precision=bf16"]


@pytest.fixture
def full_size(tmp_path: Path) -> Callable[..., ExperimentConfig]:
    """SD 1.5 or SDXL, whose sizes are known without their weights."""
    file = tmp_path / "model.safetensors"
    file.touch()

    def configure(model: str, *settings: str) -> ExperimentConfig:
        resolution = {"sd15": 512, "sdxl": 1024}[model]
        base = [f"model={model}", f"model.base={file}", f"model.layout={model}", f"dataset.resolution={resolution}"]
        return load_config([*FULL_SIZE, *base, *settings])

    return configure


def parts(config: ExperimentConfig) -> Parts:
    return Estimates(config, on_gpu=True).parts(config.trainer)


def total(config: ExperimentConfig) -> float:
    return Estimates(config, on_gpu=True).total(config.trainer)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize(
    "settings",
    [
        ["model=emoji", "method=lora"],
        ["model=emoji", "method=full", "dataset.resolution=128"],
        ["model=emoji", "method=full", "method.text_encoder=true"],
        ["model=emoji", "method=textual_inversion", "method.placeholder_token=<x>"],
        ["model=emoji", "method=autoencoder"],
        ["model=tiny_random", "method=dreambooth", "method.class_prompt=a cat"],
        ["model=tiny_random_xl", "method=pivotal", "method.tokens.placeholder_token=<x>"],
    ],
    ids=lambda settings: "-".join(setting.partition("=")[2] for setting in settings[:2]),
)
def test_a_pass_on_the_meta_device_takes_what_a_real_one_allocates(settings: list[str], checkpointing: str):
    config = load_config(
        [
            "experiment=smoke",
            "dataset.resolution=64",
            *settings,
            f"trainer.gradient_checkpointing={checkpointing}",
        ]
    )
    method = build_method(config.method)
    skeleton = load_model(config.model, method.components(), skeleton=True)
    method.prepare(skeleton, config.trainer)
    batch = fake_batch(config, method, skeleton)
    estimated = measure_activations(method, skeleton, batch, torch.float32)

    torch.manual_seed(0)
    model = load_model(config.model, method.components())
    method.prepare(model, config.trainer)
    real = {name: _values(value) for name, value in batch.items()}
    method.objective(model, real).backward()
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        method.objective(model, real).backward()
    assert estimated.beside_gradients + estimated.gradients == pytest.approx(_most_allocated(profiled), rel=0.1)


def _values(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape) if like.is_floating_point() else torch.randint(9, like.shape, dtype=like.dtype)


def _most_allocated(profiled: profile) -> int:
    now = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_half_precision_keeps_halves_but_for_norms(full_size):
    config = full_size("sd15", "method=lora")
    method = build_method(config.method)
    found: dict[torch.dtype, Activations] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(config.model, method.components(), skeleton=True)
        method.prepare(model, config.trainer)
        cast_frozen(model, dtype)
        found[dtype] = measure_activations(method, model, fake_batch(config, method, model), dtype)
    assert 0.5 < found[torch.bfloat16].alone / found[torch.float32].alone < 0.8


def test_attention_keeps_no_matrix_of_all_places_with_all(full_size):
    """4096 places in 8 heads would make 0.25 GiB a layer."""
    small, large = (
        parts(full_size("sd15", f"dataset.resolution={side}", "trainer.batch_size=1")) for side in (256, 512)
    )
    assert large["activations"] / small["activations"] < 5


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        (["trainer.optimizer=adamw_8bit", "trainer.gradient_checkpointing=true", "trainer.batch_size=1"], 9.92),
        (["trainer.optimizer=adamw_8bit", "trainer.gradient_checkpointing=true", "trainer.batch_size=2"], 10.4),
        (["trainer.optimizer=adamw_8bit", "trainer.batch_size=1"], 11.17),
        (["trainer.optimizer=adamw_8bit", "trainer.batch_size=2"], 13.67),
        (["trainer.gradient_checkpointing=true", "trainer.batch_size=1"], 15.79),
        (["trainer.batch_size=1"], 17.7),
    ],
)
def test_all_weights_of_sd15_take_about_what_others_measured(full_size, settings: list[str], published: float):
    """GB of a Tesla T4 at 512 pixels, half precision, latents and embeddings cached: examples/dreambooth of
    ShivamShrirao/diffusers."""
    found = total(full_size("sd15", "method=full", "trainer.zero.stage=0", *settings))
    assert found / GIB == pytest.approx(published, rel=0.25)


def test_weights_gradients_and_state_follow_from_the_number_of_parameters(full_size):
    settings = ["trainer.zero.stage=0", "trainer.ema_decay=0.9", "trainer.gradient_checkpointing=true"]
    config = full_size("sd15", "method=full", "trainer.batch_size=1", *settings)
    unet = 859_520_964
    found = parts(config)
    assert (found["trained weights"], found["moving average"]) == (4 * unet, 4 * unet)
    assert found["optimizer (adamw)"] == pytest.approx(8 * unet, rel=1e-6)
    assert found["gradients"] + found["update"] == 8 * unet
    frozen = parts(full_size("sd15", "method=lora"))["frozen weights"]
    assert frozen == 2 * unet


def test_workers_divide_what_zero_divides(full_size):
    estimates = {
        stage: parts(full_size("sdxl", "method=full", "trainer.num_workers=4", f"trainer.zero.stage={stage}"))
        for stage in (0, 1, 2, 3)
    }
    assert [found["optimizer (adamw)"] / estimates[0]["optimizer (adamw)"] for found in estimates.values()] == (
        pytest.approx([1, 0.25, 0.25, 0.25], rel=1e-6)
    )
    assert estimates[3]["trained weights"] == estimates[2]["trained weights"] / 4
    assert "moving average" not in estimates[0]


def test_offloaded_state_takes_no_gpu_memory(full_size):
    settings = ["method=full", "trainer.num_workers=4", "trainer.zero.stage=2", "trainer.ema_decay=0.9"]
    found = parts(full_size("sd15", *settings, "trainer.zero.offload=true"))
    assert found.keys().isdisjoint({"optimizer (adamw)", "their copy that ZeRO updates", "moving average"})
    assert sum(found.values()) < total(full_size("sd15", *settings))


def test_accumulated_gradients_stay_beside_activations(full_size):
    settings = ["method=full", "trainer.zero.stage=0", "trainer.batch_size=4", "trainer.optimizer=adamw_8bit"]
    at_once = full_size("sd15", *settings, "trainer.micro_batch_size=4")
    one_by_one = full_size("sd15", *settings, "trainer.micro_batch_size=1")
    step = Estimates(one_by_one, on_gpu=True).step(one_by_one.trainer)
    backward = next(moments(one_by_one.trainer, step))
    assert backward["gradients"] == 4 * step.elements
    assert backward["activations"] < parts(at_once)["activations"]


def test_a_batch_is_as_large_as_the_largest_bucket(full_size):
    square, wide = (
        full_size("sd15", "trainer.batch_size=1", *settings)
        for settings in ([], ["dataset.buckets={resolutions: [512, 768]}"])
    )
    assert parts(wide)["activations"] > 1.9 * parts(square)["activations"]


def test_prior_preservation_doubles_the_batch(full_size):
    alone, beside = (
        full_size("sd15", "method=dreambooth", "trainer.batch_size=1", *settings)
        for settings in ([], ["method.class_prompt=a cat"])
    )
    assert parts(beside)["activations"] == pytest.approx(2 * parts(alone)["activations"], rel=0.1)


def test_memory_that_stays_has_no_entry_for_what_is_not_there():
    config = load_config(["experiment=smoke", "trainer.zero.stage=0"])
    step = Estimates(config, on_gpu=False).step(config.trainer)
    assert resident(config.trainer, step).keys() == {"frozen weights", "trained weights", "optimizer (adamw)"}
