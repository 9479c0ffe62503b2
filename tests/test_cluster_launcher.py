"""cluster.yaml, judged by Ray's own schema."""

from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cluster() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_ray_accepts_the_cluster(cluster: dict):
    validate_config(prepare_config(cluster))


def test_ray_refuses_a_misspelt_cluster(cluster: dict):
    with pytest.raises(ValidationError, match="idle_timeout"):
        validate_config(prepare_config(cluster | {"idle_timeout": 5}))


def test_head_has_no_gpu_and_gpu_workers_come_when_asked_for(cluster: dict):
    types = prepare_config(cluster)["available_node_types"]
    head = types.pop(cluster["head_node_type"])
    assert "GPU" not in head["resources"]
    assert all(
        kind["resources"]["GPU"] > 0 and kind["min_workers"] == 0 < kind["max_workers"] for kind in types.values()
    )


def test_nodes_run_the_pinned_ray(cluster: dict):
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1].isalpha()]
    (version,) = (str(pin.specifier).removeprefix("==") for pin in pins if pin.name == "ray")
    for image in (cluster["docker"]["head_image"], cluster["docker"]["worker_image"]):
        assert image.startswith(f"rayproject/ray:{version}-py311")


def test_dashboard_stays_on_the_head(cluster: dict):
    """Whoever reaches it runs code on the cluster."""
    (start,) = (command for command in cluster["head_start_ray_commands"] if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in start
