"""`jobs/serve.py` from its start to its end, and the first request that it tells."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from head import free_port
from PIL import Image

JOB = Path(__file__).resolve().parents[2] / "jobs" / "serve.py"


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """For Ray's files. Sockets lie there, too, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.slow
def test_the_first_request_that_is_told_draws_and_the_server_ends_quietly(tmp_path: Path, ray_folder: Path):
    port = free_port()
    command = [sys.executable, JOB, f"http.port={port}", "defaults.num_inference_steps=2"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_TMPDIR"] = str(ray_folder)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as server:
        assert server.stdout is not None
        try:
            lines = [server.stdout.readline() for _ in range(7)]
            assert re.search(rf" at http://localhost:{port} after \d+ s ", lines[0])
            subprocess.run(
                ["bash", "-c", "".join(lines[2:5])], cwd=tmp_path, env=environment, check=True, capture_output=True
            )
        finally:
            server.terminate()  # which interrupts it, as Ctrl-C does
        _, errors = server.communicate(timeout=120)
    assert server.returncode == 0
    assert Image.open(tmp_path / "picture.png").size == (64, 64)
    [log] = ray_folder.glob("ray/session_latest/logs/serve/replica_ray_sd_api_*.log")
    told = [json.loads(line) for line in log.read_text().splitlines()]
    assert [one["status"] for one in told if one.get("path") == "/v1/images/generations"] == [200]
    assert re.fullmatch(r"Ray: \d+ CPUs, \d+ GPUs\n", errors)
