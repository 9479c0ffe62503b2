from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline
from tiny_models import VAE_VIDEO, tiny_video_config

from ray_sd.adapter import describe_base, describe_folder
from ray_sd.config import TrainerConfig
from ray_sd.config.load import to_dict
from ray_sd.config.method import TemporalDecoderMethod
from ray_sd.errors import ArtifactError
from ray_sd.methods import build_method, load_adapter
from ray_sd.methods.temporal_decoder import feature_distances
from ray_sd.models import fingerprint, load_model
from ray_sd.train.precision import cast_frozen


def prepared(folder: Path, **settings: object):
    method = build_method(TemporalDecoderMethod(**settings))
    model = load_model(tiny_video_config(folder), method.components())
    method.prepare(model, TrainerConfig())
    return method, model


def clips(rows: int = 2, num_frames: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (rows, num_frames, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return {"pixels": pixels, "row_seed": torch.arange(rows)}


def test_only_the_decoders_temporal_layers_train(tiny_video: Path, tmp_path: Path):
    method, model = prepared(tiny_video)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = ("temporal_res_block", "time_mixer.mix_factor", "decoder.time_conv_out")
    assert {part for part in parts for name in names if part in name} == set(parts)
    assert all(name.startswith("vae.decoder.") and any(part in name for part in parts) for name in names)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    [group] = method.parameter_groups(model, TrainerConfig(learning_rate=1e-2))
    optimizer = torch.optim.AdamW(group["params"], lr=group["lr"])
    method.objective(model, clips()).backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert changed <= names

    method.export(model, tmp_path)
    vae = AutoencoderKLTemporalDecoder.from_pretrained(tmp_path / "vae", use_safetensors=True)
    assert StableVideoDiffusionPipeline.from_pretrained(tiny_video, vae=vae).vae is vae
    fresh = load_model(tiny_video_config(tiny_video))
    assert method.attach(fresh, tmp_path, 1.0) == len(vae.state_dict())
    torch.testing.assert_close(fresh.vae.state_dict(), model.vae.state_dict())


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_loss_is_of_what_the_pipeline_decodes(tiny_video: Path, chunk_size: int | None):
    method, model = prepared(tiny_video, chunk_size=chunk_size, perceptual_weight=0.25)
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tiny_video)
    batch = clips(rows=2)
    losses = method.row_losses(model, batch)
    for row in range(2):
        pixels = batch["pixels"][row].float() / 127.5 - 1
        latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        decoded = pipeline.decode_latents(latents[None], 5, chunk_size or 5)[0].transpose(0, 1)
        expected = (decoded - pixels).abs().mean() + 0.25 * feature_distances(model, decoded, pixels).mean()
        torch.testing.assert_close(losses[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_in_half_precision_the_decoder_computes_as_the_autoencoder_asks(tiny_video: Path, whole: bool):
    method = build_method(TemporalDecoderMethod())
    model = load_model(tiny_video_config(tiny_video, vae_float32=whole), method.components())
    method.prepare(model, TrainerConfig())
    expected = method.objective(model, clips()).detach()
    cast_frozen(model, torch.bfloat16)
    seen = set()
    model.vae.decoder.conv_out.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.objective(model, clips())
    loss.backward()
    assert seen == {torch.float32 if whole else torch.bfloat16}
    torch.testing.assert_close(loss.detach(), expected, rtol=2e-2, atol=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad.isfinite().all() for parameter in trained)


def test_feature_distances_grow_with_what_differs(tiny_video: Path):
    _, model = prepared(tiny_video)
    one = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(feature_distances(model, one, one), torch.zeros(2))
    little, much = (feature_distances(model, one, (one + shift).clamp(-1, 1)) for shift in (0.05, 0.8))
    assert (little > 0).all()
    assert (little < much).all()


def test_without_the_perceptual_part_no_image_encoder_is_loaded(tiny_video: Path):
    method, model = prepared(tiny_video, perceptual_weight=0)
    assert model.image_encoder is None
    method.objective(model, clips()).backward()


def test_a_decoder_goes_with_the_autoencoder_that_it_was_trained_on(tiny_video: Path, tmp_path: Path):
    method, model = prepared(tiny_video)
    method.export(model, tmp_path)
    base = describe_base(model.config, {part: fingerprint(model.config, part) for part in method.relies_on()})
    made = {"kind": "temporal_decoder", "family": model.config.family, "config": {"method": to_dict(method.config)}}
    describe_folder(tmp_path, base=base, **made)
    own, other = (
        load_model(tiny_video_config(tiny_video, **settings), {"vae"})
        for settings in ({}, {"vae": {"architecture": VAE_VIDEO}})
    )
    assert load_adapter(own, tmp_path) == len(own.vae.state_dict())
    with pytest.raises(ArtifactError, match="the vae of 'tiny_video' is another; use that base"):
        load_adapter(other, tmp_path)
    assert load_adapter(other, tmp_path, allow_other_base=True) == len(own.vae.state_dict())
