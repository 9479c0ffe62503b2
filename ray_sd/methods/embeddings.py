"""Files of learnt token embeddings, in the layouts that tools exchange them in.

- diffusers: one file a token, `{token: [n, D]}`;
- A1111 and kohya: `{emb_params: [n, D]}`, the token being the file's name.
"""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ray_sd.config.method import file_name
from ray_sd.errors import ArtifactError

LEARNED = "learned_embeds"
"""diffusers looks for a file of this name where none is given."""
A1111 = "a1111"
"""Folder of the other layout, so that diffusers finds one file."""
EMB_PARAMS = "emb_params"


def write_embeddings(folder: Path, embeddings: dict[str, Tensor]) -> None:
    """Write fp32 [n, D] by token: `learned_embeds.safetensors`, or one such file a token, and the A1111 layout beside."""
    (folder / A1111).mkdir(parents=True, exist_ok=True)
    for token, vectors in embeddings.items():
        vectors = vectors.detach().float().cpu().contiguous()
        name = LEARNED if len(embeddings) == 1 else f"{LEARNED}-{file_name(token)}"
        save_file({token: vectors}, folder / f"{name}.safetensors", metadata={"format": "pt"})
        save_file({EMB_PARAMS: vectors}, folder / A1111 / f"{file_name(token)}.safetensors", metadata={"format": "pt"})


def read_embeddings(folder: Path) -> dict[str, Tensor]:
    """The tokens of an exported folder."""
    files = sorted(folder.glob(f"{LEARNED}*.safetensors"))
    if not files:
        raise ArtifactError(f"{folder} has no {LEARNED}.safetensors")
    return dict(read_embedding(file) for file in files)


def read_embedding(file: Path, token: str | None = None) -> tuple[str, Tensor]:
    """Token and vectors [n, D] of one file of any layout; `token` names what is in it otherwise."""
    if file.suffix != ".safetensors":
        raise ArtifactError(f"{file} is no .safetensors file; pickled embeddings are not read")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read as .safetensors: {error}") from error
    if len(tensors) != 1:
        raise ArtifactError(f"{file} is no embedding of one token: it holds {', '.join(sorted(tensors)[:4])}")
    name, vectors = next(iter(tensors.items()))
    if vectors.ndim > 2:
        raise ArtifactError(f"{file} is no embedding: {name} has {vectors.ndim} dimensions")
    own = file.stem if name == EMB_PARAMS else name
    return token or own, vectors.reshape(-1, vectors.shape[-1])
