"""`jobs/serve.py` from its start to Ctrl-C, and the first request that it tells."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

JOB = Path(__file__).resolve().parents[2] / "jobs" / "serve.py"


@pytest.mark.slow
def test_the_first_request_that_is_told_draws_and_ctrl_c_ends_it(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, JOB, f"http.port={port}", "defaults.num_inference_steps=2"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as server:
        assert server.stdout is not None
        try:
            lines = [server.stdout.readline() for _ in range(7)]
            assert f"at http://localhost:{port} " in lines[0]
            subprocess.run(
                ["bash", "-c", "".join(lines[2:5])], cwd=tmp_path, env=environment, check=True, capture_output=True
            )
        finally:
            server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=120)
    assert server.returncode == 0
    assert Image.open(tmp_path / "picture.png").size == (64, 64)
    assert re.fullmatch(r"Ray: \d+ CPUs, \d+ GPUs\n", errors)
