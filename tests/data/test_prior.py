"""Class pictures: counted, drawn where too few are there, and one beside each row."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import in_process
import pytest
import torch
from in_process import prepare, training_batches
from PIL import Image
from sample_pictures import experiment
from tiny_models import save_tiny_model

from ray_sd import data as by_ray
from ray_sd.config import ExperimentConfig
from ray_sd.data import check_class_folder
from ray_sd.data.prior import class_data
from ray_sd.data.prune import list_cache
from ray_sd.errors import ConfigError
from ray_sd.media.pictures import read_parameters
from ray_sd.methods import build_method


@pytest.fixture
def dreambooth(tmp_path: Path, folder: Path) -> Callable[..., ExperimentConfig]:
    """A DreamBooth experiment on ten pictures and a tiny model, with settings of its class pictures."""
    model = save_tiny_model(tmp_path / "model")

    def configure(**class_images: object) -> ExperimentConfig:
        base = experiment(tmp_path / "cache", folder, {"batch_size": 4, "num_workers": 2}, resolution=64)
        method = {
            "name": "dreambooth",
            "instance_prompt": "a sks cat",
            "class_prompt": ["a cat", "a dog"],
            "class_images": {"count": 3, "num_inference_steps": 1, **class_images},
        }
        content = base.model_dump(mode="json") | {"model": {"name": "tiny", "base": str(model)}, "method": method}
        return ExperimentConfig.model_validate(content)

    return configure


def pictures(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("*.png"))}


@pytest.fixture(params=[in_process, pytest.param(by_ray, marks=pytest.mark.slow)], ids=["in this process", "by Ray"])
def place(request: pytest.FixtureRequest) -> ModuleType:
    """Where class pictures are drawn and rows are prepared and read."""
    if request.param is by_ray:
        request.getfixturevalue("ray_cluster")
    return request.param


def test_missing_class_pictures_are_drawn_once_and_one_goes_with_each_row(
    place: ModuleType, dreambooth: Callable, tmp_path: Path
):
    config = dreambooth()
    rows = build_method(config.method).rows()
    data = place.prepare(config, rows)
    assert (data.train.num_rows, data.prior.num_rows) == (10, 3)
    [folder] = (tmp_path / "cache" / "class").iterdir()
    drawn = pictures(folder)
    assert list(drawn) == ["00000.png", "00001.png", "00002.png"]
    made = [(read_parameters(folder / name)["prompt"], read_parameters(folder / name)["seed"]) for name in drawn]
    assert made == [("a cat", 0), ("a dog", 1), ("a cat", 2)]
    assert data.train.load().captions.to_pylist() == [["a sks cat"]] * 10
    assert data.prior.load().captions.to_pylist() == [["a cat"], ["a dog"], ["a cat"]]

    assert place.prepare(config, rows).prior == data.prior
    assert pictures(folder) == drawn
    assert ("class/" + folder.name, 3) in [(cached.name, cached.rows) for cached in list_cache(config.cache_path)]

    batches = list(place.training_batches(data, config, rows, 0, 0, 6))
    names = {name for name in batches[0] if not name.startswith("class_")}
    assert {name for name in batches[0] if name.startswith("class_")} == {f"class_{name}" for name in names}
    assert batches[0]["class_latent_mean"].shape == batches[0]["latent_mean"].shape == (2, 4, 8, 8)
    seen = {row.numpy().tobytes() for batch in batches for row in batch["class_latent_mean"]}
    assert len(seen) == 3
    assert not seen & {row.numpy().tobytes() for batch in batches for row in batch["latent_mean"]}
    assert not {int(s) for b in batches for s in b["class_row_seed"]} & {int(s) for b in batches for s in b["row_seed"]}


def test_class_rows_do_not_depend_on_the_workers(dreambooth: Callable):
    config = dreambooth()
    rows = build_method(config.method).rows()
    data = prepare(config, rows)
    alone = config.model_copy(update={"trainer": config.trainer.model_copy(update={"num_workers": 1})})
    whole = list(training_batches(data, alone, rows, 0, 0, 3))
    parts = [list(training_batches(data, config, rows, rank, 0, 3)) for rank in (0, 1)]
    for step in range(3):
        for name in ("class_latent_mean", "class_row_seed", "class_text_embeds", "latent_mean"):
            assert torch.equal(torch.cat([part[step][name] for part in parts]), whole[step][name])


def test_drawing_goes_on_where_it_stopped_and_counts_what_is_there(
    dreambooth: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "ray_sd")
    folder = tmp_path / "class pictures"
    folder.mkdir()
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, "png")
    (folder / "mine.png").write_bytes(stream.getvalue())
    config = dreambooth(folder=str(folder))
    rows = build_method(config.method).rows()
    data = prepare(config, rows)
    assert list(pictures(folder)) == ["00000.png", "00001.png", "mine.png"]
    assert "class pictures: 1 of 3 are in" in caplog.text
    assert data.prior.load().captions.to_pylist()[2] == ["a cat"]
    before = pictures(folder)
    (folder / "00000.png").unlink()
    prepare(config, rows)
    after = pictures(folder)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["00000.png"]


def test_a_folder_that_cannot_be_written_serves_where_it_holds_enough(
    dreambooth: Callable, folder: Path, tmp_path: Path
):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"inside/{file.name}")
    inside = f"zip://inside::{(tmp_path / 'pictures.zip').as_uri()}"
    config = dreambooth(folder=inside, count=10)
    rows = build_method(config.method).rows()
    dataset, _ = class_data(config, rows, rows.prior)
    assert dataset.source.path == inside


def test_a_folder_of_something_else_is_refused(dreambooth: Callable, tmp_path: Path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "letter.doc").write_text("Dear")
    config = dreambooth(folder=str(tmp_path / "notes"))
    with pytest.raises(ConfigError, match=r"class_images.folder: 1 of 1 files are no pictures, such as .*letter.doc"):
        check_class_folder(build_method(config.method).rows())
    config = dreambooth(folder=str(tmp_path / "absent"))
    check_class_folder(build_method(config.method).rows())
    # What editors and systems leave there is no letter.
    for name in (".ipynb_checkpoints/notes.ipynb", "@eaDir/SYNO.dat", "cat.png", "cat.caption", "metadata.csv"):
        (tmp_path / "strays" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "strays" / name).touch()
    config = dreambooth(folder=str(tmp_path / "strays"))
    check_class_folder(build_method(config.method).rows())


@pytest.mark.parametrize(
    "change", [{"scheduler": {"noise": {"beta_end": 0.02}}}, {"scheduler": {"sampler": "euler"}}, {"prompt_chunks": 2}]
)
def test_what_the_model_would_draw_otherwise_is_drawn_anew(
    dreambooth: Callable, monkeypatch: pytest.MonkeyPatch, change: dict
):
    monkeypatch.setattr("ray_sd.data.prior._draw_missing", lambda *_: None)
    config = dreambooth()
    content = config.model_dump(mode="json")
    changed = ExperimentConfig.model_validate(content | {"model": content["model"] | change})
    rows = build_method(config.method).rows()
    folders = [class_data(each, rows, rows.prior)[0].source.path for each in (config, config, changed)]
    assert folders[0] == folders[1] != folders[2]
