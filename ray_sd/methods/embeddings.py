"""Files of learnt token embeddings, in the layouts that tools exchange them in.

- diffusers: one file a token, `{token: [n, D]}`;
- A1111 and kohya: `{emb_params: [n, D]}`, the token being the file's name;
- Stable Diffusion XL, everywhere: `{clip_l: [n, D1], clip_g: [n, D2]}`, the token being the file's name;
- in the file of the LoRA that they belong to: any of these, each tensor's name after `bundle_emb.TOKEN.`.
"""

from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ray_sd.adapter import open_safetensors
from ray_sd.config.method import file_name
from ray_sd.errors import ArtifactError
from ray_sd.files import local
from ray_sd.finite import WRITTEN, check_finite
from ray_sd.headers import BUNDLED, EMB_PARAMS, PAIR, TOKEN, Header, read_header
from ray_sd.methods.weights import read_tensors

Embedding = dict[str, Tensor]
"""Vectors [n, D] of one token by the name of the text encoder's component."""

LEARNED = "learned_embeds"
"""diffusers looks for a file of this name where none is given."""
A1111 = "a1111"
"""Folder of the other layout, so that diffusers finds one file."""


def write_embeddings(folder: Path, embeddings: dict[str, Embedding]) -> None:
    """Write vectors by token: `learned_embeds.safetensors`, or one such file a token, and the A1111 layout beside.

    Raises ArtifactError for two tokens that would have one file.
    """
    check_file_names(embeddings)
    for token, embedding in embeddings.items():
        name = LEARNED if len(embeddings) == 1 else f"{LEARNED}-{file_name(token)}"
        write_embedding(folder / f"{name}.safetensors", token, embedding, token)
        write_embedding(folder / A1111 / f"{file_name(token)}.safetensors", token, embedding, EMB_PARAMS)


def check_file_names(tokens: Iterable[str]) -> None:
    """Raise ArtifactError for two tokens that differ in nothing that a file's name keeps."""
    owners: dict[str, str] = {}
    for token in tokens:
        other = owners.setdefault(file_name(token), token)
        if other != token:
            raise ArtifactError(
                f"the tokens {other} and {token} would have one file, {file_name(token)}.safetensors; give one of them "
                "another word by jobs/export.py convert token=…"
            )


def write_embedding(file: Path, token: str, embedding: Embedding, name: str) -> None:
    """Write one token; `name` is the tensor's where there is one text encoder: the token itself, or EMB_PARAMS.

    In the layout of EMB_PARAMS the word is the file's name, so the file says no other.
    """
    vectors = {part: tensor.detach().cpu().contiguous() for part, tensor in embedding.items()}
    alone = len(vectors) == 1
    tensors = {name: vectors["text_encoder"]} if alone else {key: vectors[part] for key, part in PAIR.items()}
    check_finite(tensors, file.name, WRITTEN)
    file.parent.mkdir(parents=True, exist_ok=True)
    said = {} if name == EMB_PARAMS else {TOKEN: token}
    save_file(tensors, file, metadata={"format": "pt", **said})


def read_embeddings(folder: Path) -> dict[str, Embedding]:
    """The tokens of an exported folder."""
    files = sorted(folder.glob(f"{LEARNED}*.safetensors"))
    if not files:
        raise ArtifactError(f"{folder} has no {LEARNED}.safetensors")
    return dict(read_embedding(file) for file in files)


def holds_embedding(file: Path) -> bool:
    """Whether a file has the names of one of these layouts, or of several tokens, and nothing else."""
    try:
        header = read_header(local(file))
        return header.is_embedding or bool(header.several_words)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error


def read_embedding(file: Path, token: str | None = None) -> tuple[str, Embedding]:
    """Token and vectors of one file of any layout.

    `token` names what is in it otherwise, or takes one of several.
    """
    tensors, metadata = read_tensors(file)
    header = Header({name: tuple(tensor.shape) for name, tensor in tensors.items()}, metadata)
    if token in header.several_words:
        return token, _embedding(file, {token: tensors[token]})
    if header.several_words:
        raise ArtifactError(
            f"{file} holds {len(tensors)} words, {', '.join(header.several_words[:4])}; jobs/export.py convert takes one of "
            f"them into a file of its own: adapter={file} token={header.several_words[0]}"
        )
    if not header.is_embedding:
        raise ArtifactError(f"{file} is no embedding of one token: it holds {', '.join(sorted(tensors)[:4])}")
    return token or header.token(file.stem), _embedding(file, tensors)


def read_bundled(file: Path) -> dict[str, Embedding]:
    """The tokens that a LoRA's file, which is read already, has bundled."""
    bundled: dict[str, dict[str, Tensor]] = {}
    with open_safetensors(file) as content:
        for match in map(BUNDLED.fullmatch, content.keys()):
            if match is not None:
                bundled.setdefault(match[1], {})[match[2]] = content.get_tensor(match[0])
    for token, tensors in bundled.items():
        if len(tensors) > 1 and set(tensors) != set(PAIR):
            raise ArtifactError(f"{file} bundles no embedding as {token}: it holds {', '.join(sorted(tensors)[:4])}")
    return {token: _embedding(file, tensors) for token, tensors in bundled.items()}


def _embedding(file: Path, tensors: dict[str, Tensor]) -> Embedding:
    for name, tensor in tensors.items():
        if tensor.ndim not in (1, 2):
            raise ArtifactError(f"{file} is no embedding: {name} has {tensor.ndim} dimensions")
        if not tensor.numel():
            raise ArtifactError(f"{file} is no embedding: {name} has no values")
    vectors = {name: tensor.reshape(-1, tensor.shape[-1]) for name, tensor in tensors.items()}
    parts = PAIR if set(vectors) == set(PAIR) else dict.fromkeys(vectors, "text_encoder")
    return {part: vectors[name] for name, part in parts.items()}
