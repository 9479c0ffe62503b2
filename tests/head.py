"""A cluster of one node, as `ray start --head` starts it, for programs that join it by its address."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
RAY = BIN / "ray"


@dataclass(frozen=True)
class Head:
    address: str
    """Of its dashboard, which takes jobs and Serve's applications."""
    environment: dict[str, str]
    """Of programs that ask it: clusters are protected by a token."""

    @property
    def logs(self) -> Path:
        return Path(self.environment["RAY_TMPDIR"]) / "ray" / "session_latest" / "logs"


@contextmanager
def ray_head(log: Path, num_cpus: int) -> Iterator[Head]:
    """log: a file for what it says."""
    port, dashboard = free_port(), free_port()
    # Ray notes the machine's cluster below this folder, where later tests would find it and join it. Sockets lie
    # there, too, and their paths must be short.
    folder = tempfile.mkdtemp(prefix="ray-")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "PATH": f"{BIN}:{os.environ['PATH']}",  # jobs' python is this one
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": folder,
    }
    command = [RAY, "start", "--head", "--block", f"--num-cpus={num_cpus}", f"--port={port}"]
    command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"]
    command += [f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=500000000"]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            _wait_until_open(dashboard, process)
            yield Head(f"http://127.0.0.1:{dashboard}", environment)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
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
