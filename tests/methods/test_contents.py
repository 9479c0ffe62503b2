"""What other tools wrote, loaded as an adapter."""

import logging
from pathlib import Path

import pytest
import torch
from random_loras import random_updates
from safetensors.torch import load_file, save_file
from tiny_models import difference, draw, export_adapter, tiny_config, tiny_xl_config

from ray_sd.errors import ArtifactError
from ray_sd.files import local
from ray_sd.headers import read_header
from ray_sd.methods import load_adapter
from ray_sd.methods.contents import read_contents
from ray_sd.methods.lora import attach_updates
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.lora_writers import write_diffusers, write_kohya, write_peft
from ray_sd.models import DiffusionModel, load_model

TOKENS = {"placeholder_token": ["<cat>"], "initializer_token": ["a"], "num_vectors": 2}


@pytest.fixture
def model(tiny: Path) -> DiffusionModel:
    return load_model(tiny_config(tiny))


@pytest.mark.parametrize("layout", ["diffusers file", "diffusers folder", "kohya", "peft", "a file of peft"])
def test_a_lora_of_another_tool_is_an_adapter(
    tiny: Path, model: DiffusionModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str
):
    updates = random_updates(model)
    names = LoraNames(model)
    paths = {
        "diffusers file": tmp_path / "x.safetensors",
        "diffusers folder": tmp_path / "folder",
        "kohya": tmp_path / "kohya.safetensors",
        "peft": tmp_path / "peft",
        "a file of peft": tmp_path / "peft" / "unet" / "adapter_model.safetensors",
    }
    write_diffusers(updates, tmp_path / "x.safetensors")
    write_diffusers(updates, tmp_path / "folder" / "pytorch_lora_weights.safetensors")
    write_kohya(updates, tmp_path / "kohya.safetensors", names)
    write_peft(updates, tmp_path / "peft", names)

    loaded = load_model(tiny_config(tiny))
    with caplog.at_level(logging.INFO):
        assert load_adapter(loaded, paths[layout], 0.5) > 0
    unet_alone = layout == "a file of peft"
    words = f"{len(updates['unet'])} layers of the unet"
    words += "" if unet_alone else f", {len(updates['text_encoder'])} layers of the text_encoder"
    assert caplog.messages[-1] == f"{paths[layout]}: {words}"
    attach_updates(model, {"unet": updates["unet"]} if unet_alone else updates, 0.5)
    assert difference(draw(loaded.pipeline()), draw(model.pipeline())) <= 1


def test_an_embedding_of_each_layout_is_an_adapter_whose_word_draws(tiny: Path, model: DiffusionModel, tmp_path: Path):
    export_adapter(tiny, tmp_path, {"name": "textual_inversion", **TOKENS})
    load_adapter(model, tmp_path)
    expected = draw(model.pipeline(), "a <cat>")
    for path, word in (
        (tmp_path / "learned_embeds.safetensors", "<cat>"),
        (tmp_path / "a1111" / "cat.safetensors", "cat"),
    ):
        loaded = load_model(tiny_config(tiny))
        before = draw(loaded.pipeline(), f"a {word}")
        assert load_adapter(loaded, path) == 1
        assert difference(draw(loaded.pipeline(), f"a {word}"), expected) <= 1
        assert difference(before, expected) > 5
    (tmp_path / "manifest.json").unlink()
    assert load_adapter(load_model(tiny_config(tiny)), tmp_path) == 1


def test_a_pair_of_embeddings_belongs_to_xl(tiny: Path, tiny_xl: Path, tmp_path: Path):
    save_file({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 48)}, tmp_path / "cat.safetensors")
    assert load_adapter(load_model(tiny_xl_config(tiny_xl)), tmp_path / "cat.safetensors") == 1
    with pytest.raises(ArtifactError, match="vectors for text_encoder and text_encoder_2, the base has text_encoder"):
        load_adapter(load_model(tiny_config(tiny)), tmp_path / "cat.safetensors")


def test_a_pivotal_folder_without_its_manifest_holds_both(tiny: Path, model: DiffusionModel, tmp_path: Path):
    export_adapter(tiny, tmp_path, {"name": "dreambooth", "tokens": TOKENS, "adapter": {"name": "lora", "rank": 2}})
    load_adapter(model, tmp_path)
    (tmp_path / "manifest.json").unlink()
    loaded = load_model(tiny_config(tiny))
    assert read_contents(tmp_path, loaded).summary() == "32 layers of the unet, the token <cat>"
    load_adapter(loaded, tmp_path)
    assert difference(draw(loaded.pipeline(), "a <cat>"), draw(model.pipeline(), "a <cat>")) <= 1


def test_whole_weights_without_a_manifest_are_parts_of_a_model(tiny: Path, model: DiffusionModel, tmp_path: Path):
    export_adapter(tiny, tmp_path, {"name": "full"})
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=f"as parts of the model they are model.unet={tmp_path}/unet"):
        load_adapter(model, tmp_path)


def test_what_is_no_adapter_is_refused_in_words(model: DiffusionModel, tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"is no adapter: it has no manifest.json, no pytorch_lora_weights"):
        load_adapter(model, tmp_path)
    with pytest.raises(ArtifactError, match="no file or folder .*nowhere"):
        load_adapter(model, tmp_path / "nowhere")
    (tmp_path / "x.pt").touch()
    with pytest.raises(ArtifactError, match="x.pt is no .safetensors file; pickled weights are not read"):
        load_adapter(model, tmp_path / "x.pt")
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "mine.safetensors")
    with pytest.raises(ArtifactError, match="is no adapter: .*; give one of its files: mine.safetensors"):
        load_adapter(model, tmp_path)
    save_file({"emb_params": torch.ones(0, 32)}, tmp_path / "none.safetensors")
    with pytest.raises(ArtifactError, match="none.safetensors is no embedding: emb_params has no values"):
        load_adapter(model, tmp_path / "none.safetensors")
    with pytest.raises(ArtifactError, match="embeddings have no strength; use adapter_scale=1"):
        load_adapter(model, tmp_path / "mine.safetensors", scale=0.5)


def test_an_ending_in_capitals_is_no_pickle(model: DiffusionModel, tmp_path: Path):
    write_kohya(random_updates(model), tmp_path / "PET.SAFETENSORS", LoraNames(model))
    assert load_adapter(model, tmp_path / "PET.SAFETENSORS") > 0
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "cat.Safetensors")
    assert read_contents(tmp_path / "cat.Safetensors", model).summary() == "the token cat"
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ArtifactError, match=r"x.gguf is no .safetensors file$"):
        load_adapter(model, tmp_path / "x.gguf")


def test_an_xl_file_does_not_load_into_a_model_of_version_1(tiny_xl: Path, model: DiffusionModel, tmp_path: Path):
    xl = load_model(tiny_xl_config(tiny_xl))
    write_kohya(random_updates(xl), tmp_path / "xl.safetensors", LoraNames(xl))
    total = len(load_file(tmp_path / "xl.safetensors"))
    with pytest.raises(
        ArtifactError,
        match=f"no layer for .* of {total} tensors, such as lora_te2_.*another base, Stable Diffusion XL$",
    ):
        load_adapter(model, tmp_path / "xl.safetensors")


def test_a_lora_of_version_1_does_not_load_into_xl(tiny_xl: Path, tmp_path: Path):
    keys = [f"lora_unet_down_blocks_0_attentions_0_proj_in.lora_{half}.weight" for half in ("down", "up")]
    save_file({key: torch.ones(2, 2) for key in keys}, tmp_path / "x.safetensors")
    words = "no layer for 2 of 2 tensors, .*made for another base, Stable Diffusion 1 or 2$"
    with pytest.raises(ArtifactError, match=words):
        load_adapter(load_model(tiny_xl_config(tiny_xl), skeleton=True), tmp_path / "x.safetensors")


def bundle(lora: Path, embeddings: dict[str, dict[str, torch.Tensor]]) -> None:
    """Puts embeddings into a LoRA's file, as A1111 and kohya-ss' tools do."""
    words = {
        f"bundle_emb.{word}.{name}": tensor for word, parts in embeddings.items() for name, tensor in parts.items()
    }
    save_file(load_file(lora) | words, lora)


def test_a_file_of_bundled_embeddings_alone_holds_their_words(model: DiffusionModel, tmp_path: Path):
    file = tmp_path / "x.safetensors"
    for words in (["cat"], ["cat", "mat"]):
        save_file({f"bundle_emb.{word}.emb_params": torch.ones(1, 32) for word in words}, file)
        assert list(read_contents(file, model).embeddings) == words
        assert read_header(local(file)).words("x") == tuple(words)


def test_a_folder_without_its_weights_is_told_with_what_is_there(model: DiffusionModel, tmp_path: Path):
    (tmp_path / "pytorch_lora_weights.bin").touch()
    there = r"\(found: .*pytorch_lora_weights.bin\); pickled weights are not read$"
    with pytest.raises(ArtifactError, match=f"is no adapter: .* {there}"):
        load_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ArtifactError, match=f"has no adapter_model.safetensors {there}"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("name", ["string_to_param.*", "emb_params", "<cat>"])
def test_embeddings_in_a_loras_file_belong_to_it(tiny: Path, model: DiffusionModel, tmp_path: Path, name: str):
    export_adapter(tiny, tmp_path, {"name": "dreambooth", "tokens": TOKENS, "adapter": {"name": "lora", "rank": 2}})
    load_adapter(model, tmp_path)
    expected = draw(model.pipeline(), "a <cat>")
    [vectors] = load_file(tmp_path / "embeddings" / "learned_embeds.safetensors").values()
    lora = tmp_path / "kohya" / "lora.safetensors"
    bundle(lora, {"cat": {name: vectors}, "mat": {name: vectors[0].clone()}})
    loaded = load_model(tiny_config(tiny))
    assert read_contents(lora, loaded).summary() == "32 layers of the unet, the token cat, the token mat"
    assert read_header(local(lora)).words("lora") == ("cat", "mat")
    load_adapter(loaded, lora)
    assert difference(draw(loaded.pipeline(), "a cat"), expected) <= 1
    bundle(lora, {"cat": {name: vectors * torch.nan}})
    with pytest.raises(ArtifactError, match=r"lora.safetensors: bundle_emb.cat.* has values that are not finite"):
        read_contents(lora, model)


def test_bundled_embeddings_of_xl_are_pairs(tiny_xl: Path, tmp_path: Path):
    xl = load_model(tiny_xl_config(tiny_xl), ("unet", "text_encoder"), skeleton=True)
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    write_diffusers(random_updates(load_model(tiny_xl_config(tiny_xl))), lora)
    bundle(lora, {"cat": {"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 48)}})
    for path in (lora, tmp_path):
        assert list(read_contents(path, xl).embeddings["cat"]) == ["text_encoder", "text_encoder_2"]
    bundle(lora, {"cat": {"more": torch.ones(2, 32)}})
    with pytest.raises(ArtifactError, match="bundles no embedding as cat: it holds clip_g, clip_l, more"):
        read_contents(lora, xl)


def test_one_of_several_words_in_a_file_is_taken(model: DiffusionModel, tmp_path: Path):
    file = tmp_path / "x.safetensors"
    save_file({"<mat>": torch.ones(1, 32), "<cat>": torch.full((2, 32), 2.0)}, file)
    assert float(read_contents(file, model, "<cat>").embeddings["<cat>"]["text_encoder"].sum()) == 128
    for token in (None, "<hat>"):
        with pytest.raises(ArtifactError, match="holds 2 words, <cat>, <mat>; .*convert takes one .* token=<cat>$"):
            read_contents(file, model, token)
