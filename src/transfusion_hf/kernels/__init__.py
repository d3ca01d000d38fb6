"""Kernels for `"transfusion_varlen"` from other packages than torch, and the choice of one."""

from .flash_attn import FlashAttnKernel, set_varlen_kernel

__all__ = ["FlashAttnKernel", "set_varlen_kernel"]
