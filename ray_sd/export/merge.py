"""Several adapters as one that draws what all of them together draw."""

from collections.abc import Sequence

from ray_sd.config.export import MergeConfig
from ray_sd.errors import ArtifactError
from ray_sd.export.adapter_output import write_adapter
from ray_sd.export.adapters import Adapter, all_tokens, common_base, opened
from ray_sd.export.output import new_output
from ray_sd.export.skeletons import load_layers
from ray_sd.export.summary import summary
from ray_sd.methods.contents import Contents
from ray_sd.methods.low_rank import LowRank, Updates, compress, concatenate


def merge(config: MergeConfig) -> str:
    with new_output(config.output) as path:
        model = load_layers(config.model)
        with opened(config.adapters, model) as adapters:
            base = common_base(adapters, config.allow_other_base)
            for adapter, strength in zip(adapters, config.strengths(), strict=True):
                _check_mergeable(adapter, strength)
            updates = _sum(adapters, config.strengths())
            embeddings = all_tokens(adapters)
        notes = []
        if config.rank is not None:
            updates, share = _compressed(updates, config.rank)
            notes = [f"{share:.2%} of the sum's squared change is kept at rank {config.rank}"]
        contents = Contents(updates, embeddings)
        write_adapter(contents, path, model, config, base)
    return summary(config, contents.summary(), *notes)


def _check_mergeable(adapter: Adapter, strength: float) -> None:
    contents = adapter.contents
    if contents.weights:
        parts = ", ".join(contents.weights)
        raise ArtifactError(
            f"{adapter.name} holds whole weights ({parts}), of which there is one; jobs/export.py extract makes a LoRA of them"
        )
    if any(update.magnitude is not None for layers in contents.updates.values() for update in layers.values()):
        raise ArtifactError(
            f"{adapter.name} is a DoRA, and DoRAs do not add up; jobs/export.py fuse puts it into a base"
        )
    if contents.embeddings and not contents.updates and strength != 1:
        raise ArtifactError(f"{adapter.name} holds embeddings, which have no strength; give it weight 1")


def _sum(adapters: Sequence[Adapter], strengths: Sequence[float]) -> Updates:
    found: dict[tuple[str, str], list[tuple[LowRank, float]]] = {}
    for adapter, strength in zip(adapters, strengths, strict=True):
        for component, layers in adapter.contents.updates.items():
            for name, update in layers.items():
                found.setdefault((component, name), []).append((update, strength))
    updates: Updates = {}
    for (component, name), parts in found.items():
        updates.setdefault(component, {})[name] = concatenate(*zip(*parts, strict=True))
    return updates


def _compressed(updates: Updates, rank: int) -> tuple[Updates, float]:
    """Updates of at most `rank`, and the share of their squared change that is left."""
    kept = total = 0.0
    smaller: Updates = {}
    for component, layers in updates.items():
        for name, update in layers.items():
            less = compress(update, rank) if update.rank > rank else update
            smaller.setdefault(component, {})[name] = less
            total += float(update.delta().square().sum())
            kept += float(less.delta().square().sum())
    return smaller, kept / total if total else 1.0
