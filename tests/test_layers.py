"""Imports go downward, and Ray and DeepSpeed stay where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    "config",
    "requests",
    "headers",
    "adapter",
    "finite",
    "models",
    "methods",
    "generate",
    "export",
    "draw",
    "data",
    "train",
    "tune",
    "jobs",
]
BOTTOM = {"errors", "embedded", "config"}  # what anyone may import
GROUND = ["files", "media"]  # what anyone else may import
SERVE_MAY_IMPORT = {"generate", "methods", "models", "adapter", "headers", "requests", "serve"}
RAY_IN = {"cluster", "draw", "data", "train", "tune", "serve", "jobs"}
"""And only these may import `cluster`."""
DEEPSPEED_IN = "ray_sd/train/engine.py"
WITHOUT_MODELS = ["config", *GROUND]
MODEL_PACKAGES = {"torch", "ray", "diffusers", "transformers", "deepspeed", "peft"}

FILES = [
    file.relative_to(ROOT).as_posix() for folder in ("ray_sd", "jobs") for file in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES)
def test_imports_obey_the_layers(path: str):
    assert list(violations(path, (ROOT / path).read_text())) == []


@pytest.mark.parametrize(
    ("path", "program", "words"),
    [
        ("ray_sd/models/base.py", "from ray_sd.methods import METHODS", "models may not import methods"),
        ("ray_sd/models/base.py", "def f():\n    import ray_sd.train.run", "models may not import train"),
        ("ray_sd/models/base.py", "from ..train import run", "models may not import train"),
        ("ray_sd/models/base.py", "from ray_sd import data", "models may not import data"),
        ("ray_sd/config/base.py", "from ray_sd.adapter import read_manifest", "config may not import adapter"),
        ("ray_sd/requests.py", "from ray_sd.adapter import read_manifest", "requests may not import adapter"),
        ("ray_sd/config/base.py", "import torch.nn", "config may not import torch"),
        ("ray_sd/embedded/sprites.py", "import ray_sd.data", "embedded may not import data"),
        ("ray_sd/serve/app.py", "import ray_sd.train", "serve may not import train"),
        ("ray_sd/train/run.py", "import ray_sd.serve", "train may not import serve"),
        ("ray_sd/generate/sample.py", "import ray", "generate may not import ray"),
        ("ray_sd/generate/sample.py", "from ray_sd.cluster import connect", "generate may not import cluster"),
        ("ray_sd/cluster/trainer.py", "from ray_sd.data import prepare", "cluster may not import data"),
        ("ray_sd/files.py", "from ray_sd.data import prepare", "files may not import data"),
        ("ray_sd/media/videos.py", "import torch", "media may not import torch"),
        ("ray_sd/media/videos.py", "from ray_sd.generate import generate", "media may not import generate"),
        ("ray_sd/config/paths.py", "from ray_sd.files import locate", "config may not import files"),
        ("ray_sd/train/loop.py", "from deepspeed import zero", "only ray_sd/train/engine.py may import deepspeed"),
        ("ray_sd/train/run.py", "import ray._private.state", "only ray_sd/cluster may use Ray's internals"),
        (
            "ray_sd/train/run.py",
            "def f():\n    from ray.train.v2.api import exceptions",
            "only ray_sd/cluster may use Ray's internals",
        ),
        ("ray_sd/train/run.py", "import jobs.train", "train may not import jobs"),
    ],
)
def test_a_violation_is_found(path: str, program: str, words: str):
    assert list(violations(path, program)) == [words]


@pytest.mark.parametrize(
    ("path", "program"),
    [
        ("ray_sd/train/engine.py", "import deepspeed, ray\nfrom ray_sd.methods import METHODS"),
        (
            "ray_sd/serve/app.py",
            "import ray\nfrom ray_sd.generate import generate\nfrom ray_sd.config import ModelConfig",
        ),
        ("jobs/train.py", "from ray_sd.train.run import fit"),
        ("ray_sd/models/base.py", "from ray_sd import __version__\nimport ray_sd.embedded\nfrom .noise import snr"),
    ],
)
def test_downward_imports_are_fine(path: str, program: str):
    assert list(violations(path, program)) == []


def test_no_files_import_each_other_in_a_circle():
    assert circle({path: (ROOT / path).read_text() for path in FILES}) == []


def test_a_circle_is_found():
    programs = {
        "ray_sd/data/__init__.py": "from ray_sd.data.crops import cut",
        "ray_sd/data/crops.py": "def f():\n    from ray_sd.data import finders",
        "ray_sd/data/finders.py": "import numpy\nfrom ray_sd.data.windows import Box",
        "ray_sd/data/windows.py": "",
    }
    assert circle(programs) == []
    programs["ray_sd/data/windows.py"] = "import ray_sd.data.crops"
    assert set(circle(programs)) == {"ray_sd.data.crops", "ray_sd.data.finders", "ray_sd.data.windows"}


@pytest.mark.parametrize(
    ("imported", "slow"),
    [
        pytest.param(
            "ray_sd.data, ray_sd.data.detect, ray_sd.data.encode, ray_sd.data.lanes",
            {"torch", "diffusers", "transformers", "peft", "ray.train", "ray.tune", "ray.serve"},
            id="workers that only read",
        ),
        pytest.param(
            "ray_sd.train.worker, ray_sd.train.restarts, ray_sd.tune.reporter, ray_sd.tune.preparer",
            {"torch", "diffusers", "transformers", "peft", "optuna"},
            id="the controller of a run and the preparer of trials",
        ),
        pytest.param(
            "ray_sd.cluster",
            {"ray.data", "ray.train", "ray.tune", "ray.serve", "torch"},
            id="what joins a cluster",
        ),
        pytest.param(
            "ray_sd.serve.api",
            {"torch", "diffusers", "transformers", "peft", "ray.data", "ray.train"},
            id="the HTTP side",
        ),
        pytest.param(
            "ray_sd.train.run, ray_sd.train.samples",
            {"deepspeed", "bitsandbytes"},
            id="drivers and what draws a run's pictures",
            marks=pytest.mark.slow,
        ),
        pytest.param("ray_sd.train.loop", {"mlflow", "bitsandbytes"}, id="training workers", marks=pytest.mark.slow),
        pytest.param("jobs.train", {"torch", "ray", "diffusers"}, id="a command that only prints its configuration"),
        pytest.param("ray_sd.methods", {"ray"}, id="what is imported while Ray starts", marks=pytest.mark.slow),
    ],
)
def test_processes_start_without_what_they_do_not_need(imported: str, slow: set[str]):
    program = f"import sys; import {imported}; found = {slow} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", program], check=True)


def circle(programs: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle, if any do."""
    names = {path: ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__") for path in programs}
    modules = set(names.values())
    imports = {name: set(_modules(path, programs[path], modules)) - {name} for path, name in names.items()}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def _modules(path: str, program: str, modules: set[str]) -> Iterator[str]:
    """Those of `modules` that a file imports anywhere; of `from package import module` the module, not the package."""
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: say `from ray_sd. … import`"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else str(node.module) for name in whole)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def violations(path: str, program: str) -> Iterator[str]:
    part = _part(Path(path).with_suffix("").parts)
    for module in _imported(path, program):
        package, own = module[0], _part(module)
        if package == "deepspeed" and path != DEEPSPEED_IN:
            yield f"only {DEEPSPEED_IN} may import deepspeed"
        elif package == "ray" and part not in RAY_IN:
            yield f"{part} may not import ray"
        elif package == "ray" and part != "cluster" and _is_internal(module):
            yield "only ray_sd/cluster may use Ray's internals"
        elif part in WITHOUT_MODELS and package in MODEL_PACKAGES:
            yield f"{part} may not import {package}"
        elif package in ("ray_sd", "jobs") and own != part and not _allowed(part, own):
            yield f"{part} may not import {own}"


def _is_internal(module: tuple[str, ...]) -> bool:
    """Whether a module of Ray is none of those whose names its documentation gives."""
    return any(name.startswith("_") or name in {"v2", "generated"} for name in module)


def _allowed(part: str, imported: str) -> bool:
    if imported in BOTTOM:
        return True
    if imported in GROUND:
        return part not in BOTTOM and (part not in GROUND or GROUND.index(imported) < GROUND.index(part))
    if imported == "cluster":
        return part in RAY_IN
    if part == "serve":
        return imported in SERVE_MAY_IMPORT
    if part == "jobs":
        return True
    return part in LAYERS and imported in LAYERS and LAYERS.index(imported) < LAYERS.index(part)


def _part(module: tuple[str, ...]) -> str:
    """`ray_sd.models.base` -> `models`; the package itself, which holds its version only, counts as `errors`."""
    if module[0] == "jobs":
        return "jobs"
    return module[1] if len(module) > 1 and module[1] != "__init__" else "errors"


def _imported(path: str, program: str) -> Iterator[tuple[str, ...]]:
    """Modules that a file imports anywhere, `from package import module` counted as the module."""
    here = Path(path).with_suffix("").parts
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            if base == ("ray_sd",):
                yield from (base if _is_name_of_package(alias.name) else (*base, alias.name) for alias in node.names)
            else:
                yield base


def _is_name_of_package(name: str) -> bool:
    return name.startswith("__")
