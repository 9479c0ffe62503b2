"""Headers of `.safetensors` files: what is in them, without a tensor being read, nor torch imported."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ray_sd.errors import ArtifactError, first_line
from ray_sd.files import Location

SAFETENSORS = ".safetensors"
PICKLED = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
"""Of files that run code when they are read."""
EMB_PARAMS = "emb_params"
"""Name of the only tensor of an embedding whose token is the file's name."""
PAIR = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""Tensors of an embedding for two text encoders."""
TOKEN = "token"
"""Key of the metadata under which a file of a pair says its token."""
BUNDLED = re.compile(r"bundle_emb\.([^.]+)\.(.+)")
"""Names of an embedding's tensors in the file of the LoRA that it belongs to: the word, and the tensor's own name."""
LENGTH_BYTES = 8
LONGEST = 100_000_000
"""Bytes of a header, as the format has it."""
READS_TEXT = re.compile(r"attn2.*to_[kv].*(lora_A|down)\.weight$")
"""Names, in any tool's spelling, of the half of a LoRA that multiplies what text encoders say."""


@dataclass(frozen=True)
class Header:
    shapes: dict[str, tuple[int, ...]]
    """Of the tensors, by their names."""
    metadata: dict[str, str]

    @property
    def is_embedding(self) -> bool:
        """Whether the names are those of an embedding's layouts; a LoRA has at least two tensors."""
        return len(self.shapes) == 1 or set(self.shapes) == set(PAIR)

    @property
    def several_words(self) -> tuple[str, ...]:
        """Of a file of several embeddings: nothing else has tensors without a dot in their names."""
        if len(self.shapes) < 2 or self.is_embedding:
            return ()
        vectors = all("." not in name and len(shape) in (1, 2) for name, shape in self.shapes.items())
        return tuple(sorted(self.shapes)) if vectors else ()

    def words(self, stem: str) -> tuple[str, ...]:
        """Those of an embedding, or that a LoRA's file has bundled."""
        if self.is_embedding:
            return (self.token(stem),)
        return tuple(sorted({match[1] for name in self.shapes if (match := BUNDLED.fullmatch(name))}))

    def token(self, stem: str) -> str:
        """The word of an embedding; stem: of the file's name, which some layouts keep it in."""
        if set(self.shapes) == set(PAIR):
            return self.metadata.get(TOKEN, stem)
        [name] = self.shapes
        return stem if name == EMB_PARAMS else name

    @property
    def text_width(self) -> int | None:
        """Numbers a token that the U-Net reads in the base that an embedding or a LoRA is for.

        None where nothing tells, as of a LoRA that leaves the layers alone which read texts.
        """
        if self.is_embedding:
            return sum(shape[-1] for shape in self.shapes.values() if shape)
        return next(
            (shape[1] for name, shape in self.shapes.items() if READS_TEXT.search(name) and len(shape) > 1), None
        )


def read_header(file: Location) -> Header:
    """Raises ArtifactError where it cannot be read, or where the file is not as long as it says."""
    check_ending(file.path)
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            size = stream.size()
            length = int.from_bytes(stream.read_at(LENGTH_BYTES, 0), "little")
            if not 0 < length <= min(LONGEST, size - LENGTH_BYTES):
                raise ValueError("its header is cut off")
            content = json.loads(stream.read_at(length, LENGTH_BYTES))
        metadata = content.pop("__metadata__", {})
        shapes = {name: tuple(one["shape"]) for name, one in content.items()}
        end = max((one["data_offsets"][1] for one in content.values()), default=0)
        if LENGTH_BYTES + length + end != size:
            raise ValueError(f"it has {size} bytes, its header tells of {LENGTH_BYTES + length + end}")
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ArtifactError(f"{file.path} cannot be read as .safetensors: {first_line(error)}") from error
    return Header(shapes, metadata)


def is_safetensors(path: str) -> bool:
    """By the ending, which some systems write in capitals."""
    return path.lower().endswith(SAFETENSORS)


def check_ending(path: str) -> None:
    """Raise ArtifactError for a file of another kind."""
    if not is_safetensors(path):
        pickled = "; pickled weights are not read" if path.lower().endswith(PICKLED) else ""
        raise ArtifactError(f"{path} is no {SAFETENSORS} file{pickled}")


def what_is_there(names: Iterable[str]) -> str:
    """Of a folder in which weights were looked for in vain, with what to do about them."""
    found = sorted(names)
    advice = ""
    capitals = [name for name in found if is_safetensors(name) and not name.endswith(SAFETENSORS)]
    if capitals:
        advice = f"; rename {capitals[0]} so that it ends in {SAFETENSORS}"
    elif any(name.lower().endswith(PICKLED) for name in found):
        advice = "; pickled weights are not read"
    return f"(found: {', '.join(found) or 'nothing'}){advice}"
