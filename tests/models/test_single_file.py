import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import difference, draw, tiny_config, tiny_xl_config
from transformers import CLIPTextModel

from ray_sd.config import ModelConfig
from ray_sd.errors import ArtifactError
from ray_sd.models import DiffusionModel, fingerprint, load_model, single_file
from ray_sd.models.original_layout import (
    clip_weights,
    open_clip_weights,
    original_weights,
    unet_weights,
    vae_weights,
)


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("a single file asked for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def layout(tiny: Path, tmp_path: Path) -> Path:
    return layout_of(tiny, tmp_path)


def layout_of(model: Path, folder: Path) -> Path:
    """A tiny model's configuration as a layout."""
    return shutil.copytree(model, folder / "layout", ignore=shutil.ignore_patterns("*.safetensors"))


def clip_weights_with_positions(text_encoder: CLIPTextModel) -> dict[str, torch.Tensor]:
    """Stable Diffusion 1 files hold the positions, too."""
    positions = torch.arange(text_encoder.config.max_position_embeddings)[None]
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    return clip_weights(text_encoder) | {name: positions}


def save(model: DiffusionModel, path: Path, text: dict, dtype: torch.dtype = torch.float32) -> None:
    weights = unet_weights(model.unet) | vae_weights(model.vae) | text
    half = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file({name: tensor.contiguous() for name, tensor in half.items()}, path)


def file_config(tiny: Path, path: Path, layout: Path, **settings: object) -> ModelConfig:
    config = tiny_config(path, tokenizer=str(tiny / "tokenizer"), **settings)
    return config.model_copy(update={"layout": str(layout)})  # no shipped layout is tiny


@pytest.mark.parametrize("text_weights", [clip_weights, clip_weights_with_positions, open_clip_weights])
def test_a_single_file_draws_the_same_picture_as_the_folder(tiny: Path, tmp_path: Path, layout: Path, text_weights):
    model = load_model(tiny_config(tiny))
    path = tmp_path / "model.safetensors"
    save(model, path, text_weights(model.text_encoder))
    loaded = load_model(file_config(tiny, path, layout))
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(model, part).state_dict()
        found = getattr(loaded, part).state_dict()
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), (part, name)
    assert difference(draw(loaded.pipeline()), draw(model.pipeline())) <= 1


def test_a_single_file_of_xl_draws_the_same_picture_as_the_folder(tiny_xl: Path, tmp_path: Path):
    layout = layout_of(tiny_xl, tmp_path)
    model = load_model(tiny_xl_config(tiny_xl))
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in original_weights(model).items()}, path)
    tokenizers = {name: str(tiny_xl / name) for name in ("tokenizer", "tokenizer_2")}
    loaded = load_model(tiny_xl_config(path, **tokenizers).model_copy(update={"layout": str(layout)}))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        expected, found = getattr(model, part).state_dict(), getattr(loaded, part).state_dict()
        assert found.keys() == expected.keys()
        assert not [name for name in expected if not torch.equal(found[name], expected[name])], part
    assert difference(draw(loaded.pipeline()), draw(model.pipeline())) <= 1


def test_a_half_precision_file_loads_as_fp32(tiny: Path, tmp_path: Path, layout: Path):
    model = load_model(tiny_config(tiny))
    path = tmp_path / "model.safetensors"
    save(model, path, clip_weights(model.text_encoder), torch.float16)
    loaded = load_model(file_config(tiny, path, layout))
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.unet.conv_in.weight, model.unet.conv_in.weight, atol=1e-3, rtol=1e-3)


def test_a_file_with_nothing_but_an_autoencoder_replaces_the_bases(tiny: Path, tmp_path: Path, layout: Path):
    model = load_model(tiny_config(tiny))
    path = tmp_path / "vae.safetensors"
    doubled = {name: 2 * tensor for name, tensor in vae_weights(model.vae, prefix="").items()}
    save_file({name: tensor.contiguous() for name, tensor in doubled.items()}, path)
    config = tiny_config(tiny, vae=str(path)).model_copy(update={"layout": str(layout)})
    assert torch.equal(load_model(config, ("vae",)).vae.encoder.conv_in.weight, 2 * model.vae.encoder.conv_in.weight)


def test_the_fingerprint_of_a_part_is_its_own(tiny: Path, tmp_path: Path, layout: Path):
    model = load_model(tiny_config(tiny))
    save(model, tmp_path / "one.safetensors", clip_weights(model.text_encoder))
    torch.nn.init.zeros_(model.unet.conv_out.weight)
    save(model, tmp_path / "two.safetensors", clip_weights(model.text_encoder))
    one, two = (file_config(tiny, tmp_path / f"{name}.safetensors", layout) for name in ("one", "two"))
    assert fingerprint(one, "unet") != fingerprint(two, "unet")
    assert fingerprint(one, "vae") == fingerprint(two, "vae")
    assert fingerprint(one, "text_encoder") == fingerprint(two, "text_encoder")


def test_a_file_alone_has_fingerprints(tiny: Path, tmp_path: Path):
    """The shipped layouts bring configuration and tokenizer; the weights may be anyone's."""
    model = load_model(tiny_config(tiny))
    path = tmp_path / "model.safetensors"
    save(model, path, clip_weights(model.text_encoder))
    config = ModelConfig.model_validate({"name": "alone", "base": str(path), "layout": "sd15"})
    other = config.model_copy(update={"layout": "sd21"})
    assert fingerprint(config, "text_encoder") != fingerprint(other, "text_encoder")
    assert fingerprint(config, "tokenizer") != fingerprint(config, "scheduler")


def test_a_file_that_lacks_a_part_or_has_another_layout_is_refused(tiny: Path, tmp_path: Path, layout: Path):
    model = load_model(tiny_config(tiny))
    path = tmp_path / "model.safetensors"
    save_file(unet_weights(model.unet), path)
    with pytest.raises(ArtifactError, match="holds no vae .no tensor named first_stage_model.*model.vae=PATH"):
        load_model(file_config(tiny, path, layout))
    with pytest.raises(ArtifactError, match="the unet in .*model.safetensors is not of layout 'sd15'"):
        load_model(tiny_config(path), ("unet",))
    weights = unet_weights(model.unet)
    weights.pop("model.diffusion_model.out.2.bias")
    save_file(weights, path)
    with pytest.raises(ArtifactError, match="the unet in .*model.safetensors lacks weights of layout"):
        load_model(file_config(tiny, path, layout), ("unet",))
    weights = clip_weights(model.text_encoder)
    weights.pop("cond_stage_model.transformer.text_model.final_layer_norm.bias")
    save_file(weights, path)
    with pytest.raises(ArtifactError, match="the text_encoder in .*model.safetensors lacks weights of layout"):
        load_model(file_config(tiny, path, layout), ("text_encoder",))


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path):
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    with pytest.raises(ArtifactError, match="model.ckpt is no .safetensors file; pickled weights are not read"):
        load_model(tiny_config(tmp_path / "model.ckpt"), ("unet",))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ArtifactError, match=r"model.gguf is no .safetensors file$"):
        load_model(tiny_config(tmp_path / "model.gguf"), ("unet",))
    (tmp_path / "model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ArtifactError, match="cannot be read as .safetensors"):
        load_model(tiny_config(tmp_path / "model.safetensors"), ("unet",))


def test_an_ending_in_capitals_is_an_ending(tiny: Path, tmp_path: Path, layout: Path):
    model = load_model(tiny_config(tiny))
    save(model, tmp_path / "MODEL.SAFETENSORS", clip_weights(model.text_encoder))
    config = file_config(tiny, tmp_path / "MODEL.SAFETENSORS", layout)
    loaded = load_model(config, ("unet",))
    assert torch.equal(loaded.unet.conv_in.weight, model.unet.conv_in.weight)
    assert fingerprint(config, "unet")


@pytest.mark.parametrize(("layout", "padding"), [("sd15", 49407), ("sd21", 0)])
def test_the_shipped_tokenizer_is_clips(layout: str, padding: int):
    tokenizer = single_file.load_tokenizer(layout, "tokenizer")
    assert len(tokenizer) == 49408
    ids = tokenizer(["a photo of a cat"], padding="max_length").input_ids[0]
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [padding] * 70
    assert tokenizer.decode(tokenizer("Café au lait, 20% off!").input_ids[1:-1]) == "café au lait , 2 0 % off !"
