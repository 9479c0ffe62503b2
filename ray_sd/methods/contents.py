"""What an adapter holds, whichever tool wrote it."""

from dataclasses import dataclass, field
from pathlib import Path

from ray_sd.errors import ArtifactError
from ray_sd.headers import is_safetensors, what_is_there
from ray_sd.methods.dreambooth import EMBEDDINGS
from ray_sd.methods.embeddings import LEARNED, Embedding, holds_embedding, read_bundled, read_embedding, read_embeddings
from ray_sd.methods.lora import LORA_FILE, attach_updates
from ray_sd.methods.lora_names import LoraNames
from ray_sd.methods.lora_reader import PEFT_CONFIG, PEFT_WEIGHTS, peft_folders, read_lora
from ray_sd.methods.low_rank import Updates
from ray_sd.methods.textual_inversion import attach_tokens, check_embedding
from ray_sd.models import DiffusionModel


@dataclass(frozen=True)
class Contents:
    """A LoRA, embeddings of new tokens, whole components, or several of these."""

    updates: Updates = field(default_factory=dict)
    embeddings: dict[str, Embedding] = field(default_factory=dict)
    """By token."""
    weights: dict[str, Path] = field(default_factory=dict)
    """Folders of whole components."""

    def summary(self) -> str:
        """`192 layers of the unet, the token <cat>`"""
        words = [f"{len(layers)} layers of the {component}" for component, layers in self.updates.items()]
        words += [f"all weights of the {component}" for component in self.weights]
        return ", ".join(words + [f"the token {token}" for token in self.embeddings])


def read_contents(path: Path, model: DiffusionModel, token: str | None = None) -> Contents:
    """What is in an adapter folder, in a LoRA or embedding file of any layout, or in folders that PEFT saved.

    `token` is the word of an embedding's file, by default the one that it says. The model may be a skeleton; all tensors
    of a LoRA must belong to its layers, and embeddings fit its text encoders. Raises ArtifactError for what is none of
    these and for what does not fit.
    """
    contents = _read(path, model, token)
    for word, embedding in contents.embeddings.items():
        check_embedding(model, word, embedding)
    return contents


def _read(path: Path, model: DiffusionModel, token: str | None) -> Contents:
    names = LoraNames(model)
    if path.is_file() and path.name != PEFT_WEIGHTS:
        if holds_embedding(path):
            return Contents(embeddings=dict([read_embedding(path, token)]))
        return Contents(updates=read_lora(path, names), embeddings=read_bundled(path))
    folder = path.parent if path.is_file() else path
    components = ("unet", "vae", *model.text_encoders())
    if (folder / PEFT_CONFIG).is_file() or peft_folders(folder, components):
        return Contents(updates=read_lora(folder, names))
    lora = folder / LORA_FILE
    contents = Contents(
        updates=read_lora(lora, names) if lora.is_file() else {},
        embeddings=_embeddings(folder) | (read_bundled(lora) if lora.is_file() else {}),
        weights={name: folder / name for name in components if (folder / name / "config.json").is_file()},
    )
    if contents == Contents():
        raise ArtifactError(_no_adapter(folder))
    return contents


def attach_contents(model: DiffusionModel, contents: Contents, scale: float = 1.0) -> int:
    """Add a LoRA and tokens to a model for generation; returns the number of tensors taken."""
    if contents.embeddings and not contents.updates and scale != 1:
        raise ArtifactError("embeddings have no strength; use adapter_scale=1")
    if contents.embeddings:
        attach_tokens(model, contents.embeddings)
    return len(contents.embeddings) + attach_updates(model, contents.updates, scale)


def _embeddings(folder: Path) -> dict[str, Embedding]:
    for place in (folder, folder / EMBEDDINGS):
        if any(place.glob(f"{LEARNED}*.safetensors")):
            return read_embeddings(place)
    return {}


def _no_adapter(folder: Path) -> str:
    if not folder.exists():
        return f"no file or folder {folder}"
    names = [file.name for file in folder.iterdir()]
    files = sorted(filter(is_safetensors, names))
    hint = f"; give one of its files: {', '.join(files[:4])}" if files else f" {what_is_there(names)}"
    return f"{folder} is no adapter: it has no manifest.json, no {LORA_FILE}, no {LEARNED}.safetensors and no {PEFT_CONFIG}{hint}"
