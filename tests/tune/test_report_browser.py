"""A sweep's report in a browser."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser
from drawn_sweep import ANSWER, BASE, DROPOUT, LOSS, PROMPTS, RANK, RATE, drawn_sweep
from pages import written

from ray_sd.tune.report.words import number
from ray_sd.tune.results import Sweep, Trial


@pytest.mark.slow
def test_a_page_of_many_trials_is_small_without_their_pictures(many: Path):
    assert many.stat().st_size < 3 * 10**6


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


CONTROLS = """
document.querySelectorAll("details").forEach((one) => { one.open = true; });
window.controls = [...document.querySelectorAll("a[href], button, select, input, summary")]
  .filter((one) => one.checkVisibility());
controls.length
"""
FOCUSED = """
(({ outlineStyle, outlineWidth }, one) => [
  controls.indexOf(one),
  one.checkVisibility({ opacityProperty: true }) && outlineStyle !== "none" && parseFloat(outlineWidth) > 0,
])(getComputedStyle(document.activeElement), document.activeElement)
"""


@pytest.mark.slow
def test_all_is_done_by_keys_and_where_they_go_is_seen(page: tuple[Sweep, Path], chromium: Browser):
    _, path = page
    chromium.show(path)
    count = chromium.run(CONTROLS)
    found: dict[int, bool] = {}
    for _ in range(count + 10):  # and parts that scroll
        chromium.press("Tab")
        control, is_seen = chromium.run(FOCUSED)
        found[control] = is_seen
    unseen = [control for control in range(count) if not found.get(control)]
    assert [chromium.run(f"controls[{control}].outerHTML") for control in unseen] == []

    focused = "document.activeElement.closest({!r})"
    chromium.run("[...document.querySelectorAll('thead button')].find((b) => b.textContent === 'rank').focus()")
    for order in ("ascending", "descending"):
        chromium.press("Enter")
        assert chromium.run(focused.format("th") + ".ariaSort") == order
    cells = "[...document.querySelectorAll('#grid .cell')]"
    chromium.run(f"{cells}[1].focus()")
    opened = chromium.run("document.activeElement.dataset.trial")
    for turns in ((), ("ArrowDown",)):  # which lays the grid anew
        chromium.press("Enter")
        assert chromium.run("document.querySelector('#large').open")
        for key in turns:
            chromium.press(key)
        chromium.press("Escape")
        assert not chromium.run("document.querySelector('#large').open")
        chromium.wait(f"() => {focused.format('.cell')}?.dataset.trial === {opened!r}")
    chromium.press("Enter")
    chromium.run("document.querySelector('#large a').focus()")
    chromium.press("Enter")
    assert chromium.run(focused.format("tr") + ".id") == f"trial-{opened}"
    chromium.press("Tab")
    assert chromium.run(focused.format("tr") + ".id") == f"trial-{opened}"
    assert chromium.run("document.activeElement.tagName") == "BUTTON"
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
