"""
From input ids to the attention mask of Transfusion (Fig. 4, arXiv 2408.11039): causal everywhere, and full attention
among the patches of one image. The only file that follows transformers' mask API.
"""

import torch
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate, find_packed_sequence_indices

from .attention_transfusion import VARLEN_ATTENTION, VarlenPlan, make_varlen_plan


def check_attn_implementation(attn_implementation: str | None) -> None:
    """
    Refuses the attention implementations that would lose the image blocks without a word.

    Raises:
        ValueError: a stock flash implementation.
    """
    if attn_implementation is not None and "flash" in attn_implementation:
        raise ValueError(
            f"`attn_implementation={attn_implementation!r}` cannot compute Transfusion's mask: flash attention knows "
            "only causal and full attention, so transformers would silently drop the bidirectional image blocks. Use "
            "'transfusion_varlen' (exact, on flash kernels), 'sdpa', 'eager' or 'flex_attention'."
        )


def image_block_ids(input_ids: torch.LongTensor, image_token_id: int) -> torch.LongTensor:
    """
    Numbers the images of each row: a run of placeholders is one image, `<BOI>` and `<EOI>` keep neighbours apart.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, seq)`)
        image_token_id (`int`): Id of the placeholder.

    Returns:
        `torch.LongTensor` of shape `(batch, seq)`: 0, 1, … at the patches of a row's images in turn, −1 at text.
    """
    is_patch = input_ids == image_token_id
    starts = is_patch.clone()
    starts[:, 1:] &= ~is_patch[:, :-1]
    return torch.where(is_patch, starts.cumsum(dim=-1) - 1, -1)


def image_block_lengths(block_ids: torch.LongTensor) -> list[int]:
    """Number of patches of each image, row by row, in order (one device synchronisation)."""
    rows, columns = block_ids.shape
    num_blocks = block_ids.max(dim=-1, keepdim=True).values + 1 if columns else block_ids.new_zeros(rows, 1)
    first = num_blocks.cumsum(dim=0) - num_blocks  # blocks in the rows above
    flat = (first + block_ids)[block_ids >= 0]
    return torch.bincount(flat).tolist()


def create_transfusion_mask(
    text_config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    block_ids: torch.LongTensor | None,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.LongTensor | None,
):
    """
    The mask for the new positions, in whatever form the decoder and its attention implementation want.

    Args:
        text_config (`PreTrainedConfig`): The decoder's.
        inputs_embeds (`torch.Tensor` of shape `(batch, seq, hidden)`): Only its shape, dtype and device are read.
        block_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*):
            Of the new positions, as from [`image_block_ids`]. `None`: causal throughout. An image never straddles
            the border between cache and new positions, so those of the cache are not needed.
        attention_mask (`torch.Tensor` of shape `(batch, past + seq)`, *optional*): 0 at padding.
        cache (`Cache`, *optional*)
        position_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*)

    Returns:
        A tensor, a `BlockMask`, `None`, or a dict of those by layer type, for the decoder's `attention_mask`; or, for
        `"transfusion_varlen"`, a `VarlenPlan`.

    Raises:
        ValueError: the decoder runs on a stock flash implementation.
    """
    check_attn_implementation(text_config._attn_implementation)
    if text_config._attn_implementation == VARLEN_ATTENTION:
        return _create_varlen_plan(inputs_embeds, block_ids, attention_mask, cache, position_ids)
    if block_ids is not None and cache is not None:
        # The library wants the ids of prefix and query together; shorter ones give a wrong mask without an error.
        past_length = cache.get_seq_length()
        block_ids = torch.nn.functional.pad(block_ids, (past_length, 0), value=-1)
    return create_masks_for_generate(
        config=text_config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        cache=cache,
        position_ids=position_ids,
        block_sequence_ids=block_ids,
    )


def _create_varlen_plan(inputs_embeds, block_ids, attention_mask, cache, position_ids) -> VarlenPlan:
    batch, seq = inputs_embeds.shape[:2]
    past_length = 0 if cache is None else cache.get_seq_length()
    document_ids = None
    if attention_mask is None:
        attention_mask = torch.ones(batch, past_length + seq)
        if cache is None and position_ids is not None:
            # transformers' own rule for documents packed into a row: positions that do not go on.
            document_ids = find_packed_sequence_indices(position_ids.expand(batch, -1))
    return make_varlen_plan(attention_mask, seq, block_ids, document_ids, inputs_embeds.device)


def make_packed_plan(input_ids: torch.LongTensor, position_ids: torch.LongTensor, image_token_id: int) -> VarlenPlan:
    """
    The plan of packed rows, for `varlen_plan` of `TransfusionModel.forward`.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, seq)`): Padding counts as a document.
        position_ids (`torch.LongTensor` of shape `(batch, seq)`): They begin anew at each document.
        image_token_id (`int`): Id of the placeholder.
    """
    block_ids = image_block_ids(input_ids, image_token_id)
    document_ids = find_packed_sequence_indices(position_ids)
    return make_varlen_plan(torch.ones_like(input_ids), input_ids.shape[1], block_ids, document_ids)


def check_varlen_plan(
    plan: VarlenPlan,
    text_config: PreTrainedConfig,
    shape: torch.Size,
    block_ids: torch.LongTensor | None,
    position_ids: torch.LongTensor | None,
    is_bidirectional: bool = True,
) -> None:
    """
    Refuses a plan, handed in by the caller, that was made for other inputs (one device synchronisation).

    Args:
        plan (`VarlenPlan`)
        text_config (`PreTrainedConfig`): The decoder's.
        shape (`torch.Size`): `(batch, seq)`.
        block_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*)
        position_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*)
        is_bidirectional (`bool`, defaults to `True`): `config.bidirectional_image_attention`.

    Raises:
        ValueError: other images or documents, a plan with images where attention is causal, or an attention
            implementation that uses no plan.
    """
    if text_config._attn_implementation != VARLEN_ATTENTION:
        raise ValueError(
            f"`varlen_plan` is for `attn_implementation='{VARLEN_ATTENTION}'`; this model runs on "
            f"{text_config._attn_implementation!r}. Have the collator make none, or set that implementation."
        )
    if not is_bidirectional and plan.block_ids is not None and bool((plan.block_ids >= 0).any()):
        raise ValueError(
            "`varlen_plan` has attention in both directions inside images, which this model has not "
            "(`bidirectional_image_attention=False`); pass no plan, and the model makes its own."
        )
    document_ids = None if position_ids is None else find_packed_sequence_indices(position_ids.expand(shape))
    for what, own, other, default in (
        ("images", plan.block_ids, block_ids, -1),
        ("documents", plan.document_ids, document_ids, 0),
    ):
        own, other = (torch.tensor(default).expand(shape) if ids is None else ids for ids in (own, other))
        if own.shape != other.shape or not torch.equal(own.to(other.device), other):
            raise ValueError(
                f"`varlen_plan` was made for other {what} than those of `input_ids` and `position_ids`; make it from "
                "the batch that it goes with."
            )


def is_prepared(attention_mask) -> bool:
    """Whether the mask is one that [`create_transfusion_mask`] made, to be handed on as it is."""
    if attention_mask is None or isinstance(attention_mask, (dict, VarlenPlan)):
        return attention_mask is not None
    return len(attention_mask.shape) == 4
