"""Where a model's components are, and how they are loaded."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPImageProcessor, CLIPTokenizer, PreTrainedModel

import ray_sd.embedded
from ray_sd.adapter import open_safetensors
from ray_sd.config import ModelConfig
from ray_sd.config.model import ComponentSource
from ray_sd.errors import ArtifactError, first_line
from ray_sd.files import local
from ray_sd.finite import check_finite
from ray_sd.headers import check_ending, read_header, what_is_there
from ray_sd.models import single_file
from ray_sd.models.single_file import CONFIG_FILES

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
VARIANT = re.compile(r"\.([^.]+?)(-\d+-of-\d+)?\.safetensors$")
"""`fp16` of `model.fp16.safetensors` and of `model.fp16-00001-of-00002.safetensors`."""
IMAGE_PROCESSOR = "feature_extractor"
CLIP_LENGTH = 77
NO_LENGTH = 1_000_000
"""transformers gives a tokenizer without a length a larger one than this."""


@dataclass(frozen=True)
class Folder:
    """A component in the diffusers layout: its configuration beside its weights."""

    path: Path
    variant: str | None


@dataclass(frozen=True)
class SingleFile:
    """A component inside one `.safetensors` file in the original Stable Diffusion layout."""

    path: Path
    layout: str


@dataclass(frozen=True)
class Architecture:
    """A component with random weights."""

    config: dict[str, Any]
    seed: int


Location = Folder | SingleFile | Architecture


def find_component(config: ModelConfig, component: str, weights: bool = True) -> Location:
    """Find a component, fetching it from the hub if need be. Raises ArtifactError where there is none.

    Without `weights` only its configuration is fetched.
    """
    source = component_source(config, component)
    if source.path is None:
        return Architecture(source.architecture or {}, _component_seed(config.seed, component))
    root = _find_root(config, component, source.path)
    if root.is_file():
        check_ending(str(root))
        return SingleFile(root, config.layout)
    folder = _find_subfolder(config, component, source, root)
    if weights and is_hub_id(source.path):
        _fetch_weights(config, component, source.path, folder.relative_to(root))
    return Folder(folder, config.variant)


def component_source(config: ModelConfig, component: str) -> ComponentSource:
    """Where a component comes from, by itself or with the base."""
    if component == "low_res_scheduler":
        own = None
    elif component == "scheduler":
        own = None if config.scheduler.path is None else ComponentSource(path=config.scheduler.path)
    else:
        own = getattr(config, component)
    return own or ComponentSource(path=config.base, subfolder=component)


def load_weights(config: ModelConfig, component: str, cls: type[nn.Module]) -> nn.Module:
    """Load a U-Net, autoencoder or text encoder in fp32 and evaluation mode, leaving the global generator as it was."""
    location = find_component(config, component)
    with _own_randomness(location):
        match location:
            case Architecture(architecture):
                module = _build(config, component, cls, architecture)
            case SingleFile(path, layout):
                module = single_file.load_component(path, layout, component, cls)
            case Folder():
                module = _load_folder(component, cls, location)
    return module.eval()


def load_skeleton(config: ModelConfig, component: str, cls: type[nn.Module]) -> nn.Module:
    """A U-Net, autoencoder or text encoder as `load_weights` gives it, but on the meta device, without its weights."""
    architecture = read_config(config, component)
    if issubclass(cls, PreTrainedModel):
        # A whole CLIP's configuration holds its towers'.
        tower = architecture.get("text_config" if component in TOKENIZERS else "vision_config", {})
        architecture = {**architecture, **tower}
    with torch.device("meta"):
        module = _build(config, component, cls, architecture).eval()
    return module.to("meta")  # tensors made of numbers do not heed the device


def load_tokenizer(config: ModelConfig, component: str = "tokenizer") -> CLIPTokenizer:
    location = find_component(config, component)
    if isinstance(location, SingleFile):
        return single_file.load_tokenizer(location.layout, component)
    if not isinstance(location, Folder):
        raise ArtifactError(f"model '{config.name}': a tokenizer has no random weights; give its folder")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(location.path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare exceptions for damaged files
        raise ArtifactError(f"cannot read the {component} in {location.path}: {first_line(error)}") from error
    if tokenizer.model_max_length > NO_LENGTH:
        tokenizer.model_max_length = CLIP_LENGTH
    return tokenizer


def load_image_processor(config: ModelConfig) -> CLIPImageProcessor:
    """How pictures are normalised for the image encoder: as the base says, else as CLIP does."""
    folder = None if config.base is None else _find_root(config, IMAGE_PROCESSOR, config.base) / IMAGE_PROCESSOR
    if folder is None or not folder.is_dir():
        return CLIPImageProcessor()
    try:
        return CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read the {IMAGE_PROCESSOR} in {folder}: {first_line(error)}") from error


def read_config(config: ModelConfig, component: str) -> dict[str, Any]:
    """A component's configuration, without its weights."""
    location = find_component(config, component, weights=False)
    match location:
        case Architecture(architecture):
            return architecture
        case SingleFile(_, layout):
            return single_file.read_config(layout, component)
        case Folder(path):
            return read_json(path / CONFIG_FILES.get(component, "config.json"))


def read_index(config: ModelConfig) -> dict[str, Any]:
    """What the base's `model_index.json` says of the pipeline as a whole; nothing where there is no such file."""
    if config.base is None:
        return {}
    root = _find_root(config, "model_index", config.base)
    file = root / "model_index.json"
    return read_json(file) if file.is_file() else {}


def read_json(file: Path) -> dict[str, Any]:
    """A configuration file. Raises ArtifactError where it cannot be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read as JSON: {error}") from error


def _component_seed(seed: int, component: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {component}".encode(), digest_size=7).digest())


def _find_root(config: ModelConfig, component: str, path: str) -> Path:
    """The local folder or file that `path` stands for."""
    if path.startswith("embedded/"):
        folder = Path(ray_sd.embedded.__path__[0])
        name = path.removeprefix("embedded/")
        if not (folder / name).is_dir():
            names = sorted(child.parent.parent.name for child in folder.glob("*/*/config.json"))
            raise ArtifactError(
                f"model '{config.name}': no embedded model '{name}'; the embedded models are: {', '.join(dict.fromkeys(names))}"
            )
        return folder / name
    local = Path(path).expanduser()
    if local.exists():
        return local
    if is_hub_id(path):
        return _fetch(config, component, path, ["*.json", "*.txt"])
    raise ArtifactError(f"model '{config.name}': no folder or file {path} for the {component}")


def is_hub_id(path: str) -> bool:
    """Whether a path of the configuration names a repository of the hub: it looks like one, and no local folder has that name."""
    return not path.startswith("embedded/") and HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def _find_subfolder(config: ModelConfig, component: str, source: ComponentSource, root: Path) -> Path:
    if source.subfolder is not None:
        folder = root / source.subfolder
    else:
        folder = root / component if (root / component).is_dir() else root
    if not _holds(folder, component):
        folders = ", ".join(sorted(child.name for child in root.iterdir() if child.is_dir())) or "none"
        remedies = {
            "scheduler": "give one by model.scheduler.path=PATH",
            "low_res_scheduler": "is the base an upscaler, all of it?",
        }
        raise ArtifactError(
            f"model '{config.name}': {folder} holds no {component} (no {config_file(component)} there; folders in {root}: "
            f"{folders}); {remedies.get(component, f'give one by model.{component}=PATH')}"
        )
    return folder


def _holds(folder: Path, component: str) -> bool:
    if component in TOKENIZERS.values():
        return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return (folder / config_file(component)).is_file()


def config_file(component: str) -> str:
    return "vocab.json" if component in TOKENIZERS.values() else CONFIG_FILES.get(component, "config.json")


def _fetch_weights(config: ModelConfig, component: str, hub_id: str, subfolder: Path) -> None:
    """Fetch a component's safetensors: those of the variant if it has them, the plain ones otherwise."""
    if component in CONFIG_FILES:
        return
    prefix = "" if subfolder == Path() else f"{subfolder.as_posix()}/"
    if config.variant is not None:
        folder = _fetch(config, component, hub_id, [f"{prefix}*.{config.variant}*.safetensors"]) / subfolder
        if any(folder.glob(f"*.{config.variant}*.safetensors")):
            return
    _fetch(config, component, hub_id, [f"{prefix}*.safetensors"], ignore="*.*.safetensors")


def _fetch(config: ModelConfig, component: str, hub_id: str, patterns: list[str], ignore: str | None = None) -> Path:
    revision = config.revision if hub_id == config.base else None
    try:
        return snapshot(hub_id, revision, tuple(patterns), ignore)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        setting = "base" if hub_id == config.base else component
        raise ArtifactError(
            f"model '{config.name}': cannot fetch the {component} of '{hub_id}' from the Hugging Face hub "
            f"({first_line(error)}), and no local folder has that name; download it elsewhere and give its folder: "
            f"model.{setting}=/path/to/folder"
        ) from error


@lru_cache(maxsize=64)
def snapshot(hub_id: str, revision: str | None, patterns: tuple[str, ...], ignore: str | None) -> Path:
    """Fetch files once a process: a load asks several times."""
    return Path(
        huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=ignore
        )
    )


@contextmanager
def _own_randomness(location: Location) -> Iterator[None]:
    """Seed what has random weights by its own seed, and keep the global CPU generator untouched."""
    state = torch.default_generator.get_state()
    try:
        if isinstance(location, Architecture):
            torch.default_generator.manual_seed(location.seed)
        yield
    finally:
        torch.default_generator.set_state(state)


def _build(config: ModelConfig, component: str, cls: type[nn.Module], architecture: dict[str, Any]) -> nn.Module:
    try:
        if issubclass(cls, PreTrainedModel):
            tokenizer = TOKENIZERS.get(component)
            vocabulary = {} if tokenizer is None else _vocabulary(load_tokenizer(config, tokenizer))
            return cls(cls.config_class(**{**vocabulary, **architecture}))
        return cls.from_config(architecture)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"model '{config.name}': cannot build a {cls.__name__} from model.{component}.architecture: {first_line(error)}"
        ) from error


def _vocabulary(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """What a text encoder's architecture may leave out."""
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _load_folder(component: str, cls: type[nn.Module], folder: Folder) -> nn.Module:
    _check_class(component, cls, folder.path)
    files = weight_files(component, folder)
    for file in files:
        read_header(local(file))
    variant = folder.variant if folder.variant and f".{folder.variant}" in files[0].name else None
    try:
        with no_progress_bar():
            module, info = cls.from_pretrained(
                str(folder.path),
                variant=variant,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"cannot read the {component} in {folder.path}: {first_line(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ArtifactError(
            f"the {component} in {folder.path} lacks {len(missing)} of its weights, such as {missing[0]}"
        )
    _check_values(module, files)
    return module


def _check_values(module: nn.Module, files: tuple[Path, ...]) -> None:
    try:
        check_finite(module.state_dict(), files[0].parent)
    except ArtifactError:
        for file in files:  # in which a tensor may have another name
            with open_safetensors(file) as content:
                check_finite({name: content.get_tensor(name) for name in list(content.keys())}, file)
        raise


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar for every file that it loads."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()


def _check_class(component: str, cls: type[nn.Module], folder: Path) -> None:
    content = read_json(folder / "config.json")
    found = content.get("_class_name") or ", ".join(content.get("architectures") or [])
    accepted = {cls.__name__, "CLIPModel"} if issubclass(cls, PreTrainedModel) else {cls.__name__}
    if found and found not in accepted:
        raise ArtifactError(f"{folder} holds a {found}; the {component} must be a {cls.__name__}")


def weight_files(component: str, folder: Folder) -> tuple[Path, ...]:
    """The safetensors files of a component: those of the variant if there are any, the plain ones otherwise."""
    files = sorted(folder.path.glob("*.safetensors"))
    of_variant = [
        file for file in files if folder.variant and re.search(rf"\.{re.escape(folder.variant)}[.-]", file.name)
    ]
    plain = [file for file in files if file.name.count(".") == 1]
    if not (of_variant or plain):
        variants = sorted({match[1] for file in files if (match := VARIANT.search(file.name))})
        if variants:
            raise ArtifactError(
                f"the weights for the {component} in {folder.path} are of the variant {' and '.join(variants)}, such as "
                f"{files[0].name}; set model.variant={variants[0]}"
            )
        there = what_is_there(child.name for child in folder.path.iterdir())
        raise ArtifactError(f"no .safetensors weights for the {component} in {folder.path} {there}")
    return tuple(of_variant or plain)
