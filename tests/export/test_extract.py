from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import picture
from random_loras import random_updates
from tiny_models import difference, draw, tiny_config, tiny_xl_config

from jobs.export import main
from ray_sd.config.load import run_job
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.lora_writers import write_diffusers
from ray_sd.methods.weights import save_component
from ray_sd.models import load_model


def test_a_lora_is_extracted_from_a_model_that_it_was_fused_into(
    tiny: Path,
    adapters: dict[str, Path],
    job: Callable,
    tmp_path: Path,
):
    write_diffusers(random_updates(load_model(tiny_config(tiny)), convolutions=True), tmp_path / "x.safetensors")
    job("fuse", f"adapters=[x.safetensors, {adapters['lora']}]", "output=tuned", "dtype=float32")
    expected = picture(Path("tuned"))
    printed = job("extract", "tuned=tuned", "rank=8", "output=extracted", "layout=diffusers")
    assert "100.00% of the squared change is kept at rank 8; 0.00% is in biases" in printed
    assert difference(picture(tiny, "extracted"), expected) <= 1
    job("extract", "tuned=tuned", "rank=8", "output=x8.safetensors", "layout=kohya")
    plain = load_model(tiny_config(tiny)).pipeline()
    plain.load_lora_weights(tmp_path, weight_name="x8.safetensors")
    assert difference(draw(plain, "a <cat>"), expected) <= 1

    less = job("extract", "tuned=tuned", "rank=1", "output=one.safetensors", "text_encoder=false")
    assert 10 < float(less.split("%")[0].split()[-1]) < 90
    assert "text_encoder" not in less


@pytest.mark.slow
def test_a_lora_is_extracted_from_an_xl_model_with_both_its_text_encoders(tiny_xl: Path, job: Callable, tmp_path: Path):
    model = load_model(tiny_xl_config(tiny_xl))
    write_diffusers(random_updates(model, convolutions=True), tmp_path / "x.safetensors")
    job("fuse", "adapters=x.safetensors", "output=tuned", "dtype=float32", base=tiny_xl, model="sdxl")
    expected = picture(Path("tuned"), config=tiny_xl_config)
    assert difference(picture(tiny_xl, config=tiny_xl_config), expected) > 10
    for output, layout in {"mine": "diffusers", "kohya.safetensors": "kohya"}.items():
        settings = ["tuned=tuned", "rank=8", f"output={output}", f"layout={layout}"]
        assert "layers of the text_encoder_2" in job("extract", *settings, base=tiny_xl, model="sdxl")
        assert difference(picture(tiny_xl, output, config=tiny_xl_config), expected) <= 1, output


@pytest.mark.slow
def test_a_full_rank_extraction_of_a_fully_tuned_model_is_exact_but_for_what_a_lora_cannot_hold(
    tiny: Path,
    adapters: dict[str, Path],
    job: Callable,
    tmp_path: Path,
):
    printed = job("extract", f"tuned={adapters['full']}", "rank=1000", "output=extracted")
    assert "text_encoder" not in printed
    kept, others = (float(part.split()[-1]) for part in printed.split("%")[:2])
    assert kept + others == pytest.approx(100, abs=0.02)
    assert others > 0

    model = load_model(tiny_config(tiny))
    tuned = load_model(tiny_config(tiny, unet=str(adapters["full"])))
    layers = {name: layer for (part, name), layer in LoraNames(model).layers.items() if part == "unet"}
    for name, layer in LoraNames(tuned).layers.items():
        if name[0] == "unet":
            layers[name[1]].weight.data.copy_(layer.weight)
    assert difference(picture(tiny, "extracted"), draw(model.pipeline(), "a <cat>")) <= 1
    save_component(model.unet, tmp_path / "layers_alone")
    exact = job("extract", "tuned=layers_alone", "text_encoder=false", "rank=1000", "output=exact.safetensors")
    assert "100.00% of the squared change is kept" in exact


def test_rounding_to_half_precision_is_no_change(tiny: Path, adapters: dict[str, Path], job: Callable):
    job("fuse", f"adapters={adapters['lora']}", "output=half")
    assert "text_encoder" not in job("extract", "tuned=half", "rank=4", "output=x.safetensors")


def test_a_model_tuned_from_another_base_is_refused_without_a_switch_that_is_not_there(
    adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
):
    settings = ["extract", "model=tiny_random", f"tuned={adapters['full']}", "output=x.safetensors"]
    assert run_job(main, settings) == 1
    error = capsys.readouterr().err
    assert "is another; use that base" in error
    assert "allow_other_base" not in error
