"""Two runs at once on one machine, each with a Ray of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from ray_sd.adapter import read_manifest

REPOSITORY = Path(__file__).parents[2]

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_two_runs_at_once_end_well_and_tell_nothing_of_each_other(settings: list[str], tmp_path: Path):
    command = [sys.executable, "jobs/train.py", *settings]
    runs = {
        name: subprocess.Popen(
            [*command, f"name={name}"], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name in ("one", "other")
    }
    for name, run in runs.items():
        said, _ = run.communicate()
        assert run.returncode == 0, said
        assert read_manifest(tmp_path / "runs" / name / "adapter").step == 4
        assert "Traceback" not in said
        assert "multiple active Ray" not in said
