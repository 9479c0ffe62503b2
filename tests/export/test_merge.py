from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import KINDS, picture
from random_loras import random_updates
from safetensors.torch import load_file
from tiny_models import difference, draw, export_adapter, save_tiny_model, tiny_config, tiny_xl_config

from jobs.export import main
from ray_sd.adapter import read_manifest
from ray_sd.config.load import run_job
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.lora_writers import write_diffusers, write_kohya
from ray_sd.models import load_model


def test_a_merge_draws_what_the_weighted_adapters_draw_together(
    tiny: Path,
    adapters: dict[str, Path],
    job: Callable,
    tmp_path: Path,
):
    model = load_model(tiny_config(tiny))
    write_kohya(random_updates(model, alike=False), tmp_path / "style.safetensors", LoraNames(model))
    both = f"adapters=[{adapters['lora']}, style.safetensors]"
    expected = picture(tiny, adapters["lora"], "style.safetensors", scales=(0.7, -0.5))
    job("merge", both, "weights=[0.7, -0.5]", "output=merged")
    assert difference(picture(tiny, "merged"), expected) <= 1
    assert read_manifest(tmp_path / "merged").base == read_manifest(adapters["lora"]).base
    plain = load_model(tiny_config(tiny)).pipeline()
    plain.load_lora_weights("merged")
    assert difference(draw(plain, "a <cat>"), expected) <= 1

    enough = job("merge", both, "weights=[0.7, -0.5]", "output=kohya.safetensors", "layout=kohya", "rank=8")
    assert "100.00% of the sum's squared change is kept at rank 8" in enough
    assert difference(picture(tiny, "kohya.safetensors"), expected) <= 1
    little = job("merge", both, "weights=[0.7, -0.5]", "output=little", "rank=2")
    assert 30 < float(little.split("%")[0].split()[-1]) < 99
    ranks = {len(tensor) for name, tensor in load_file("little/kohya/lora.safetensors").items() if "lora_down" in name}
    assert ranks == {2}


@pytest.mark.slow
def test_merged_xl_loras_draw_what_they_draw_together(tiny_xl: Path, job: Callable, tmp_path: Path):
    model = load_model(tiny_xl_config(tiny_xl))
    write_kohya(random_updates(model, alike=False), tmp_path / "one.safetensors", LoraNames(model))
    write_diffusers(random_updates(model, seed=1), tmp_path / "other.safetensors")
    both = ("one.safetensors", "other.safetensors")
    expected = picture(tiny_xl, *both, scales=(0.7, -0.5), config=tiny_xl_config)
    settings = [f"adapters=[{', '.join(both)}]", "weights=[0.7, -0.5]"]
    for output, layout in {"mine": "diffusers", "kohya.safetensors": "kohya"}.items():
        job("merge", *settings, f"output={output}", f"layout={layout}", base=tiny_xl, model="sdxl")
        assert difference(picture(tiny_xl, output, config=tiny_xl_config), expected) <= 1, output


def test_a_lora_and_words_merge_into_what_a_pivotal_tuning_leaves(
    tiny: Path,
    adapters: dict[str, Path],
    job: Callable,
):
    job("merge", f"adapters=[{adapters['tokens']}, {adapters['lora']}]", "output=both")
    assert difference(picture(tiny, "both"), picture(tiny, adapters["tokens"], adapters["lora"])) <= 1
    manifest = read_manifest(Path("both"))
    assert manifest.kind == "dreambooth"
    assert set(manifest.base.fingerprints) == {"unet", "text_encoder"}


def test_adapters_of_different_bases_do_not_merge(adapters: dict[str, Path], refusal: Callable, tmp_path: Path):
    other = save_tiny_model(tmp_path / "other", seed=1)
    export_adapter(other, tmp_path / "stranger", KINDS["lora"])
    both = f"adapters=[{adapters['lora']}, stranger]"
    words = refusal("merge", both, "output=merged")
    assert f"{adapters['lora']} was made for the base 'tiny'" in words
    assert f"stranger for 'tiny' ({other}), and their text_encoders differ; take adapters of one base" in words
    assert (
        run_job(main, ["merge", "model=sd15", f"model.base={other}", both, "output=merged", "allow_other_base=true"])
        == 0
    )
