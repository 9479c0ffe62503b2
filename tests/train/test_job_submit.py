"""The cluster path: `ray job submit` against a head started by `ray start --head`."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_sd.adapter import read_manifest

REPOSITORY = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
# Clusters are protected by a token; the jobs' python is this one.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
    "PATH": f"{RAY.parent}:{os.environ['PATH']}",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    # Ray notes the machine's cluster below this folder, where later tests would find it and join it. Sockets lie
    # there, too, and their paths must be short.
    "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray-"),
}

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def head(tmp_path_factory) -> Iterator[str]:
    """Address of the job server of a head of two CPUs."""
    port, dashboard = _free_port(), _free_port()
    with (tmp_path_factory.mktemp("head") / "log").open("w") as log:
        process = subprocess.Popen(
            [
                RAY,
                "start",
                "--head",
                "--block",
                "--num-cpus=2",
                f"--port={port}",
                f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={_free_port()}",
                f"--dashboard-agent-listen-port={_free_port()}",
                "--object-store-memory=500000000",
            ],
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            _wait_until_open(dashboard, process)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def test_a_submitted_job_trains_with_the_repository_as_working_directory(head, settings, tmp_path):
    submitted = _submit(
        [
            RAY,
            "job",
            "submit",
            "--address",
            head,
            "--working-dir",
            ".",
            "--",
            "python",
            "jobs/train.py",
            *settings,
            "name=submitted",
            "trainer.num_workers=2",
        ]
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in submitted.stdout
    adapter = tmp_path / "runs" / "submitted" / "adapter"
    assert str(adapter) in submitted.stdout
    assert read_manifest(adapter).step == 4
    lines = (tmp_path / "runs" / "submitted" / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def _submit(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    """Submit once the head's job agent is there, which takes some seconds more than its dashboard."""
    deadline = time.monotonic() + 90
    while True:
        done = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(1)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_until_open(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert process.poll() is None, "ray start ended"
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    raise TimeoutError(f"nothing answers on port {port}")
