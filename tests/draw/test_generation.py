from pathlib import Path

import fsspec
import pytest
import torch
from in_process import in_process
from PIL import Image
from safetensors.torch import save_file
from tiny_models import difference, draw, export_adapter, save_tiny_model, tiny_config

from ray_sd.config import GenerateConfig
from ray_sd.draw import generation
from ray_sd.errors import ArtifactError, ConfigError
from ray_sd.media.pictures import read_parameters
from ray_sd.models import load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("generation") / "tiny")


def config(base: Path, output: Path, **settings: object) -> GenerateConfig:
    return GenerateConfig.model_validate(
        {"model": tiny_config(base), "prompt": "a cat", "output": str(output), "num_inference_steps": 3, **settings}
    )


def test_one_prompt_is_drawn_without_ray_with_seeds_that_count_up(base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(generation, "connect", lambda: pytest.fail("Ray was started for one prompt"))
    result = generation.draw(config(base, tmp_path, num_images=2, seed=7, negative_prompt="bad"))
    assert result.pictures == [f"{tmp_path}/00000.png", f"{tmp_path}/00001.png"]
    pipeline = load_model(tiny_config(base)).pipeline()
    for seed, path in zip((7, 8), result.pictures, strict=True):
        assert difference(Image.open(path), draw(pipeline, seed=seed, negative_prompt="bad")) <= 1
        found = read_parameters(Path(path))
        assert (found["prompt"], found["seed"], found["negative_prompt"]) == ("a cat", seed, "bad")
        assert (found["num_inference_steps"], found["guidance_scale"], found["sampler"]) == (3, 7.5, "ddim")
        assert (found["model"], found["base"]) == ("tiny", str(base))
    assert Image.open(result.sheet).width > 2 * 64
    assert result.sheet in result.summary()


def test_an_adapter_is_loaded_from_a_folder_and_from_a_uri(base: Path, tmp_path: Path):
    folder = tmp_path / "adapter"
    export_adapter(base, folder, {"name": "lora", "rank": 4})
    fsspec.filesystem("memory").put(str(folder), "/adapters/mine", recursive=True)
    pipeline = load_model(tiny_config(base)).pipeline()
    pipeline.load_lora_weights(folder)
    pipeline.set_adapters("default_0", 0.5)
    expected = draw(pipeline, seed=0)
    for adapter in (str(folder), "memory://adapters/mine"):
        result = generation.draw(config(base, tmp_path, adapter=adapter, adapter_scale=0.5))
        assert difference(Image.open(result.pictures[0]), expected) <= 1
        assert read_parameters(Path(result.pictures[0]))["adapter"] == adapter
    plain = generation.draw(config(base, tmp_path))
    assert difference(Image.open(plain.pictures[0]), expected) > 5


def test_a_file_of_another_tool_is_loaded_from_a_path_and_from_a_uri(base: Path, tmp_path: Path):
    export_adapter(base, tmp_path / "adapter", {"name": "lora", "rank": 4})
    file = tmp_path / "adapter" / "kohya" / "lora.safetensors"
    fsspec.filesystem("memory").put(str(file), "/loras/lora.safetensors")
    adapters = (str(tmp_path / "adapter"), str(file), "memory://loras/lora.safetensors")
    drawn = [generation.draw(config(base, tmp_path, adapter=adapter)).pictures[0] for adapter in adapters]
    pictures = [Image.open(path) for path in drawn]
    assert difference(pictures[0], pictures[1]) <= 1
    assert difference(pictures[1], pictures[2]) == 0
    plain = generation.draw(config(base, tmp_path))
    assert difference(Image.open(plain.pictures[0]), pictures[0]) > 5


def test_a_file_that_does_not_fit_is_told_before_workers_start(base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(generation, "connect", lambda: pytest.fail("Ray was started for a file that does not fit"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    save_file(
        {"lora_unet_a.lora_down.weight": torch.ones(1), "lora_unet_a.alpha": torch.ones(1)}, tmp_path / "x.safetensors"
    )
    job = config(base, tmp_path, prompts_file=str(prompts), adapter=str(tmp_path / "x.safetensors"))
    with pytest.raises(
        ArtifactError, match="none of its layers is called as tools call the base's, such as lora_unet_a.alpha"
    ):
        generation.draw(job)


def test_new_pictures_are_numbered_on_and_overwrite_nothing(base: Path, tmp_path: Path):
    first = generation.draw(config(base, tmp_path))
    before = Path(first.pictures[0]).read_bytes()
    second = generation.draw(config(base, tmp_path, seed=1))
    assert second.pictures == [f"{tmp_path}/00001.png"]
    assert Path(first.pictures[0]).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "00000.png",
        "00001.png",
        "sheet-00000-00000.png",
        "sheet-00001-00001.png",
    }


@pytest.mark.slow
def test_a_file_of_prompts_is_drawn_by_a_pool_like_one_by_one(
    base: Path, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    """Models and adapters are found from the folder where the command runs, workers run in another one."""
    export_adapter(base, tmp_path / "adapter", {"name": "lora", "rank": 4})
    (tmp_path / "prompts.txt").write_text("a cat\n\n  ein Bär \nan owl\n", encoding="utf-8")
    (tmp_path / "models").symlink_to(base.parent)
    monkeypatch.chdir(tmp_path)
    settings = {"prompts_file": "prompts.txt", "adapter": "adapter", "allow_other_base": True, "num_images": 2}
    job = config(Path("models/tiny"), Path("drawn"), **settings, num_workers=2, batch_size=2)
    result = generation.draw(job)
    assert len(result.pictures) == 6
    pipeline = load_model(tiny_config(base)).pipeline()
    pipeline.load_lora_weights(tmp_path / "adapter")
    expected = [(prompt, seed) for prompt in ("a cat", "ein Bär", "an owl") for seed in (0, 1)]
    for path, (prompt, seed) in zip(result.pictures, expected, strict=True):
        found = read_parameters(Path(path))
        assert (found["prompt"], found["seed"]) == (prompt, seed)
        assert (found["base"], found["adapter"]) == ("models/tiny", "adapter")
        assert difference(Image.open(path), draw(pipeline, prompt, seed)) <= 1


def test_a_model_that_workers_cannot_load_is_told_in_words(base: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    broken = tiny_config(base, vae=str(base / "unet"))
    # A worker says it in what it returns, so that it is the same whatever Ray makes of exceptions.
    with in_process(), pytest.raises(ArtifactError, match="holds a UNet2DConditionModel; the vae must be a Auto"):
        generation.draw(config(base, tmp_path, prompts_file=str(prompts), model=broken))


def test_an_adapter_that_is_none_is_told_before_workers_start(base: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    job = config(base, tmp_path, prompts_file=str(prompts), adapter=str(tmp_path))
    with pytest.raises(ArtifactError, match="is no adapter: it has no manifest.json"):
        generation.draw(job)


def test_prompts_that_cannot_be_read_are_refused(base: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="prompts_file: cannot read .*nowhere.txt"):
        generation.draw(config(base, tmp_path, prompts_file=str(tmp_path / "nowhere.txt")))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    with pytest.raises(ConfigError, match="empty.txt has no prompts"):
        generation.draw(config(base, tmp_path, prompts_file=str(empty)))


def test_pictures_are_kept_that_were_done_before_a_failure(base: Path, tmp_path: Path, monkeypatch):
    draw_batch = generation.generate

    def fail_at_the_second(model, requests, *arguments):
        if requests[0].seed == 1:
            raise KeyboardInterrupt
        return draw_batch(model, requests, *arguments)

    monkeypatch.setattr(generation, "generate", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        generation.draw(config(base, tmp_path, num_images=3, batch_size=1))
    assert [path.name for path in tmp_path.glob("*.png")] == ["00000.png"]


def test_output_that_cannot_be_written_is_refused_before_anything_is_drawn(base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(generation, "load_for_generation", lambda _: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output: .*file/pictures cannot be written .*; set output=FOLDER"):
        generation.draw(config(base, tmp_path / "file" / "pictures"))
