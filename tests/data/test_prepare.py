import logging
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from in_process import prepare
from PIL import Image
from sample_pictures import LATENTS, PIXELS, TINY_MODEL, bomb_png, captioned_pictures, encoded, experiment, noise_png
from tiny_models import save_tiny_model

from ray_sd.config import ExperimentConfig, ModelConfig
from ray_sd.config.load import load_config
from ray_sd.config.model import ComponentSource
from ray_sd.config.rows import RowSpec
from ray_sd.data import PreparedData, RowIndex
from ray_sd.data import prepare as prepare_by_ray
from ray_sd.data.encode import ImageEncoder, add_time_ids
from ray_sd.data.examine import PICTURE
from ray_sd.data.reader import RowReader
from ray_sd.data.sources import list_source
from ray_sd.errors import ArtifactError, ConfigError, DataError
from ray_sd.models import load_model

CAPTIONED_PIXELS = RowSpec(images="pixels", text="tokens", caption_dropout=0.0)


def read_all(index: RowIndex, config: Any, rows: RowSpec) -> dict[str, dict[str, np.ndarray]]:
    """Every row of an index by its id, first variant."""
    reader = RowReader(index, rows, config)
    ids = [reader.id(position) for position in range(index.num_rows)]
    batch = reader.read(range(index.num_rows), [0] * index.num_rows, vary=False)
    return {name: {key: array[i] for key, array in batch.items()} for i, name in enumerate(ids)}


def counts(prepared: PreparedData) -> tuple[int, int]:
    return prepared.summary.encoded, prepared.summary.reused


@pytest.fixture(scope="module")
def encoded_folder(
    tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> tuple[ExperimentConfig, PreparedData]:
    """Pictures and captions, encoded by Ray's actors with an autoencoder that the command names from where it runs."""
    path = tmp_path_factory.mktemp("encoded")
    save_tiny_model(path / "models" / "tiny")
    config = experiment(
        path / "cache",
        captioned_pictures(path / "pictures"),
        encode={"dtype": "float32", "batch_size": 4, "num_actors": 2},  # else they are encoded in this process
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)  # actors run in another folder
        prepared = prepare_by_ray(with_autoencoder(config, "models/tiny"), LATENTS)
    return with_autoencoder(config, path / "models" / "tiny"), prepared


def with_autoencoder(config: ExperimentConfig, path: Path | str) -> ExperimentConfig:
    model = config.model.model_copy(update={"vae": ComponentSource(path=str(path))})
    return config.model_copy(update={"model": model})


def test_pictures_and_captions_are_encoded_as_the_model_itself_encodes_them(encoded_folder: tuple):
    """Also where the command's folder is another than the actors'."""
    config, prepared = encoded_folder
    assert counts(prepared) == (10, 0)
    assert (prepared.summary.texts, prepared.summary.texts_encoded) == (11, 11)  # the empty caption is always there
    rows = read_all(prepared.train, config, LATENTS)
    assert list(rows) == [f"{i}.png" for i in range(10)]

    model = load_model(config.model, {"vae", "text_encoder", "tokenizer"})
    picture = Image.open(Path(config.dataset.source.path) / "7.png").resize((16, 16), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        mean, std = model.encode_images(pixels)
        text = model.encode_text(model.tokenize(["picture number 7"]))["text_embeds"]
    # Four pictures at once, and on other threads, are added up in another order.
    assert np.allclose(rows["7.png"]["latent_mean"], mean[0], atol=1e-4)
    assert np.allclose(rows["7.png"]["latent_std"], std[0], atol=1e-4)
    assert np.allclose(rows["7.png"]["text_embeds"], text[0], atol=1e-4)
    others = [rows[name] for name in rows if name != "7.png"]
    for name in ("latent_mean", "text_embeds"):
        assert min(np.abs(rows["7.png"][name] - other[name]).max() for other in others) > 1e-2


def test_one_machine_without_gpus_encodes_in_the_process_that_prepares(
    encoded_folder: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, by_actors = encoded_folder
    encode = config.dataset.encode.model_copy(update={"num_actors": 1})
    dataset = config.dataset.model_copy(update={"encode": encode})
    config = config.model_copy(update={"dataset": dataset, "cache_path": str(tmp_path)})
    monkeypatch.setattr("ray_sd.data.passes.ActorPoolStrategy", lambda **_: pytest.fail("an actor encodes"))
    threads = torch.get_num_threads()
    prepared = prepare_by_ray(config, LATENTS)
    assert torch.get_num_threads() == threads
    assert prepared.fingerprint == by_actors.fingerprint
    assert counts(prepared) == (10, 0)
    expected = read_all(by_actors.train, encoded_folder[0], LATENTS)
    for name, row in read_all(prepared.train, config, LATENTS).items():
        for key in ("latent_mean", "text_embeds"):
            assert np.allclose(row[key], expected[name][key], atol=1e-4)


def test_stable_diffusion_xl_gets_both_embeddings_the_size_and_the_crop(configure: Callable, tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "wide.png").write_bytes(noise_png(0, (40, 20)))
    xl = load_config(["experiment=smoke", "model=tiny_random_xl"], ExperimentConfig).model
    caption, encode = {"template": "a wide picture"}, {"dtype": "float32"}
    settings = configure(tmp_path / "pictures", flip=True, crop="center", caption=caption, encode=encode)
    config = settings.model_copy(update={"model": xl})
    index = prepare(config, LATENTS).train
    rows = RowReader(index, LATENTS, config).read([0], [0], vary=False)
    model = load_model(xl, {"text_encoder", "tokenizer"})
    with torch.inference_mode():
        expected = model.encode_text(model.tokenize(["a wide picture"]))
    assert np.allclose(rows["text_embeds"], expected["text_embeds"], atol=1e-4)
    assert np.allclose(rows["pooled_text_embeds"], expected["pooled_text_embeds"], atol=1e-4)
    # The middle of 40 x 20 pixels at 16 x 16: scaled by 0.8, cut 8 pixels from the left.
    assert rows["add_time_ids"].tolist() == [[20, 40, 0, 8, 16, 16]]
    dropped = RowReader(index, replace(LATENTS, caption_dropout=1.0), config).read([0], [0])
    assert not dropped["text_embeds"].any()
    assert not dropped["pooled_text_embeds"].any()


def test_the_crop_of_a_mirrored_picture_counts_from_its_own_left():
    record = {"width": 40, "height": 20, "box": [4.0, 0.0, 24.0, 20.0], "flip": False}
    assert add_time_ids(record, height=16, width=16).tolist() == [20, 40, 0, 3, 16, 16]
    assert add_time_ids(record | {"flip": True}, height=16, width=16).tolist() == [20, 40, 0, 13, 16, 16]


def test_only_what_changed_is_encoded_again(encoded_folder: tuple, caplog: pytest.LogCaptureFixture):
    config, first = encoded_folder
    with caplog.at_level(logging.INFO):
        second = prepare(config, LATENTS)
    assert counts(second) == (0, 10)
    assert second.fingerprint == first.fingerprint
    assert "data: 10 rows; encoded 0, reused 10 of 10; captions: encoded 0, reused 11 of 11" in caplog.text

    (Path(config.dataset.source.path) / "3.txt").write_text("owl " * 200)
    third = prepare(config, LATENTS)
    assert counts(third) == (0, 10)
    assert third.summary.texts_encoded == 1
    assert third.summary.cut_captions == 1
    assert third.fingerprint != first.fingerprint


def test_one_changed_picture_is_encoded_alone(folder: Path, configure: Callable):
    config = configure(folder)
    before = read_all(prepare(config, PIXELS).train, config, PIXELS)
    (folder / "3.png").write_bytes(noise_png(100))
    prepared = prepare(config, PIXELS)
    after = read_all(prepared.train, config, PIXELS)
    assert counts(prepared) == (1, 9)
    changed = [name for name in before if not (before[name]["pixels"] == after[name]["pixels"]).all()]
    assert changed == ["3.png"]


def test_the_fingerprint_follows_pictures_and_their_variants(folder: Path, configure: Callable):
    first = prepare(configure(folder), PIXELS).fingerprint
    assert prepare(configure(folder, flip=True), PIXELS).fingerprint != first
    (folder / "3.png").write_bytes(noise_png(100))
    assert prepare(configure(folder), PIXELS).fingerprint != first


def test_shards_say_where_a_window_was(configure: Callable, tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "wide.png").write_bytes(noise_png(0, (40, 20)))
    config = configure(tmp_path / "pictures", flip=True)
    prepare(config, PIXELS)
    (shard,) = (Path(config.cache_path) / "pixels").rglob("*.parquet")
    rows = pq.read_table(shard, columns=["id", "width", "height", "box", "flip"]).to_pylist()
    assert {(row["id"], row["width"], row["height"], *row["box"]) for row in rows} == {
        ("wide.png", 40, 20, 10, 0, 30, 20)
    }
    assert sorted(row["flip"] for row in rows) == [False, True]


def test_what_could_not_be_read_once_is_tried_again(folder: Path, configure: Callable, monkeypatch: pytest.MonkeyPatch):
    picture = folder / "3.png"
    content = picture.read_bytes()
    times = picture.stat().st_atime_ns, picture.stat().st_mtime_ns
    config = configure(folder, max_rejected_fraction=0.5)
    listing = list_source(config.dataset)
    picture.unlink()
    with monkeypatch.context() as patched:
        patched.setattr("ray_sd.data.pipeline.list_source", lambda _: listing)
        assert prepare(config, PIXELS).summary.rejected == 1
    picture.write_bytes(content)
    os.utime(picture, ns=times)
    assert list_source(config.dataset).fingerprint == listing.fingerprint
    assert prepare(config, PIXELS).summary.rejected == 0


def test_a_source_without_rows_is_refused(configure: Callable, tmp_path: Path):
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(DataError, match="so nothing is left"):
        prepare(configure({"name": "webdataset", "path": str(tmp_path / "empty.tar")}), PIXELS)
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="hold no rows"):
        prepare(configure({"name": "parquet", "path": str(tmp_path / "x.parquet")}), PIXELS)


def test_latents_that_are_not_finite_are_rejected():
    encoder = ImageEncoder(ModelConfig.model_validate(TINY_MODEL), "float32", num_actors=1)
    mean = np.zeros((2, 4, 2, 2), np.float32)
    mean[1] = np.nan
    encoder._encode = lambda pixels: (mean, np.ones_like(mean))
    records = [
        {
            "id": name,
            "path": name,
            "captions": ["x"],
            "key": name.encode() * 16,
            "shapes": [[3, 16, 16]],
            "width": 20,
            "height": 20,
            "box": [0, 0, 20, 20],
            "pixels": bytes(768),
        }
        for name in "ab"
    ]
    table = encoder(pa.Table.from_pylist(records, PICTURE))
    assert table["key"].to_pylist() == [b"a" * 16, None]


def test_an_encoder_that_cannot_be_loaded_is_told_in_words(folder: Path, configure: Callable, tmp_path: Path):
    save_tiny_model(tmp_path / "tiny")
    with pytest.raises(ArtifactError, match="holds a UNet2DConditionModel; the vae must be a AutoencoderKL"):
        prepare(with_autoencoder(configure(folder), tmp_path / "tiny" / "unet"), LATENTS)


def test_flips_are_added_to_what_the_cache_has(folder: Path, configure: Callable):
    plain = prepare(configure(folder), PIXELS)
    flipped = configure(folder, flip=True)
    prepared = prepare(flipped, PIXELS)
    shards = list((Path(flipped.cache_path) / "pixels").rglob("*.parquet"))
    assert sum(pq.read_metadata(shard).num_rows for shard in shards) == 20
    assert prepared.train.load().images.count(0) == 2
    assert plain.train.load().images.count(0) == 1


def test_a_pruned_shard_is_encoded_again(folder: Path, configure: Callable):
    config = configure(folder, encode={"rows_per_shard": 4})
    prepare(config, PIXELS)
    shards = sorted((Path(config.cache_path) / "pixels").rglob("*.parquet"))
    assert len(shards) == 3
    lost = pq.read_metadata(shards[0]).num_rows
    shards[0].unlink()
    assert counts(prepare(config, PIXELS)) == (lost, 10 - lost)


def test_a_damaged_shard_is_encoded_again(folder: Path, configure: Callable):
    config = configure(folder)
    prepare(config, PIXELS)
    (shard,) = (Path(config.cache_path) / "pixels").rglob("*.parquet")
    shard.write_bytes(b"damaged")
    (folder / "0.txt").write_text("so that the source is read again")
    prepared = prepare(config, PIXELS)
    assert counts(prepared) == (10, 0)
    assert len(read_all(prepared.train, config, PIXELS)) == 10


def test_a_damaged_view_is_made_again(folder: Path, configure: Callable):
    config = configure(folder)
    prepare(config, PIXELS)
    for file in (Path(config.cache_path) / "views").rglob("train.index"):
        file.unlink()
    assert counts(prepare(config, PIXELS)) == (0, 10)
    for file in (Path(config.cache_path) / "views").rglob("prepared.json"):
        file.write_text("{")
    assert counts(prepare(config, PIXELS)) == (0, 10)


def test_rows_are_in_the_order_of_their_ids_however_many_tasks_read_them(
    configure: Callable, tmp_path: Path, ray_cluster: None
):
    table = pa.table({"image": [noise_png(i) for i in range(40)], "name": [f"{(i * 7) % 40:02}" for i in range(40)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=5)
    source = {"name": "parquet", "path": str(tmp_path / "x.parquet"), "id_column": "name"}
    index = prepare_by_ray(configure(source, encode={"rows_per_shard": 7}), PIXELS).train.load()
    assert index.ids.to_pylist() == [f"{i:02}" for i in range(40)]


def test_rows_that_share_an_id_are_all_kept_and_numbered(configure: Callable, tmp_path: Path):
    table = pa.table({"image": [noise_png(0), noise_png(1), noise_png(0)], "caption": ["b", "c", "a"]})
    pq.write_table(table, tmp_path / "x.parquet")
    config = configure({"name": "parquet", "path": str(tmp_path / "x.parquet")})
    index = prepare(config, CAPTIONED_PIXELS).train.load()
    names = index.ids.to_pylist()
    twice = next(name for name in names if f"{name}#1" in names)
    assert len(set(names)) == 3
    assert index.captions[names.index(twice)].as_py() == ["a"]
    assert index.captions[names.index(f"{twice}#1")].as_py() == ["b"]


def test_the_holdout_is_chosen_by_id_and_kept_from_training(folder: Path, configure: Callable):
    prepared = prepare(configure(folder, holdout=3), PIXELS)
    held_out, trained = prepared.validation.load().ids.to_pylist(), prepared.train.load().ids.to_pylist()
    assert len(held_out) == 3
    assert sorted(held_out + trained) == [f"{i}.png" for i in range(10)]

    (folder / "new.png").write_bytes(noise_png(50))
    (folder / "new.txt").write_text("new")
    again = prepare(configure(folder, holdout=3), PIXELS).validation.load().ids.to_pylist()
    assert len(set(again) & set(held_out)) >= 2


def test_a_holdout_of_everything_is_refused(folder: Path, configure: Callable):
    with pytest.raises(DataError, match="dataset.holdout: 10 leaves none of the 10 rows to train on"):
        prepare(configure(folder, holdout=10), PIXELS)


def test_hostile_rows_are_rejected_with_reasons_and_the_others_are_kept(
    folder: Path, configure: Callable, rejected: Callable
):
    jpeg = encoded(Image.effect_noise((64, 64), 50), "jpeg")
    files = {
        "bomb.png": bomb_png(),
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "zero.png": b"",
        "text.png": b"no picture",
        "uncaptioned.png": noise_png(70),
        "latin.png": noise_png(71),
        "pixel.png": noise_png(72, (1, 1)),
        "grey16.png": encoded(Image.fromarray(np.full((8, 8), 30_000, np.uint16))),
        "cmyk.jpg": encoded(Image.new("CMYK", (8, 8)), "jpeg"),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("a caption")
    (folder / "uncaptioned.txt").unlink()
    (folder / "latin.txt").write_bytes(b"\xe9")
    config = configure(folder, max_rejected_fraction=0.5)
    prepared = prepare(config, CAPTIONED_PIXELS)
    reasons = rejected(prepared.summary)
    assert prepared.summary.rows == 13
    assert prepared.summary.rejected == len(reasons) == 6
    assert reasons["bomb.png"].startswith("60000x60000 pixels are more than")
    assert reasons["truncated.jpg"].startswith("cannot be decoded")
    assert reasons["text.png"].startswith("cannot be decoded")
    assert reasons["zero.png"] == "is empty"
    assert reasons["uncaptioned.png"] == "has no caption, and dataset.caption.template gives none"
    assert reasons["latin.png"] == "the caption is not UTF-8"

    assert prepare(config, CAPTIONED_PIXELS).summary.rejected == 6  # also when nothing is read again
    with pytest.raises(DataError, match=r"6 of 19 rows were rejected, more than dataset.max_rejected_fraction=0.1"):
        prepare(configure(folder, max_rejected_fraction=0.1), CAPTIONED_PIXELS)


def test_what_is_cached_is_held_against_the_limit_as_well(folder: Path, configure: Callable, rejected: Callable):
    (folder / "large.png").write_bytes(noise_png(99, (48, 48)))
    assert prepare(configure(folder), PIXELS).summary.rows == 11
    summary = prepare(configure(folder, max_pixels=24 * 24, max_rejected_fraction=0.5), PIXELS).summary
    assert (summary.encoded, summary.reused) == (0, 10)
    assert rejected(summary) == {"large.png": "48x48 pixels are more than dataset.max_pixels=576; not decoded"}


def test_pictures_without_captions_are_refused_with_the_remedy(folder: Path, configure: Callable):
    for file in folder.glob("*.txt"):
        file.unlink()
    with pytest.raises(DataError, match=r"10 of 10 rows were rejected, so nothing is left.*dataset.caption.template"):
        prepare(configure(folder, max_rejected_fraction=1.0), CAPTIONED_PIXELS)


def test_the_template_captions_rows_that_have_none(folder: Path, configure: Callable):
    (folder / "4.txt").unlink()
    config = configure(folder, caption={"template": "a photo of a sks dog"})
    index = prepare(config, CAPTIONED_PIXELS).train.load()
    assert index.captions.to_pylist()[3:6] == [["picture number 3"], ["a photo of a sks dog"], ["picture number 5"]]


def test_captions_are_rewritten(folder: Path, configure: Callable):
    caption = {"replace": {"picture": "<my-picture>", "umber": "x", "1": r"\\1"}, "prefix": "see ", "suffix": "!"}
    captions = prepare(configure(folder, caption=caption), CAPTIONED_PIXELS).train.load().captions.to_pylist()
    assert captions[:2] == [["see <my-picture> number 0!"], [r"see <my-picture> number \\1!"]]


def test_a_placeholder_that_no_caption_holds_is_refused(folder: Path, configure: Callable):
    rows = replace(CAPTIONED_PIXELS, placeholders=(("<cat>", 2),))
    with pytest.raises(DataError, match=r"no caption holds '<cat>'; write it into the captions"):
        prepare(configure(folder), rows)
    prepare(configure(folder, caption={"replace": {"picture": "<cat>"}}), rows)
    (folder / "3.txt").unlink()
    templates = replace(rows, templates=("a photo of <cat>",))
    assert prepare(configure(folder), templates).summary.rejected == 0


def test_captions_beyond_the_context_are_cut_and_counted(folder: Path, configure: Callable):
    (folder / "0.txt").write_text("owl " * 200)
    config = configure(folder)
    prepared = prepare(config, CAPTIONED_PIXELS)
    assert prepared.summary.cut_captions == 1
    assert "1 captions are longer than the text encoder reads and are cut" in str(prepared.summary)
    assert prepare(config, CAPTIONED_PIXELS).summary.cut_captions == 1  # also when nothing is read again
    assert read_all(prepared.train, config, CAPTIONED_PIXELS)["0.png"]["input_ids"].shape == (24,)


def test_a_cache_that_cannot_be_written_is_refused_in_words(folder: Path, configure: Callable, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    config = configure(folder).model_copy(update={"cache_path": str(tmp_path / "file" / "cache")})
    with pytest.raises(ConfigError, match=r"cache_path: .*/file/cache cannot be written .*; set cache_path=FOLDER"):
        prepare(config, PIXELS)


def test_a_cache_behind_a_uri_works_like_a_folder(folder: Path, configure: Callable, tmp_path: Path):
    config = configure(folder).model_copy(update={"cache_path": (tmp_path / "elsewhere").as_uri()})
    assert counts(prepare(config, PIXELS)) == (10, 0)
    prepared = prepare(config, PIXELS)
    assert counts(prepared) == (0, 10)
    assert len(read_all(prepared.train, config, PIXELS)) == 10
