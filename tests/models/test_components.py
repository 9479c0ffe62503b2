import json
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tiny_models import TEXT_ENCODER, UNET, VAE, difference, draw, save_tiny_model, save_tokenizer, tiny_config

from ray_sd.config import ModelConfig
from ray_sd.config.load import load_config
from ray_sd.errors import ArtifactError
from ray_sd.methods import build_method
from ray_sd.models import fingerprint, load_model

RANDOM = {
    "name": "scratch",
    "unet": {"architecture": UNET},
    "vae": {"architecture": VAE},
    "text_encoder": {"architecture": TEXT_ENCODER},
}


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in module.parameters()])


def test_parts_saved_apart_draw_the_same_picture_as_together(tiny: Path, tmp_path: Path):
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(tiny / part, tmp_path / "apart" / f"my-{part}")
    shutil.copytree(tiny / "vae", tmp_path / "other" / "vae")
    apart = ModelConfig.model_validate(
        {
            "name": "apart",
            "unet": str(tmp_path / "apart/my-unet"),
            "vae": str(tmp_path / "other"),  # its folder `vae` is found
            "text_encoder": {"path": str(tmp_path / "apart"), "subfolder": "my-text_encoder"},
            "tokenizer": str(tmp_path / "apart/my-tokenizer"),
            "scheduler": {"path": str(tmp_path / "apart/my-scheduler")},
        }
    )
    together = tiny_config(tiny)
    expected = draw(load_model(together).pipeline())
    assert difference(draw(load_model(apart).pipeline()), expected) <= 1
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        assert fingerprint(apart, part) == fingerprint(together, part)


def test_a_component_replaces_the_bases(tiny: Path, tmp_path: Path):
    other = save_tiny_model(tmp_path, seed=1)
    model = load_model(tiny_config(tiny, vae=str(other)))
    assert torch.equal(weights(model.vae), weights(AutoencoderKL.from_pretrained(other / "vae")))
    assert torch.equal(weights(model.unet), weights(load_model(tiny_config(tiny), ("unet",)).unet))


def test_random_weights_come_from_the_seed_alone(tmp_path: Path):
    save_tokenizer(tmp_path)
    settings = RANDOM | {"tokenizer": str(tmp_path)}
    config = ModelConfig.model_validate(settings)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole = load_model(config)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    alone = load_model(config, ("text_encoder",))
    assert torch.equal(weights(whole.text_encoder), weights(alone.text_encoder))
    other = ModelConfig.model_validate(settings | {"seed": 1})
    assert not torch.equal(weights(load_model(other, ("unet",)).unet), weights(whole.unet))
    for part in ("unet", "vae", "text_encoder"):
        assert fingerprint(config, part) != fingerprint(other, part)
    assert fingerprint(config, "unet") == fingerprint(ModelConfig.model_validate(settings), "unet")


def test_loading_a_folder_leaves_the_global_generator_alone(tiny: Path):
    before = torch.get_rng_state()
    load_model(tiny_config(tiny))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_text_encoders_architecture_takes_its_vocabulary_from_the_tokenizer(tmp_path: Path):
    save_tokenizer(tmp_path)
    architecture = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ModelConfig.model_validate(
        RANDOM | {"tokenizer": str(tmp_path), "text_encoder": {"architecture": architecture}}
    )
    text = load_model(config, ("text_encoder",)).text_encoder.config
    assert (text.vocab_size, text.max_position_embeddings, text.bos_token_id, text.eos_token_id) == (514, 16, 512, 513)


def test_an_architecture_that_cannot_be_built_is_refused_in_words(tmp_path: Path):
    save_tokenizer(tmp_path)
    config = ModelConfig.model_validate(
        RANDOM | {"tokenizer": str(tmp_path), "unet": {"architecture": UNET | {"block_out_channels": [32]}}}
    )
    with pytest.raises(
        ArtifactError, match="cannot build a UNet2DConditionModel from model.unet.architecture: .*block_out"
    ):
        load_model(config, ("unet",))


def test_weights_load_as_fp32_from_half_precision_and_from_shards(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny, tmp_path / "half")
    file = tmp_path / "half/unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    half = load_model(tiny_config(tmp_path / "half"), ("unet",)).unet
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}

    shutil.copytree(tiny, tmp_path / "shards")
    unet = load_model(tiny_config(tiny), ("unet",)).unet
    shutil.rmtree(tmp_path / "shards/unet")
    unet.save_pretrained(tmp_path / "shards/unet", max_shard_size="1MB")
    assert len(list((tmp_path / "shards/unet").glob("*.safetensors"))) > 1
    sharded = tiny_config(tmp_path / "shards")
    assert torch.equal(weights(load_model(sharded, ("unet",)).unet), weights(unet))
    assert fingerprint(sharded, "unet") == fingerprint(tiny_config(tiny), "unet")


def test_a_variant_is_taken_where_there_is_one(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny, tmp_path / "both")
    folder = tmp_path / "both/unet"
    plain = load_file(folder / "diffusion_pytorch_model.safetensors")
    doubled = {name: 2 * tensor for name, tensor in plain.items()}
    save_file(doubled, folder / "diffusion_pytorch_model.fp16.safetensors", {"format": "pt"})
    config = tiny_config(tmp_path / "both", variant="fp16")
    model = load_model(config, ("unet", "vae"))  # the autoencoder has no such variant
    torch.testing.assert_close(weights(model.unet), 2 * weights(load_model(tiny_config(tiny), ("unet",)).unet))
    assert fingerprint(config, "unet") != fingerprint(tiny_config(tiny), "unet")
    assert fingerprint(config, "vae") == fingerprint(tiny_config(tiny), "vae")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{stem}.fp16.safetensors", "are of the variant fp16, such as .*fp16.safetensors; set model.variant=fp16$"),
        ("{stem}.fp16-00001-of-00001.safetensors", "are of the variant fp16, such as .*; set model.variant=fp16$"),
        ("{stem}.SAFETENSORS", "SAFETENSORS.; rename .*SAFETENSORS so that it ends in .safetensors$"),
        ("{stem}.msgpack", r"\(found: config.json, .*.msgpack\)$"),
        ("{stem}.bin", r"\(found: config.json, .*.bin\); pickled weights are not read$"),
    ],
)
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_weights_of_another_name_are_told_for_what_they_are(
    tiny: Path, tmp_path: Path, component: str, name: str, words: str
):
    shutil.copytree(tiny / component, tmp_path / component)
    [file] = (tmp_path / component).glob("*.safetensors")
    file.rename(file.with_name(name.format(stem=file.stem)))
    with pytest.raises(ArtifactError, match=f"weights for the {component} in .*{words}"):
        load_model(tiny_config(tiny, **{component: str(tmp_path)}), (component,))


def test_the_fingerprint_follows_content(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny, tmp_path / "copy")
    config = tiny_config(tmp_path / "copy")
    assert fingerprint(config, "unet") == fingerprint(tiny_config(tiny), "unet")

    file = tmp_path / "copy/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] += 1e-6
    save_file(tensors, file, {"format": "pt"})
    assert fingerprint(config, "unet") != fingerprint(tiny_config(tiny), "unet")

    settings = tmp_path / "copy/vae/config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps(content | {"_diffusers_version": "0.1"}))
    assert fingerprint(config, "vae") == fingerprint(tiny_config(tiny), "vae")
    settings.write_text(json.dumps(content | {"scaling_factor": 0.7}))
    assert fingerprint(config, "vae") != fingerprint(tiny_config(tiny), "vae")

    merges = tmp_path / "copy/tokenizer/tokenizer_config.json"
    merges.write_text(merges.read_text().replace("16", "15"))
    assert fingerprint(config, "text_encoder") != fingerprint(tiny_config(tiny), "text_encoder")


def test_a_folder_without_a_component_is_refused_in_words(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "vae")
    words = "vae holds no vae .no config.json there; folders in .*: scheduler, text_encoder, tokenizer, unet.*model.vae=PATH"
    with pytest.raises(ArtifactError, match=words):
        load_model(tiny_config(tmp_path))


def test_a_component_of_another_kind_is_refused(tiny: Path):
    with pytest.raises(ArtifactError, match="holds a AutoencoderKL; the unet must be a UNet2DConditionModel"):
        load_model(tiny_config(tiny, unet=str(tiny / "vae")), ("unet",))


def test_pickled_weights_are_not_read(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").rename(tmp_path / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(
        ArtifactError, match="no .safetensors weights for the unet .*model.bin.*pickled weights are not read"
    ):
        load_model(tiny_config(tmp_path), ("unet",))


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_weights_that_are_damaged_or_incomplete_are_refused(tiny: Path, tmp_path: Path, component: str):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    file = next((tmp_path / component).glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ArtifactError, match=f"the {component} in .* lacks 1 of its weights, such as "):
        load_model(tiny_config(tmp_path), (component,))
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    for content, words in ((file.read_bytes()[:1000], ""), (b"", "it is empty"), (pointer, "it is Git LFS' pointer")):
        file.write_bytes(content)
        for call in (load_model, fingerprint):
            with pytest.raises(ArtifactError, match=f"{component}/{file.name} cannot be read as .safetensors: {words}"):
                call(tiny_config(tmp_path), (component,) if call is load_model else component)
    (tmp_path / component / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="config.json cannot be read as JSON"):
        fingerprint(tiny_config(tmp_path), component)


@pytest.mark.parametrize("preset", ["lora", "lora_linear", "lora_dora", "full"])
def test_a_skeleton_has_the_parameters_of_the_model(tiny: Path, preset: str):
    config = load_config(["experiment=lora", "dataset.source.path=x", f"method={preset}", "method.text_encoder=true"])
    method = build_method(config.method)
    shapes = []
    for skeleton in (True, False):
        model = load_model(tiny_config(tiny), method.components(), skeleton=skeleton)
        method.prepare(model, config.trainer)
        assert all(parameter.is_meta == skeleton for parameter in model.parameters())
        shapes.append({name: (p.shape, p.requires_grad) for name, p in model.named_parameters()})
    assert shapes[0] == shapes[1]


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match="model 'tiny': no folder or file .*nowhere for the unet"):
        load_model(tiny_config(tmp_path / "nowhere"), ("unet",))


def test_an_embedded_model_is_found_and_a_wrong_name_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import ray_sd.embedded

    monkeypatch.setattr(ray_sd.embedded, "__path__", [str(tmp_path)])
    save_tiny_model(tmp_path / "small")
    assert load_model(ModelConfig(name="small", base="embedded/small"), ("vae",)).vae is not None
    with pytest.raises(ArtifactError, match="no embedded model 'smal'; the embedded models are: small"):
        load_model(ModelConfig(name="small", base="embedded/smal"))


def test_a_hub_id_without_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object, **settings: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ArtifactError) as caught:
        load_model(ModelConfig(name="sd15", base="nobody/nothing"))
    message = str(caught.value)
    assert "\n" not in message
    assert "cannot fetch the unet of 'nobody/nothing' from the Hugging Face hub" in message
    assert message.endswith("give its folder: model.base=/path/to/folder")


def test_a_hub_id_loads_from_the_cache_without_network(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = ModelConfig(name="tiny", base="someone/tiny")
    assert fingerprint(config, "unet") == fingerprint(tiny_config(tiny), "unet")
    assert load_model(config).tokenizer is not None
