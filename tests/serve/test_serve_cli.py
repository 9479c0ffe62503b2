"""The shipped `serve_config.yaml` by Ray Serve's own commands, on a cluster that has one CPU."""

import base64
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from head import BIN, Head, free_port, ray_head
from PIL import Image
from waiting import wait_for

SHIPPED = Path(__file__).resolve().parents[2] / "serve_config.yaml"


def run(head: Head, verb: str, *arguments: str | Path) -> str:
    """What `serve VERB` prints."""
    command = [BIN / "serve", verb, "--address", head.address, *arguments]
    done = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def state(head: Head) -> str:
    application: dict[str, Any] = yaml.safe_load(run(head, "status"))["applications"]["ray_sd"]
    assert application["status"] in ("NOT_STARTED", "DEPLOYING", "RUNNING"), application
    return application["status"]


def answer(address: str) -> httpx.Response | None:
    try:
        return httpx.get(f"{address}/ready", timeout=60)
    except httpx.TransportError:
        return None  # the proxy is not there yet


@pytest.mark.slow
def test_what_ships_is_deployed_draws_and_is_shut_down(tmp_path: Path):
    port = free_port()
    config = tmp_path / "serve_config.yaml"
    text = SHIPPED.read_text()
    assert "\n  port: 8000\n" in text
    config.write_text(text.replace("\n  port: 8000\n", f"\n  port: {port}\n"))
    address = f"http://127.0.0.1:{port}"
    with ray_head(tmp_path / "log", num_cpus=1) as head:
        run(head, "deploy", config)
        wait_for(lambda: state(head) == "RUNNING")
        wait_for(lambda: (ready := answer(address)) and ready.status_code == 200)
        body = {"prompt": "a owl on a red background", "model": "owl", "num_inference_steps": 2}
        drawn = httpx.post(f"{address}/v1/images/generations", json=body, timeout=300).raise_for_status()
        [picture] = drawn.json()["data"]
        assert Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))).size == (64, 64)
        [log] = (head.logs / "serve").glob("replica_ray_sd_api_*.log")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        [told] = [line for line in lines if line.get("path") == "/v1/images/generations"]
        assert (told["request_id"], told["status"]) == (drawn.headers["x-request-id"], 200)
        run(head, "shutdown", "--yes")
        assert not yaml.safe_load(run(head, "status"))["applications"]
