"""The cluster path: `ray job submit` against a head started by `ray start --head`."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from head import RAY, Head, ray_head

from ray_sd.adapter import read_manifest

REPOSITORY = Path(__file__).parents[2]

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def head(tmp_path_factory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head") / "log", num_cpus=2) as head:
        yield head


def test_a_submitted_job_trains_with_the_repository_as_working_directory(head, settings, tmp_path):
    submitted = _submit(
        [
            RAY,
            "job",
            "submit",
            "--address",
            head.address,
            "--working-dir",
            ".",
            "--",
            "python",
            "jobs/train.py",
            *settings,
            "name=submitted",
            "trainer.num_workers=2",
        ],
        head.environment,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in submitted.stdout
    adapter = tmp_path / "runs" / "submitted" / "adapter"
    assert str(adapter) in submitted.stdout
    assert read_manifest(adapter).step == 4
    lines = (tmp_path / "runs" / "submitted" / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def _submit(command: list[str | Path], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Submit once the head's job agent is there, which takes some seconds more than its dashboard."""
    deadline = time.monotonic() + 90
    while True:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(1)
