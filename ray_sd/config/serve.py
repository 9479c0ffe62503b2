"""What `serve_config.yaml` gives the application as `args`: models, their adapters, and what a request may ask for."""

from ipaddress import ip_address
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ray_sd.config.base import Schema
from ray_sd.config.method import Texts
from ray_sd.config.model import ModelConfig

IMAGE_FAMILIES = ("stable_diffusion", "stable_diffusion_xl")


class ServedPreset(Schema):
    """The model that a deployment serves, composed as for `jobs/generate.py`."""

    model: ModelConfig
    """Group `model`."""

    @model_validator(mode="after")
    def _check(self) -> "ServedPreset":
        if self.model.family not in IMAGE_FAMILIES:
            raise ValueError(f"model '{self.model.name}' draws no pictures from prompts; serve a text-to-image model")
        return self


class BatchingConfig(Schema):
    """How a replica's pictures share its steps."""

    max_rows: int = Field(16, ge=1)
    """Rows of the U-Net at once at the model's own size, two a picture with guidance; fewer of larger pictures. On a GPU also
    no more than its memory has room for, which is measured at the start."""
    max_waiting: int = Field(64, ge=1)
    """Pictures that may wait in one replica for their first step, whatever `limits.max_queue` leaves room for."""
    policy: Literal["shortest", "fair"] = "shortest"
    """Who goes first: what has the fewest steps left, or who has had the least."""
    patience: int = Field(16, ge=1)
    """Steps that a picture lets others take before it goes first."""
    result_cache: int = Field(64, ge=0)
    """MiB of pictures that are kept in case the same is asked for again."""
    prompt_cache: int = Field(128, ge=0)
    """MiB of encoded prompts that are kept."""
    decoded_at_once: int = Field(4, ge=1)
    """Pictures of the model's own size that are decoded together; fewer larger ones."""


class Replicas(Schema):
    """How many replicas serve a model."""

    min: int = Field(1, ge=1)
    """Always there."""
    max: int | None = Field(None, ge=1)
    """Most that there may be; null takes `min`, and their number stays."""
    steps: int = Field(2000, ge=1)
    """Denoising steps that each may have before it until another is started; a picture with guidance counts twice."""
    upscale_delay: float = Field(10, ge=0)
    """Seconds for which more are wanted until they are started."""
    downscale_delay: float = Field(300, ge=0)
    """Seconds for which fewer are enough until one goes."""

    @model_validator(mode="after")
    def _check(self) -> "Replicas":
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max: {self.max} is less than the {self.min} of min")
        return self

    @property
    def most(self) -> int:
        return self.min if self.max is None else self.max


class ServedModel(Schema):
    """A base model and its deployment."""

    shorthand = "settings"
    settings: Texts = ()
    """What `jobs/generate.py` would be given: `model=sdxl`, `model.base=folder`."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of the weights; `auto` is fp16 on GPUs and fp32 on CPUs. An autoencoder that overflows in fp16 stays in fp32."""
    num_cpus: float = Field(0.5, ge=0)
    """CPUs that Ray sets aside for a replica. Less than one lets models share a CPU; `threads` are not bound by it."""
    num_gpus: float = Field(0, ge=0)
    """GPUs of a replica. Less than one lets replicas share a GPU, without keeping them apart."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of a step where there is no GPU; null takes all cores."""
    channels_last: bool = False
    """Keep pixels' channels beside each other in memory, which many GPUs convolve faster."""
    compile: bool = False
    """Compile the U-Net's transformer blocks by `torch.compile`, in the first steps, which take minutes then. Needs a C++
    compiler on CPUs."""
    adapter_memory: int = Field(2048, ge=0)
    """MiB that adapters may take in a replica together, with what rows of a step copy of theirs."""
    replicas: Replicas = Replicas()
    """How many there are."""
    batching: BatchingConfig = BatchingConfig()
    """How pictures share steps."""


class RequestLimits(Schema):
    """What one request may ask for, and how much all of them together."""

    max_pixels: int = Field(1024 * 1024, ge=64)
    """Height times width."""
    max_steps: int = Field(100, ge=1)
    """Denoising steps."""
    max_images: int = Field(10, ge=1)
    """Pictures of a prompt."""
    max_prompt_length: int = Field(2000, ge=1)
    """Characters of each prompt."""
    max_adapters: int = Field(4, ge=0)
    """Adapters of a picture."""
    max_upload_bytes: int = Field(20 * 2**20, ge=1)
    """Of a request, with its files."""
    max_upload_pixels: int = Field(16 * 2**20, ge=1)
    """Of an uploaded picture, once it is decoded."""
    deadline: float = Field(300, gt=0)
    """Seconds after which a request that is not done fails."""
    max_queue: int = Field(256, ge=1)
    """Pictures of a base model that wait or are drawn at once, over all of its replicas; what comes then is told to come back."""
    idempotency_seconds: float = Field(600, gt=0)
    """How long the answer to a request with an `Idempotency-Key` is kept for who asks again."""
    idempotency_memory: int = Field(128, ge=0)
    """MiB of such answers, of all HTTP replicas together."""
    url_seconds: float = Field(3600, gt=0)
    """How long a picture is kept behind a link (`response_format: url`)."""
    url_memory: int = Field(512, ge=0)
    """MiB of such pictures, of all HTTP replicas together; the least recently asked for go first."""

    @model_validator(mode="after")
    def _check_queue(self) -> "RequestLimits":
        if self.max_queue < self.max_images:
            raise ValueError(
                f"max_queue {self.max_queue} is less than max_images {self.max_images}, which one request may ask for; "
                f"set max_queue to {self.max_images} or more, or max_images lower"
            )
        return self


class ApiKey(Schema):
    """A key of the HTTP side, and how much may be asked for with it."""

    shorthand = "sha256"
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of the key; `python -m ray_sd.serve.gate` makes one."""
    role: Literal["user", "admin"] = "user"
    """An admin loads and unloads adapters, too."""
    requests_per_minute: int | None = Field(None, ge=1)
    """Most requests that draw in any minute, over all HTTP replicas."""
    concurrent: int | None = Field(None, ge=1)
    """Most requests that draw at once, over all HTTP replicas."""


class Defaults(Schema):
    """What a request that does not say is drawn with."""

    num_inference_steps: int | None = Field(None, ge=1)
    """Denoising steps; null takes 20 for the embedded model and 30 for others, as `jobs/generate.py` does."""
    guidance_scale: float | None = Field(None, ge=0)
    """Classifier-free guidance; 1 or less switches it off; null takes 4 for the embedded model and 7.5 for others."""


class HttpConfig(Schema):
    """Where `jobs/serve.py` listens. For `serve deploy` it is said in `http_options`."""

    host: str = "127.0.0.1"
    """Address of this machine; `0.0.0.0` for all of its own, which needs `keys`."""
    port: int = Field(8000, ge=1, le=65535)
    """Port there."""

    @field_validator("host")
    @classmethod
    def _check_host(cls, host: str) -> str:
        if host != "localhost":
            ip_address(host)
        return host

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine can ask."""
        return self.host == "localhost" or ip_address(self.host).is_loopback

    @property
    def url(self) -> str:
        host = "localhost" if self.host == "127.0.0.1" else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


class ServeConfig(Schema):
    """The application that Ray Serve runs (`jobs/serve.py`, `serve_config.yaml`)."""

    places = ("adapters",)
    models: dict[str, ServedModel] = Field(min_length=1)
    """Base models by the names that requests ask for them by; the first is taken where a request names none."""
    adapters: str | None = None
    """Folder or bucket (a URI, as of a dataset) of adapters and of training runs, by whose names requests ask for them; new
    ones are found as they come."""
    keys: dict[str, ApiKey] = Field(default_factory=dict)
    """Keys by their holders' names, who share the models fairly by `policy: fair`. Without any this machine alone may ask."""
    limits: RequestLimits = RequestLimits()
    """What one request may ask for, and how much all of them together."""
    defaults: Defaults = Defaults()
    """What is drawn with where a request does not say."""
    http: HttpConfig = HttpConfig()
    """Where to listen."""
