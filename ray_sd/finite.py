"""Values of weights: where one is no number, or infinite, its tensor is named."""

from collections.abc import Mapping

from torch import Tensor

from ray_sd.errors import ArtifactError

READ = "the training that made it diverged, or it is damaged; take another"
WRITTEN = "the training diverged, or dtype=float16, which ends at 65504, is too small (bfloat16 and float32 hold more)"
"""What such values come of, and what to do."""


def check_finite(tensors: Mapping[str, Tensor], where: object, advice: str = READ) -> None:
    """Raise ArtifactError that names the first tensor with NaN or infinity; where: what holds them."""
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise ArtifactError(f"{where}: {name} has values that are not finite (NaN or infinity); {advice}")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch has no extremes of 8 bits
    # NaN is both extremes. They take one pass without a copy, which `isfinite().all()` does not.
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())
