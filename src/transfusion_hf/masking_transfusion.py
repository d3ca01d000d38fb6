"""
From input ids to Transfusion's attention mask (Fig. 4, arXiv 2408.11039): causal everywhere, bidirectional among the
patches of one image. The only file that follows transformers' mask API.
"""

from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate

from .attention_transfusion import VARLEN_ATTENTION, VarlenPlan, make_varlen_plan
from .configuration_transfusion import TransfusionConfig


def check_attn_implementation(attn_implementation: str | dict | None) -> None:
    """Raises `ValueError` for a stock flash implementation, alone or in a dict of those of the sub-configs."""
    if "flash" in str(attn_implementation):
        raise ValueError(
            f"`attn_implementation={attn_implementation!r}` cannot compute Transfusion's mask: flash attention knows "
            "only causal and full attention, so transformers would silently drop the bidirectional image blocks. Use "
            "'transfusion_varlen' (exact, on flash kernels), 'sdpa', 'eager' or 'flex_attention'."
        )


def image_block_ids(input_ids: torch.LongTensor, *token_ids: int) -> torch.LongTensor:
    """0, 1, … at the patches of each row's images, −1 at text: `(batch, seq)`. A run of a placeholder is one image."""
    is_patch = input_ids == token_ids[0]
    for token_id in token_ids[1:]:
        is_patch = is_patch | (input_ids == token_id)
    starts = is_patch.clone()
    starts[:, 1:] &= input_ids[:, 1:] != input_ids[:, :-1]
    return torch.where(is_patch, starts.cumsum(dim=-1) - 1, -1)


def attention_block_ids(
    input_ids: torch.LongTensor, config: TransfusionConfig, has_vision: bool = True
) -> torch.LongTensor:
    """
    [`image_block_ids`], of what the vision encoder reads, too, and with `<BOI>` and `<EOI>` in the blocks of their
    images if `image_markers_in_block`.
    """
    token_ids = [config.image_token_id]
    if has_vision and config.vision_token_id is not None:
        token_ids.append(config.vision_token_id)
    block_ids = image_block_ids(input_ids, *token_ids)
    if not config.image_markers_in_block:
        return block_ids
    after, before = (torch.nn.functional.pad(block_ids, pad, value=-1) for pad in ((0, 1), (1, 0)))
    block_ids = torch.where(input_ids == config.image_start_token_id, after[:, 1:], block_ids)
    return torch.where(input_ids == config.image_end_token_id, before[:, :-1], block_ids)


def positions_of_images(block_ids: torch.LongTensor, chosen: torch.BoolTensor) -> torch.BoolTensor:
    """Where the blocks of the images stand that `chosen`, of shape `(num_images,)`, names: `(batch, seq)`."""
    num_blocks = block_ids.amax(dim=-1, keepdim=True) + 1
    image = num_blocks.cumsum(dim=0) - num_blocks + block_ids
    return (block_ids >= 0) & chosen.to(block_ids.device)[image.clamp(0, len(chosen) - 1)]


def share_positions(
    position_ids: torch.LongTensor, block_ids: torch.LongTensor
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    Positions `(batch, seq)` where each block has that of its first token, and what follows in its document moves up.
    Positions of which this is true already stay. Returns them, and those that count all tokens of each document, from
    which documents packed into a row are told.
    """
    steps = position_ids.diff(dim=-1, prepend=position_ids[:, :1])
    is_repeated = (block_ids >= 0) & (block_ids == torch.nn.functional.pad(block_ids, (1, 0), value=-1)[:, :-1])
    is_start = (steps != 1) & ~is_repeated
    removed = torch.where(is_repeated, steps, 0).cumsum(dim=-1)
    columns = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    before, first = (torch.where(is_start, x, 0).cummax(dim=-1).values for x in (removed, columns))
    return position_ids - (removed - before), columns - first


_NAMES = "`pixel_values` or `latents`"


def check_num_images(num_images: int, num_blocks: int, names: str = _NAMES) -> None:
    if num_images != num_blocks:
        raise ValueError(
            f"{names} hold {num_images} images but `input_ids` has {num_blocks} image blocks; "
            "pass one image per block."
        )


def check_blocks(num_patches: list[int], block_ids: torch.LongTensor, names: str = _NAMES) -> None:
    """Raises `ValueError` unless images of these numbers of patches and the blocks match in number and length."""
    num_blocks = block_ids.amax(dim=-1, keepdim=True) + 1
    num_before = num_blocks.cumsum(dim=0) - num_blocks  # in the rows above
    block_lengths = torch.bincount((num_before + block_ids)[block_ids >= 0]).tolist()  # in patches
    check_num_images(len(num_patches), len(block_lengths), names)
    if num_patches != block_lengths:
        raise ValueError(
            f"`input_ids` has image blocks of {block_lengths} patches but the images have {num_patches}; an image "
            "needs one placeholder per patch, in one uninterrupted run."
        )


def check_image_blocks(stacks: list[torch.Tensor] | None, block_ids: Any, config: TransfusionConfig) -> int:
    """The number of images. Raises `ValueError` unless finite latents and blocks match in number and length."""
    if block_ids is None:
        if stacks is not None:
            raise ValueError("`inputs_embeds` holds text only; pass images together with `input_ids`.")
        return 0
    num_patches = []
    for stack in stacks or []:
        if stack.ndim != 4 or stack.shape[1] != config.latent_channels:
            shape = f"(num_images, {config.latent_channels}, height, width)"
            raise ValueError(f"Latents need shape {shape}; got {tuple(stack.shape)}.")
        num_patches += [config.num_patches(*stack.shape[2:])] * len(stack)
        if not torch.isfinite(stack).all():
            raise ValueError("`pixel_values` or `latents` hold NaN or infinite values; expected finite numbers.")
    check_blocks(num_patches, block_ids)
    return len(num_patches)


def check_vision_blocks(stacks: list[torch.Tensor] | None, input_ids: torch.LongTensor, config) -> None:
    """Raises `ValueError` unless finite pixels for the vision encoder and blocks match in number and length."""
    num_patches, side, longest = [], config.vision_config.patch_size, config.vision_config.image_size
    for stack in stacks or []:
        if stack.ndim != 4 or any(n % side or not 0 < n <= longest for n in stack.shape[2:]):
            raise ValueError(
                "`vision_pixel_values` must have shape (num_images, 3, height, width), sides multiples of "
                f"{side} up to {longest}; got {tuple(stack.shape)}. Use the model's processor."
            )
        if not torch.isfinite(stack).all():
            raise ValueError("`vision_pixel_values` holds NaN or infinite values; expected finite numbers.")
        num_patches += [stack.shape[2] * stack.shape[3] // side**2] * len(stack)
    check_blocks(num_patches, image_block_ids(input_ids, config.vision_token_id), "`vision_pixel_values`")


def create_transfusion_mask(
    text_config,
    inputs_embeds,
    block_ids,
    attention_mask,
    cache,
    position_ids,
    varlen_plan: VarlenPlan | None = None,
    hidden: torch.BoolTensor | None = None,
    check_inputs: bool = True,
) -> Any:
    """
    The mask for the new positions, in the form that the decoder takes: a tensor, a `BlockMask`, `None`, or a dict of
    those by layer type; for `"transfusion_varlen"` a `VarlenPlan`. Only shape, dtype and device of `inputs_embeds` are
    read. The other arguments are those of `TransfusionModel.forward`, and:

        block_ids (`torch.LongTensor` of shape `(batch, seq)`, *optional*):
            Of the new positions, from [`image_block_ids`]; `None`: causal throughout. An image never straddles the
            border between cache and new positions, so the cached ones are not needed.
        hidden (`torch.BoolTensor` of shape `(batch, seq)`, *optional*):
            `True` at the new positions of images that no position outside of their own block may attend to.
        check_inputs (`bool`):
            Whether to compare a plan with the batch, and to look whether a row holds several documents or padding at
            all, which waits for the device.

    Raises:
        ValueError: the decoder runs on a stock flash implementation; `varlen_plan` was made for another batch, or
            comes with `hidden` images, which it does not know.
    """
    attn_implementation = text_config._attn_implementation
    check_attn_implementation(attn_implementation)
    batch, seq = inputs_embeds.shape[:2]
    if varlen_plan is not None:
        if attention_mask is not None or cache is not None:
            raise ValueError("`varlen_plan` excludes `attention_mask` and `cache`; pass one of them.")
        if hidden is not None:
            raise ValueError("`varlen_plan` does not know `hide_noised_images`; have the collator make none.")
        if check_inputs:
            _check_varlen_plan(varlen_plan, attn_implementation, (batch, seq), block_ids, position_ids)
        return varlen_plan.to(inputs_embeds.device)
    document_ids = None
    is_own = hidden is not None or not check_inputs or attn_implementation == VARLEN_ATTENTION
    if attention_mask is None and cache is None and is_own:
        document_ids = _document_ids(position_ids, batch, seq)
    if attn_implementation == VARLEN_ATTENTION:
        if attention_mask is None:
            attention_mask = torch.ones(batch, seq if cache is None else cache.get_seq_length() + seq)
        return make_varlen_plan(attention_mask, seq, block_ids, document_ids, inputs_embeds.device, hidden)
    options: dict[str, Any] = {}
    if hidden is not None or document_ids is not None:
        past = 0 if cache is None else cache.get_seq_length()
        hidden = torch.zeros_like(document_ids, dtype=torch.bool) if hidden is None else hidden
        is_seen = ~torch.nn.functional.pad(hidden, (past, 0), value=False)
        # The library would hand over positions in place of columns where it finds documents itself.
        documents = torch.zeros_like(is_seen, dtype=torch.long) if document_ids is None else document_ids
        position_ids = None if document_ids is not None else position_ids

        def is_visible(batch, head, query, key):  # before the blocks are added, so that each sees itself
            return is_seen[batch, key] & (documents[batch, query] == documents[batch, key])

        options["and_mask_function"] = is_visible
    elif block_ids is None and attention_mask is not None and not check_inputs:
        # With any function the library does not look for padding, which waits for the device.
        options["and_mask_function"] = lambda batch, head, query, key: key >= 0
    if block_ids is not None and cache is not None:
        # The library wants the ids of prefix and query together; shorter ones give a wrong mask without an error.
        block_ids = torch.nn.functional.pad(block_ids, (cache.get_seq_length(), 0), value=-1)
    return create_masks_for_generate(
        text_config, inputs_embeds, attention_mask, cache, position_ids, block_sequence_ids=block_ids, **options
    )


def make_packed_plan(input_ids: torch.LongTensor, position_ids: torch.LongTensor, *token_ids: int) -> VarlenPlan:
    """
    The plan of packed rows `(batch, seq)`, whose positions restart at each document; padding counts as one.
    `token_ids` are those of placeholders.
    """
    block_ids = image_block_ids(input_ids, *token_ids)
    document_ids = _document_ids(position_ids, *input_ids.shape)
    return make_varlen_plan(torch.ones_like(input_ids), input_ids.shape[1], block_ids, document_ids)


def _document_ids(position_ids: torch.LongTensor | None, batch: int, seq: int) -> torch.LongTensor | None:
    """transformers' rule for documents packed into a row: a new one starts where positions do not go on."""
    if position_ids is None:
        return None
    position_ids = position_ids.expand(batch, seq)
    return (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)


def _check_varlen_plan(plan: VarlenPlan, attn_implementation: str | None, shape, block_ids, position_ids) -> None:
    """Two device synchronisations."""
    if attn_implementation != VARLEN_ATTENTION:
        raise ValueError(
            f"`varlen_plan` is for `attn_implementation='{VARLEN_ATTENTION}'`; this model runs on "
            f"{attn_implementation!r}. Have the collator make none, or set that implementation."
        )
    of_images = ("images", -1, plan.block_ids, block_ids)
    of_documents = ("documents", 0, plan.document_ids, _document_ids(position_ids, *shape))
    for what, default, *pair in (of_images, of_documents):
        own, other = (torch.tensor(default).expand(shape) if ids is None else ids for ids in pair)
        if own.shape != other.shape or not torch.equal(own.to(other.device), other):
            raise ValueError(
                f"`varlen_plan` was made for other {what} than those of `input_ids` and `position_ids`, or for a "
                "model with bidirectional attention in images; make it from the batch that it goes with, or pass none."
            )


def no_mask(text_config, hidden_states: torch.Tensor) -> Any:
    """For a decoder whose attention has a plan: what keeps it from a mask of its own, for which it would wait."""
    layer_types = getattr(text_config, "layer_types", None)
    return hidden_states.new_empty(1, 1, 1, 1) if layer_types is None else dict.fromkeys(layer_types)


def is_prepared(attention_mask: Any) -> bool:
    """Whether [`create_transfusion_mask`] made the mask, so that it is handed on as it is."""
    return isinstance(attention_mask, (dict, VarlenPlan)) or len(getattr(attention_mask, "shape", ())) == 4
