import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ray_sd.generate import read_parameters

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.mark.cluster
@pytest.mark.slow
def test_the_demo_draws_before_and_after(tmp_path: Path):
    settings = [
        *(
            "trainer.max_steps=2",
            "trainer.schedule=constant",
            "trainer.checkpoint.every_steps=2",
            "trainer.num_workers=1",
        ),
        "trainer.validation.num_inference_steps=2",
        f"storage_path={tmp_path / 'demo'}",
        f"cache_path={tmp_path / 'cache'}",
    ]
    command = [sys.executable, "jobs/demo.py", *settings]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    picture = tmp_path / "demo" / "before_after.png"
    drawn = Image.open(picture)
    assert drawn.width > 4 * 64
    assert read_parameters(picture)["adapter"] == str(tmp_path / "demo" / "demo-1" / "adapter")
    assert f"adapter={tmp_path / 'demo' / 'demo-1' / 'adapter'}" in done.stdout
