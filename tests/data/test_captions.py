from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from in_process import prepare
from sample_pictures import LATENTS, noise_png

from ray_sd.config.dataset import CaptionConfig
from ray_sd.data.captions import written_captions
from ray_sd.data.reader import RowReader
from ray_sd.models import load_model

TAGS = "my-cat, red, small, on a mat"


def settings(**values: object) -> CaptionConfig:
    return CaptionConfig.model_validate(values)


def test_words_are_replaced_between_prefix_and_suffix():
    config = settings(replace={"cat": r"<\\1>"}, prefix="a photo of ", suffix=", sharp")
    assert written_captions(["a cat, no cats"], config) == [r"a photo of a <\\1>, no cats, sharp"]


def test_words_change_places_and_the_longest_goes_first():
    config = settings(replace={"cat": "dog", "dog": "cat", "cat face": "mask"})
    assert written_captions(["a cat, a dog, a cat face"], config) == ["a dog, a cat, a mask"]


def test_what_stands_between_two_separators_is_a_tag_only_if_it_is_something():
    captions = written_captions([", red, small,, ", ","], settings(tags={"keep_first": 1, "num_variants": 20}))
    assert captions[:2] == [", red, small,, ", ","]
    assert set(captions[2:]) == {"red, small", ""}


def test_one_tag_is_always_left():
    captions = written_captions([TAGS], settings(tags={"dropout": 0.99, "num_variants": 200}))
    assert set(TAGS.split(", ")) <= set(captions)
    assert "" not in captions


def test_tags_change_places_behind_those_that_stay():
    captions = written_captions([TAGS], settings(tags={"keep_first": 1, "num_variants": 40}))
    assert captions[0] == TAGS
    assert all(caption.startswith("my-cat, ") for caption in captions)
    assert {tuple(sorted(caption.split(", "))) for caption in captions} == {tuple(sorted(TAGS.split(", ")))}
    assert len(set(captions)) == 6  # three tags in every order


def test_tags_are_left_out_at_the_asked_rate():
    captions = written_captions([TAGS], settings(tags={"shuffle": False, "dropout": 0.3, "num_variants": 2000}))
    count = Counter(tag for caption in captions[1:] for tag in caption.split(", "))
    assert all(1300 < count[tag] < 1500 for tag in TAGS.split(", "))
    assert "my-cat, small, on a mat" in captions
    kept = written_captions([TAGS], settings(tags={"keep_first": 1, "dropout": 0.9, "num_variants": 50}))
    assert all(caption.startswith("my-cat") for caption in kept)


def test_versions_depend_on_the_caption_alone_and_not_on_how_many_there_are():
    few, many = (settings(tags={"num_variants": count}) for count in (3, 9))
    assert written_captions([TAGS], many)[:3] == written_captions([TAGS], few)
    assert written_captions(["a, b", TAGS], few)[:2] == ["a, b", TAGS]


def test_another_separator_separates():
    captions = written_captions(["a | b c"], settings(tags={"separator": "|", "num_variants": 20}))
    assert set(captions) == {"a | b c", "a| b c", "b c| a"}


def test_epochs_draw_among_versions_and_validation_takes_the_caption_itself(tmp_path: Path, configure: Callable):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(noise_png(0))
    (tmp_path / "pictures" / "1.txt").write_text("a, b, c")
    config = configure(tmp_path / "pictures", caption={"tags": {}})
    for rows in (LATENTS, replace(LATENTS, text="tokens")):
        data = prepare(config, rows)
        reader = RowReader(data.train, rows, config)
        name = "text_embeds" if rows.text == "embeddings" else "input_ids"
        drawn = reader.read([0] * 60, range(60))[name]
        versions = {row.tobytes() for row in drawn}
        assert len(versions) == len(set(written_captions(["a, b, c"], config.dataset.caption))) > 2
    ids = load_model(config.model, {"tokenizer"}).tokenize(["a, b, c"])["input_ids"].numpy()
    assert (reader.read([0], [7], vary=False)["input_ids"] == ids).all()
