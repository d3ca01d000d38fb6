"""
Drawing (§3, Inference, arXiv 2408.11039): from pure noise to images, behind a prefix that is read once.

Time runs from t = T − 1, noise, down to t = 0. Each step overwrites the patches of the step before, in the sequence
and in the cache. Guidance has *branches*, further contexts of the same image; all of them go through one pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import logging

from .diffusion_transfusion import (
    at_timestep,
    first_noise,
    guide,
    make_sampling_scheduler,
    model_input,
    predicted_x_0,
    sampling_step_kwargs,
)
from .masking_transfusion import create_transfusion_mask, image_block_ids


def align(rows: Sequence[torch.LongTensor], pad_token_id: int) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Rows of ids to `(rows, columns)`, padded at the left, and their attention mask."""
    ids = torch.nn.utils.rnn.pad_sequence(
        list(rows), batch_first=True, padding_value=pad_token_id, padding_side="left"
    )
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) >= (ids.shape[1] - lengths)[:, None]
    return ids, mask.long()


def positions_of(mask: torch.LongTensor) -> torch.LongTensor:
    """Positions `(rows, columns)` that count from each row's first token."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def move_columns(states: torch.Tensor, ends: torch.LongTensor, length: int) -> torch.Tensor:
    """
    Of keys or values `(rows, heads, columns, dim)`: for each row the `length` columns before `ends[row]`. Columns that
    would lie before the first repeat it; they are padding.
    """
    columns = torch.arange(length, device=states.device) + (ends.to(states.device) - length)[:, None]
    columns = columns.clamp(min=0)[:, None, :, None]
    return states.gather(2, columns.expand(-1, states.shape[1], -1, states.shape[3]))


@contextmanager
def undone_on_error(cache: Cache | None) -> Iterator[None]:
    """Whatever stops or refuses the call inside, a `DynamicCache` is what it was: the same call can be made again."""
    layers: list[Any] = cache.layers if isinstance(cache, DynamicCache) else []
    # Its keys and values are replaced, never written to: to remember them costs nothing.
    before = [dict(vars(layer)) for layer in layers]
    try:
        yield
    except BaseException:
        del layers[len(before) :]
        for layer, state in zip(layers, before, strict=True):
            vars(layer).clear()
            vars(layer).update(state)
        raise


class DrawingLayer(CacheLayerMixin):
    """
    Keys and values of a prefix and, behind it, of an image: allocated once, never copied or grown. What is written
    behind the prefix is overwritten by the next pass; fewer rows than there are write to the first ones.
    """

    is_sliding = False

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self.prefix_length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, heads, _, dim = key_states.shape
        self.keys = key_states.new_zeros(rows, heads, self.capacity, dim)
        self.values = value_states.new_zeros(rows, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, end = len(key_states), self.prefix_length + key_states.shape[2]
        assert self.keys is not None and self.values is not None
        self.keys[:rows, :, self.prefix_length : end] = key_states
        self.values[:rows, :, self.prefix_length : end] = value_states
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.prefix_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.prefix_length

    def get_max_length(self) -> int:
        return self.capacity


class GuidanceBranches:
    """
    The further contexts of guidance for all rows of a `generate()`. What stands in each before `<BOI>` is read once,
    however many images are drawn.

    Args:
        decoder: The call of `generate()`.
    """

    def __init__(self, decoder: Any):
        config = decoder.generation_config
        self.decoder = decoder
        self.scale = config.image_guidance_scale
        self.input_image_scale = config.input_image_guidance_scale
        self.contexts: list[list[torch.LongTensor]] = []
        self.latents: list[list[list[torch.Tensor]]] = []
        self._caches: dict[int, DynamicCache] = {}
        negative_ids, negative_mask = config._negative_prompt
        self.is_bos_alone = negative_ids is None
        # Equal scales leave nothing of the images alone, a scale of 1 nothing of the unconditional context.
        if self.input_image_scale not in (None, self.scale):
            self._add_images_alone()
            self.is_bos_alone = False
        if (self.scale if self.input_image_scale is None else self.input_image_scale) != 1:
            self._add_unconditional(negative_ids, negative_mask)

    def __len__(self) -> int:
        return len(self.contexts)

    @property
    def have_prefixes(self) -> bool:
        """Whether anything but the first token of the prompt stands before `<BOI>`."""
        return not self.is_bos_alone and any(len(context) > 1 for rows in self.contexts for context in rows)

    def _bos(self) -> list[torch.LongTensor]:
        """The beginning-of-sequence token of each row that begins with it."""
        bos = self.decoder.generation_config._bos_token_tensor
        has_bos = [bos is not None and len(row) > 1 and bool(row[0] == bos) for row in self.decoder.ids]
        return [row[:1] if keep else row[:0] for row, keep in zip(self.decoder.ids, has_bos, strict=True)]

    def _add_unconditional(self, ids: torch.LongTensor | None, mask: torch.LongTensor | None) -> None:
        boi = self.decoder.ids[0].new_tensor([self.decoder.config.image_start_token_id])
        prefixes = self._bos()
        if ids is not None:
            if len(ids) not in (1, len(prefixes)):
                raise ValueError(
                    f"`negative_prompt_ids` has {len(ids)} rows for {len(prefixes)} prompts; pass one for all or one "
                    "for each."
                )
            ids = ids.to(boi.device).expand(len(prefixes), -1)
            mask = torch.ones_like(ids) if mask is None else mask.to(boi.device).expand(len(prefixes), -1)
            if (ids == self.decoder.config.image_token_id).any():
                raise ValueError("`negative_prompt_ids` holds an image; a negative prompt is text.")
            prefixes = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
            # One that ends at <BOI> already.
            prefixes = [row[:-1] if len(row) and row[-1] == boi else row for row in prefixes]
            self._check_positions(prefixes)
        self.contexts.append([torch.cat([prefix, boi]) for prefix in prefixes])
        self.latents.append([[] for _ in prefixes])

    def _check_positions(self, prefixes: list[torch.LongTensor]) -> None:
        """The other contexts are no longer than their prompts."""
        num_positions = getattr(self.decoder.config.text_config, "max_position_embeddings", None)
        for row, (prefix, needed) in enumerate(zip(prefixes, self.decoder.image_lengths, strict=True)):
            if num_positions is not None and len(prefix) + needed > num_positions:  # <BOI> and the patches
                raise ValueError(
                    f"`negative_prompt_ids` has {len(prefix)} tokens for row {row}, which with <BOI> and the patches "
                    f"of an image are {len(prefix) + needed}, and `max_position_embeddings` is {num_positions}; "
                    "shorten the negative prompt."
                )

    def _add_images_alone(self) -> None:
        """The images of each prompt without its text."""
        config, decoder = self.decoder.config, self.decoder
        boi = decoder.ids[0].new_tensor([config.image_start_token_id])
        image_ids = (config.image_start_token_id, config.image_token_id, config.image_end_token_id)
        contexts = []
        for bos, row, latents in zip(self._bos(), decoder.prompt_ids(), decoder.prompt_latents, strict=True):
            is_image = torch.isin(row, row.new_tensor(image_ids))
            blocks = row[is_image]
            if len(blocks) and blocks[-1] == boi:  # where the prompt itself asks for a drawing
                blocks = blocks[:-1]
            if not latents or int((blocks == boi).sum()) != len(latents):
                raise ValueError(
                    "`input_image_guidance_scale` guides by the images of the prompt, and a prompt has none (or they "
                    "are in `past_key_values`); leave it `None`."
                )
            contexts.append(torch.cat([bos, blocks, boi]))
        self.contexts.append(contexts)
        self.latents.append(decoder.prompt_latents)

    def prefix_states(self, branch: int, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values of layer `index` for all rows, pads at the left; `None` where no context has a prefix."""
        prefixes = [context[:-1] for context in self.contexts[branch]]
        if not any(len(prefix) for prefix in prefixes):
            return None
        if branch not in self._caches:
            self._caches[branch] = self._read(prefixes, self.latents[branch])
        layer = self._caches[branch].layers[index]
        return layer.keys, layer.values

    def _read(self, prefixes: list[torch.LongTensor], latents: list[list[torch.Tensor]]) -> DynamicCache:
        ids, mask = align(prefixes, self.decoder.pad_token_id)
        mask[mask.sum(dim=-1) == 0, -1] = 1  # a row without prefix: a pad of its own, which its drawing will not see
        cache = DynamicCache()
        self.decoder.model(
            ids,
            latents=[image for row in latents for image in row] or None,
            attention_mask=mask,
            position_ids=positions_of(mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cache

    def combine(self, predictions: list[torch.Tensor], rescale: float) -> torch.Tensor:
        """
        The guided prediction. With the scale s_I of the input image apart from the scale s (Eq. 3 of InstructPix2Pix,
        arXiv 2211.09800): ε(∅) + s_I·(ε(image) − ε(∅)) + s·(ε(image, text) − ε(image)).

        Args:
            predictions (`list[torch.Tensor]`): Of the conditional context, then of each branch.
            rescale (`float`): φ of Eq. 16, arXiv 2305.08891.
        """
        conditional, other, *nothing = predictions
        guided = guide(conditional, other, self.scale)
        if nothing:
            guided = guided + (self.input_image_scale - 1) * (other - nothing[0])
        return rescale_noise_cfg(guided, conditional, rescale) if rescale else guided


class DenoisingLoop:
    """
    The images of some rows, together. With guidance the branches stand behind the conditional rows, all in one pass.
    The first pass reads whatever the cache does not hold yet; the others compute the image alone.

    Args:
        decoder: The call of `generate()`.
        rows (`list[int]`): Those to draw for, images of one size.
    """

    def __init__(self, decoder: Any, rows: list[int]):
        self.decoder = decoder
        self.model = decoder.model
        self.device = decoder.device
        self.branches: GuidanceBranches = decoder.branches
        self.rows = torch.tensor(rows, device=self.device)
        self.size = decoder.sizes[rows[0]]
        contexts = [decoder.ids[row] for row in rows]
        self.latents = [decoder.latents[row] for row in rows]
        for branch in range(len(self.branches)):
            contexts += [self.branches.contexts[branch][row] for row in rows]
        # The prefixes of the conditional rows are in the decoder's cache, but for their last token.
        is_cached = decoder.cache is not None and decoder.cache.get_seq_length() > 0
        for latents in self.branches.latents:
            self.latents += [[] if is_cached else latents[row] for row in rows]
        ids, mask = align(contexts, decoder.pad_token_id)
        self.columns = ids.shape[1]
        self.num_cached = self.columns - 1 if is_cached else 0
        num_patches = self.model.config.num_patches(*self.size)
        block = ids.new_full((len(ids), num_patches), self.model.config.image_token_id)
        self.ids = torch.cat([ids, block], dim=-1)
        self.mask = torch.cat([mask, torch.ones_like(block)], dim=-1)
        self.positions = positions_of(self.mask)
        self.cache: Any = None
        if decoder.cache is not None:
            capacity = self.columns + num_patches
            self.cache = Cache(layer_class_to_replicate=partial(DrawingLayer, capacity))
        if is_cached:
            self._copy_prefixes()
        self.block_masks: dict[int, Any] = {}
        self.num_steps = 0  # of the last `run`
        # The steps alone: what else there is, is called once for an image and with other arguments.
        options = decoder.generation_config.compile_config
        self.step_model = self.model.model
        if options is not None and not decoder.generation_config.disable_compile:
            self.step_model = torch.compile(self.step_model, **options.to_dict())

    def _copy_prefixes(self) -> None:
        lengths = torch.tensor([len(row) for row in self.decoder.ids], device=self.device)[self.rows]
        main_length = self.decoder.cache.get_seq_length()
        first = (main_length + 1 - lengths).clamp(max=main_length - 1)  # column of each row's first token
        for index, layer in enumerate(self.decoder.cache.layers):
            ends = torch.full((len(self.rows),), main_length, device=self.device)
            states = [[move_columns(s[self.rows], ends, self.num_cached) for s in (layer.keys, layer.values)]]
            for branch in range(len(self.branches)):
                if self.branches.is_bos_alone:
                    # Position 0 sees only itself: the token has the same keys and values in either context.
                    arange = torch.arange(len(first), device=first.device)
                    tokens = [s[self.rows][arange, :, first][:, :, None] for s in (layer.keys, layer.values)]
                    prefix: Any = [token.expand(-1, -1, self.num_cached, -1) for token in tokens]
                elif (given := self.branches.prefix_states(branch, index)) is not None:
                    ends = torch.full((len(self.rows),), given[0].shape[2], device=self.device)
                    prefix = [move_columns(s[self.rows], ends, self.num_cached) for s in given]
                else:
                    prefix = [torch.zeros_like(s) for s in states[0]]
                states.append(prefix)
            self.cache.update(*(torch.cat(parts) for parts in zip(*states, strict=True)), index)
        self._keep(self.num_cached)

    def _keep(self, num_columns: int) -> None:
        """Makes the first columns the prefix, behind which the next pass writes."""
        for layer in self.cache.layers:
            layer.prefix_length = num_columns

    def run(self, generators) -> torch.Tensor:
        """From pure noise to x_0, `(rows, channels, height, width)`, float32 throughout."""
        config = self.decoder.generation_config
        scheduler = make_sampling_scheduler(
            self.model.noise_scheduler, config.scheduler, config.num_inference_steps, self.device
        )
        step_kwargs = sampling_step_kwargs(scheduler, generators)
        shape = (len(self.rows), self.model.config.latent_channels, *self.size)
        noise = randn_tensor(shape, generator=generators, device=self.device, dtype=torch.float32)
        x_t, timesteps = first_noise(scheduler, noise), scheduler.timesteps
        # In "image" mode only, where all rows draw at once.
        known, mask = self.decoder.known_latents, self.decoder.known_mask
        if known is not None:
            start = len(timesteps) - max(1, round(config.strength * len(timesteps)))
            if start:
                if hasattr(scheduler, "set_begin_index"):  # those that count their steps
                    scheduler.set_begin_index(start)
                timesteps = timesteps[start:]
                x_t = at_timestep(scheduler, known, noise, timesteps[0])
        self.num_steps = len(timesteps)
        steps = logging.tqdm(timesteps, desc="draw", leave=False, disable=not config.progress_bar)
        for i, t in enumerate(steps):
            x_in = model_input(scheduler, x_t, t)
            is_guided = config.guidance_start <= i / self.num_steps < config.guidance_end
            num_contexts = 1 + len(self.branches) if is_guided else 1
            predictions = list(self._predict(x_in, t, num_contexts).chunk(num_contexts))
            eps = predictions[0]
            if num_contexts > 1:
                eps = self.branches.combine(predictions, config.guidance_rescale)
            self._preview(i + 1, x_in, eps, t)
            x_t = scheduler.step(eps, t, x_t, **step_kwargs).prev_sample
            if mask is not None:
                is_last = i + 1 == self.num_steps
                kept = known if is_last else at_timestep(scheduler, known, noise, timesteps[i + 1])
                x_t = torch.where(mask, x_t, kept)
            if config.callback_on_step_end is not None:
                changed = config.callback_on_step_end(self.model, i, t, {"latents": x_t})
                x_t = (changed or {}).get("latents", x_t)
        return x_t

    def _preview(self, step: int, x_in: torch.Tensor, prediction: torch.Tensor, t) -> None:
        if hasattr(self.decoder.streamer, "check"):
            self.decoder.streamer.check()
        interval = getattr(self.decoder.streamer, "preview_interval", None)
        if interval is not None and step % interval == 0 and step < self.num_steps:
            x_0 = predicted_x_0(self.model.noise_scheduler, x_in[:1], prediction[:1], t)
            self.decoder.streamer.put_image(self.model.decode_latents(x_0)[0], step, self.num_steps)

    def _predict(self, x_t: torch.Tensor, t: torch.Tensor, num_contexts: int) -> torch.Tensor:
        """One pass: ε of every row in its first contexts, `(rows · num_contexts, channels, height, width)`."""
        if self.cache is not None and self.cache.get_seq_length() == self.columns:
            x_in = x_t.repeat(num_contexts, 1, 1, 1)
            (prediction,) = self._block_pass(self.step_model, x_in, t.expand(len(x_in)))
            return prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        # The first pass reads all contexts, whether the step is guided or not: later ones may be.
        num_rows = len(self.ids) if self.cache is not None else len(x_t) * num_contexts
        x_in = x_t.repeat(num_rows // len(x_t), 1, 1, 1)
        images = [[*row, x] for row, x in zip(self.latents[:num_rows], x_in, strict=True)]
        counts = torch.tensor([len(row) for row in images])
        is_last = torch.zeros(int(counts.sum()), dtype=torch.bool)
        is_last[counts.cumsum(0) - 1] = True
        output = self.model(
            self.ids[:num_rows, self.num_cached :],
            latents=[image for row in images for image in row],
            timesteps=torch.where(is_last.to(self.device), t, 0),
            prediction_mask=is_last,
            attention_mask=self.mask[:num_rows],
            position_ids=self.positions[:num_rows, self.num_cached :],
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=1,
        )
        if self.cache is not None:
            self._keep(self.columns)
        return torch.stack(output.image_predictions[: len(x_t) * num_contexts])

    def _block_mask(self, num_rows: int) -> Any:
        """The mask of the image alone behind its prefix: the same for every step."""
        if num_rows not in self.block_masks:
            config = self.model.config
            block = self.ids[:num_rows, self.columns :]
            block_ids = image_block_ids(block, config.image_token_id) if config.bidirectional_image_attention else None
            self.block_masks[num_rows] = create_transfusion_mask(
                config.text_config,
                torch.empty(*block.shape, 0, dtype=self.model.dtype, device=self.device),
                block_ids,
                self.mask[:num_rows],
                self.cache,
                self.positions[:num_rows, self.columns :],
            )
        return self.block_masks[num_rows]

    def _block_pass(self, model: Any, x: torch.Tensor, timesteps: torch.Tensor | None) -> list[torch.Tensor]:
        output = model(
            self.ids[: len(x), self.columns :],
            latents=x,
            timesteps=timesteps,
            attention_mask=self._block_mask(len(x)),
            position_ids=self.positions[: len(x), self.columns :],
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.image_predictions

    def commit(self, x_0: torch.Tensor) -> None:
        """Reads the finished images at t = 0 and hands the keys and values of these rows to the decoder."""
        self._block_pass(self.model.model, x_0, None)
        main, length = self.decoder.cache, max(len(row) for row in self.decoder.ids) - 1
        drawn_ends = torch.full((len(self.rows),), self.ids.shape[1], device=self.device)
        all_rows, num_cached = len(self.decoder.ids), self.decoder.cache.get_seq_length()
        for index, layer in enumerate(self.cache.layers):
            drawn = [move_columns(states[: len(x_0)], drawn_ends, length) for states in (layer.keys, layer.values)]
            if len(self.rows) < all_rows:
                if num_cached:
                    old = main.layers[index]
                    ends = torch.full((all_rows,), num_cached, device=self.device)
                    merged = [move_columns(states, ends, length) for states in (old.keys, old.values)]
                else:  # prefixes of no token but <BOI>
                    merged = [s.new_zeros(all_rows, *s.shape[1:]) for s in drawn]
                for target, source in zip(merged, drawn, strict=True):
                    target[self.rows] = source
                drawn = merged
            if index < len(main.layers):
                main.layers[index].keys, main.layers[index].values = drawn
            else:
                main.update(*drawn, index)


__all__ = [
    "DenoisingLoop",
    "DrawingLayer",
    "GuidanceBranches",
    "align",
    "move_columns",
    "positions_of",
    "undone_on_error",
]
