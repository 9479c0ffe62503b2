"""A model on the device that serves it: in which precision and layout, and how many rows of it the memory holds."""

import ctypes
import os
import platform
from collections.abc import Callable

import torch

from ray_sd.config.serve import BatchingConfig, ServedModel
from ray_sd.generate import Batch, ImageRequest, start
from ray_sd.generate.decoding import decode_pictures
from ray_sd.models import DiffusionModel
from ray_sd.models.compiler import check_cpu_compiler

SPARE = 0.05
"""Share of a GPU's memory that is left: what lies between tensors is used by nobody."""
FEW, MORE = 1, 2
"""Pictures with guidance whose steps are measured."""
ROWS = 2
"""Of each."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Settings of glibc's `mallopt`, as malloc.h numbers them."""
KEPT = 2**30
"""Bytes."""


def place(model: DiffusionModel, settings: ServedModel) -> DiffusionModel:
    """The model on its device, as it is served. Raises ConfigError where it is to be compiled without a compiler."""
    on_gpu = torch.cuda.is_available()
    precision = settings.precision if settings.precision != "auto" else ("fp16" if on_gpu else "fp32")
    if precision != "fp32":
        model.to_half({"fp16": torch.float16, "bf16": torch.bfloat16}[precision])
    if settings.channels_last:
        for part in (model.unet, model.vae):
            part.to(memory_format=torch.channels_last)
    if on_gpu:
        model.to("cuda")
    else:
        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        keep_freed_memory()
    if settings.compile:
        if not on_gpu:
            check_cpu_compiler("compile")
        model.unet.compile_repeated_blocks(dynamic=True)
    return model


def keep_freed_memory() -> None:
    """Let this process keep what it frees for what it wants next, as torch does on a GPU.

    glibc gives the memory of each step back to the system otherwise, which has to map and clear it anew, page by page.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for setting in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            libc.mallopt(setting, KEPT)


def rows_that_fit(model: DiffusionModel, batching: BatchingConfig, adapter_memory: int) -> int | None:
    """Rows of a step at the model's own size for which its GPU has room beside decoding and adapters; None on a CPU.

    adapter_memory: bytes that are kept free for them. Takes steps and decodes pictures to see what these take.
    """
    if model.device.type != "cuda":
        return None
    with torch.inference_mode():
        few, more = (_peak_of_step(model, pictures) for pictures in (FEW, MORE))
        decoding = _peak_of_decoding(model, batching.decoded_at_once)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(model.device)
    return rows_in(free - SPARE * total - adapter_memory - decoding, few, more)


def rows_in(free: float, few: int, more: int) -> int:
    """Rows whose step takes no more than `free` bytes, where those of FEW and of MORE pictures took so many. At least ROWS."""
    of_a_row = max(1.0, (more - few) / ((MORE - FEW) * ROWS))
    always = few - FEW * ROWS * of_a_row
    return max(ROWS, int((free - always) // of_a_row))


def _peak_of_step(model: DiffusionModel, pictures: int) -> int:
    """Bytes that a step of so many takes beside the model."""
    request = ImageRequest("", num_inference_steps=2, guidance_scale=2.0)
    batch = Batch(model)
    batch.join(start(model, [request] * pictures))
    return _peak(model, batch.advance)


def _peak_of_decoding(model: DiffusionModel, pictures: int) -> int:
    [drawing] = start(model, [ImageRequest("")])
    latents = drawing.latents.expand(pictures, *drawing.shape)
    return _peak(model, lambda: decode_pictures(model, latents))


def _peak(model: DiffusionModel, work: Callable[[], object]) -> int:
    torch.cuda.synchronize(model.device)
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    work()
    torch.cuda.synchronize(model.device)
    return torch.cuda.max_memory_allocated(model.device) - before
