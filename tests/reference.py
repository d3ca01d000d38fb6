"""
The naive twin of the model: float64, loops over tokens, written from the paper's equations (arXiv 2408.11039).

It reads the parameters of a `TransfusionForCausalLMAndDiffusion` over a Llama by name and uses none of its code. It
takes ᾱ, from the scheduler, and the sinusoids of t, from diffusers, as inputs. Autograd gives gradients.
"""

import math

import torch

Params = dict[str, torch.Tensor]


def mask(ids: list[int], image_token_id: int) -> list[list[bool]]:
    """Fig. 4: `mask[i][j]` says whether position i sees position j."""
    image = []  # which image a position belongs to; None for text
    number = -1
    for i, token in enumerate(ids):
        if token == image_token_id:
            if i == 0 or ids[i - 1] != image_token_id:
                number += 1
            image.append(number)
        else:
            image.append(None)
    return [
        [j <= i or (image[i] is not None and image[i] == image[j]) for j in range(len(ids))] for i in range(len(ids))
    ]


def noised(x_0: torch.Tensor, eps: torch.Tensor, alpha_bar: float) -> torch.Tensor:
    """Eq. 2, pixel by pixel."""
    x_t = torch.empty_like(x_0)
    for c in range(x_0.shape[0]):
        for y in range(x_0.shape[1]):
            for x in range(x_0.shape[2]):
                x_t[c, y, x] = math.sqrt(alpha_bar) * x_0[c, y, x] + math.sqrt(1 - alpha_bar) * eps[c, y, x]
    return x_t


def patches(image: torch.Tensor, size: int) -> list[torch.Tensor]:
    """k × k windows, left to right, top to bottom; a window is read channel by channel, row by row."""
    _, height, width = image.shape
    return [
        image[:, top : top + size, left : left + size].reshape(-1)
        for top in range(0, height, size)
        for left in range(0, width, size)
    ]


def unpatched(vectors: list[torch.Tensor], size: int, shape: tuple[int, int, int]) -> torch.Tensor:
    channels, height, width = shape
    columns = width // size
    rows = [
        torch.cat([v.reshape(channels, size, size) for v in vectors[r * columns : (r + 1) * columns]], dim=2)
        for r in range(height // size)
    ]
    return torch.cat(rows, dim=1)


def linear(params: Params, name: str, x: torch.Tensor) -> torch.Tensor:
    y = params[f"{name}.weight"] @ x
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def rms_norm(weight: torch.Tensor, x: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).sum() / len(x) + eps)


def rotate(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """RoPE in Llama's layout: coordinate i turns with coordinate i + d/2."""
    half = len(x) // 2
    y = torch.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-i / half)
        y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        y[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return y


def timestep_vector(params: Params, sinusoids: torch.Tensor) -> torch.Tensor:
    name = "model.patch_encoder.timestep_embedding.mlp"
    return linear(params, f"{name}.linear_2", silu(linear(params, f"{name}.linear_1", sinusoids)))


def attention(params: Params, config, layer: int, hidden: list[torch.Tensor], sees: list[list[bool]]):
    name = f"model.language_model.layers.{layer}.self_attn"
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    projected = {p: [linear(params, f"{name}.{p}_proj", h) for h in hidden] for p in "qkv"}

    def head(p: str, i: int, h: int) -> torch.Tensor:
        return projected[p][i][h * dim : (h + 1) * dim]

    outputs = []
    for i in range(len(hidden)):
        row = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            query = rotate(head("q", i, h), i, theta)
            seen = [j for j in range(len(hidden)) if sees[i][j]]
            scores = torch.stack([query @ rotate(head("k", j, g), j, theta) / math.sqrt(dim) for j in seen])
            weights = torch.exp(scores - scores.max())
            weights = weights / weights.sum()
            row.append(sum(w * head("v", j, g) for w, j in zip(weights, seen, strict=True)))
        outputs.append(linear(params, f"{name}.o_proj", torch.cat(row)))
    return outputs


def transformer(params: Params, config, vectors: list[torch.Tensor], sees: list[list[bool]]) -> list[torch.Tensor]:
    """A Llama on the vectors of one document."""
    prefix, eps = "model.language_model", config.rms_norm_eps
    hidden = vectors
    for layer in range(config.num_hidden_layers):
        name = f"{prefix}.layers.{layer}"
        normed = [rms_norm(params[f"{name}.input_layernorm.weight"], h, eps) for h in hidden]
        hidden = [h + a for h, a in zip(hidden, attention(params, config, layer, normed, sees), strict=True)]
        normed = [rms_norm(params[f"{name}.post_attention_layernorm.weight"], h, eps) for h in hidden]
        hidden = [
            h
            + linear(
                params,
                f"{name}.mlp.down_proj",
                silu(linear(params, f"{name}.mlp.gate_proj", n)) * linear(params, f"{name}.mlp.up_proj", n),
            )
            for h, n in zip(hidden, normed, strict=True)
        ]
    return [rms_norm(params[f"{prefix}.norm.weight"], h, eps) for h in hidden]


def document(params: Params, config, ids: list[int], images: list[torch.Tensor], sinusoids: list[torch.Tensor]):
    """
    One document without padding.

    Args:
        images: What the transformer sees, x_t (or x_0 with the sinusoids of t = 0).
        sinusoids: Of t, for each image.

    Returns:
        The logits of each position and the predicted ε of each image.
    """
    vectors, where, encoded = [], [], []
    for image, s in zip(images, sinusoids, strict=True):
        t = timestep_vector(params, s)
        # Footnote 6: the timestep embedding is added to the patch before the linear layer.
        encoded += [
            linear(params, "model.patch_encoder.proj", patch + t) for patch in patches(image, config.patch_size)
        ]
    iterator = iter(encoded)
    for i, token in enumerate(ids):
        if token == config.image_token_id:
            vectors.append(next(iterator))
            where.append(i)
        else:
            vectors.append(params["model.language_model.embed_tokens.weight"][token])
    hidden = transformer(params, config.text_config, vectors, mask(ids, config.image_token_id))
    logits = [linear(params, "lm_head", h) for h in hidden]
    decoded = [linear(params, "model.patch_decoder.proj", hidden[i]) for i in where]
    predictions = []
    for image in images:
        count = len(patches(image, config.patch_size))
        predictions.append(unpatched(decoded[:count], config.patch_size, tuple(image.shape)))
        decoded = decoded[count:]
    return logits, predictions


def lm_terms(config, ids: list[int], logits: list[torch.Tensor]) -> list[torch.Tensor]:
    """−log p of each target, from the rules of §3: none at patches, at <EOI>, or where the input is <BOI>."""
    terms = []
    for i in range(len(ids) - 1):
        target = ids[i + 1]
        if target in (config.image_token_id, config.image_end_token_id) or ids[i] == config.image_start_token_id:
            continue
        shifted = logits[i] - logits[i].max()
        terms.append(torch.log(torch.exp(shifted).sum()) - shifted[target])
    return terms


def diffusion_term(prediction: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Eq. 3: the mean squared error of one image."""
    return ((prediction - eps) ** 2).sum() / eps.numel()


def attention_of_one_head(query, key, value, sees: list[list[bool]], scale: float) -> torch.Tensor:
    """Softmax attention, query by query, over the keys that it sees; 0 where it sees none."""
    rows = []
    for i in range(len(query)):
        seen = [j for j in range(len(key)) if sees[i][j]]
        if not seen:
            rows.append(torch.zeros_like(value[0]))
            continue
        weights = torch.softmax(key[seen] @ query[i] * scale, dim=0)
        rows.append(weights @ value[seen])
    return torch.stack(rows)
