"""Where pictures come from and how they become training rows."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ray_sd.config.base import Free, Schema, name_to_mapping
from ray_sd.config.video import VideoConfig
from ray_sd.config.words import no_such


class ImageFolderSource(Schema):
    """A folder of pictures, searched recursively."""

    places = ("path",)
    name: Literal["image_folder"] = "image_folder"
    """Kind of source."""
    path: str
    """Local folder or URI (`s3://…`, `gs://…`, any pyarrow or fsspec filesystem). Captions come from a file beside each
    picture (`.txt`, `.caption`, `.cap`, `.json`), or from `metadata.jsonl` or `metadata.csv` (`file_name`, and the
    caption column)."""


class VideoFolderSource(Schema):
    """A folder of videos, searched recursively."""

    places = ("path",)
    name: Literal["video_folder"] = "video_folder"
    """Kind of source."""
    path: str
    """Local folder or URI of the videos (MP4, MOV, M4V, WebM, MKV, AVI, GIF). Captions, where a method wants them, come
    from a file beside each, or from `metadata.jsonl` or `metadata.csv`."""


class FrameFolderSource(Schema):
    """Folders of pictures, each of which is one video: its frames in the natural order of their names."""

    places = ("path",)
    name: Literal["frame_folder"] = "frame_folder"
    """Kind of source."""
    path: str
    """Local folder or URI; every folder in it that holds pictures is a video. The caption, where a method wants one, is
    in `cat.txt` beside the folder `cat`."""
    fps: float = Field(gt=0)
    """Frames a second that the pictures were taken at."""


class ParquetSource(Schema):
    """Parquet files with one encoded picture, or video, a row."""

    places = ("path",)
    name: Literal["parquet"] = "parquet"
    """Kind of source."""
    path: str
    """File, folder or URI of the Parquet files."""
    image_column: str = "image"
    """Column with the encoded bytes (or the `{bytes, path}` struct of Hugging Face files)."""
    video_column: str | None = None
    """Column with encoded videos, or such structs of them, where rows are clips."""
    id_column: str | None = None
    """Column that names a row; without it the name is the hash of the picture's bytes."""


class WebDatasetSource(Schema):
    """WebDataset tar shards: `key.jpg` (or `key.mp4`) with `key.txt`, `key.caption`, `key.cap` or `key.json` beside it."""

    places = ("path",)
    name: Literal["webdataset"] = "webdataset"
    """Kind of source."""
    path: str
    """A tar file, a folder of tar files, or a URI of either."""


class HuggingFaceSource(Schema):
    """A Hugging Face data set, from the hub or from `save_to_disk`."""

    local_paths = ("path",)
    name: Literal["huggingface"] = "huggingface"
    """Kind of source."""
    path: str
    """Hub id (`lambdalabs/naruto-blip-captions`) or local folder."""
    split: str = "train"
    """Split to read."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    image_column: str = "image"
    """Column with the picture."""


Source = Annotated[
    ImageFolderSource | VideoFolderSource | FrameFolderSource | ParquetSource | WebDatasetSource | HuggingFaceSource,
    Field(discriminator="name"),
]


CLIPS_ONLY = ("video_folder", "frame_folder")
"""Sources that give nothing but clips."""


class CenterCrop(Schema):
    """The middle of the picture."""

    name: Literal["center"] = "center"
    """Kind of crop."""


class RandomCrop(Schema):
    """Seeded random windows; each is encoded once, and each epoch draws one."""

    name: Literal["random"] = "random"
    """Kind of crop."""
    num_variants: int = Field(4, ge=1)
    """Windows encoded per picture."""


class DetectorConfig(Schema):
    """An object-detection model of transformers, run in a pool of Ray Data actors."""

    shorthand = "path"
    local_paths = ("path",)
    path: str
    """Hub id (`hustvl/yolos-tiny`, `PekingU/rtdetr_r50vd`) or local folder, with safetensors weights."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    threshold: float = Field(0.5, ge=0, le=1)
    """Score below which a detection does not count."""
    batch_size: Free[int] = Field(8, ge=1)
    """Pictures that an actor looks at together."""


CASCADE_LABELS = ("cat face", "face")
MARGINS = {"foreground": 0.1, "cascade": 0.5, "detector": 0.1}
"""By finder; a face is much less than its subject."""


class SubjectCrop(Schema):
    """A window around the animal or object; the middle of the picture where none is found."""

    name: Literal["subject"] = "subject"
    """Kind of crop."""
    finder: Literal["foreground", "cascade", "detector"] = "foreground"
    """What finds the subject: `foreground` takes what is not transparent, or what stands out from the border (any subject,
    no model); `cascade` faces of cats and people (no model); `detector` asks a model, and is chosen by naming one."""
    detector: DetectorConfig | None = None
    """The model that finds it."""
    labels: tuple[str, ...] = ()
    """What may be the subject, by the detector's names (`[cat, dog]`) or as `[cat face]`, `[face]` of the cascades;
    empty takes anything. Of several the best-scoring one is taken."""
    margin: float | None = Field(None, ge=0)
    """Room on each side of the subject, as a share of its longer side; null takes 0.1, around faces 0.5."""
    max_enlargement: float = Field(2.0, ge=1)
    """A small subject keeps more of its surroundings rather than being enlarged further than this."""

    @property
    def padding(self) -> float:
        """`margin`, or what suits the finder."""
        return MARGINS[self.finder] if self.margin is None else self.margin

    @model_validator(mode="before")
    @classmethod
    def _a_model_is_for_the_detector(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("detector") is not None:
            return {"finder": "detector", **value}
        return value

    @model_validator(mode="after")
    def _check(self) -> "SubjectCrop":
        if self.finder == "detector" and self.detector is None:
            raise ValueError("finder 'detector' needs a model; name one by detector=HUB_ID_OR_FOLDER")
        if self.finder != "detector" and self.detector is not None:
            raise ValueError(f"finder '{self.finder}' asks no model; leave out detector, or take finder=detector")
        if self.finder == "foreground" and self.labels:
            raise ValueError(
                "finder 'foreground' knows no labels; leave them out, or take finder=cascade or detector=…"
            )
        for label in self.labels if self.finder == "cascade" else ():
            if label not in CASCADE_LABELS:
                raise ValueError(f"labels: {no_such('label', label, CASCADE_LABELS)}")
        return self


Crop = Annotated[CenterCrop | RandomCrop | SubjectCrop, Field(discriminator="name"), BeforeValidator(name_to_mapping)]


class BucketConfig(Schema):
    """Sizes of about one area but different shapes, so that pictures are neither squashed nor cut to squares. Every
    batch is of one size. The scheme is NovelAI's."""

    step: int = Field(64, ge=8, multiple_of=8)
    """Sides are multiples of so many pixels; for the U-Net's sake at least 64 with Stable Diffusion."""
    max_aspect_ratio: float = Field(2.0, ge=1)
    """Longest side over shortest; a picture that is longer is cut to it."""
    resolutions: tuple[int, ...] = ()
    """Sides of the squares whose areas are used; a picture takes the largest that it fills. None takes `resolution`."""


class AlphaMask(Schema):
    """The picture's own alpha channel: what is transparent does not count. An opaque picture counts everywhere."""

    name: Literal["alpha"] = "alpha"
    """Kind of mask."""
    outside: float = Field(0.0, ge=0, lt=1)
    """Weight of what the mask leaves out."""


class MaskFiles(Schema):
    """A PNG file for each picture, of its size, white where the picture counts."""

    places = ("path",)
    name: Literal["files"] = "files"
    """Kind of mask."""
    path: Free[str]
    """Folder or URI; the mask of `cats/1.jpg` is `cats/1.png` below it. Rows of
    Parquet files need `source.id_column` for it; those of Hugging Face data sets have no names."""
    outside: float = Field(0.0, ge=0, lt=1)
    """Weight of what the mask leaves out."""


Mask = Annotated[AlphaMask | MaskFiles, Field(discriminator="name"), BeforeValidator(name_to_mapping)]


class TagConfig(Schema):
    """Captions that are lists of tags: each epoch takes one of several orders, with some tags left out. They are made
    once, so that their embeddings can be; validation takes the caption as it stands."""

    separator: str = Field(",", min_length=1)
    """What stands between tags."""
    shuffle: bool = True
    """Change the order of the tags."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of leaving a tag out; one is always kept."""
    keep_first: int = Field(0, ge=0)
    """Tags at the beginning that stay where they are, such as the subject's name."""
    num_variants: int = Field(8, ge=1)
    """Versions of each caption, the caption itself included."""


class CaptionConfig(Schema):
    """Where a row's caption comes from. A row without one falls back to the template; without either it is rejected."""

    column: str | None = None
    """Column of Parquet, Hugging Face and `metadata.jsonl` rows, and key of `.json` files; null takes the first that is
    there of `caption`, `text`, `prompt`, `txt` and `captions`."""
    template: str | None = None
    """Caption of every row that has none, such as `a photo of a sks dog`. An empty string trains without text."""
    replace: dict[str, str] = Field(default_factory=dict)
    """Words of captions, and what is written in their place, all at once: `'{owl: <my-owl>}'`."""
    prefix: str = ""
    """Written before every caption, as it stands."""
    suffix: str = ""
    """Written after every caption, as it stands."""
    tags: TagConfig | None = None
    """Shuffle and leave out tags; `{}` takes the defaults, null takes captions as they are."""


class EncodeConfig(Schema):
    """How the frozen encoders run, in a pool of Ray Data actors."""

    batch_size: Free[int] = Field(16, ge=1)
    """Pictures, or frames of clips, encoded at once by an actor."""
    num_actors: Free[int] = Field(1, ge=1)
    """Largest number of encoder actors. With 1, on one machine without GPUs, the process that prepares the data encodes."""
    dtype: Literal["float16", "float32"] = "float16"
    """Precision of the stored latents and embeddings."""
    rows_per_shard: Free[int] = Field(1024, ge=1)
    """Largest number of rows in one Parquet file of the cache."""


class DatasetConfig(Schema):
    """Pictures or clips with their captions, and how they are prepared."""

    source: Free[Source]
    """Where the pictures or videos are."""
    caption: CaptionConfig = CaptionConfig()
    """Where the captions are."""
    resolution: int | tuple[int, int] = 512
    """Size in pixels that training sees: one number for a square, or `[height, width]`. A multiple of 8."""
    video: VideoConfig | None = None
    """Rows are clips, taken from videos like this; `{}` takes the defaults, null reads pictures."""
    buckets: BucketConfig | None = None
    """Train pictures in sizes near their own shapes instead of one; `{}` takes the defaults."""
    crop_bars: bool = False
    """Cut black bars (letterbox, pillarbox) off pictures and videos first of all. The run says how many have them,
    whether they are cut off or not."""
    crop: Crop = CenterCrop()
    """What is cut out and scaled to `resolution`: the `center`, `random` windows, or the `subject`."""
    flip: bool = False
    """Also train on the mirrored picture."""
    mask: Mask | None = None
    """Let the loss count only a part of each picture: `alpha` or `files`."""
    background: str = "#ffffff"
    """Colour (`#rrggbb`) behind transparent pixels."""
    max_pixels: Free[int] = Field(100_000_000, ge=1, le=178_956_970)
    """A picture with more pixels than this is rejected unread, as a decompression bomb; Pillow opens none above the bound."""
    max_rejected_fraction: Free[float] = Field(0.05, ge=0, le=1)
    """Share of unreadable rows past which the run fails; the rows and reasons are in `rejected.jsonl`."""
    holdout: int = Field(0, ge=0)
    """Rows kept from training for the validation loss, chosen by the hash of their id."""
    shuffle_rows: int = Field(4096, ge=1)
    """Runs of 64 neighbouring rows are shuffled over the whole data set, then rows within windows of this size."""
    reader_memory: Free[int] = Field(256, ge=1)
    """MB of rows that each training worker's reader keeps; reading is fastest where it holds `shuffle_rows` rows."""
    encode: EncodeConfig = EncodeConfig()
    """The encode stage."""

    @property
    def height(self) -> int:
        return self.resolution if isinstance(self.resolution, int) else self.resolution[0]

    @property
    def width(self) -> int:
        return self.resolution if isinstance(self.resolution, int) else self.resolution[1]

    @model_validator(mode="after")
    def _check(self) -> "DatasetConfig":
        for side in (self.height, self.width):
            if side < 8 or side % 8:
                raise ValueError(
                    f"resolution {side} is not a positive multiple of 8; try {max(8, round(side / 8) * 8)}"
                )
        if self.buckets is not None:
            self._check_buckets(self.buckets)
        if isinstance(self.mask, MaskFiles):
            self._check_mask_files()
        self._check_clips()
        digits = self.background.removeprefix("#")
        if len(digits) != 6 or any(c not in "0123456789abcdefABCDEF" for c in digits):
            raise ValueError(f"background '{self.background}' is no colour; write it as '#rrggbb'")
        return self

    def _check_mask_files(self) -> None:
        remedy = None
        if isinstance(self.source, ParquetSource) and self.source.id_column is None:
            remedy = "name the column that holds them by dataset.source.id_column"
        elif isinstance(self.source, HuggingFaceSource):
            remedy = "take dataset=parquet with dataset.source.id_column, or dataset.mask=alpha"
        if remedy is not None:
            raise ValueError(
                f"mask files are found by their rows' names, and those of the source '{self.source.name}' have none; "
                + remedy
            )

    def _check_clips(self) -> None:
        kind, column = self.source.name, getattr(self.source, "video_column", None)
        if self.video is None:
            if kind in CLIPS_ONLY or column is not None:
                found = f"source.video_column={column}" if column is not None else f"the source '{kind}'"
                raise ValueError(
                    f"{found} gives clips; say what they are like by dataset.video, '{{}}' for the defaults"
                )
            return
        if kind == "parquet" and column is None:
            raise ValueError("video: the source 'parquet' needs source.video_column=NAME, the column with the videos")
        if kind not in (*CLIPS_ONLY, "parquet", "webdataset"):
            raise ValueError(
                f"video: the source '{kind}' gives pictures; clips come from {', '.join(CLIPS_ONLY)}, parquet and webdataset"
            )
        if self.mask is not None:
            raise ValueError("mask is for pictures, not for clips; leave out mask or video")
        if self.buckets is not None:
            raise ValueError("buckets are for pictures; all clips are of one size, so leave out buckets or video")
        if isinstance(self.crop, SubjectCrop):
            raise ValueError("crop 'subject' looks at pictures only; with clips take crop=center or crop=random")

    def _check_buckets(self, buckets: BucketConfig) -> None:
        if self.height != self.width:
            raise ValueError(f"buckets need one number for resolution, not [{self.height}, {self.width}]")
        for side in buckets.resolutions or (self.height,):
            if side < buckets.step or side % buckets.step:
                near = max(buckets.step, round(side / buckets.step) * buckets.step)
                raise ValueError(
                    f"the resolution {side} is no positive multiple of buckets.step={buckets.step}; try {near}"
                )
