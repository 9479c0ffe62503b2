"""How training runs: steps, workers, optimizer, precision, checkpoints, validation."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from ray_sd.config.base import Identity, Schema, name_to_mapping
from ray_sd.config.metrics import PREFIX, PictureMetric
from ray_sd.config.optimizer import OF_WHOLE_WEIGHTS, AdamWOptimizer, Optimizer, ProdigyOptimizer


class ConstantSchedule(Schema):
    """Warm-up, then a constant rate."""

    name: Literal["constant"] = "constant"
    """Kind of schedule."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from zero."""


class LinearSchedule(Schema):
    """Warm-up, then a straight fall."""

    name: Literal["linear"] = "linear"
    """Kind of schedule."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from zero."""
    min_ratio: float = Field(0.0, ge=0, le=1)
    """Last learning rate as a share of the first."""


class CosineSchedule(Schema):
    """Warm-up, then cosine annealing with warm restarts (arXiv:1608.03983)."""

    name: Literal["cosine"] = "cosine"
    """Kind of schedule."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from zero."""
    num_cycles: int = Field(1, ge=1)
    """Cosine cycles of equal length; each starts again at the full rate."""
    min_ratio: float = Field(0.0, ge=0, le=1)
    """Lowest learning rate as a share of the highest."""


Schedule = Annotated[
    ConstantSchedule | LinearSchedule | CosineSchedule,
    Field(discriminator="name"),
    BeforeValidator(name_to_mapping),
]


BaseFormat = Literal["nf4", "int8"]


class ZeroConfig(Schema):
    """DeepSpeed ZeRO: what is divided among the workers (arXiv:1910.02054)."""

    stage: Literal[0, 1, 2, 3] | None = None
    """0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters; null is 1, or 0 with an optimizer that needs
    every parameter whole (`adafactor`, `prodigy`)."""
    offload: bool = False
    """Keep optimizer state in the machine's memory instead of the GPU's. DeepSpeed compiles an optimizer for it: needs a C++
    compiler and `pip install 'ray-sd[offload]'`."""
    param_persistence_threshold: int = Field(100_000, ge=0)
    """Stage 3: parameters smaller than this stay gathered."""


class CheckpointConfig(Schema):
    """When state is saved and how much of it is kept."""

    every_steps: int = Field(500, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""


class ValidationConfig(Schema):
    """What is measured and drawn along the way."""

    local_paths = ("images",)
    every_steps: int = Field(500, ge=1)
    """Steps between validation losses (where `dataset.holdout` keeps rows); drawn pictures come with checkpoints."""
    num_timesteps: int = Field(4, ge=1)
    """Fixed, evenly spread timesteps at which each held-out row is measured."""
    prompts: tuple[str, ...] = ()
    """Prompts drawn at every checkpoint and at the end; none draws nothing."""
    negative_prompt: str = ""
    """What the pictures should not show."""
    images: tuple[str, ...] = ()
    """First frames of clips that a video model draws at every checkpoint and at the end: paths, or `embedded/…`. For
    interpolation the key frames of each clip, one after another; for an upscaler the pictures that it is given small, with
    the `prompts` as their captions, if any."""
    seed: int = 0
    """Seed of the first prompt's picture, or first image's clip; the next count on."""
    num_inference_steps: int = Field(20, ge=1)
    """Denoising steps a picture."""
    guidance_scale: float = Field(5.0, ge=0)
    """Classifier-free guidance."""
    metrics: tuple[PictureMetric, ...] = ()
    """What is measured on the pictures of the prompts, each reported as `val/` and its label: `subject_similarity`,
    `dino_similarity`, `prompt_similarity`, `base_drift` and `lpips`."""

    @property
    def draws(self) -> bool:
        """Whether anything is drawn at checkpoints."""
        return bool(self.prompts or self.images)

    @model_validator(mode="after")
    def _check(self) -> "ValidationConfig":
        keys = [metric.key for metric in self.metrics]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ValueError(
                f"metrics: {keys.count(twice)} are reported as {twice}; give each a label of its own, such as "
                f"label: {twice.removeprefix(PREFIX)}_2"
            )
        return self


class TrainerConfig(Schema):
    """One training run."""

    max_steps: int = Field(1000, ge=1)
    """Optimizer steps."""
    batch_size: Identity[int] = Field(4, ge=1)
    """Rows of one optimizer step, over all workers: the result does not depend on how many share it."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows a worker takes at once; the rest accumulates. Null takes all of its rows."""
    num_workers: int = Field(1, ge=1)
    """Training workers, each with one GPU where GPUs are used."""
    use_gpu: bool | None = None
    """Train on GPUs; null uses them if the cluster has any."""
    gpus_per_worker: float = Field(1.0, gt=0, le=1)
    """GPUs reserved a worker; below 1 several share one, as small trials of a sweep may."""
    cpus_per_worker: float = Field(0.5, gt=0)
    """CPUs reserved a worker. Ray Data's tasks need what is left, so keep the sum below the machine's."""
    threads_per_worker: int | None = Field(None, ge=1)
    """Threads of torch in a worker without a GPU; null divides the machine's cores among the workers."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    text_encoder_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of text encoder weights; null takes `learning_rate`."""
    token_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of new tokens' embeddings; null takes `learning_rate`."""
    schedule: Schedule = ConstantSchedule()
    """Learning rate schedule: `constant`, `linear` or `cosine`."""
    optimizer: Optimizer = AdamWOptimizer()
    """Optimizer: `adamw`, `adamw_8bit`, `adafactor`, `lion` or `prodigy`."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Largest gradient norm over all workers; 0 never clips."""
    ema_decay: Identity[float | None] = Field(None, gt=0, lt=1)
    """Decay of the moving average of what trains, exported instead of the last weights; null exports those."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "native"] = "auto"
    """Compute precision; weights that train stay fp32. `auto` is bf16 on GPUs and fp32 on CPUs; `native` is bf16 on CPUs,
    too, that multiply it themselves: others take many times as long as in fp32."""
    quantize_base: BaseFormat | None = None
    """Keep the U-Net's frozen linear layers in 4 bits (`nf4`, arXiv:2305.14314) or 8 (`int8`, arXiv:2208.07339), for
    adapters on GPUs that are too small otherwise. Needs a GPU and bitsandbytes; null keeps them in `precision`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third slower."""
    compile: bool = False
    """Run the U-Net through `torch.compile`, which needs a C++ compiler on CPUs."""
    gpu_memory: float | None = Field(None, gt=0)
    """Memory of each GPU in GiB, with which the run's needs are compared before it starts; null asks this machine's
    GPUs, if it has any."""
    zero: ZeroConfig = ZeroConfig()
    """DeepSpeed ZeRO."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    validation: ValidationConfig = ValidationConfig()
    """Validation loss and pictures."""
    log_every: int = Field(10, ge=1)
    """Steps between log lines."""
    max_failures: int = Field(2, ge=0)
    """Worker failures after which the run gives up; each retry goes on from the last checkpoint."""

    @property
    def rows_per_worker(self) -> int:
        return self.batch_size // self.num_workers

    @property
    def rows_per_micro_batch(self) -> int:
        return self.micro_batch_size or self.rows_per_worker

    @property
    def accumulation_steps(self) -> int:
        return self.rows_per_worker // self.rows_per_micro_batch

    @property
    def zero_stage(self) -> int:
        if self.zero.stage is not None:
            return self.zero.stage
        return 0 if isinstance(self.optimizer, OF_WHOLE_WEIGHTS) else 1

    @model_validator(mode="after")
    def _check(self) -> "TrainerConfig":
        if self.batch_size % self.num_workers:
            low = self.batch_size // self.num_workers * self.num_workers
            choices = [str(n) for n in (low, low + self.num_workers) if n]
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by num_workers {self.num_workers}; "
                f"try {' or '.join(choices)}"
            )
        if self.rows_per_worker % self.rows_per_micro_batch:
            raise ValueError(
                f"a worker's {self.rows_per_worker} rows are not divisible by micro_batch_size {self.micro_batch_size}"
            )
        if self.schedule.warmup_steps >= self.max_steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} leaves none of the {self.max_steps} steps to train"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile does not go with zero.stage=3, which gathers parameters layer by layer; use stage 2"
            )
        if self.quantize_base is not None:
            self._check_quantization()
        self._check_optimizer()
        return self

    def _check_quantization(self) -> None:
        if self.use_gpu is False:
            raise ValueError(f"quantize_base={self.quantize_base} needs a GPU, and use_gpu=false takes none")
        if self.zero_stage == 3:
            raise ValueError("quantize_base does not go with zero.stage=3, which divides every weight; use stage 2")

    def _check_optimizer(self) -> None:
        name = self.optimizer.name
        if self.zero.offload and not isinstance(self.optimizer, AdamWOptimizer):
            raise ValueError(
                f"zero.offload updates by DeepSpeed's AdamW on the CPU, and there is no such {name}; "
                "set optimizer.name=adamw or zero.offload=false"
            )
        if self.zero_stage > 0 and isinstance(self.optimizer, OF_WHOLE_WEIGHTS):
            raise ValueError(
                f"optimizer {name} needs every parameter whole, and zero.stage={self.zero_stage} divides them; "
                "set zero.stage=0, or optimizer.name=adamw_8bit to save memory at any stage"
            )
        if self.zero.offload and self.zero_stage == 0:
            raise ValueError("zero.offload needs zero.stage 1, 2 or 3; stage 0 divides nothing")
        if isinstance(self.optimizer, ProdigyOptimizer):
            self._check_prodigy()

    def _check_prodigy(self) -> None:
        if self.learning_rate < 0.1:
            raise ValueError(
                f"optimizer prodigy multiplies learning_rate {self.learning_rate:g} by a rate that it finds itself; "
                "set learning_rate=1, and optimizer.d_coef to train more or less strongly"
            )
        for setting in ("text_encoder_learning_rate", "token_learning_rate"):
            rate = getattr(self, setting)
            if rate is not None and rate != self.learning_rate:
                raise ValueError(
                    f"optimizer prodigy finds one rate for all that trains, and {setting} {rate:g} differs from "
                    f"learning_rate {self.learning_rate:g}; leave it out, or use another optimizer"
                )
