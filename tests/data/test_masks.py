from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from in_process import prepare
from PIL import Image
from pydantic import ValidationError
from sample_pictures import LATENTS, encoded, noise_png

from ray_sd.config import ExperimentConfig
from ray_sd.data import check_masks
from ray_sd.data.encode import latent_mask
from ray_sd.data.examine import source_rows
from ray_sd.data.reader import RowReader
from ray_sd.data.sources import list_source
from ray_sd.data.sources.masks import mask_name
from ray_sd.errors import ConfigError


def half(mode: str, size: tuple[int, int] = (32, 16)) -> Image.Image:
    """White, or opaque, on the left; nothing on the right."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    if mode == "L":
        return mask
    picture = Image.new("RGB", size, "red")
    picture.putalpha(mask)
    return picture


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A picture, captioned, with a mask of its own beside the folder."""
    folder = tmp_path / "pictures"
    (folder / "cats").mkdir(parents=True)
    (tmp_path / "masks/cats").mkdir(parents=True)
    (folder / "cats/1.jpg").write_bytes(noise_png(0, (32, 16)))
    (folder / "cats/1.txt").write_text("a cat")
    (tmp_path / "masks/cats/1.png").write_bytes(encoded(half("L")))
    return folder


def masks(config: ExperimentConfig) -> np.ndarray:
    """Of every row's variants: the first, and where there are two, the mirrored one."""
    index = prepare(config, LATENTS).train
    reader = RowReader(index, LATENTS, config)
    return reader.read(range(index.num_rows), [0] * index.num_rows, vary=False)["loss_mask"]


def files(folder: Path, **settings: object) -> dict:
    return {"name": "files", "path": str(folder.parent / "masks"), **settings}


def test_a_mask_file_is_cut_as_its_picture_is(pictures: Path, configure: Callable):
    config = configure(pictures, resolution=(16, 32), mask=files(pictures))
    assert masks(config).tolist() == [[[[1, 1, 0, 0]] * 2]]
    square = configure(pictures, resolution=16, mask=files(pictures, outside=0.2))  # the middle 16 of 32 columns
    assert masks(square).tolist() == [[[[1, pytest.approx(0.2)]] * 2]]


def test_the_mask_of_a_mirrored_picture_is_mirrored(pictures: Path, configure: Callable):
    config = configure(pictures, resolution=(16, 32), mask=files(pictures), flip=True)
    index = prepare(config, LATENTS).train
    drawn = RowReader(index, LATENTS, config).read([0] * 20, range(20))["loss_mask"]
    assert {str(mask[0, 0].tolist()) for mask in drawn} == {"[1.0, 1.0, 0.0, 0.0]", "[0.0, 0.0, 1.0, 1.0]"}


def test_the_alpha_channel_is_a_mask(pictures: Path, configure: Callable):
    (pictures / "cats/1.jpg").unlink()
    (pictures / "cats/1.png").write_bytes(encoded(half("RGBA")))
    (pictures / "cats/2.png").write_bytes(noise_png(1, (32, 16)))
    config = configure(pictures, resolution=(16, 32), mask="alpha", caption={"template": "x"})
    assert masks(config).tolist() == [[[[1, 1, 0, 0]] * 2], [[[1, 1, 1, 1]] * 2]]


def test_a_changed_mask_is_encoded_again(pictures: Path, configure: Callable):
    config = configure(pictures, resolution=(16, 32), mask=files(pictures))
    first = prepare(config, LATENTS)
    assert prepare(config, LATENTS).summary.encoded == 0
    (pictures.parent / "masks/cats/1.png").write_bytes(encoded(Image.new("L", (32, 16), 255)))
    second = prepare(config, LATENTS)
    assert second.summary.encoded == 1
    assert second.fingerprint != first.fingerprint
    assert masks(config).min() == 1


def test_rows_without_a_mask_or_with_one_of_another_size_are_rejected(
    pictures: Path, configure: Callable, rejected: Callable
):
    for name in ("2", "3"):
        (pictures / f"{name}.png").write_bytes(noise_png(int(name), (32, 16)))
    (pictures.parent / "masks/3.png").write_bytes(encoded(half("L", (16, 16))))
    config = configure(pictures, mask=files(pictures), caption={"template": "x"}, max_rejected_fraction=0.9)
    prepared = prepare(config, LATENTS)
    assert prepared.summary.rows == 1
    assert rejected(prepared.summary) == {
        "2.png": "has no mask: 2.png",
        "3.png": "its mask has another size: 16 x 16 pixels, the picture 32 x 16",
    }


def test_a_mask_that_cannot_be_read_loses_no_other_row(pictures: Path, configure: Callable):
    (pictures / "0.png").write_bytes(noise_png(1, (32, 16)))
    (pictures.parent / "masks/0.png").mkdir()
    listing = list_source(configure(pictures, mask=files(pictures)).dataset)
    rows = {row.id: row for unit in listing.units for row in source_rows(listing.read, unit)}
    assert rows.keys() == {"0.png", "cats/1.jpg"}
    assert rows["0.png"].reason.startswith("cannot be read: ")
    assert rows["cats/1.jpg"].mask == encoded(half("L"))


def test_masks_that_cannot_belong_to_the_pictures_are_refused_before_a_run(pictures: Path, configure: Callable):
    check_masks(configure(pictures, mask=files(pictures)).dataset)
    (pictures.parent / "masks/cats/1.png").write_bytes(encoded(half("L", (16, 16))))
    words = r"dataset.mask.path: the mask cats/1.png is 16 x 16 pixels large, its picture 32 x 16; make them alike"
    with pytest.raises(ConfigError, match=words):
        check_masks(configure(pictures, mask=files(pictures)).dataset)
    (pictures.parent / "masks/cats/1.png").unlink()
    with pytest.raises(ConfigError, match="holds no mask of the pictures; that of cats/1.jpg would be cats/1.png"):
        check_masks(configure(pictures, mask=files(pictures)).dataset)


def test_sizes_are_those_of_upright_pictures(pictures: Path, configure: Callable):
    picture = Image.new("RGB", (16, 32), "red")
    orientation = Image.Exif()
    orientation[0x0112] = 6
    (pictures / "cats/1.jpg").write_bytes(encoded(picture, "jpeg", exif=orientation))
    check_masks(configure(pictures, mask=files(pictures)).dataset)


def test_places_of_the_latents_count_by_their_share():
    mask = np.zeros((16, 16), np.uint8)
    mask[:8, :4] = 255
    assert latent_mask(mask.tobytes(), (16, 16), (2, 2)).tolist() == [[[0.5, 0], [0, 0]]]


def test_names_of_masks():
    assert [mask_name(name) for name in ("a/1.jpg", "1.PNG", "shard.tar/key", "v1.5")] == [
        "a/1.png", "1.png", "shard.tar/key.png", "v1.5.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"name": "parquet"}, "name the column that holds them by dataset.source.id_column"),
        ({"name": "huggingface"}, "take dataset=parquet with dataset.source.id_column, or dataset.mask=alpha"),
    ],
)
def test_mask_files_for_rows_without_names_are_refused(source: dict, words: str, pictures: Path, configure: Callable):
    source |= {"path": str(pictures)}
    with pytest.raises(ValidationError, match=f"source '{source['name']}' have none; {words}"):
        configure(source, mask=files(pictures))
    configure(source, mask="alpha")
    configure({"name": "parquet", "path": "x", "id_column": "name"}, mask=files(pictures))


def test_an_autoencoder_takes_no_masks(configure: Callable, pictures: Path):
    content = configure(pictures, mask="alpha").model_dump(mode="json") | {"method": {"name": "autoencoder"}}
    with pytest.raises(ValidationError, match="dataset.mask is for the denoiser's loss"):
        ExperimentConfig.model_validate(content)
