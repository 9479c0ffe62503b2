"""What a person sees of a running sweep."""

import logging
import sys
from io import StringIO
from threading import Thread

from drawn_sweep import ANSWER, drawn_sweep
from rich.console import Console
from rich.text import Text

from ray_sd.tune.progress import MOST_ROWS, Watcher, line, show, table, watching


def shown(sweep) -> str:
    console = Console(file=StringIO(), width=400)
    console.print(table(sweep))
    return console.file.getvalue()


def test_the_table_shows_settings_and_goals_of_each_trial_and_marks_the_best():
    sweep = drawn_sweep(8)
    text = shown(sweep)
    best = sweep.best()
    row = next(row for row in text.splitlines() if "* " in row)
    assert f"{best.settings['trainer.learning_rate']:.4g}" in row
    assert f"{best.last('validation_loss'):.4g}" in row
    assert f"{best.step}/{sweep.max_steps}" in row
    assert all(f" {number} " in text for number in range(1, 9))


def test_a_long_sweep_shows_what_is_at_work_and_what_came_last():
    sweep = drawn_sweep(200)
    sweep.trials[0].status = "running"
    rows = [row for row in shown(sweep).splitlines() if row.startswith("│")]
    assert len(rows) == MOST_ROWS
    assert rows[0].split("│")[1].strip(" *") == "1"
    assert rows[-1].split("│")[1].strip(" *") == "200"


def test_where_nobody_watches_each_change_is_one_line():
    sweep = drawn_sweep(2)
    console = Console(file=StringIO(), width=40)
    watcher = Watcher(console)
    for trial in sweep.trials:
        trial.status = "running"
    watcher.show(sweep)
    watcher.show(sweep)
    sweep.trials[1].status, sweep.trials[1].reason = "failed", "its process died"
    watcher.show(sweep)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("trial 2: failed (its process died): trainer.learning_rate=")
    assert "validation_loss" in lines[0]


def test_why_a_trial_was_stopped_is_shown():
    sweep = drawn_sweep(8)
    stopped = [trial for trial in sweep.trials if trial.status == "stopped"]
    assert stopped
    assert shown(sweep).count("stopped: others were better at step 100") == len(stopped)


def test_a_loss_is_shown_beside_what_is_measured_on_pictures():
    sweep = drawn_sweep(4, objectives=(ANSWER,))
    rows = shown(sweep).splitlines()
    heads = next(row for row in rows if "clip_score" in row)
    assert heads.index("clip_score") < heads.index("validation_loss")
    losses = [f"{trial.last('validation_loss'):.4g}" for trial in sweep.trials]
    assert all(any(loss in row for row in rows) for loss in losses)
    assert f"validation_loss {losses[0]}" in line(sweep, sweep.trials[0])
    for trial in sweep.trials:
        trial.reports = [{name: one[name] for name in ("step", "loss")} for one in trial.reports]
    assert " loss " in shown(sweep)
    assert shown(drawn_sweep(4)).count("loss") == 1


def test_brackets_in_a_reason_are_shown_as_they_are():
    sweep = drawn_sweep(2)
    sweep.trials[1].status, sweep.trials[1].reason = "failed", "OSError: no [batch, channels] in [/tmp/x]"
    assert "no [batch, channels] in [/tmp/x]" in shown(sweep)


def test_a_terminal_of_few_lines_shows_what_came_last():
    sweep = drawn_sweep(40)
    console = Console(file=StringIO(), force_terminal=True, width=400, height=12)
    watcher = Watcher(console)
    watcher.show(sweep)
    drawn = Text.from_ansi(console.file.getvalue()).plain
    watcher.stop()
    rows = [row.split("│") for row in drawn.splitlines() if row.startswith("│")]
    assert [row[1].strip(" *") for row in rows] == [str(number) for number in range(35, 41)]


def test_log_lines_stay_above_the_table(monkeypatch, capsys):
    console = Console(file=StringIO(), width=100, force_terminal=True)
    handler = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    watcher = Watcher(console)
    watcher.show(drawn_sweep(2))
    logging.getLogger().warning("told meanwhile")
    watcher.stop()
    assert handler.stream is sys.stderr
    assert "told meanwhile" in console.file.getvalue()
    assert "told meanwhile" not in capsys.readouterr().err


def test_sweeps_of_one_process_are_shown_each_by_itself(capsys):
    def another() -> None:
        show(drawn_sweep(1))  # which nobody watches
        with watching():
            show(drawn_sweep(1))

    with watching():
        show(drawn_sweep(2))
        beside = Thread(target=another)
        beside.start()
        beside.join()
        show(drawn_sweep(3))
    show(drawn_sweep(4))
    told = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == ["trial 1", "trial 2", "trial 1", "trial 3"]
