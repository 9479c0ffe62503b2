"""What a sweep's report says."""

import base64
import gzip
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from drawn_sweep import ANSWER, LOSS, MAX_STEPS, PROMPTS, WORD, drawn_sweep
from pages import COMMANDS, NAN, grid_of, page_of, sweep_of, trial
from PIL import Image

from ray_sd.tune.report import report_html, thumbnails
from ray_sd.tune.report.charts import curves
from ray_sd.tune.report.page import _columns
from ray_sd.tune.report.thumbnails import SIZES, read_thumbnails
from ray_sd.tune.report.words import duration, number, short_names
from ray_sd.tune.results import Pictures, Sweep


def test_a_report_loads_nothing_from_anywhere(tmp_path: Path):
    page = page_of(drawn_sweep(12, tmp_path, objectives=(LOSS, ANSWER), only_last=True), refresh_seconds=10)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, name)
    styles = re.findall(r"<style>(.*?)</style>", report_html(drawn_sweep(0), configuration="", commands=[]), re.DOTALL)
    assert styles
    assert not any("url(" in style or "@import" in style for style in styles)
    (packed,) = [script for script in page.scripts if script.startswith("H4sI")]
    assert "plotly.js v" in gzip.decompress(base64.b64decode(packed)).decode()


def test_what_trials_and_prompts_say_is_text_and_no_markup(tmp_path: Path):
    sweep = drawn_sweep(12, tmp_path, only_last=True)
    sweep.trials[2].reason = "</script><script>alert(1)</script>"
    sweep.trials[3].settings[WORD] = "</td><img src=x onerror=alert(2)>"
    page = page_of(sweep)
    assert "owl" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert not any(script.startswith("alert") for script in page.scripts)
    assert "owl <sweep>" in page.text
    assert "</script><script>alert(1)</script>" in page.text
    assert COMMANDS[0][0] in page.text
    assert COMMANDS[0][1] in page.text
    assert "name: <owl>" in page.text
    assert any(attributes["alt"] == f"trial 00000: {PROMPTS[0]}" for attributes in page.all("img"))
    for script in page.scripts:
        if script.startswith("{"):
            json.loads(script)
    # Plotly makes markup of what its labels say.
    (line,) = [line for line in curves(sweep, LOSS, short_names(sweep.paths)).data if line.meta[0] == 3]
    assert "&lt;img src=x" in line.meta[1]


def test_the_winner_and_the_base_are_told_with_their_difference():
    sweep = drawn_sweep(20)
    best, base = sweep.best(), sweep.trials[0]
    new, old = best.last("validation_loss"), base.last("validation_loss")
    text = page_of(sweep).text
    assert f"Trial {best.id} wins with validation_loss {number(new)} at step {MAX_STEPS}." in text
    assert f"own settings, trial 00000, came to validation_loss {number(old)}" in text
    assert f"(the winner's is {(old - new) / old * 100:.1f} % lower)" in text
    assert f"The winner: trial {best.id}" in text


def test_a_winner_that_was_better_before_its_end_is_said_to_need_fewer_steps():
    turned, steady = trial(1, {"a.x": 1}, 1.0, 0.5, 0.8), trial(2, {"a.x": 2}, 1.0, 0.81, 0.8)
    text = page_of(sweep_of(turned)).text
    assert (
        "At step 20 its validation_loss was 0.5, better than in the end: fewer steps may do (trainer.max_steps=20)."
        in text
    )
    assert "fewer steps" not in page_of(sweep_of(steady)).text
    higher = Sweep("odd", (ANSWER,), ("a.x",), (), 100, (), [trial(3, {"a.x": 1}, 1.0, 1.0)], finished=True)
    for report, score in zip(higher.trials[0].reports, (0.9, 0.5), strict=True):
        report[ANSWER.metric] = score
    assert "At step 10 its clip_score was 0.9" in page_of(higher).text


def test_a_winner_that_is_worse_than_no_training_is_said_to_be():
    for untrained, words in ((0.9, "0.9."), (0.7, "0.7, which is better: this training did harm.")):
        winner = trial(1, {"a.x": 1}, 1.0, 0.8)
        winner.reports[0]["untrained_validation_loss"] = untrained
        page = page_of(sweep_of(winner))
        assert f"Without training validation_loss is {words}" in page.text
        assert "untrained_validation_loss" not in page.text
    assert "Without training" not in page_of(sweep_of(trial(1, {"a.x": 1}, 0.8))).text
    higher = Sweep("odd", (ANSWER,), ("a.x",), (), 100, (), [trial(1, {"a.x": 1}, 1.0)], finished=True)
    higher.trials[0].reports[0] |= {ANSWER.metric: 0.2, f"untrained_{ANSWER.metric}": 0.3}
    assert "Without training clip_score is 0.3, which is better" in page_of(higher).text


def test_a_metric_that_is_called_as_a_setting_is_told_from_it():
    sweep = drawn_sweep(3)
    sweep.trials[0].reports[-1]["learning_rate"] = 3e-8
    titles = [column.title for column in _columns(sweep, short_names(sweep.paths))]
    assert titles.count("learning_rate") == 1
    assert "learning_rate at the end" in titles


def test_a_base_that_wins_is_said_to():
    sweep = drawn_sweep(3)
    sweep.trials[0].reports[-1]["validation_loss"] = 0.0
    assert "nothing else that was tried is better" in page_of(sweep).text


def test_a_base_without_a_value_is_said_to_have_none():
    sweep = drawn_sweep(3)
    sweep.trials[0].status, sweep.trials[0].reports = "failed", []
    assert "no value to compare with: trial 00000 is failed" in page_of(sweep).text


def test_failed_trials_say_why_and_counts_are_told():
    sweep = drawn_sweep(20, running=True)
    text = page_of(sweep).text
    failed = [one for one in sweep.trials if one.status == "failed"]
    assert failed
    assert all(one.reason in text for one in failed)
    for status in ("finished", "stopped", "failed", "running", "pending"):
        assert f"{sum(one.status == status for one in sweep.trials)} {status}" in text
    assert "leads so far" in text


def test_a_page_reloads_itself_until_the_sweep_is_finished():
    assert "refresh" not in str(page_of(drawn_sweep(3, running=True)).tags)
    running = page_of(drawn_sweep(3, running=True), refresh_seconds=30)
    assert {"http-equiv": "refresh", "content": "30"} in running.all("meta")
    assert running.all("body") == [{"data-refresh": "30"}]
    assert "refresh" not in str(page_of(drawn_sweep(3), refresh_seconds=30).tags)


def test_pictures_are_small_and_each_is_in_the_page_but_for_the_winners_once(tmp_path: Path):
    sweep = drawn_sweep(4, tmp_path, size=512, only_last=True)
    page = page_of(sweep)
    drawn = [one for one in sweep.trials if one.pictures]
    shown = [image for image in page.all("img") if image.get("id")]
    assert len(shown) == len(drawn) * len(PROMPTS)
    assert len(page.all("img")) == len(shown) + 2 * len(PROMPTS)  # the winner and the base, once more
    assert {image["width"] for image in shown} == {"512", "256"}  # of noise, which takes many bytes, less
    assert not any("class" in image for image in shown)
    most = 4 / 3 * SIZES[0][1] + 100
    assert all(len(image["src"]) < most for image in shown)
    assert page.all("option")[0] == {"value": "0"}
    assert all(prompt in page.text for prompt in PROMPTS)


def test_small_pictures_keep_their_pixels(tmp_path: Path):
    picture = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    picture.save(tmp_path / "picture.png")
    sweep = sweep_of(trial(0, {"a.x": 1}, 1.0))
    path = str(tmp_path / "picture.png")
    sweep.trials[0].pictures = [Pictures(10, path, (path,))]
    (((thumbnail,),),) = (steps.values() for steps in read_thumbnails(sweep).values())
    assert (thumbnail.width, thumbnail.height, thumbnail.is_small) == (32, 32, True)
    shown = Image.open(io.BytesIO(base64.b64decode(thumbnail.uri.partition(",")[2])))
    assert np.array_equal(np.asarray(shown), np.asarray(picture))


def test_a_page_of_very_many_pictures_takes_smaller_ones(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    sweep = drawn_sweep(300)
    for one in sweep.trials:
        one.pictures = [Pictures(10, "", (str(tmp_path / "noise.png"),) * 20)]
    found = [thumbnail for steps in read_thumbnails(sweep).values() for thumbnail in steps[10]]
    assert len(found) == 6000
    assert max(thumbnail.width for thumbnail in found) <= 64
    assert sum(len(thumbnail.uri) for thumbnail in found) < 20 * 2**20


def test_older_pictures_are_there_as_far_as_the_page_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sweep = drawn_sweep(3, tmp_path)
    steps = [[one.step for one in reversed(trial.pictures)] for trial in sweep.trials]
    assert [len(of_trial) for of_trial in steps] == [8, 8, 2]
    assert [list(of_trial) for of_trial in read_thumbnails(sweep).values()] == steps
    monkeypatch.setattr(thumbnails, "SIZES", SIZES[-1:])
    newest = sum(one.bytes for of_trial in read_thumbnails(sweep).values() for one in next(iter(of_trial.values())))
    # Room for two trials' four pictures at three steps, and not at a fourth.
    monkeypatch.setattr(thumbnails, "PAGE_BYTES", newest + 7 * 4 * SIZES[-1][1])
    assert [list(of_trial) for of_trial in read_thumbnails(sweep).values()] == [[400, 350, 300, 250]] * 2 + [[100]]
    drawn = [drawn for trial in grid_of(sweep)["trials"] for drawn in trial["drawn"]]
    assert [one["pictures"] is None for one in drawn] == [True, False, False, False] * 2 + [True]
    assert drawn[1]["values"] == [number(sweep.trials[0].reports[-2]["validation_loss"])]


def test_contact_sheets_stand_in_for_pictures_and_missing_ones_are_left_out(tmp_path: Path):
    sweep = drawn_sweep(4, tmp_path)
    for one in sweep.trials:
        one.pictures = [Pictures(drawn.step, drawn.sheet) for drawn in one.pictures]
    sweep.trials[1].pictures[-1] = Pictures(MAX_STEPS, str(tmp_path / "gone.png"))
    newest = [next(iter(steps.values())) for steps in read_thumbnails(sweep).values()]
    assert [len(pictures) for pictures in newest] == [1, 1, 1, 1]
    assert [pictures[0] is None for pictures in newest] == [False, True, False, False]
    assert "all at once" in page_of(sweep).text


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (drawn_sweep(0, running=True), "No trial has begun."),
        (drawn_sweep(0), "No trial was run."),
        (sweep_of(trial(0, {"a.x": 1}, status="failed")), "All trials failed; the table says why."),
        (sweep_of(trial(0, {"a.x": 1}, NAN)), "No trial has a value of validation_loss."),
        (sweep_of(trial(0, {}, 1.0), paths=()), "Trial 00000 wins with validation_loss 1"),
    ],
)
def test_a_sweep_that_has_little_to_show_has_a_page(sweep: Sweep, words: str):
    page = page_of(sweep, refresh_seconds=5)
    assert words in page.text
    assert "Curves" in page.text if sweep.best() else "Curves" not in page.text
    assert COMMANDS[0][1] in page.text


def test_a_metric_that_some_trials_lack_is_left_empty():
    sweep = drawn_sweep(6)
    sweep.trials[1].reports[-1]["gradient_norm"] = 2.5
    page = page_of(sweep)
    assert "gradient_norm" in page.text
    assert "2.5" in page.text


def test_headings_tables_and_charts_can_be_read_aloud(tmp_path: Path):
    page = page_of(drawn_sweep(12, tmp_path, objectives=(LOSS, ANSWER), num_seeds=2, only_last=True))
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    assert all(image["alt"] for image in page.all("img"))
    assert all(head["scope"] in ("col", "row") for head in page.all("th"))
    charts = [attributes for attributes in page.all("div") if attributes.get("class") == "chart"]
    assert len(charts) >= 6
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    targets = {attributes["href"][1:] for attributes in page.all("a")}
    assert targets <= set(identifiers)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-4, "1e-4"), (0.00032, "0.00032"), (3.2e-6, "3.2e-6"), (0.001, "0.001"), (0.5, "0.5"), (16, "16"), (12000.0, "12000"),
     (0.0, "0"), (-0.00002, "-2e-5"), (0.123456, "0.1235"), (1234.5, "1234"), (1e20, "1e20"), (2.5e-10, "2.5e-10")],
)  # fmt: skip
def test_numbers_are_written_as_people_write_them(value: float, text: str):
    assert number(value) == text


def test_paths_are_named_by_as_many_words_as_tell_them_apart():
    paths = ("trainer.learning_rate", "model.rank", "method.rank", "seed")
    assert list(short_names(paths).values()) == ["learning_rate", "model.rank", "method.rank", "seed"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (3600, "1 h"), (273600, "3 d 4 h")],
)
def test_times_are_written_in_two_units(seconds: float, text: str):
    assert duration(seconds) == text
