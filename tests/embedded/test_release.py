from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel

import jobs.release_emoji
from ray_sd.adapter import write_manifest
from ray_sd.config import TrainerConfig
from ray_sd.config.load import load_config
from ray_sd.errors import ConfigError
from ray_sd.methods import build_method
from ray_sd.models import fingerprint, load_model

CLIPS = ("dataset=emoji_clips", "dataset.resolution=64", "trainer=cpu", "tracker=none")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where releases go in place of the package."""
    for name in ("FOLDER", "UPSCALER", "VIDEO", "INTERPOLATION", "ADAPTERS"):
        monkeypatch.setattr(jobs.release_emoji, name, tmp_path / "released" / name.lower())
    return tmp_path / "released"


def trained(folder: Path, method: str, *settings: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter as a run leaves it, all that trains moved, and what the component is then."""
    config = load_config(["name=run", "model=tiny_random_video", f"method={method}", *CLIPS, *settings])
    verbs = build_method(config.method)
    model = load_model(config.model, verbs.components())
    verbs.prepare(model, TrainerConfig())
    with torch.no_grad():
        for group in verbs.parameter_groups(model, TrainerConfig()):
            for parameter in group["params"]:
                parameter.add_(0.125)
    verbs.export(model, folder)
    fingerprints = {part: fingerprint(config.model, part) for part in verbs.relies_on()}
    write_manifest(
        folder, config=config, step=1, fingerprints=fingerprints, data_fingerprint="d", metrics={"loss": 1.0}
    )
    part = model.vae if method == "temporal_decoder" else model.unet
    return folder, part.state_dict()


def assert_half_of(released: torch.nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    found = released.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].half(), values.half()) for name, values in wanted.items())


def test_a_video_model_is_released_whole(tmp_path: Path, folders: Path):
    adapter, unet = trained(tmp_path / "adapter", "temporal")
    jobs.release_emoji.main([str(adapter)])
    pipeline = StableVideoDiffusionPipeline.from_pretrained(folders / "video", torch_dtype=torch.float16)
    assert_half_of(pipeline.unet, unet)
    assert [child.name for child in folders.iterdir()] == ["video"]


def test_a_model_of_the_frames_between_is_released_as_its_u_net(tmp_path: Path, folders: Path):
    adapter, unet = trained(tmp_path / "adapter", "interpolation")
    jobs.release_emoji.main([str(adapter)])
    assert_half_of(UNetSpatioTemporalConditionModel.from_pretrained(folders / "interpolation" / "unet"), unet)
    assert [path.name for path in folders.rglob("*") if path.is_dir()] == ["interpolation", "unet"]


def test_a_video_autoencoder_is_released_into_the_video_model(tmp_path: Path, folders: Path):
    adapter, vae = trained(tmp_path / "adapter", "temporal_decoder")
    jobs.release_emoji.main([str(adapter)])
    assert_half_of(AutoencoderKLTemporalDecoder.from_pretrained(folders / "video" / "vae"), vae)
    assert [path.name for path in folders.rglob("*") if path.is_dir()] == ["video", "vae"]


@pytest.mark.parametrize("method", ["temporal", "interpolation"])
def test_what_has_seen_the_held_out_motion_is_not_released(tmp_path: Path, folders: Path, method: str):
    adapter, _ = trained(tmp_path / "adapter", method, "dataset=spin")
    with pytest.raises(
        ConfigError, match="adapter was trained on embedded/clips/spin, which no embedded model may have"
    ):
        jobs.release_emoji.main([str(adapter)])
    assert not folders.exists()
