"""The LM head's logits, and L_LM (Eq. 4, arXiv 2408.11039) where they are needed at the labels alone."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig

_PIECE = 2**24  # logits that are worked on at a time


def scale_logits(logits: torch.Tensor, text_config: PreTrainedConfig) -> torch.Tensor:
    """What Cohere, Granite and Gemma do to their logits after the head."""
    if (scale := getattr(text_config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


class _CrossEntropyInPlace(torch.autograd.Function):
    """The sum of the cross entropies. The logits become their own gradient: nothing else of their size is kept."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = logits.new_zeros(())
        num_rows = max(1, _PIECE // logits.shape[1])
        for rows, ids in zip(logits.split(num_rows), targets[:, None].split(num_rows), strict=True):
            rows.sub_(rows.logsumexp(1, keepdim=True))
            total -= rows.gather(1, ids).sum()
            rows.exp_().scatter_add_(1, ids, rows.new_full(ids.shape, -1.0))
        ctx.gradient = logits
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.gradient is None:
            raise RuntimeError(
                "The LM loss without logits goes backward once. Pass `skip_logits=False` to `forward` for a second "
                "time, as with `retain_graph=True`."
            )
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_output), None


@torch.compiler.disable  # a compiled graph cannot hold a function that keeps what it overwrote
def sum_cross_entropy_(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    The sum of −log softmax(logits)[target], in at least float32. In place: float32 or float64 logits hold nothing of
    use afterwards. In a backward pass they need no memory but their own, where `F.cross_entropy` takes three times it.

    Args:
        logits (`torch.FloatTensor` of shape `(num_labels, vocab)`)
        targets (`torch.LongTensor` of shape `(num_labels,)`)

    Returns:
        `torch.FloatTensor` of shape `()`.

    Raises:
        RuntimeError: a second backward pass.
    """
    return _CrossEntropyInPlace.apply(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def sum_cross_entropy_by_liger(
    hidden_states: torch.Tensor, head: nn.Linear, targets: torch.Tensor, text_config: PreTrainedConfig
) -> torch.Tensor:
    """
    Of head and loss in one, by Liger, which makes the logits in pieces and keeps none.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(num_labels, hidden)`)
        head (`nn.Linear`)
        targets (`torch.LongTensor` of shape `(num_labels,)`)
        text_config (`PreTrainedConfig`)

    Raises:
        ImportError: Liger is not installed.
    """
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise ImportError("`use_liger_loss` needs Liger; `pip install liger-kernel`.") from error
    cap = getattr(text_config, "final_logit_softcapping", None)
    scale = getattr(text_config, "logit_scale", None) or 1.0
    scale = scale / (getattr(text_config, "logits_scaling", None) or 1.0)
    if scale != 1.0:  # no such family has a head with bias
        hidden_states = hidden_states * scale
    return LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=cap)(
        head.weight, hidden_states, targets, head.bias
    )


__all__ = ["scale_logits", "sum_cross_entropy_", "sum_cross_entropy_by_liger"]
