from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNetSpatioTemporalConditionModel
from tiny_models import SCHEDULER_UPSCALE, UNET, UNET_VIDEO, random_clips, tiny_video_config

from ray_sd.config import TrainerConfig
from ray_sd.config.method import InflateMethod
from ray_sd.errors import ConfigError
from ray_sd.methods import build_method
from ray_sd.methods.inflate import inflate
from ray_sd.models import load_model

IMAGE = UNET | {"norm_num_groups": 32, "use_linear_projection": True, "attention_head_dim": [2, 4]}


def image_unet(seed: int = 0, **settings: object) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(**IMAGE | settings).eval()


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """An image model whose U-Net has the tiny video model's shapes."""
    folder = tmp_path_factory.mktemp("image_model")
    for part in ("vae", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(tiny / part)
    DDIMScheduler(**SCHEDULER_UPSCALE).save_pretrained(folder / "scheduler")  # which predicts v
    image_unet().save_pretrained(folder / "unet")
    return folder


def test_an_inflated_unet_computes_the_image_unets_output_on_every_frame():
    video, image = UNetSpatioTemporalConditionModel(**UNET_VIDEO).eval(), image_unet()
    inflate(video, image)
    generator = torch.Generator().manual_seed(0)
    noisy, condition = torch.randn(2, 2, 4, 4, 8, 8, generator=generator)
    embeds = torch.randn(2, 1, 32, generator=generator)
    timesteps = torch.tensor([3.0, 700.0])
    ids = torch.tensor([[6.0, 127.0, 0.02], [24.0, 3.0, 0.1]])
    with torch.no_grad():
        clips = video(torch.cat([noisy, condition], dim=2), timesteps, embeds, ids).sample
        for frame in range(4):
            # diffusers' video blocks use another epsilon in some norms.
            torch.testing.assert_close(
                clips[:, frame], image(noisy[:, frame], timesteps, embeds).sample, rtol=1e-3, atol=1e-3
            )


def test_every_weight_of_an_inflated_unet_trains_and_temporal_layers_leave_the_identity(
    image_model: Path, tiny_video: Path
):
    method = build_method(InflateMethod(image_model=str(image_model)))
    model = load_model(tiny_video_config(tiny_video), method.components())
    method.prepare(model, TrainerConfig())
    assert all(parameter.requires_grad for parameter in model.unet.parameters())
    [group] = method.parameter_groups(model, TrainerConfig(learning_rate=1e-3))
    optimizer = torch.optim.AdamW(group["params"], lr=1e-3)
    for step in range(3):
        method.objective(model, random_clips(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = UNetSpatioTemporalConditionModel(**UNET_VIDEO)
    inflate(before, image_unet())
    zero = {name for name, value in before.state_dict().items() if not value.any()}
    assert any("conv2" in name for name in zero)
    still = {name for name, value in model.unet.state_dict().items() if name in zero and not value.any()}
    assert not still


def test_a_skeleton_is_checked_without_weights(image_model: Path, tiny_video: Path):
    method = build_method(InflateMethod(image_model=str(image_model)))
    model = load_model(tiny_video_config(tiny_video), method.components(), skeleton=True)
    method.prepare(model, TrainerConfig())
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ({"block_out_channels": [32, 96], "attention_head_dim": [2, 4]}, r"has the shape \(\d+.*the video model's"),
        ({"use_linear_projection": False}, r"proj_in.weight has the shape \(32, 32, 1, 1\)"),
        ({"layers_per_block": 2}, "has more layers than the video model's: down_blocks.0"),
        ({"norm_num_groups": 8}, "its U-Net has norm_num_groups 8, and that of a video model always 32"),
        ({"act_fn": "gelu"}, "has act_fn gelu, and that of a video model always silu"),
        ({"flip_sin_to_cos": False}, "has flip_sin_to_cos False"),
        ({"freq_shift": 1}, "has freq_shift 1"),
        ({"attention_head_dim": [4, 4]}, "has 4 attention heads in down_blocks.0.*, the video model's 2"),
        ({"attention_head_dim": [2, 8]}, "has 8 attention heads in mid_block.*, the video model's 4"),
        ({"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}, "has fewer layers than"),
    ],
)
def test_an_image_model_of_another_shape_is_refused(image: dict, words: str):
    with pytest.raises(ConfigError, match=f"^method.image_model: .*{words}"):
        inflate(UNetSpatioTemporalConditionModel(**UNET_VIDEO), image_unet(**image))


def test_an_image_model_that_predicts_something_else_is_refused(
    image_model: Path, tiny: Path, tiny_video: Path, tmp_path
):
    for part in ("vae", "text_encoder", "tokenizer", "unet"):
        (tmp_path / part).symlink_to(image_model / part)
    (tmp_path / "scheduler").symlink_to(tiny / "scheduler")
    method = build_method(InflateMethod(image_model=str(tmp_path)))
    model = load_model(tiny_video_config(tiny_video), method.components(), skeleton=True)
    with pytest.raises(ConfigError, match="^method.image_model: it predicts 'epsilon', the video model 'v_prediction'"):
        method.prepare(model, TrainerConfig())
