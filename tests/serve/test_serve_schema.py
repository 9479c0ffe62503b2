"""Whether the HTTP side is what its OpenAPI document says, asked by schemathesis, with a real Ray Serve."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import serving
from tiny_models import export_adapter

from ray_sd.serve.app import build
from ray_sd.serve.gate import hash_of

pytestmark = pytest.mark.slow

EXAMPLES = 200
"""Requests of each operation, beside those at the edges of what the document allows."""
SECONDS = 60
"""In which everything is answered: pictures are few steps of a tiny model."""
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)
LIMITS = {
    "max_pixels": 64 * 64,
    "max_steps": 3,
    "max_images": 2,
    "max_prompt_length": 200,
    "max_upload_bytes": 100_000,
    "max_upload_pixels": 128 * 128,
    "deadline": SECONDS / 2,
}
ADMIN, USER = "sd-cleo", "sd-ann"


@pytest.fixture(scope="module")
def server(tiny: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server with keys and an adapter."""
    folder = tmp_path_factory.mktemp("served")
    export_adapter(tiny, folder / "pet", {"name": "lora", "rank": 4}, name="tiny_served")
    arguments = {
        "models": {"tiny": {"settings": [f"model.base={tiny}", "model.name=tiny_served"], "threads": 1}},
        "adapters": str(folder),
        "keys": {"ann": hash_of(USER), "cleo": {"sha256": hash_of(ADMIN), "role": "admin"}},
        "limits": LIMITS,
        "defaults": {"num_inference_steps": 2},
    }
    with serving(build(arguments)) as address:
        yield address


def ask(server: str, key: str, folder: Path, *options: str) -> None:
    """Asks everything, always the same, and fails where an answer is not as it should be."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server}/openapi.json", "--no-color", "--no-shrink"]
    settings = {
        "--header": f"Authorization: Bearer {key}",
        "--checks": ",".join(CHECKS),
        "--request-timeout": f"{SECONDS}",
        "--suppress-health-check": "all",
        "--warnings": "off",
    }
    given = [text for setting in settings.items() for text in setting]
    run = subprocess.run(
        [*command, "--generation-deterministic", "--continue-on-failure", *given, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_request_is_answered_as_the_document_says(server: str, tmp_path: Path):
    ask(server, ADMIN, tmp_path, "--phases", "coverage,fuzzing", "--max-examples", f"{EXAMPLES}")
    body = {"prompt": "a cat", "num_inference_steps": 3}
    header = {"Authorization": f"Bearer {ADMIN}"}
    answer = httpx.post(f"{server}/v1/images/generations", json=body, headers=header, timeout=SECONDS)
    assert answer.status_code == 200


@pytest.mark.parametrize("key", [USER, "sd-eve"])
def test_those_who_may_not_are_told_as_the_document_says(server: str, tmp_path: Path, key: str):
    ask(server, key, tmp_path, "--phases", "fuzzing", "--max-examples", "10")
