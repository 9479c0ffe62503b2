"""What the dashboard asks Prometheus for; that it is told is seen where a server runs."""

import json
import re
from pathlib import Path

import ray_sd.serve
from ray_sd.serve.metrics import COUNTED, SEEN, TIMED

BOARD = json.loads((Path(ray_sd.serve.__file__).parent / "grafana.json").read_text())
TARGETS = [target for panel in BOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_asks_for_what_is_told_and_for_all_of_it():
    asked = {name for target in TARGETS for name in re.findall(r"ray_(sd_\w+)", target["expr"])}
    told = {f"sd_{name}_total" for name in (*COUNTED, "requests")} | {f"sd_{name}" for name in SEEN}
    assert asked == told | {f"sd_{name}_bucket" for name in (*TIMED, "request_seconds")}


def test_the_dashboards_panels_lie_side_by_side():
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    taken = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(places)
