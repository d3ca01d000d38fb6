"""
The discrete baseline of the comparison (§4.1, arXiv 2408.11039): Chameleon (arXiv 2405.09818), which predicts the
codes of a VQ autoencoder like words.

A model reads ids of one vocabulary: the text's, then one id per code. An image is `<BOI>`, its codes row by row, and
`<EOI>`. transformers' Chameleon lacks the z-loss and switches for its stability changes; both are here.
"""

from typing import Any

import torch
from diffusers import VQModel
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import ChameleonConfig, ChameleonForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

# transformers builds an encoder of images inside the model. It is made as small as possible and then dropped.
SMALLEST_ENCODER = {
    "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 1, "embed_dim": 1,
    "num_embeddings": 1, "attn_type": "none",
}  # fmt: skip


@strict
class ChameleonTwinConfig(ChameleonConfig):
    r"""
    `ChameleonConfig` with the stability changes as switches, on by default. All three off, it is Llama.

    Args:
        qk_norm (`bool`, defaults to `True`): Layer norm of queries and keys, with separate weights for each head.
        swin_norm (`bool`, defaults to `True`):
            Post-normalisation: x + norm(f(x)) in place of Llama's x + f(norm(x)).
        z_loss_weight (`float`, defaults to 1e-5): Weight of the z-loss in training; the default is Chameleon's (§2.3).
        num_image_codes (`int`, defaults to 0): Size of the codebook. Its ids are the last of the vocabulary.
        sample_size (`int`, defaults to 8): Height and width, in codes, of drawn images.
        image_start_token_id, image_end_token_id (`int`, *optional*): Ids of `<BOI>` and `<EOI>`.

    Raises:
        ValueError: codes without `<BOI>` and `<EOI>`, or tokens that are no text.
    """

    model_type = "chameleon_twin"

    qk_norm: bool = True
    swin_norm: bool | None = True
    z_loss_weight: float | int = 1e-5
    num_image_codes: int = 0
    sample_size: int = 8
    image_start_token_id: int | None = None
    image_end_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vocabulary_map is None:
            self.vocabulary_map = {}  # `forward` forbids the image tokens that it names
        if self.vq_config is None:
            self.vq_config = SMALLEST_ENCODER
        super().__post_init__(**kwargs)
        for name in ("image_start_token_id", "image_end_token_id"):
            token_id = getattr(self, name)
            if self.num_image_codes and (token_id is None or not 0 <= token_id < self.first_code_id):
                raise ValueError(
                    f"`{name}` must be one of the {self.first_code_id} text tokens, because the last "
                    f"{self.num_image_codes} of `vocab_size` {self.vocab_size} are codes; got {token_id}."
                )

    @property
    def first_code_id(self) -> int:
        """The id of code 0, which is also the number of text tokens."""
        return self.vocab_size - self.num_image_codes


def z_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    log² Z with Z = Σ exp(logits), the denominator of the softmax (§2.3 of Chameleon): the mean over the positions that
    predict a label, or their sum divided by `num_items_in_batch`.

    Args:
        logits (`torch.FloatTensor` of shape `(batch, seq, vocab_size)`)
        labels (`torch.LongTensor` of shape `(batch, seq)`): Not shifted; −100 for no label.
        num_items_in_batch (`torch.LongTensor` or `int`, *optional*): Number of labels of all micro-batches.
    """
    log_z = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1)
    squares = log_z[labels[:, 1:] != -100].square()
    return squares.mean() if num_items_in_batch is None else squares.sum() / num_items_in_batch


class ChameleonTwinForConditionalGeneration(ChameleonForConditionalGeneration):
    """
    transformers' Chameleon without an image encoder. In training its loss includes the z-loss; in evaluation mode it
    is the cross-entropy alone, comparable between models.

    Rows of several documents need `position_ids` that restart at 0, and neither `attention_mask` nor a cache.
    """

    config_class = ChameleonTwinConfig
    config: ChameleonTwinConfig

    def __init__(self, config: ChameleonTwinConfig):
        super().__init__(config)
        self.model.vqmodel = None
        if not config.qk_norm:
            for layer in self.model.layers:
                layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        # With a cache, transformers' mask ignores where documents begin.
        use_cache = bool(use_cache)
        output = super().forward(
            input_ids, labels=labels, use_cache=use_cache, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if labels is not None and self.training and self.config.z_loss_weight:
            output.loss = output.loss + self.config.z_loss_weight * z_loss(output.logits, labels, num_items_in_batch)
        return output


def image_ids(config: ChameleonTwinConfig, codes: torch.LongTensor) -> torch.LongTensor:
    """
    The ids of images, `(num_images, height · width + 2)`, from their codes, `(num_images, height, width)` in 0 to
    `num_image_codes` − 1. `ValueError` for codes of another codebook.
    """
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < config.num_image_codes:
        raise ValueError(
            f"`codes` must lie in 0 to {config.num_image_codes - 1}; got {int(codes.min())} to {int(codes.max())}. "
            "Encode the images with the autoencoder that the model is for."
        )
    start, end = (
        codes.new_full((len(codes), 1), token_id)
        for token_id in (config.image_start_token_id, config.image_end_token_id)
    )
    return torch.cat([start, config.first_code_id + codes.flatten(1), end], dim=1)


@torch.no_grad()
def encode_images(vq: VQModel, pixel_values: torch.Tensor) -> torch.LongTensor:
    """Codes, `(num_images, height, width)`, of images, `(num_images, channels, height, width)` in [−1, 1]."""
    latents = vq.encode(pixel_values).latents
    return vq.quantize(latents)[2][2].view(len(latents), *latents.shape[2:])


@torch.no_grad()
def decode_images(vq: VQModel, codes: torch.LongTensor) -> torch.Tensor:
    """Images, `(num_images, channels, height, width)` in [−1, 1], of codes, `(num_images, height, width)`."""
    latents = vq.quantize.embedding(codes).permute(0, 3, 1, 2)  # (num_images, channels, height, width)
    return vq.decode(latents, force_not_quantize=True).sample.clamp(-1, 1)


def draw_codes(
    model: ChameleonTwinForConditionalGeneration,
    input_ids: torch.LongTensor,
    attention_mask: torch.LongTensor | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> torch.LongTensor:
    """
    Samples the codes of an image behind each prompt, with classifier-free guidance on their log-probabilities.

    Args:
        model ([`ChameleonTwinForConditionalGeneration`])
        input_ids (`torch.LongTensor` of shape `(batch, seq)`): Prompts that end at `<BOI>`, padded on the left.
        attention_mask (`torch.LongTensor` of shape `(batch, seq)`, *optional*): 0 at padding.
        guidance_scale (`float`, defaults to 1.0):
            1 is off. The unconditional context is the beginning-of-sequence token and `<BOI>`. The paper takes 5 in
            the controlled comparison and 3 in the ablations (§4.1). NOTE: where both contexts are sure of a code, a
            large scale may prefer one that both think very unlikely, so choose the scale by what is drawn.
        temperature (`float`, defaults to 1.0), top_p (`float`, defaults to 1.0):
            Sampling settings; temperature 0 always takes the likeliest code. NOTE: the paper does not give them.
        seed (`int`, defaults to 0): Of the whole batch.

    Returns codes of shape `(batch, sample_size, sample_size)`. Raises a `ValueError` for a prompt that does not end at
    `<BOI>`, or a negative temperature.
    """
    config, num_codes = model.config, model.config.sample_size**2
    if (input_ids[:, -1] != config.image_start_token_id).any():
        raise ValueError(
            f"`input_ids` must end at `<BOI>` ({config.image_start_token_id}); the last ids are "
            f"{input_ids[:, -1].tolist()}. Append it, and pad on the left."
        )
    if temperature < 0:
        raise ValueError(f"`temperature` must be at least 0; got {temperature}. 0 takes the likeliest code.")
    bos = [] if config.bos_token_id is None else [config.bos_token_id]
    nothing = input_ids.new_tensor([[*bos, config.image_start_token_id]]).expand(len(input_ids), -1)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ids = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            max_new_tokens=num_codes,
            use_cache=True,
            guidance_scale=guidance_scale,
            negative_prompt_ids=nothing,
            suppress_tokens=list(range(config.first_code_id)),
            **sampling,
        )
    return ids[:, -num_codes:].unflatten(1, (config.sample_size, -1)) - config.first_code_id


def write_captions(
    model: ChameleonTwinForConditionalGeneration, codes: torch.LongTensor, max_new_tokens: int = 64
) -> torch.LongTensor:
    """
    The text that the model writes behind images, greedily and without further images, until the end-of-sequence token.

    Args:
        model ([`ChameleonTwinForConditionalGeneration`])
        codes (`torch.LongTensor` of shape `(batch, height, width)`)
        max_new_tokens (`int`, defaults to 64)

    Returns ids of shape `(batch, length)` with the end-of-sequence token and padding behind it.
    """
    config = model.config
    prompts = image_ids(config, codes)
    if config.bos_token_id is not None:
        prompts = nn.functional.pad(prompts, (1, 0), value=config.bos_token_id)
    ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=max_new_tokens,
        use_cache=True,
        do_sample=False,
        suppress_tokens=[
            config.image_start_token_id,
            config.image_end_token_id,
            *range(config.first_code_id, config.vocab_size),
        ],
    )
    return ids[:, prompts.shape[1] :]
