"""What a row's captions become before they are encoded: words replaced, tags shuffled and left out, prefix and suffix."""

import hashlib
from collections.abc import Sequence

import numpy as np

from ray_sd.config.dataset import CaptionConfig, TagConfig
from ray_sd.config.rewording import reword


def written_captions(captions: Sequence[str], config: CaptionConfig) -> list[str]:
    """All that a row may be trained with; the first is the first caption with its tags in place."""
    replaced = [reword(caption, config.replace) for caption in captions]
    if config.tags is not None:
        versions = [_versions(caption, config.tags) for caption in replaced]
        replaced = [of_caption[0] for of_caption in versions]
        replaced += [version for of_caption in versions for version in of_caption[1:]]
    return [f"{config.prefix}{caption}{config.suffix}" for caption in replaced]


def _versions(caption: str, config: TagConfig) -> list[str]:
    """The caption, and versions of it that depend on nothing but the caption and their number."""
    tags = [tag.strip() for tag in caption.split(config.separator) if tag.strip()]
    kept, rest = tags[: config.keep_first], tags[config.keep_first :]
    join = f"{config.separator.strip()} " if config.separator.strip() else config.separator
    versions = [caption]
    for number in range(1, config.num_variants):
        seed = int.from_bytes(hashlib.blake2b(f"{number} {caption}".encode(), digest_size=8).digest())
        random = np.random.Generator(np.random.PCG64(seed))
        left = [tag for tag in rest if random.random() >= config.dropout]
        if rest and not kept and not left:
            left = [rest[random.integers(len(rest))]]
        order = random.permutation(len(left)) if config.shuffle else range(len(left))
        versions.append(join.join([*kept, *(left[i] for i in order)]))
    return versions
