from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from pictures import picture
from random_loras import random_updates
from safetensors.torch import load_file, save_file
from tiny_models import difference, draw, save_tiny_model, tiny_config, tiny_xl_config

from jobs.export import main
from ray_sd.adapter import read_manifest
from ray_sd.config import GenerateConfig
from ray_sd.config.load import load_config, run_job
from ray_sd.errors import ArtifactError
from ray_sd.methods import load_adapter
from ray_sd.methods.embeddings import write_embedding
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.lora_writers import write_diffusers, write_kohya
from ray_sd.models import load_model
from ray_sd.models.single_file import ORIGINS

LAYERS = {
    "sd15": {
        "unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": 640,
        "te_text_model_encoder_layers_0_self_attn_q_proj": 768,
    },
    "sd21": {
        "unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": 640,
        "te_text_model_encoder_layers_0_self_attn_q_proj": 1024,
    },
    "sdxl": {
        "unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": 640,
        "te1_text_model_encoder_layers_0_self_attn_q_proj": 768,
    },
}
"""Two layers of each by kohya-ss' names, with their sizes."""
FAMILIES = {"sd15": ("tiny", tiny_config), "sdxl": ("tiny_xl", tiny_xl_config)}


@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_lora_draws_alike_after_every_conversion_and_back(
    request: pytest.FixtureRequest, job: Callable, tmp_path: Path, name: str
):
    folder, config = request.getfixturevalue(FAMILIES[name][0]), FAMILIES[name][1]
    write_diffusers(random_updates(load_model(config(folder)), alike=False), tmp_path / "start.safetensors")
    expected = picture(folder, "start.safetensors", config=config)
    assert difference(picture(folder, config=config), expected) > 10

    steps = {
        "x.safetensors": "kohya",
        "peft": "peft",
        "mine": "diffusers",
        "again.safetensors": "diffusers",
        "last.safetensors": "kohya",
    }
    source = "start.safetensors"
    for output, layout in steps.items():
        printed = job("convert", f"adapter={source}", f"layout={layout}", f"output={output}", base=folder, model=name)
        assert printed.startswith(f"output:  {output}\n")
        assert "layers of the unet" in printed
        assert difference(picture(folder, output, config=config), expected) <= 1, output
        source = output
    for file in ("x.safetensors", "again.safetensors"):
        pipeline = load_model(config(folder)).pipeline()
        pipeline.load_lora_weights(tmp_path, weight_name=file)
        assert difference(draw(pipeline, "a <cat>"), expected) <= 1, file


def test_an_imported_lora_is_an_adapter_of_its_base(tiny: Path, job: Callable, tmp_path: Path):
    model = load_model(tiny_config(tiny))
    write_kohya(random_updates(model), tmp_path / "x.safetensors", LoraNames(model))
    job("convert", "adapter=x.safetensors", "output=mine")
    manifest = read_manifest(tmp_path / "mine")
    assert (manifest.kind, manifest.base.name, manifest.base.source) == ("lora", "sd15", str(tiny))
    assert set(manifest.files) == {"pytorch_lora_weights.safetensors", "kohya/lora.safetensors"}
    assert manifest.config["method"]["rank"] == 4
    other = load_model(tiny_config(save_tiny_model(tmp_path / "other", seed=1)))
    with pytest.raises(ArtifactError, match="mine was made for the base 'sd15'"):
        load_adapter(other, tmp_path / "mine")


def test_what_a_run_made_keeps_its_base_through_a_conversion(adapters: dict[str, Path], job: Callable, tmp_path: Path):
    """Of a base that is not at hand: only its names and sizes are needed."""
    other = save_tiny_model(tmp_path / "other", seed=1)
    job("convert", f"adapter={adapters['lora']}", "output=mine", base=other)
    assert read_manifest(tmp_path / "mine").base == read_manifest(adapters["lora"]).base


@pytest.mark.parametrize("kind", ["tokens", "pivotal", "dora"])
def test_adapters_of_every_kind_become_folders_that_draw_alike(
    tiny: Path,
    adapters: dict[str, Path],
    job: Callable,
    kind: str,
):
    job("convert", f"adapter={adapters[kind]}", "output=mine")
    assert difference(picture(tiny, "mine"), picture(tiny, adapters[kind])) <= 1
    assert difference(picture(tiny, "mine"), picture(tiny)) > 5


def test_an_embedding_changes_its_layout_and_its_word(tiny: Path, adapters: dict[str, Path], job: Callable):
    expected = picture(tiny, adapters["tokens"])
    job("convert", f"adapter={adapters['tokens']}", "layout=a1111", "output=katze.safetensors")
    assert list(load_file("katze.safetensors")) == ["emb_params"]
    assert difference(picture(tiny, "katze.safetensors", prompt="a katze"), expected) <= 1
    job("convert", "adapter=katze.safetensors", "token=<neko>", "output=neko.safetensors", "dtype=float16")
    assert {name: tensor.dtype for name, tensor in load_file("neko.safetensors").items()} == {"<neko>": torch.float16}
    assert difference(picture(tiny, "neko.safetensors", prompt="a <neko>"), expected) <= 1


def test_the_word_of_an_xl_embedding_in_the_layout_of_a1111_is_its_files_name(
    tiny_xl: Path, job: Callable, tmp_path: Path
):
    generator = torch.Generator().manual_seed(0)
    embedding = {"text_encoder": torch.randn(2, 32, generator=generator)}
    embedding["text_encoder_2"] = torch.randn(2, 48, generator=generator)
    write_embedding(tmp_path / "cat.safetensors", "<cat>", embedding, "<cat>")
    expected = picture(tiny_xl, "cat.safetensors", config=tiny_xl_config)
    assert difference(picture(tiny_xl, config=tiny_xl_config), expected) > 5
    settings = ["adapter=cat.safetensors", "layout=a1111", "output=katze.safetensors"]
    job("convert", *settings, base=tiny_xl, model="sdxl")
    assert difference(picture(tiny_xl, "katze.safetensors", prompt="a katze", config=tiny_xl_config), expected) <= 1


def test_the_words_of_a_pivotal_tuning_lie_beside_its_file(tiny: Path, adapters: dict[str, Path], job: Callable):
    printed = job("convert", f"adapter={adapters['pivotal']}", "layout=kohya", "output=x.safetensors")
    assert "x-embeddings: the tokens, for which such a file has no place" in printed
    words = Path("x-embeddings") / "a1111" / "cat.safetensors"
    found = picture(tiny, "x.safetensors", words, prompt="a cat")
    assert difference(found, picture(tiny, adapters["pivotal"])) <= 1


def test_half_precision_is_half_the_size(adapters: dict[str, Path], job: Callable):
    for dtype in ("float32", "float16"):
        job("convert", f"adapter={adapters['lora']}", f"dtype={dtype}", f"output={dtype}.safetensors")
    tensors = load_file("float16.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert Path("float16.safetensors").stat().st_size < 0.7 * Path("float32.safetensors").stat().st_size


@pytest.mark.parametrize("name", ORIGINS)
def test_models_of_the_hub_that_presets_name_are_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
):
    """Their layers and sizes are in the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    found = {}
    for layer, size in LAYERS[name].items():
        found |= {
            f"lora_{layer}.lora_down.weight": torch.randn(2, size),
            f"lora_{layer}.lora_up.weight": torch.randn(size, 2),
        }
        found[f"lora_{layer}.alpha"] = torch.tensor(2.0)
    save_file(found, "start.safetensors")
    for source, output, layout in (("start.safetensors", "mine", "diffusers"), ("mine", "again.safetensors", "kohya")):
        code = run_job(main, ["convert", f"model={name}", f"adapter={source}", f"output={output}", f"layout={layout}"])
        assert code == 0, capsys.readouterr().err
    again = load_file("again.safetensors")
    assert again.keys() == found.keys()
    assert all(torch.equal(again[key], found[key]) for key in found)
    base = read_manifest(Path("mine")).base
    assert (base.source, base.fingerprints) == (ORIGINS[name], {})


def test_the_package_holds_the_configuration_of_what_presets_name():
    for layout, origin in ORIGINS.items():
        model = load_config(["prompt=x", f"model={layout}"], GenerateConfig).model
        assert (model.layout, model.base) == (layout, origin)
