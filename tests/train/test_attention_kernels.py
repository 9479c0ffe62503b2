"""Which kernel attention runs by."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from ray_sd.train.engine import Engine
from ray_sd.train.precision import attention_kernels

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(("dtype", "fused"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)])
def test_only_single_precision_is_fused_on_a_cpu(dtype: torch.dtype, fused: bool) -> None:
    query = torch.randn(2, 4, 16, 8, dtype=dtype, requires_grad=True)
    with profile() as profiler:
        with attention_kernels(dtype, torch.device("cpu")):
            output = F.scaled_dot_product_attention(query, query, query)
        output.sum().backward()  # what the forward pass chose holds for the backward pass
    called = {event.key for event in profiler.key_averages()}
    assert (FUSED in called) == fused
    assert (f"{FUSED}_backward" in called) == fused


def test_a_gpu_chooses_for_itself() -> None:
    before = torch.backends.cuda.flash_sdp_enabled()
    with attention_kernels(torch.bfloat16, torch.device("cuda")):
        assert torch.backends.cuda.flash_sdp_enabled() == before


class Attention:
    """Stands for DeepSpeed's engine, whose own start needs a process group."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.query = torch.randn(2, 4, 16, 8, dtype=dtype, requires_grad=True)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        return checkpoint(self._attend, self.query, use_reentrant=False).sum()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @staticmethod
    def _attend(query: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, query, query)


@pytest.mark.parametrize(("dtype", "fused"), [(torch.bfloat16, False), (torch.float32, True)])
def test_the_engine_runs_its_module_by_them_and_again_in_the_backward_pass(dtype: torch.dtype, fused: bool) -> None:
    engine = object.__new__(Engine)
    engine.device, engine.compute_dtype, engine._deepspeed = torch.device("cpu"), dtype, Attention(dtype)
    with profile() as profiler:
        engine.backward(engine({}))
    assert engine._deepspeed.query.grad is not None
    assert (FUSED in {event.key for event in profiler.key_averages()}) == fused
