import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import difference, draw, export_adapter, save_tiny_model, tiny, tiny_config  # noqa: F401

from ray_sd.adapter import read_manifest
from ray_sd.errors import ArtifactError
from ray_sd.methods import load_adapter
from ray_sd.models import fingerprint, load_model


@pytest.fixture(scope="module")
def lora(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    export_adapter(tiny, folder, {"name": "lora", "rank": 4})
    return folder


def test_the_manifest_says_what_the_adapter_is(tiny: Path, lora: Path):  # noqa: F811
    manifest = read_manifest(lora)
    assert (manifest.kind, manifest.family, manifest.step) == ("lora", "stable_diffusion", 3)
    assert (manifest.base.name, manifest.base.source) == ("tiny", str(tiny))
    assert manifest.base.fingerprints == {
        part: fingerprint(tiny_config(tiny), part) for part in ("unet", "text_encoder")
    }
    assert (manifest.data_fingerprint, manifest.metrics) == ("d1", {"loss": 0.5})
    assert manifest.config["method"]["rank"] == 4
    assert manifest.versions["torch"] == torch.__version__
    assert set(manifest.files) == {"pytorch_lora_weights.safetensors", "kohya/lora.safetensors"}


def test_an_adapter_loads_by_its_folder_alone(tiny: Path, lora: Path):  # noqa: F811
    model = load_model(tiny_config(tiny))
    before = draw(model.pipeline())
    assert load_adapter(model, lora) == 64
    plain = load_model(tiny_config(tiny)).pipeline()
    plain.load_lora_weights(lora)
    assert difference(draw(model.pipeline()), draw(plain)) <= 1
    assert difference(draw(plain), before) > 10


def test_whole_weights_load_by_their_folder_alone(tiny: Path, tmp_path: Path):  # noqa: F811
    manifest = export_adapter(tiny, tmp_path, {"name": "full"})
    assert set(manifest.files) == {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    model = load_model(tiny_config(tiny))
    before = draw(model.pipeline())
    assert load_adapter(model, str(tmp_path)) > 100
    assert difference(draw(model.pipeline()), before) > 10


def test_an_adapter_of_another_base_is_refused_unless_allowed(lora: Path, tmp_path: Path):
    other = load_model(tiny_config(save_tiny_model(tmp_path, seed=1), name="another"))
    words = "lora was made for the base 'tiny' .*tiny.*, and the unet of 'another' is another"
    with pytest.raises(ArtifactError, match=words):
        load_adapter(other, lora)
    assert load_adapter(other, lora, allow_other_base=True) == 64


def test_another_autoencoder_or_sampler_is_no_other_base(tiny: Path, lora: Path, tmp_path: Path):  # noqa: F811
    other = save_tiny_model(tmp_path, seed=1)
    config = tiny_config(tiny, vae=str(other), scheduler={"sampler": "euler"})
    assert load_adapter(load_model(config), lora) == 64


def change_manifest(folder: Path, **values: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "manifest.json is damaged"),
        (lambda folder: change_manifest(folder, format_version="1"), "manifest.json is damaged"),
        (lambda folder: change_manifest(folder, step="many"), "manifest.json is damaged"),
        (lambda folder: change_manifest(folder, format_version=99), "has format 99, this version of ray_sd reads 1"),
        (
            lambda folder: change_manifest(folder, kind="sliders"),
            "of kind 'sliders'; this version knows lora, loha",
        ),
        (
            lambda folder: change_manifest(folder, config={"method": {"name": "lora", "sliders": 3}}),
            "manifest.json: config.method.lora.sliders is not what this version .*made by another version",
        ),
        (lambda folder: change_manifest(folder, config={}), "manifest.json: config.method is not what this version"),
        (lambda folder: change_manifest(folder, family="flux"), "for a model of family flux, not stable_diffusion"),
        (
            lambda folder: (folder / "pytorch_lora_weights.safetensors").unlink(),
            "lacks pytorch_lora_weights.safetensors, which its manifest.json lists",
        ),
        (
            lambda folder: (folder / "kohya/lora.safetensors").write_bytes(b"else"),
            "lora.safetensors is damaged: its content is not what manifest.json lists",
        ),
    ],
)
def test_a_damaged_folder_is_refused_in_words(tiny: Path, lora: Path, tmp_path: Path, change, words: str):  # noqa: F811
    folder = tmp_path / "copy"
    shutil.copytree(lora, folder)
    change(folder)
    with pytest.raises(ArtifactError, match=words):
        load_adapter(load_model(tiny_config(tiny), ("unet", "text_encoder", "tokenizer")), folder)


def test_an_assembled_base_is_described_by_its_parts(tiny: Path, tmp_path: Path):  # noqa: F811
    manifest = export_adapter(tiny, tmp_path, {"name": "lora", "rank": 2}, vae=str(tiny / "vae"))
    assert manifest.base.source == f"{tiny}, vae={tiny / 'vae'}"


@pytest.fixture(scope="module")
def autoencoders(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:  # noqa: F811
    """The tiny model's autoencoder as a run with a teacher, or without one, leaves it."""
    folder = tmp_path_factory.mktemp("autoencoders")

    def export(teacher: str | None) -> Path:
        path = folder / ("alone" if teacher is None else "taught")
        if not path.exists():
            export_adapter(tiny, path, {"name": "autoencoder", "teacher": teacher})
        return path

    return export


def test_an_autoencoder_of_another_is_refused_unless_allowed(
    tiny: Path,  # noqa: F811
    autoencoders: Callable,
    tmp_path: Path,
):
    taught = autoencoders(str(tiny))
    other = tiny_config(tiny, vae=str(save_tiny_model(tmp_path, seed=1)), name="another")
    with pytest.raises(
        ArtifactError, match="the vae of 'another' is another; .* anyway by decode.allow_other_base=true"
    ):
        load_adapter(load_model(other, {"vae"}), taught, switch="decode.allow_other_base")
    assert load_adapter(load_model(other, {"vae"}), taught, allow_other_base=True) > 50
    assert load_adapter(load_model(tiny_config(tiny), {"vae"}), taught) > 50


def test_an_autoencoder_with_latents_of_its_own_is_refused_unless_allowed(tiny: Path, autoencoders: Callable):  # noqa: F811
    alone = autoencoders(None)
    words = "had no method.teacher, and the U-Net of 'tiny' did not learn on them; .*model.vae=.*alone/vae.*allow_other_base"
    with pytest.raises(ArtifactError, match=words):
        load_adapter(load_model(tiny_config(tiny), {"vae"}), alone)
    assert load_adapter(load_model(tiny_config(tiny), {"vae"}), alone, allow_other_base=True) > 50
