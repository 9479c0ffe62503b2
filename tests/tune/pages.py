"""What a browser takes of a sweep's report, and small sweeps to report on."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from drawn_sweep import LOSS

from ray_sd.tune.report import report_html
from ray_sd.tune.results import Status, Sweep, Trial

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


def written(sweep: Sweep, folder: Path, **more: Any) -> Path:
    path = folder / "report.html"
    path.write_text(report_html(sweep, configuration=CONFIGURATION, commands=COMMANDS, **more), "utf-8")
    return path
