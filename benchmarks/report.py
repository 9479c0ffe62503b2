"""How a benchmark speaks: one table for people, one line of JSON for programs, one file for the record."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("ray", "torch", "diffusers", "transformers", "peft", "deepspeed", "pyarrow")

Figures = Mapping[str, float | int]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def write_result(
    name: str,
    figures: Figures,
    bars: Figures | None = None,
    settings: Mapping[str, object] | None = None,
    *,
    at_most: Figures | None = None,
    keep: bool = True,
) -> None:
    """Print whether each bar was reached, `keep` the figures in `results/NAME.json`, and end with the line of JSON.

    bars: the least value of a figure, by its name. at_most: the same of figures that are good when they are small.
    """
    for figure, bar in {**(bars or {}), **(at_most or {})}.items():
        reached = figures[figure] >= bar if figure in (bars or {}) else figures[figure] <= bar
        print(f"{figure}: {figures[figure]:g}, bar {bar:.4g}: {'reached' if reached else 'MISSED'}")
    if keep:
        _keep(name, figures, settings)
    print(json.dumps(dict(figures)))


def _keep(name: str, figures: Figures, settings: Mapping[str, object] | None) -> None:
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "machine": machine(),
        "settings": dict(settings or {}),
        "figures": dict(figures),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def machine() -> dict[str, object]:
    """Processor, cores this process may use, and accelerator."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "accelerator": accelerator}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
