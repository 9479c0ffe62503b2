from pathlib import Path

import matplotlib
import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

import ray_sd.generate

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / "inference.ipynb", as_version=4)


@pytest.mark.slow
def test_the_inference_notebook_runs_and_shows_pictures(notebook: nbformat.NotebookNode):
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 7


@pytest.mark.slow
def test_the_cells_of_the_inference_notebook_go_together(
    notebook: nbformat.NotebookNode, monkeypatch: pytest.MonkeyPatch
):
    """With pictures that cost nothing, but for the last cell, where the pipeline draws by itself."""
    asked: list[ray_sd.generate.ImageRequest] = []

    def generate(model: object, requests: list[ray_sd.generate.ImageRequest]) -> list[Image.Image]:
        asked.extend(requests)
        return [Image.new("RGB", (64, 64)) for _ in requests]

    monkeypatch.setattr(ray_sd.generate, "generate", generate)
    matplotlib.use("agg")
    names: dict[str, object] = {}
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert "pipeline(PROMPTS[0]" in cells[-1]
    for source in cells[:-1]:
        exec(source, names)
    assert len(asked) == 3 + 12 + 12 + 15
    assert names["base"].pipeline().unet is names["base"].unet
