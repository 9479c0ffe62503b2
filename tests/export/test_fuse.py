import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableVideoDiffusionPipeline
from pictures import picture
from PIL import Image
from random_loras import random_updates
from safetensors.torch import load_file
from tiny_models import difference, draw, save_tiny_model, tiny_config, tiny_video_config, tiny_xl_config
from transformers import CLIPTokenizer

from ray_sd.config.export import ConvertConfig, FuseConfig
from ray_sd.export import export
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.lora_writers import write_diffusers, write_kohya
from ray_sd.methods.temporal import is_temporal
from ray_sd.methods.weights import save_component
from ray_sd.models import load_model


@pytest.mark.parametrize(
    ("dtype", "output"),
    [
        ("float32", "folder"),
        ("float16", "model.safetensors"),
        pytest.param("float32", "model.safetensors", marks=pytest.mark.slow),
        pytest.param("float16", "folder", marks=pytest.mark.slow),
    ],
)
def test_a_fused_model_draws_what_its_adapters_draw(
    tiny: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    output: str,
    dtype: str,
):
    model = load_model(tiny_config(tiny))
    write_kohya(random_updates(model), tmp_path / "style.safetensors", LoraNames(model))
    names = (str(adapters["lora"]), str(adapters["dora"]), str(tmp_path / "style.safetensors"))
    expected = picture(tiny, *names, scales=(0.5, 1.0, 0.7))
    layout = shutil.copytree(tiny, tmp_path / "layout", ignore=shutil.ignore_patterns("*.safetensors"))
    base = tiny_config(tiny).model_copy(update={"layout": str(layout)})  # no shipped layout is tiny
    target = tmp_path / output
    export(FuseConfig(model=base, adapters=names, weights=(0.5, 1.0, 0.7), output=str(target), dtype=dtype))

    tokenizer = {"tokenizer": str(tiny / "tokenizer")} if target.is_file() else {}
    fused = tiny_config(target, **tokenizer).model_copy(update={"layout": str(layout)})
    assert difference(draw(load_model(fused).pipeline(), "a <cat>"), expected) <= 2
    if target.is_dir():
        assert not [path for path in target.rglob("*.json") if str(tiny) in path.read_text()]
        plain = DiffusionPipeline.from_pretrained(target)
        text = load_file(target / "text_encoder" / "model.safetensors")
        assert all(name.startswith("text_model.") for name in text)
        assert {tensor.dtype for tensor in text.values()} == {getattr(torch, dtype)}
    else:
        plain = load_in_plain_diffusers(target, layout)
    assert difference(draw(plain, "a <cat>"), expected) <= 2


def load_in_plain_diffusers(file: Path, layout: Path) -> StableDiffusionPipeline:
    """`from_single_file` wants to know the kind of pipeline, for which the published files need no configuration."""
    (layout / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "StableDiffusionPipeline",
                "unet": ["diffusers", "UNet2DConditionModel"],
                "vae": ["diffusers", "AutoencoderKL"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "scheduler": ["diffusers", "DDIMScheduler"],
                "safety_checker": [None, None],
                "feature_extractor": [None, None],
            }
        )
    )
    return StableDiffusionPipeline.from_single_file(file, config=str(layout), local_files_only=True)


@pytest.mark.slow
def test_an_xl_model_fuses_into_a_folder_that_draws_alike(tiny_xl: Path, job: Callable, tmp_path: Path):
    write_diffusers(random_updates(load_model(tiny_xl_config(tiny_xl))), tmp_path / "x.safetensors")
    expected = picture(tiny_xl, "x.safetensors", config=tiny_xl_config)
    job("fuse", "adapters=x.safetensors", "output=fused", "dtype=float32", base=tiny_xl, model="sdxl")
    assert difference(picture(tmp_path / "fused", config=tiny_xl_config), expected) <= 1
    assert difference(draw(DiffusionPipeline.from_pretrained("fused"), "a <cat>"), expected) <= 1


def test_an_xl_model_fuses_into_a_file_that_draws_alike(tiny_xl: Path, tmp_path: Path):
    write_diffusers(random_updates(load_model(tiny_xl_config(tiny_xl))), tmp_path / "x.safetensors")
    expected = picture(tiny_xl, tmp_path / "x.safetensors", config=tiny_xl_config)
    base = tiny_xl_config(tiny_xl).model_copy(update={"layout": str(tiny_xl)})  # no shipped layout is tiny
    target = tmp_path / "fused.safetensors"
    adapters = (str(tmp_path / "x.safetensors"),)
    export(FuseConfig(model=base, adapters=adapters, output=str(target), dtype="float32"))
    tokenizers = {name: str(tiny_xl / name) for name in ("tokenizer", "tokenizer_2")}
    fused = tiny_xl_config(target, **tokenizers).model_copy(update={"layout": str(tiny_xl)})
    assert difference(draw(load_model(fused).pipeline(), "a <cat>"), expected) <= 1


def test_a_fused_folder_has_the_tokenizers_files_of_older_transformers(tiny_xl: Path, job: Callable, tmp_path: Path):
    model = load_model(tiny_xl_config(tiny_xl))
    write_diffusers(random_updates(model), tmp_path / "x.safetensors")
    job("fuse", "adapters=x.safetensors", "output=fused", base=tiny_xl, model="sdxl")
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / "fused" / name / "tokenizer.json").unlink()
        plain = CLIPTokenizer.from_pretrained(tmp_path / "fused" / name)
        padded = {"padding": "max_length", "max_length": 16}
        assert plain("a cat, 3", **padded).input_ids == getattr(model, name)("a cat, 3", **padded).input_ids


@pytest.mark.parametrize("kind", ["full", "pivotal"])
def test_whole_weights_and_words_fuse_too(tiny: Path, adapters: dict[str, Path], job: Callable, kind: str):
    job("fuse", f"adapters={adapters[kind]}", "output=fused", "dtype=float32")
    words = ["fused/embeddings"] if kind == "pivotal" else []
    assert difference(picture(Path("fused"), *words), picture(tiny, adapters[kind])) <= 1


def test_a_file_keeps_the_words_of_a_pivotal_tuning_beside_it(
    tiny: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
):
    base = tiny_config(tiny).model_copy(update={"layout": str(tiny)})
    printed = export(
        FuseConfig(model=base, adapters=(str(adapters["pivotal"]),), output=str(tmp_path / "m.safetensors"))
    )
    assert {path.name for path in tmp_path.iterdir()} == {"m.safetensors", "m-embeddings"}
    assert "m-embeddings: the tokens" in printed


def test_a_file_says_which_noise_schedule_it_loses(tiny: Path, adapters: dict[str, Path], tmp_path: Path):
    noise = {"noise": {"prediction_type": "v_prediction"}}
    base = tiny_config(tiny, scheduler=noise).model_copy(update={"layout": str(tiny)})
    printed = export(FuseConfig(model=base, adapters=(str(adapters["lora"]),), output=str(tmp_path / "m.safetensors")))
    assert "no noise schedule; load it with model.scheduler.noise.prediction_type=v_prediction" in printed


def test_an_adapter_of_another_base_does_not_fuse(adapters: dict[str, Path], refusal: Callable, tmp_path: Path):
    other = save_tiny_model(tmp_path / "other", seed=1)
    words = refusal("fuse", f"adapters={adapters['lora']}", "output=fused", base=other)
    assert "was made for the base 'tiny'" in words


@pytest.mark.slow
def test_a_video_models_adapter_is_fused_into_a_folder_that_the_plain_pipeline_loads(tiny_video: Path, tmp_path: Path):
    adapter = tmp_path / "adapter"
    trained = load_model(tiny_video_config(tiny_video)).unet
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if is_temporal(name):
                parameter.add_(0.1)
    save_component(trained, adapter / "unet")
    export(FuseConfig(model=tiny_video_config(tiny_video), adapters=(str(adapter),), output=str(tmp_path / "whole")))
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "whole")
    for name, tensor in pipeline.unet.state_dict().items():
        torch.testing.assert_close(tensor, trained.state_dict()[name], rtol=1e-3, atol=1e-4)
    picture_of_noise = Image.effect_noise((64, 64), 80).convert("RGB")
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(picture_of_noise, height=64, width=64, num_frames=2, num_inference_steps=1).frames[0]
    assert len(frames) == 2


@pytest.mark.parametrize(
    ("schema", "settings", "words"),
    [
        (FuseConfig, {"adapters": "a", "output": "whole.safetensors"}, "goes into no single file"),
        (ConvertConfig, {"adapter": "a", "output": "converted"}, "takes whole weights only"),
    ],
)
def test_what_video_models_have_no_use_for_is_told(schema: type, settings: dict, words: str):
    with pytest.raises(ValueError, match=words):
        schema.model_validate({"model": tiny_video_config(Path("base")).model_dump(), **settings})
