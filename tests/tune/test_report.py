import base64
import gzip
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, browser
from drawn_sweep import ANSWER, BASE, DROPOUT, LOSS, MAX_STEPS, PROMPTS, RANK, RATE, WORD, drawn_sweep
from PIL import Image
from scipy import stats

from ray_sd.tune.report import report_html, thumbnails
from ray_sd.tune.report.charts import curves, front
from ray_sd.tune.report.grid import axes, ranked
from ray_sd.tune.report.importance import _shares, importance
from ray_sd.tune.report.parallel import parallel
from ray_sd.tune.report.seeds import seed_intervals
from ray_sd.tune.report.thumbnails import SIZES, read_thumbnails
from ray_sd.tune.report.words import duration, number, short_names
from ray_sd.tune.results import Pictures, Status, Sweep, Trial

NAN = float("nan")
COMMANDS = [("Train the winner <again>", "python jobs/train.py 'prompt=an <owl> & \"hat\"'")]
CONFIGURATION = "name: <owl>\ntrainer:\n  learning_rate: 0.0001\n"


class Page(HTMLParser):
    """What a browser would take of a page, without its scripts running."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif not self._inside:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(sweep: Sweep, refresh_seconds: int | None = None) -> Page:
    return Page(report_html(sweep, configuration=CONFIGURATION, commands=COMMANDS, refresh_seconds=refresh_seconds))


def grid_of(sweep: Sweep) -> dict:
    """What the page's script is given of the pictures."""
    return next(json.loads(script) for script in page_of(sweep).scripts if script.startswith('{"axes"'))


def sweep_of(*trials: Trial, paths: tuple[str, ...] = ("a.x", "b.y"), log_paths: tuple[str, ...] = ()) -> Sweep:
    return Sweep("odd", (LOSS,), paths, log_paths, 100, (), list(trials), finished=True)


def trial(number: int, settings: dict, *losses: float, status: Status = "finished", seed: int = 0) -> Trial:
    reports = [{"step": 10 * step, "validation_loss": loss} for step, loss in enumerate(losses, 1)]
    return Trial(f"{number:05d}", settings, seed, status=status, reports=reports)


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


@pytest.mark.slow
def test_a_page_of_many_trials_is_small_without_their_pictures(many: Path):
    assert many.stat().st_size < 3 * 10**6


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


def test_importance_finds_the_setting_that_matters_and_the_same_each_time():
    sweep = drawn_sweep(80)
    told = importance(sweep, LOSS)
    assert next(iter(told.shares)) == RATE
    assert told.shares[RATE] > 0.5
    assert sum(told.shares.values()) == pytest.approx(1)
    assert set(told.shares) == set(sweep.paths)
    _shares.cache_clear()
    assert importance(sweep, LOSS) == told


def test_one_trial_that_diverged_does_not_hide_which_setting_matters():
    random = np.random.default_rng(0)
    drawn = [(float(random.uniform()), float(random.uniform())) for _ in range(30)]
    trials = [trial(n, {"a.x": x, "b.y": y}, x + 0.01 * y) for n, (x, y) in enumerate(drawn)]
    trials[7].reports[-1]["validation_loss"] = 1e6
    assert importance(sweep_of(*trials), LOSS).shares["a.x"] > 0.8


def test_importance_compares_trials_where_they_were_equally_long():
    """What goes on gains, whatever its settings: by their last values the later of these steps would decide, not x."""
    stopped = [trial(n, {"a.x": n % 4, "b.y": n // 6}, 5.0 + n % 4, status="stopped") for n in range(6)]
    finished = [trial(n, {"a.x": n % 4, "b.y": n // 6}, 5.0 + n % 4, 3.0, 1.0) for n in range(6, 9)]
    told = importance(sweep_of(*stopped, *finished), LOSS)
    assert (told.trials, told.step) == (9, 10)
    assert told.shares["a.x"] > 0.8
    assert "9 trials at step 10" in page_of(sweep_of(*stopped, *finished)).text


def test_importance_takes_texts_lists_and_settings_that_do_not_always_apply():
    kinds = ["lora", None, ["to_q"], True]
    trials = [
        trial(n, {"a.x": kinds[n % 4]} | ({"b.y": 0.1 * (n % 3)} if n % 2 else {}), float(n % 4)) for n in range(16)
    ]
    told = importance(sweep_of(*trials), LOSS)
    assert next(iter(told.shares)) == "a.x"


@pytest.mark.parametrize(
    ("trials", "reason"),
    [
        ([trial(n, {"a.x": n}, 1.0 * n) for n in range(3)], "4 trials with a value are needed, and there are 3"),
        ([trial(n, {"a.x": n}, NAN) for n in range(6)], "and there are 0"),
        ([trial(n, {"a.x": 1}, 1.0 * n) for n in range(6)], "the same settings"),
        ([trial(n, {"a.x": n}, 1.0) for n in range(6)], "the same value"),
    ],
)
def test_where_importance_cannot_be_told_the_page_says_why(trials: list[Trial], reason: str):
    sweep = sweep_of(*trials)
    assert importance(sweep, LOSS).shares == {}
    assert "validation_loss it cannot be told: " in page_of(sweep).text
    assert reason in page_of(sweep).text


def test_the_front_is_drawn_through_the_trials_that_nothing_beats():
    sweep = drawn_sweep(30, objectives=(LOSS, ANSWER))
    figure = front(sweep, short_names(sweep.paths))
    line = next(trace for trace in figure.data if trace.mode == "lines")
    expected = [(one.last("validation_loss"), one.last("clip_score")) for one in sweep.front()]
    assert list(zip(line.x, line.y, strict=True)) == expected
    assert len(expected) > 1
    names = {trace.name for trace in figure.data}
    assert {"front", "winner", "base"} <= names
    text = page_of(sweep).text
    assert "What is traded" in text
    assert ", ".join(one.id for one in sweep.front()) in text
    assert "What is traded" not in page_of(drawn_sweep(30)).text


def test_seeds_make_means_with_students_interval():
    values = {1e-4: [0.3, 0.34, 0.29], 1e-3: [0.5, 0.9], 1e-2: [0.4]}
    trials = [
        trial(10 * place + seed, {RATE: rate}, value, seed=seed)
        for place, (rate, of_rate) in enumerate(values.items())
        for seed, value in enumerate(of_rate)
    ]
    trials[0].is_base = True
    sweep = sweep_of(*trials, trial(99, {RATE: 1e-3}, 0.1, status="stopped", seed=7), paths=(RATE,))
    intervals = seed_intervals(sweep, LOSS)
    assert [one.settings[RATE] for one in intervals] == [1e-4, 1e-2, 1e-3]
    assert [one.is_base for one in intervals] == [True, False, False]
    for one in intervals:
        expected = values[one.settings[RATE]]
        assert one.values == tuple(expected)
        assert one.mean == pytest.approx(np.mean(expected))
        if len(expected) < 2:
            assert one.half_width is None
        else:
            low, high = stats.t.interval(0.95, len(expected) - 1, loc=np.mean(expected), scale=stats.sem(expected))
            assert (one.mean - one.half_width, one.mean + one.half_width) == pytest.approx((low, high))
    text = page_of(sweep).text
    assert "Luck or merit" in text
    assert "Over its 3 seeds validation_loss is 0.31 ± 0.066" in text
    assert "Luck or merit" not in page_of(drawn_sweep(6)).text


def test_a_best_mean_whose_runs_are_beaten_in_both_is_not_said_to_be_unbeaten():
    found = {("lucky", 0): (0.1, 0.9), ("lucky", 1): (0.9, 0.1), ("good", 0): (0.3, 0.5), ("good", 1): (0.2, 0.4)}
    trials = []
    for place, ((name, seed), (loss, answer)) in enumerate(found.items()):
        trials.append(trial(place, {"a.x": name}, loss, seed=seed))
        trials[-1].reports[-1][ANSWER.metric] = answer
    sweep = Sweep("odd", (LOSS, ANSWER), ("a.x",), (), 100, (), trials, finished=True)
    best = sweep.best()
    assert (best.id, [one.id for one in sweep.front()]) == ("00003", ["00000"])
    text = page_of(sweep).text
    assert "Trial 00003 wins with validation_loss 0.2 and clip_score 0.4" in text
    assert "Over its 2 seeds validation_loss is 0.25 " in text
    assert "It is the best" not in text
    assert "No trial beats it" not in text
    best.reports[-1]["validation_loss"] = 0.09
    assert "It is the best in validation_loss of those that no trial beats in both" in page_of(sweep).text


def test_many_values_are_binned_on_their_own_scale_and_few_are_not():
    rates = [10 ** (-6 + 4 * n / 59) for n in range(60)]
    trials = [trial(n, {"a.x": rate, "b.y": [16, 4, 8][n % 3]}, 1.0) for n, rate in enumerate(rates)]
    x, y = axes(sweep_of(*trials, log_paths=("a.x",)))
    assert len(x.columns) == 8  # the root of 60, rounded up
    assert x.columns[0] == "1e-6 … 3.2e-6"
    assert x.columns[-1] == "0.0032 … 0.01"
    assert list(x.places) == sorted(x.places)
    assert {x.places.count(place) for place in range(8)} <= {7, 8}
    assert y.columns == ("4", "8", "16")
    assert y.places[:3] == (2, 0, 1)


def test_columns_tell_values_apart_and_put_what_does_not_apply_last():
    values = [0.000321, 0.00032149, None, True, "lora", [1, 2]]
    trials = [trial(n, {"a.x": value}, 1.0) for n, value in enumerate(values)]
    (axis,) = axes(sweep_of(*trials, trial(9, {}, 1.0), paths=("a.x",)))
    assert axis.columns == ("0.000321", "0.0003215", "[1, 2]", "lora", "null", "true", "–")
    assert [axis.columns[place] for place in axis.places] == [
        "0.000321",
        "0.0003215",
        "null",
        "true",
        "lora",
        "[1, 2]",
        "–",
    ]


def test_a_single_swept_setting_makes_one_row_in_the_order_of_its_values():
    trials = [trial(n, {RATE: rate}, 1.0) for n, rate in enumerate((1e-3, 1e-5, 0.00032, 1e-4))]
    (axis,) = axes(sweep_of(*trials, paths=(RATE,)))
    assert axis.columns == ("1e-5", "1e-4", "0.00032", "0.001")
    assert axis.places == (3, 0, 2, 1)


def test_seeds_are_an_axis_where_there_are_several():
    assert [axis.path for axis in axes(drawn_sweep(6, num_seeds=3))][-1] == "seed"
    assert "seed" not in [axis.path for axis in axes(drawn_sweep(6))]


def test_a_cell_shows_its_best_trial_the_winner_before_all():
    sweep = drawn_sweep(30, objectives=(ANSWER, LOSS))
    order = ranked(sweep)
    assert order[0] is sweep.best()
    finished = [one.last("clip_score") for one in order if one.status == "finished"]
    assert finished == sorted(finished, reverse=True)
    assert [one.last("clip_score") is None for one in order] == sorted(one.last("clip_score") is None for one in order)


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


def test_curves_of_stopped_trials_are_dashed():
    sweep = drawn_sweep(12)
    lines = curves(sweep, LOSS, short_names(sweep.paths)).data
    dashed = {line.meta[0] for line in lines if line.line.dash == "dash"}
    assert dashed == {row for row, one in enumerate(sweep.trials) if one.status == "stopped"} != set()


def test_far_outliers_do_not_flatten_the_curves():
    trials = [trial(n, {"a.x": n}, 0.5, 0.3 + 0.01 * n) for n in range(10)]
    sweep = sweep_of(*trials, trial(10, {"a.x": 10}, 0.5, 900.0))
    figure = curves(sweep, LOSS, short_names(sweep.paths))
    assert figure.layout.yaxis.range[1] < 1
    assert "1 trial far outside" in figure.layout.annotations[0].text
    assert curves(sweep_of(*trials), LOSS, short_names(sweep.paths)).layout.yaxis.range is None


def test_a_value_that_is_no_number_leaves_a_gap_and_one_without_values_no_line():
    sweep = sweep_of(trial(0, {"a.x": 1}, 1.0, NAN, 3.0), trial(1, {"a.x": 2}, NAN), trial(2, {"a.x": 3}))
    (line,) = curves(sweep, LOSS, short_names(sweep.paths)).data
    assert list(line.x) == [10, 30]
    assert list(line.y) == [1.0, 3.0]


def test_parallel_axes_are_logarithmic_where_drawn_so_and_name_categories():
    sweep = drawn_sweep(30)
    (lines,) = parallel(sweep, short_names(sweep.paths)).data
    axis = {dimension.label: dimension for dimension in lines.dimensions}
    known = [one for one in sweep.trials if one.last("validation_loss") is not None]
    assert len(axis["learning_rate"].values) == len(known)
    assert sorted(axis["learning_rate"].values) == pytest.approx(
        sorted(np.log10([one.settings[RATE] for one in known]))
    )
    assert axis["learning_rate"].ticktext[-1] == "0.01"
    assert axis["rank"].ticktext == ("1", "4", "8", "16", "32")
    assert "<owl>" in axis["initializer_token"].ticktext
    assert axis["dropout"].ticktext[0] == "–"  # of trials without it
    assert "validation_loss" in axis
    told = parallel(sweep, short_names(sweep.paths)).layout.meta
    assert sorted(told["rows"]) == list(range(30))  # also those that have no line
    (rates,) = [one["places"] for one in told["axes"] if one["name"] == "learning_rate"]
    assert rates == pytest.approx([np.log10(sweep.trials[row].settings[RATE]) for row in told["rows"]])
    best = len(known) - 1
    assert axis["learning_rate"].values[best] == pytest.approx(np.log10(sweep.best().settings[RATE]))


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


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path]:
    """A sweep with pictures, and its page."""
    folder = tmp_path_factory.mktemp("report")
    sweep = drawn_sweep(14, folder, objectives=(LOSS, ANSWER), num_seeds=2)
    return sweep, written(sweep, folder)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 200 trials without pictures."""
    return written(drawn_sweep(200, objectives=(LOSS, ANSWER)), tmp_path_factory.mktemp("many"))


def written(sweep: Sweep, folder: Path, **more: Any) -> Path:
    path = folder / "report.html"
    path.write_text(report_html(sweep, configuration=CONFIGURATION, commands=COMMANDS, **more), "utf-8")
    return path


def texts(chromium: Browser, selector: str) -> list[str]:
    return chromium.run(f"[...document.querySelectorAll({selector!r})].map((found) => found.textContent)")


def rows_shown(chromium: Browser) -> set[int]:
    """The trials in the table, by their places in the sweep."""
    ids = chromium.run("[...document.querySelectorAll('#table tbody tr:not([hidden])')].map((row) => row.id)")
    return {int(name.removeprefix("trial-")) for name in ids}


def choose(chromium: Browser, **settings: object) -> None:
    """Of the selectors over the pictures."""
    for name, value in settings.items():
        chromium.run(f"document.querySelector('#axes').elements.{name}.value = {str(value)!r}")
    chromium.run("document.querySelector('#axes').dispatchEvent(new Event('change'))")


@pytest.mark.slow
def test_a_browser_draws_every_chart_lays_the_grid_and_sorts_the_table(page: tuple[Sweep, Path], chromium: Browser):
    sweep, path = page
    chromium.show(path)
    drawn = chromium.run("[...document.querySelectorAll('.chart')].map((chart) => !!chart.querySelector('.main-svg'))")
    assert drawn == [True] * len(drawn)
    assert len(drawn) >= 7
    buttons = chromium.run("[...document.querySelectorAll('.modebar-btn')].map((one) => one.dataset.title)")
    assert buttons
    assert not any("hare" in title or "cloud" in title for title in buttons)  # nothing sends a chart away
    cells = texts(chromium, "#grid .cell")
    assert any("winner" in cell for cell in cells)
    assert any(re.search(r"best of \d+ trials", cell) for cell in cells)
    choose(chromium, x=1, y=-1, prompt=2)
    ranks = sorted({one.settings[RANK] for one in sweep.trials})
    assert texts(chromium, "#grid thead th") == [str(rank) for rank in ranks]
    assert len(texts(chromium, "#grid tbody tr")) == 1
    assert chromium.run("document.querySelector('#grid img').alt").endswith(PROMPTS[2])

    known = {one.id: value for one in sweep.trials if (value := one.last("validation_loss")) is not None}
    for falling in (False, True):
        chromium.run(
            "[...document.querySelectorAll('thead button')].find((b) => b.textContent === 'validation_loss').click()"
        )
        order = [name[:5] for name in texts(chromium, "#table tbody th")]
        assert order[: len(known)] == sorted(known, key=known.__getitem__, reverse=falling)
    assert chromium.complaints == []


@pytest.mark.slow
def test_a_brush_keeps_the_trials_that_pass_it_in_all_that_is_below(page: tuple[Sweep, Path], chromium: Browser):
    sweep, path = page
    chromium.show(path)
    box = "(({ x, y, width, height }) => [x + width / 2, y, height])(document.querySelector({!r}).getBoundingClientRect())"
    chromium.run("document.querySelector('#settings').scrollIntoView({ behavior: 'instant' })")
    x, top, height = chromium.run(box.replace("{!r}", repr("#settings .axis-brush .background")))
    chromium.drag((x, top + 0.4 * height), (x, top + 0.9 * height))
    chromium.wait("() => !document.querySelector('#filtered').hidden")
    low, high = chromium.run("document.querySelector('#settings .chart').data[0].dimensions[0].constraintrange")
    rates = sorted({one.settings[RATE] for one in sweep.trials})  # so few that they are at equal distances
    passing = {row for row, one in enumerate(sweep.trials) if low <= rates.index(one.settings[RATE]) <= high}
    assert 0 < len(passing) < len(sweep.trials)
    assert rows_shown(chromium) == passing
    assert texts(chromium, "#filtered span") == [f"{len(passing)} of {len(sweep.trials)} trials"]
    curve = "document.querySelector('#curves .chart').data.filter((line) => line.visible !== false).map((line) => line.meta[0])"
    known = {row for row, one in enumerate(sweep.trials) if one.last("validation_loss") is not None}
    assert set(chromium.run(curve)) == passing & known
    front = (
        "document.querySelector('#front .chart').data.flatMap((points) => points.customdata || []).map(([row]) => row)"
    )
    assert set(chromium.run(front)) == {row for row in passing if sweep.trials[row].last("clip_score") is not None}
    assert {
        int(row)
        for row in chromium.run("[...document.querySelectorAll('#grid .cell')].map((cell) => cell.dataset.trial)")
    } <= passing

    chromium.run("document.querySelector('#filtered button').click()")
    chromium.wait("() => document.querySelector('#filtered').hidden")
    assert rows_shown(chromium) == set(range(len(sweep.trials)))
    # The same by keys.
    chromium.run("document.querySelector('#settings details').open = true")
    chromium.run("document.querySelector('#ranges [aria-label=\"rank, from\"]').focus()")
    chromium.press("ArrowRight")
    chromium.wait("() => !document.querySelector('#filtered').hidden")
    least = min(one.settings[RANK] for one in sweep.trials)
    more = {row for row, one in enumerate(sweep.trials) if one.settings[RANK] > least}
    assert rows_shown(chromium) == more
    # A report of a running sweep reloads itself.
    chromium.show(path, keep=True)
    assert rows_shown(chromium) == more
    assert chromium.complaints == []


@pytest.mark.slow
def test_pictures_are_chosen_by_step_and_seed_and_seen_large(page: tuple[Sweep, Path], chromium: Browser):
    sweep, path = page
    chromium.show(path)
    ids = {row: one.id for row, one in enumerate(sweep.trials)}
    choose(chromium, seed="", step=50)
    at_last = chromium.run("document.querySelector('#table .pictures img').src")
    assert chromium.run("document.querySelector('#grid img').src") != at_last
    choose(chromium, seed=1, step=50)
    cells = [
        int(row)
        for row in chromium.run("[...document.querySelectorAll('#grid .cell')].map((cell) => cell.dataset.trial)")
    ]
    assert {sweep.trials[row].seed for row in cells} == {1}
    value = number(sweep.trials[cells[0]].reports[0]["validation_loss"])
    assert value in texts(chromium, "#grid .cell")[0]

    caption = "document.querySelector('#large').textContent"
    chromium.run("document.querySelector('#grid .cell').focus()")
    chromium.press("Enter")
    chromium.wait("() => document.querySelector('#large').open")
    told = chromium.run(caption)
    assert f"trial {ids[cells[0]]}" in told
    assert f"step 50 · validation_loss {value}" in told
    assert PROMPTS[0] in told
    assert f"rank={sweep.trials[cells[0]].settings[RANK]}" in told
    chromium.press("ArrowRight")
    chromium.press("ArrowDown")
    assert f"trial {ids[cells[1]]}" in chromium.run(caption)
    assert PROMPTS[1] in chromium.run(caption)
    chromium.press("Escape")
    assert not chromium.run("document.querySelector('#large').open")
    chromium.run("document.querySelector('#table .pictures button').click()")
    chromium.run("document.querySelector('#large a').click()")
    assert not chromium.run("document.querySelector('#large').open")
    assert chromium.run("document.querySelector('#table tr.shown').id") == "trial-0"
    assert chromium.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1400, False)])
def test_many_trials_fit_a_phone_and_a_dark_theme(width: int, dark: bool, many: Path, chromium: Browser):
    chromium.show(many, width=width, dark=dark)
    assert chromium.complaints == []
    assert chromium.run("document.documentElement.scrollWidth") == width
    ground = chromium.run("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert max(ground) < 64 if dark else min(ground) > 192
    assert chromium.run("document.querySelector('#settings .chart').data[0].dimensions[0].values.length") > 100


@pytest.mark.slow
def test_a_browser_that_cannot_unpack_the_charts_says_so(page: tuple[Sweep, Path], chromium: Browser, tmp_path: Path):
    _, path = page
    old = tmp_path / "old.html"
    old.write_text(
        path.read_text("utf-8").replace("<head>", "<head><script>delete window.DecompressionStream</script>")
    )
    chromium.show(old)
    (note, *others) = set(texts(chromium, ".chart .note"))
    assert "a browser of 2023 or later" in note
    assert not others
    assert texts(chromium, "#grid .cell")


def test_a_browser_shows_a_sweep_that_has_just_begun(tmp_path: Path, chromium: Browser):
    sweep = drawn_sweep(0, running=True)
    sweep.trials = [Trial("00000", dict(BASE) | {DROPOUT: None}, 0, is_base=True, status="pending")]
    path = written(sweep, tmp_path, refresh_seconds=60)
    chromium.show(path)
    assert chromium.complaints == []
    assert len(path.read_text()) < 10**5  # without plotly, which draws no chart here
