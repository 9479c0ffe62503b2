"""DeepSpeed's configuration, with ZeRO as a run needs it."""

import torch

from ray_sd.config import TrainerConfig

SMALL = 50_000_000
"""Up to so many trained elements, a second copy of their gradients costs less than the hooks that would save it."""
LARGEST_BUCKET = 500_000_000
"""Elements of gradients that are summed over the workers at once."""


def deepspeed_config(trainer: TrainerConfig, dtype: torch.dtype, elements: int) -> dict:
    """elements: how many numbers train."""
    zero: dict = {
        "stage": trainer.zero_stage,
        # A buffer of this size is filled during the backward pass; DeepSpeed's default takes 2 GB for any adapter.
        "reduce_bucket_size": min(elements, LARGEST_BUCKET),
    }
    if trainer.zero_stage == 1 and elements <= SMALL:
        # Stage 1 then reduces after the backward pass instead of from a hook on each of an adapter's many tensors.
        zero["contiguous_gradients"] = False
    if trainer.zero.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if trainer.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = trainer.zero.param_persistence_threshold
    return {
        "train_batch_size": trainer.batch_size,
        "train_micro_batch_size_per_gpu": trainer.rows_per_micro_batch,
        "gradient_accumulation_steps": trainer.accumulation_steps,
        "gradient_clipping": trainer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Trained weights stay fp32 and so do gradients in flight; layers compute in `dtype`.
        "torch_autocast": {
            "enabled": dtype != torch.float32,
            "dtype": str(dtype).removeprefix("torch."),
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 2**31,
    }
