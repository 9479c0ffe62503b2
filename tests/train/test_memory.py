"""Estimates of memory against what torch's allocator counts, and against what others measured at full size."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from ray_sd.config import ExperimentConfig
from ray_sd.config.compose import PRESETS, preset_groups
from ray_sd.config.documentation import preset_description
from ray_sd.config.load import load_config
from ray_sd.methods import build_method
from ray_sd.models import load_model
from ray_sd.train.activations import fake_batch, measure_activations
from ray_sd.train.memory import GIB, Estimates, Parts, measure_step, moments, resident

ROOT = Path(__file__).parents[2]
FULL_SIZE = ["experiment=smoke", "trainer=default", "trainer.precision=bf16"]


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ExperimentConfig]:
    """SD 1.5 or SDXL, whose sizes are known without their weights."""
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    file.touch()

    def configure(model: str, *settings: str) -> ExperimentConfig:
        resolution = {"sd15": 512, "sdxl": 1024}[model]
        base = [f"model={model}", f"model.base={file}", f"model.layout={model}", f"dataset.resolution={resolution}"]
        return load_config([*FULL_SIZE, *base, *settings])

    return configure


_estimates: defaultdict[str, Estimates] = defaultdict(lambda: Estimates(on_gpu=True))
"""By all but the trainer's settings, so that the steps of a model are measured once for all tests."""


def estimates(config: ExperimentConfig) -> Estimates:
    same = config.model_dump(mode="json", include={"model", "method", "dataset"})
    return _estimates[json.dumps([same, config.trainer.precision])]


def parts(config: ExperimentConfig) -> Parts:
    return estimates(config).parts(config)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("checkpointing", [slow("false"), "true"])
@pytest.mark.parametrize(
    "settings",
    [
        ["model=emoji", "method=lora"],
        slow(["model=emoji", "method=full", "dataset.resolution=128"]),
        slow(["model=emoji", "method=full", "method.text_encoder=true"]),
        slow(["model=emoji", "method=textual_inversion", "method.placeholder_token=<x>"]),
        ["model=emoji", "method=autoencoder"],
        ["model=tiny_random", "method=dreambooth", "method.class_prompt=a cat"],
        slow(["model=tiny_random_xl", "method=pivotal", "method.tokens.placeholder_token=<x>"]),
        ["model=tiny_random_upscale", "method=full"],
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
    """The most bytes at once, but for what one operation takes only while it runs: kernels choose that by the processor."""
    events = []
    for root in profiled.profiler.kineto_results.experimental_event_tree():
        events += _allocations(root, operation=None)
    events.sort(key=lambda found: found[0].start_time_ns)
    taken: dict[int, int] = {}
    passing: set[int] = set()
    for number, (event, operation) in enumerate(events):
        fields = event.extra_fields
        if fields.alloc_size > 0:
            taken[fields.ptr] = number
        elif fields.ptr in taken:
            start = taken.pop(fields.ptr)
            if operation is not None and events[start][1] == operation:
                passing |= {start, number}
    now = most = 0
    for number, (event, _) in enumerate(events):
        if number not in passing:
            now += event.extra_fields.alloc_size
            most = max(most, now)
    return most


def _allocations(event: Any, operation: int | None) -> Iterator[tuple[Any, int | None]]:
    """Those below `event`, each with the outermost operation of torch's library that it happens in."""
    if event.tag == _EventType.Allocation:
        yield event, operation
    if operation is None and event.name.startswith("aten::"):
        operation = event.id
    for child in event.children:
        yield from _allocations(child, operation)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("lora", "textual_inversion", "temporal_lora") else slow(name)
        for name in preset_groups("train")["method"]
    ],
)
def test_every_method_has_an_estimate(name: str):
    words = {"textual_inversion": "method.", "pivotal": "method.tokens."}
    if name == "inflate":
        settings = ["model=emoji_video_scratch", "dataset=spin"]  # whose image model fits
    elif name in ("temporal", "temporal_lora", "interpolation", "temporal_decoder"):
        settings = ["model=tiny_random_video", "dataset=spin"]
    else:
        settings = ["model=tiny_random_xl"]
    if name in words:
        settings += [f"{words[name]}placeholder_token=<x>"]
    config = load_config(["experiment=smoke", f"method={name}", *settings])
    found = parts(config)
    assert found["trained weights"] > 0
    assert found["activations"] > 0


@pytest.mark.slow
def test_half_precision_keeps_halves_but_for_norms(full_size):
    whole, halves = (
        full_size("sd15", "method=lora", "trainer.batch_size=1", f"trainer.precision={precision}")
        for precision in ("fp32", "bf16")
    )
    share = estimates(halves).step(halves).activations.alone / estimates(whole).step(whole).activations.alone
    assert 0.5 < share < 0.8


def test_an_autoencoder_that_asks_for_single_precision_takes_as_much():
    settings = ["model=tiny_random_video", "dataset=spin", "method=temporal_decoder", "method.perceptual_weight=0"]
    whole, halves, asked = (
        parts(
            load_config(["experiment=smoke", *settings, f"trainer.precision={precision}", f"model.vae_float32={own}"])
        )
        for precision, own in (("fp32", "false"), ("bf16", "false"), ("bf16", "true"))
    )
    assert halves["activations"] < 0.9 * whole["activations"]
    assert asked["activations"] == whole["activations"]
    assert asked["frozen weights"] == whole["frozen weights"]


@pytest.mark.slow
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
        slow(["trainer.optimizer=adamw_8bit", "trainer.gradient_checkpointing=true", "trainer.batch_size=2"], 10.4),
        slow(["trainer.optimizer=adamw_8bit", "trainer.batch_size=1"], 11.17),
        slow(["trainer.optimizer=adamw_8bit", "trainer.batch_size=2"], 13.67),
        slow(["trainer.gradient_checkpointing=true", "trainer.batch_size=1"], 15.79),
        (["trainer.batch_size=1"], 17.7),
    ],
)
def test_all_weights_of_sd15_take_about_what_others_measured(full_size, settings, published):
    """GB of a Tesla T4 at 512 pixels, half precision, latents and embeddings cached: examples/dreambooth of
    ShivamShrirao/diffusers."""
    config = full_size("sd15", "method=full", "trainer.zero.stage=0", *settings)
    assert estimates(config).total(config) / GIB == pytest.approx(published, rel=0.25)


def test_weights_gradients_and_state_follow_from_the_number_of_parameters(full_size):
    settings = ["trainer.zero.stage=0", "trainer.ema_decay=0.9", "trainer.gradient_checkpointing=true"]
    found = parts(full_size("sd15", "method=full", "trainer.batch_size=1", *settings))
    unet = 859_520_964
    assert (found["trained weights"], found["moving average"]) == (4 * unet, 4 * unet)
    assert found["optimizer (adamw)"] == pytest.approx(8 * unet, rel=1e-6)
    assert found["gradients"] + found["update"] == 8 * unet
    assert parts(full_size("sd15", "method=lora", "trainer.batch_size=1"))["frozen weights"] == 2 * unet


def test_workers_divide_what_zero_divides(full_size):
    found = [
        parts(full_size("sd15", "method=full", "trainer.num_workers=4", f"trainer.zero.stage={stage}"))
        for stage in (0, 1, 2, 3)
    ]
    state = [each["optimizer (adamw)"] / found[0]["optimizer (adamw)"] for each in found]
    assert state == pytest.approx([1, 0.25, 0.25, 0.25], rel=1e-6)
    assert found[3]["trained weights"] == found[2]["trained weights"] / 4
    assert all("moving average" not in each for each in found)


def test_offloaded_state_takes_no_gpu_memory(full_size):
    settings = ["method=full", "trainer.num_workers=4", "trainer.zero.stage=2", "trainer.ema_decay=0.9"]
    here, offloaded = (
        parts(full_size("sd15", *settings, f"trainer.zero.offload={offload}")) for offload in ("false", "true")
    )
    left = {"optimizer (adamw)", "their copy that ZeRO updates", "moving average"}
    assert left <= here.keys()
    assert left.isdisjoint(offloaded)
    assert sum(offloaded.values()) < sum(here.values())


@pytest.mark.parametrize(("model", "linear"), [("sd15", 0.31), slow("sdxl", 0.87)])
def test_a_quantised_base_takes_less(full_size, model, linear):
    """Of its linear layers, where SD 1.5's U-Net has 31 % of its parameters and SDXL's 87 %, nf4 keeps 4.5 bits."""
    settings = ["method=lora", "trainer.use_gpu=true", "trainer.batch_size=1"]
    whole, int8, nf4 = (
        parts(full_size(model, *settings, f"trainer.quantize_base={base}"))["frozen weights"]
        for base in ("null", "int8", "nf4")
    )
    assert int8 / whole == pytest.approx(1 - linear / 2, abs=0.02)
    assert nf4 / whole == pytest.approx(1 - linear * (1 - 4.5 / 16), abs=0.02)


def test_accumulated_gradients_stay_beside_activations(full_size):
    settings = ["method=full", "trainer.zero.stage=0", "trainer.batch_size=4", "trainer.optimizer=adamw_8bit"]
    at_once = full_size("sd15", *settings, "trainer.micro_batch_size=2")
    one_by_one = full_size("sd15", *settings, "trainer.micro_batch_size=1")
    step = estimates(one_by_one).step(one_by_one)
    backward = next(moments(one_by_one.trainer, step))
    assert backward["gradients"] == 4 * step.elements
    assert backward["activations"] < parts(at_once)["activations"]


@pytest.mark.slow
def test_a_batch_is_as_large_as_the_largest_bucket(full_size):
    square, wide = (
        full_size("sd15", "trainer.batch_size=1", *settings)
        for settings in ([], ["dataset.buckets={resolutions: [512, 768]}"])
    )
    assert parts(wide)["activations"] > 1.9 * parts(square)["activations"]


def test_prior_preservation_doubles_the_batch():
    alone, beside = (
        load_config([*FULL_SIZE, "model=emoji", "dataset.resolution=64", "method=dreambooth", *settings])
        for settings in ([], ["method.class_prompt=a cat"])
    )
    assert parts(beside)["activations"] == pytest.approx(2 * parts(alone)["activations"], rel=0.1)


def test_memory_that_stays_has_no_entry_for_what_is_not_there():
    config = load_config(["experiment=smoke", "trainer.zero.stage=0"])
    step = measure_step(config, on_gpu=False)
    assert resident(config.trainer, step).keys() == {"frozen weights", "trained weights", "optimizer (adamw)"}


@pytest.mark.parametrize(
    ("words", "model", "settings"),
    [
        ("a LoRA of SD 1.5 at 512 pixels", "sd15", ["method=lora"]),
        slow(
            "all weights of SD 1.5, 8-bit AdamW",
            "sd15",
            ["method=full", "trainer/optimizer=adamw_8bit", "trainer.zero.stage=0"],
        ),
        slow("a LoRA of SDXL at 1024 pixels", "sdxl", ["method=lora"]),
        slow(
            "all weights of SDXL on four GPUs, ZeRO 2",
            "sdxl",
            ["method=full", "trainer.num_workers=4", "trainer.zero.stage=2"],
        ),
    ],
)  # fmt: skip
def test_the_documents_tell_what_common_runs_need(full_size, words, model, settings):
    same = ["trainer.batch_size=4", "trainer.micro_batch_size=1", *settings]
    configs = [full_size(model, *same, f"trainer.gradient_checkpointing={each}") for each in ("false", "true")]
    plain, checkpointed = (estimates(config).total(config) / GIB for config in configs)
    text = (ROOT / "docs" / "training.md").read_text()
    assert f"| {words} | {plain:.1f} | {checkpointed:.1f} |" in text


VIDEO_RUNS = {
    "svd_temporal_svd": {
        "`svd_temporal_svd`: 14 frames of 320x576": [],
        "the same, `trainer.num_workers=4 trainer.zero.stage=2`": ["trainer.num_workers=4", "trainer.zero.stage=2"],
        "the same on one GPU, `trainer.zero.stage=2 trainer.zero.offload=true`": [
            "trainer.zero.stage=2",
            "trainer.zero.offload=true",
        ],
    },
    "svd_temporal_svd method=temporal_lora": {"the same, `method=temporal_lora`": []},
    "svd_temporal_svd dataset.resolution=[576,1024]": {"the same, `dataset.resolution='[576, 1024]'`": []},
    "svd_temporal_svd_xt": {"`svd_temporal_svd_xt`: 25 frames": []},
    "svd_interpolation_svd": {"`svd_interpolation_svd`: 5 frames": []},
    "svd_decoder_svd": {"`svd_decoder_svd`: 14 frames, decoded 8 at a time, in single precision": []},
    "svd_decoder_svd_xt": {"`svd_decoder_svd_xt`: 25 frames": []},
}
"""Rows of the guide's table by what differs in more than the trainer."""


def video_needs(run: str) -> Callable[..., str]:
    """GiB of one GPU, by further settings of the trainer, of an experiment with a model of Stable Video Diffusion's size."""
    base = [f"experiment={run.split()[0]}", "--config-dir", str(ROOT / "benchmarks" / "presets"), "model=svd_random"]
    base += [*run.split()[1:], "dataset.source.path=clips"]

    def need(*settings: str) -> str:
        config = load_config([*base, *settings])
        return f"{estimates(config).total(config) / GIB:.0f} GiB"

    return need


@pytest.mark.slow
def test_the_video_guide_and_its_experiments_tell_what_they_need():
    needs, found = {}, []
    for run, rows in VIDEO_RUNS.items():
        need = video_needs(run)
        found += [(words, need(*settings)) for words, settings in rows.items()]
        needs[run] = need()
    text = (ROOT / "docs" / "methods" / "video.md").read_text()
    assert re.findall(r"^\| (.+) \| (\d+ GiB) \|$", text, re.MULTILINE) == found
    needs["svd_interpolation_svd_xt"] = needs["svd_interpolation_svd"]  # clips of five frames, too
    for name in preset_groups("train")["experiment"]:
        if name.endswith(("_svd", "_svd_xt")):
            said = preset_description(PRESETS / "experiment" / f"{name}.yaml")
            assert re.findall(r"bout (\d+ GiB) of one GPU", said) == [needs[name]], name
