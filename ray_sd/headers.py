"""Headers of `.safetensors` files: what is in them, without a tensor being read, nor torch imported."""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ray_sd.errors import ArtifactError, first_line
from ray_sd.files import Location

SAFETENSORS = ".safetensors"
PICKLED = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
"""Of files that run code when they are read."""
EMB_PARAMS = "emb_params"
"""Name of the only tensor of an embedding whose token is the file's name, as tools write it."""
OLD_PARAMS = "string_to_param"
"""How that name begins where the embedding was pickled before."""
PAIR = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""Tensors of an embedding for two text encoders."""
TOKEN = "token"
"""Key of the metadata under which a file of a pair says its token."""
NO_WORD = re.compile(rf"({EMB_PARAMS}|{OLD_PARAMS}|string_to_token|text_encoders_\d)")
"""How tensors begin that are called otherwise than by a word, of which there may be several in a file."""
BUNDLED = re.compile(r"bundle_emb\.([^.]+)\.(.+)")
"""Names of an embedding's tensors in the file of the LoRA that it belongs to: the word, and the tensor's own name."""
LENGTH_BYTES, BEGINNING = 8, 32
LONGEST = 100_000_000
"""Bytes of a header, as the format has it."""
OTHER_FILES = {
    b"version https://git-lfs": "it is Git LFS' pointer to the file, which git lfs pull fetches",
    b"PK\3\4": "it is pickled, under another name; pickled weights are not read",
    b"\x80\2": "it is pickled, under another name; pickled weights are not read",
    b"GGUF": "it is GGUF, under another name",
    b"<": "it is a web page; download the file itself",
}
"""What files are that have the ending alone, by how they begin."""
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
        is_one = len(self.shapes) == 1 and not BUNDLED.fullmatch(next(iter(self.shapes)))
        return is_one or set(self.shapes) == set(PAIR)

    @property
    def several_words(self) -> tuple[str, ...]:
        """Of a file of several embeddings: few others have tensors without a dot in their names."""
        if len(self.shapes) < 2 or self.is_embedding or any(map(NO_WORD.match, self.shapes)):
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
        return stem if name in (EMB_PARAMS, *PAIR) or name.startswith(OLD_PARAMS) else name

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
    beginning = b""
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            size = stream.size()
            beginning = stream.read_at(min(size, BEGINNING), 0)
            length = int.from_bytes(beginning[:LENGTH_BYTES], "little")
            if not 0 < length <= min(LONGEST, size - LENGTH_BYTES):
                raise ValueError("its header is cut off")
            content = json.loads(stream.read_at(length, LENGTH_BYTES))
        metadata = content.pop("__metadata__", {})
        shapes = {name: tuple(one["shape"]) for name, one in content.items()}
        end = max((one["data_offsets"][1] for one in content.values()), default=0)
        if LENGTH_BYTES + length + end != size:
            raise ValueError(f"it has {size} bytes, its header tells of {LENGTH_BYTES + length + end}")
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        reason = _other_file(beginning) or first_line(error)
        raise ArtifactError(f"{file.path} cannot be read as .safetensors: {reason}") from error
    return Header(shapes, metadata)


def unreadable(path: Path, error: Exception) -> str:
    """Why a local `.safetensors` file cannot be read: what it is in truth, or else what its reader says."""
    with suppress(OSError), path.open("rb") as file:
        return _other_file(file.read(BEGINNING)) or first_line(error)
    return first_line(error)


def _other_file(beginning: bytes) -> str | None:
    if not beginning:
        return "it is empty"
    if int.from_bytes(beginning[:LENGTH_BYTES], "little") <= LONGEST:
        return None
    return next((what for start, what in OTHER_FILES.items() if beginning.startswith(start)), None)


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
