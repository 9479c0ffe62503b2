"""What the driver loads to export: the components that the method exports, and no others."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
from checkpoints import write_state
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from tiny_models import SCHEDULER_UPSCALE, UNET
from traces import assert_same_bits

from ray_sd import models
from ray_sd.config import ExperimentConfig
from ray_sd.config.load import load_config
from ray_sd.methods import build_method
from ray_sd.models import load_model
from ray_sd.train.checkpoint import trained_parameters
from ray_sd.train.job import TrainingJob
from ray_sd.train.run import _export
from ray_sd.train.storage import RunFolder
from ray_sd.train.validation import load_trained

TOKEN = "placeholder_token=<thing>"
CLIPS = ("model=tiny_random_video", "dataset=spin")
EXPORTED = {
    "lora": (("method=lora",), {"unet"}),
    "lora of text encoders, too": (("method=lora", "method.text_encoder=true"), {"unet", "text_encoder"}),
    "lora of XL": (("model=tiny_random_xl", "method=lora"), {"unet"}),
    "loha": (("method=loha",), {"unet"}),
    "textual_inversion": (("method=textual_inversion", f"method.{TOKEN}"), {"text_encoder"}),
    "words of XL": (
        ("model=tiny_random_xl", "method=textual_inversion", f"method.{TOKEN}"),
        {"text_encoder", "text_encoder_2"},
    ),
    "dreambooth": (("method=dreambooth",), {"unet"}),
    "pivotal": (("method=pivotal", f"method.tokens.{TOKEN}"), {"unet", "text_encoder"}),
    "autoencoder": (("model=emoji", "method=autoencoder", "method.teacher=embedded/emoji"), {"vae"}),
    "temporal": ((*CLIPS, "method=temporal"), {"unet"}),
    "inflate": ((*CLIPS, "method=inflate", "method.image_model=IMAGE_MODEL"), {"unet"}),
    "temporal_decoder": ((*CLIPS, "method=temporal_decoder"), {"vae"}),
}
"""Settings, and components with weights."""


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of an image model of the tiny video model's shapes as that is made of."""
    folder = tmp_path_factory.mktemp("image_model")
    DDIMScheduler(**SCHEDULER_UPSCALE).save_pretrained(folder / "scheduler")  # which predicts v
    same = {"norm_num_groups": 32, "use_linear_projection": True, "attention_head_dim": [2, 4]}
    UNet2DConditionModel(**UNET | same).save_pretrained(folder / "unet")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8]}))
    return folder


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Components whose weights were loaded, in their order."""
    components: list[str] = []
    for family in (models.stable_diffusion, models.stable_video_diffusion):
        load = family.load_weights

        def record(config: Any, component: str, cls: type, load: Any = load) -> Any:
            components.append(component)
            return load(config, component, cls)

        monkeypatch.setattr(family, "load_weights", record)
    return components


def save_checkpoint(config: ExperimentConfig, folder: Path) -> None:
    """A checkpoint of what trains, each value other than those of the base and of a new start."""
    torch.manual_seed(1)
    method = build_method(config.method)
    model = load_model(config.model, method.components())
    method.prepare(model, config.trainer)
    state = {name: value + 0.1 * torch.randn_like(value) for name, value in trained_parameters(model).items()}
    folder.mkdir()
    write_state(folder, state, step=3)


@pytest.mark.parametrize("kind", EXPORTED)
def test_an_export_loads_what_it_is_made_of_and_is_that_of_the_whole_model(
    kind: str, image_model: Path, tmp_path: Path, loaded: list[str]
):
    settings, components = EXPORTED[kind]
    settings = tuple(setting.replace("IMAGE_MODEL", str(image_model)) for setting in settings)
    config = load_config(["experiment=smoke", "name=run", f"storage_path={tmp_path}", *settings])
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(config, checkpoint)

    whole = tmp_path / "whole"
    whole.mkdir()
    build_method(config.method).export(load_trained(config, checkpoint)[0], whole)
    loaded.clear()
    job = TrainingJob(config, config, None, SimpleNamespace(fingerprint="rows"), None)
    result = _export(job, RunFolder(str(tmp_path), "run"), {}, ray.train.Checkpoint(str(checkpoint)))

    assert sorted(loaded) == sorted(components)
    assert result.step == 3
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert files
    for file in files:
        ours = Path(result.adapter) / file
        if file.suffix == ".safetensors":  # which have metadata in any order
            assert_same_bits(load_file(whole / file), load_file(ours))
        else:
            assert (whole / file).read_bytes() == ours.read_bytes(), file
