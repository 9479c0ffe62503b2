"""The cache's part of one configuration: its folders, and the stored view of its rows."""

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ray_sd.config import ExperimentConfig
from ray_sd.config.buckets import bucket_sizes
from ray_sd.config.rows import RowSpec
from ray_sd.data.bars import FORMAT as BARS_FORMAT
from ray_sd.data.cache import CacheFolder, digest_of
from ray_sd.data.crops import variants
from ray_sd.data.index import RowIndex
from ray_sd.data.sources import Listing, counted
from ray_sd.files import Location

logger = logging.getLogger(__name__)

FORMAT = 4
"""Raise it when the same configuration would encode other values."""
CLIP_FORMAT = 2
"""The same, of clips alone: raise it when other frames would be chosen or cut."""


@dataclass(frozen=True)
class EncodeSummary:
    """What became of a data set's rows."""

    rows: int
    """Usable rows, held-out ones included."""
    held_out: int
    encoded: int
    """Rows of which at least one variant was encoded now."""
    texts: int
    """Different captions whose embeddings are in use, the empty one included."""
    texts_encoded: int
    cut_captions: int
    """Different captions that are longer than the text encoder reads."""
    buckets: dict[str, int]
    """Rows of each size that training sees."""
    rejected: int
    reasons: dict[str, int]
    """How many rows were rejected for what."""
    rejected_file: str
    not_found: int | None = None
    """Rows in which a subject crop found nothing, so that they are cut from the middle."""
    contact_sheet: str | None = None
    """File that shows what a subject crop found; None where no picture could be shown."""
    still: int = 0
    """Videos that dataset.video.min_motion leaves out; not among the rejected ones, but in their file."""
    still_clips: int = 0
    """Clips of other videos that it leaves out."""
    motion: str | None = None
    """How much clips move, in words."""
    bars: str | None = None
    """How many rows have black bars, in words; None where that says nothing."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """How many files, or members of tar files, are no rows and nothing of one, by why not."""
    passed_over_file: str = ""
    profile_errors: int = 0
    """Of the pictures that were read now, those whose colour profile cannot be used, so that their numbers count as they are."""
    templated: int = 0
    """Rows without a caption, which take the template."""
    unread_keys: dict[str, int] = field(default_factory=dict)
    """How many of them have other keys beside them, by these keys."""

    @property
    def reused(self) -> int:
        return self.rows - self.encoded

    def __str__(self) -> str:
        held_out = f" ({self.held_out} held out)" if self.held_out else ""
        parts = [f"{self.rows} rows{held_out}", f"encoded {self.encoded}, reused {self.reused} of {self.rows}"]
        if self.texts:
            parts.append(
                f"captions: encoded {self.texts_encoded}, reused {self.texts - self.texts_encoded} of {self.texts}"
            )
        if self.templated:
            keys = ""
            if self.unread_keys:
                names = max(self.unread_keys, key=lambda keys: self.unread_keys[keys])
                count = sum(self.unread_keys.values())
                keys = f" (beside {count} are keys that are not read, {names}; dataset.caption.column=KEY reads one)"
            parts.append(f"{self.templated} have no caption and take dataset.caption.template{keys}")
        if self.profile_errors:
            parts.append(f"{self.profile_errors} have a colour profile that cannot be used, and count as they are")
        if self.cut_captions:
            parts.append(f"{self.cut_captions} captions are longer than the text encoder reads and are cut")
        if self.not_found is not None:
            otherwise = f", the other {self.not_found} are cut from the middle" if self.not_found else ""
            see = f" (see {self.contact_sheet})" if self.contact_sheet is not None else ""
            parts.append(f"subject found in {self.rows - self.not_found} of {self.rows}{otherwise}{see}")
        if self.bars is not None:
            parts.append(self.bars)
        if self.motion is not None:
            parts.append(self.motion)
        if self.still:
            parts.append(f"{self.still} move too little and are left out, listed in {self.rejected_file}")
        if self.still_clips:
            parts.append(f"{self.still_clips} still clips of videos that move elsewhere are left out")
        if self.rejected:
            parts.append(f"rejected {self.rejected}, listed in {self.rejected_file}")
        if self.passed_over:
            count, reasons = sum(self.passed_over.values()), counted(self.passed_over)
            parts.append(
                f"passed over {count} file{'s' if count > 1 else ''} ({reasons}), listed in {self.passed_over_file}"
            )
        return "; ".join(parts)

    def bucket_table(self) -> str:
        """Buckets and their rows, a line each."""
        width = max(len(f"{count}") for count in self.buckets.values())
        return "\n".join(f"  {name}  {count:>{width}} rows" for name, count in self.buckets.items())


@dataclass(frozen=True)
class PreparedData:
    """A data set, ready to train on; small and picklable."""

    train: RowIndex
    validation: RowIndex | None
    fingerprint: str
    """Changes with the content of the rows: pictures, captions, transform, encoders."""
    summary: EncodeSummary
    prior: RowIndex | None = None
    """Pictures of the subject's class, one of which goes with each row."""


class View:
    """One configuration's folders in the cache."""

    def __init__(self, config: ExperimentConfig, rows: RowSpec, root: Location, listing: Listing) -> None:
        self.kinds = variants(config.dataset)
        image, text = _image_description(config, rows), _text_description(config, rows)
        view = {
            "format": FORMAT,
            "image": image,
            "text": text,
            "listing": listing.fingerprint,
            "passed_over": listing.passed_over,
            **config.dataset.model_dump(mode="json", include={"source", "caption", "video", "max_pixels", "holdout"}),
            "templates": rows.templates,
            "placeholders": [token for token, _ in rows.placeholders],
            "variants": [str(variant) for variant in self.kinds],
        }
        view |= {"bars": BARS_FORMAT} if config.dataset.crop_bars else {}
        self.root = root
        self.images = CacheFolder(root, f"{rows.images}/{digest_of(image)}")
        self.texts = CacheFolder(root, f"text/{digest_of(text)}") if rows.text == "embeddings" else None
        self.folder = CacheFolder(root, f"views/{digest_of(view)}")
        self._config = config
        self._parts = [(self.images, image)] + ([(self.texts, text)] if self.texts is not None else [])

    @property
    def rejected(self) -> Location:
        return self.folder.location / "rejected.jsonl"

    @property
    def passed_over(self) -> Location:
        return self.folder.location / "passed_over.jsonl"

    def load(self) -> PreparedData | None:
        """What an earlier run made of the same listing; None if there was none, or the cache lost a part of it."""
        if not self._prepared.exists():
            return None
        try:
            stored = json.loads(self._prepared.read())
            indices = {
                part: RowIndex(self.root, name, tuple(buckets)) for part, (name, buckets) in stored["indices"].items()
            }
            missing = [shard for index in indices.values() for shard in index.load().missing_shards()]
            summary = replace(EncodeSummary(**stored["summary"]), encoded=0, texts_encoded=0)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("data: the source is read again, since %s cannot be used: %s", self._prepared.path, error)
            return None
        if missing:
            logger.info("data: the cache lost %d shards; the source is read again", len(set(missing)))
            return None
        return PreparedData(indices["train"], indices.get("validation"), stored["fingerprint"], summary)

    def store(self, prepared: PreparedData) -> None:
        indices = {"train": prepared.train, "validation": prepared.validation}
        content = {
            "summary": asdict(prepared.summary),
            "fingerprint": prepared.fingerprint,
            "indices": {part: [index.name, index.buckets] for part, index in indices.items() if index is not None},
        }
        self._prepared.write(json.dumps(content, indent=1).encode())

    def touch(self) -> None:
        """Mark all folders as used now."""
        for folder, description in self._parts:
            folder.touch({"model": self._config.model.name, **description})
        uses = [folder.name for folder, _ in self._parts]
        self.folder.touch({"run": self._config.name, "uses": uses, "config": self._config.model_dump(mode="json")})

    @property
    def _prepared(self) -> Location:
        return self.folder.location / "prepared.json"


def _image_description(config: ExperimentConfig, rows: RowSpec) -> dict[str, Any]:
    """What all pictures or clips in a cache folder share."""
    from ray_sd.models import fingerprint
    from ray_sd.models.components import load_image_processor

    dataset = config.dataset
    description = {
        "format": FORMAT,
        "sizes": bucket_sizes(dataset),
        "background": dataset.background.lower().removeprefix("#"),
        "mask": None if dataset.mask is None else dataset.mask.name,
    }
    if dataset.video is not None:
        description["clip_format"] = CLIP_FORMAT
    if rows.images == "latents" and dataset.video is not None:
        description["condition_frames"] = rows.condition_frames
        description["image_encoder"] = fingerprint(config.model, "image_encoder")
        processor = load_image_processor(config.model)
        description["image_processor"] = [processor.image_mean, processor.image_std]
    if rows.images == "latents":
        description |= {"dtype": dataset.encode.dtype, "vae": fingerprint(config.model, "vae")}
        description |= {"low_res": True} if config.model.upscales else {}
    return description


def _text_description(config: ExperimentConfig, rows: RowSpec) -> dict[str, Any]:
    """What all captions of a data set share."""
    from ray_sd.models import fingerprint
    from ray_sd.models.components import read_index

    description: dict[str, Any] = {"format": FORMAT, "text": rows.text, "prompt_chunks": config.model.prompt_chunks}
    if rows.text == "embeddings":
        description |= {
            "dtype": config.dataset.encode.dtype,
            "text_encoder": fingerprint(config.model, "text_encoder"),
            "zero_empty_prompt": read_index(config.model).get("force_zeros_for_empty_prompt"),
        }
    elif rows.text == "tokens":
        description |= {"tokenizer": fingerprint(config.model, "tokenizer")}
    return description
