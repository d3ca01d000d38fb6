"""The `flash_attn` package as a kernel of `"transfusion_varlen"`, and the choice among kernels."""

import torch

from ..attention_transfusion import CHOSEN, KERNELS, TorchCudaKernel, VarlenPass

try:
    from flash_attn import flash_attn_interface
except ImportError as error:  # absent, or built for another torch
    flash_attn_interface, _flash_attn_error = None, str(error)


class FlashAttnKernel(TorchCudaKernel):
    """FlashAttention 2 of the `flash_attn` package."""

    name = "flash_attn"

    @staticmethod
    def unavailable() -> str | None:
        if flash_attn_interface is None:
            return f"{_flash_attn_error} (`pip install flash-attn --no-build-isolation`)"
        return None if torch.cuda.is_available() else "torch sees no CUDA device"

    @staticmethod
    def forward(query, key, value, one: VarlenPass, scale: float):
        output, lse, _, rng_state = flash_attn_interface._flash_attn_varlen_forward(
            query, key, value, *one.segments, dropout_p=0.0, softmax_scale=scale, causal=one.is_causal
        )
        return output, lse.transpose(0, 1), [rng_state]

    @staticmethod
    def make_states(query) -> list[torch.Tensor]:
        return [query.new_empty(2, dtype=torch.int64)]

    @staticmethod
    def backward(grad, query, key, value, output, lse, state, one: VarlenPass, scale: float):
        grads = [torch.empty_like(states) for states in (query, key, value)]
        flash_attn_interface._flash_attn_varlen_backward(
            grad.contiguous(), query, key, value, output, lse.transpose(0, 1).contiguous(), *grads, *one.segments,
            dropout_p=0.0, softmax_scale=scale, causal=one.is_causal, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=state[0],
        )  # fmt: skip
        return grads


KERNELS[FlashAttnKernel.name] = FlashAttnKernel


def set_varlen_kernel(name: str) -> None:
    """
    Chooses a kernel of [`varlen_kernels`] for its device, in the whole process; `ValueError` if it cannot run here.
    FlashAttention 3 and 4 are behind `"torch_cuda"` after `torch.nn.attention.activate_flash_attention_impl("FA3")`.
    """
    if name not in KERNELS:
        raise ValueError(f"`name` must be one of {', '.join(KERNELS)}; got {name!r}.")
    if reason := KERNELS[name].unavailable():
        raise ValueError(f"The kernel {name!r} cannot be used: {reason}.")
    CHOSEN[KERNELS[name].device_type] = KERNELS[name]
