"""The adapters that an export reads, and the base that they were made for."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray_sd.adapter import MANIFEST, AdapterManifest, Base, read_manifest
from ray_sd.errors import ArtifactError
from ray_sd.files import local_copy
from ray_sd.methods.contents import Contents, read_contents
from ray_sd.methods.embeddings import Embedding, check_file_names
from ray_sd.models import DiffusionModel


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was found."""

    name: str
    """Path or URI that it was given by."""
    path: Path
    """Where it is on this machine."""
    contents: Contents
    manifest: AdapterManifest | None
    """None of what another tool wrote."""


@contextmanager
def opened(names: Sequence[str], model: DiffusionModel, token: str | None = None) -> Iterator[list[Adapter]]:
    """Read adapters that are for a model or its skeleton; what came from elsewhere stays here as long as they are open."""
    with ExitStack() as stack:
        yield [_read(name, stack.enter_context(local_copy(name, "adapter")), model, token) for name in names]


def _read(name: str, path: Path, model: DiffusionModel, token: str | None) -> Adapter:
    manifest = read_manifest(path) if (path / MANIFEST).is_file() else None
    family = model.config.family
    if manifest is not None and manifest.family != family:
        raise ArtifactError(f"{name} was made for a model of family {manifest.family}, not {family}")
    return Adapter(name, path, read_contents(path, model, token), manifest)


def common_base(adapters: Sequence[Adapter], allow_other_base: bool = False) -> Base | None:
    """The base that adapters say they were made for; None where none says. Raises ArtifactError where they differ."""
    known = [(adapter.name, adapter.manifest.base) for adapter in adapters if adapter.manifest is not None]
    for name, base in known[1:]:
        first_name, first = known[0]
        for component in sorted(first.fingerprints.keys() & base.fingerprints.keys()):
            if first.fingerprints[component] != base.fingerprints[component] and not allow_other_base:
                raise ArtifactError(
                    f"{first_name} was made for the base '{first.name}' ({first.source}), {name} for '{base.name}' "
                    f"({base.source}), and their {component}s differ; take adapters of one base, or try it anyway by "
                    "allow_other_base=true"
                )
    if not known:
        return None
    fingerprints = {part: digest for _, base in reversed(known) for part, digest in base.fingerprints.items()}
    return known[0][1].model_copy(update={"fingerprints": fingerprints})


def all_tokens(adapters: Sequence[Adapter]) -> dict[str, Embedding]:
    """The embeddings of all adapters. Raises ArtifactError for a token that two of them have, or that no file can tell
    from another."""
    owners: dict[str, str] = {}
    tokens: dict[str, Embedding] = {}
    for adapter in adapters:
        for token, embedding in adapter.contents.embeddings.items():
            if token in owners:
                raise ArtifactError(f"{owners[token]} and {adapter.name} both hold the token {token}; give one of them")
            owners[token], tokens[token] = adapter.name, embedding
    check_file_names(tokens)
    return tokens
