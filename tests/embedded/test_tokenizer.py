import copy
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

import ray_sd.embedded
from ray_sd.embedded.sprites import catalogue
from ray_sd.embedded.tokenizer import build_tokenizer

PACKAGE = Path(ray_sd.embedded.__file__).parent
NAMES = (PACKAGE / "names.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def saved():
    return CLIPTokenizer.from_pretrained(PACKAGE / "emoji" / "tokenizer")


@pytest.fixture(scope="module")
def built():
    return build_tokenizer()


def words_of(tokenizer, text):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    return [token.removesuffix("</w>") for token in tokens[1:-1]]


@pytest.mark.slow
def test_building_again_gives_the_saved_tokenizer(saved, built):
    assert built.get_vocab() == saved.get_vocab()
    assert built(NAMES).input_ids == saved(NAMES).input_ids


def test_every_word_of_a_caption_is_one_token(saved):
    for name in (name for name in NAMES if name.replace(" ", "").isalpha()):
        caption = f"a {name} on a yellow background"
        assert words_of(saved, caption) == caption.split()


@pytest.mark.parametrize("word", catalogue().held_out)
def test_held_out_subjects_are_words_that_a_fine_tune_can_teach(saved, word):
    assert words_of(saved, word) == [word]


def test_text_is_framed_and_padded_as_clip_does_it(saved):
    ids = saved("a cat", padding="max_length", max_length=saved.model_max_length).input_ids
    end = saved.eos_token_id
    assert ids[0] == saved.bos_token_id
    assert ids[3:] == [end] * (len(ids) - 3)
    assert end == max(saved.get_vocab().values())
    assert saved.pad_token_id == end


def test_every_caption_fits_the_text_encoder(saved):
    longest = max(len(ids) for ids in saved([f"a {name} on a yellow background" for name in NAMES]).input_ids)
    assert longest <= saved.model_max_length < 77


@pytest.mark.parametrize("prompt", ["naïve zebra", "un œuf", "東京タワー", "🐙 octopus", "a <cat>, 42 % off!"])
def test_any_prompt_survives_the_round_trip(saved, prompt):
    ids = saved(prompt).input_ids[1:-1]
    assert saved.eos_token_id not in ids
    assert saved.decode(ids).replace(" ", "") == prompt.replace(" ", "")


def test_a_new_token_is_added_behind_the_vocabulary(saved):
    tokenizer = copy.deepcopy(saved)
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<owl-toy>"]) == 1
    assert tokenizer("a <owl-toy> on a red background").input_ids[2] == size
