"""
The naive twin of the model: float64, loops over tokens, written from the paper's equations (arXiv 2408.11039).

It reads the parameters of a `TransfusionForCausalLMAndDiffusion` over a Llama by name and uses none of its code. It
takes ᾱ, from the scheduler, and the sinusoids of t, from diffusers, as inputs. Autograd gives gradients.
"""

import math

import torch

Params = dict[str, torch.Tensor]


def blocks(ids: list[int], image_token_id: int, has_markers: bool = False) -> list[int | None]:
    """Which image a position belongs to; `None` for text. With its markers, those on both sides of an image, too."""
    image: list[int | None] = []
    number = -1
    for i, token in enumerate(ids):
        if token == image_token_id:
            if i == 0 or ids[i - 1] != image_token_id:
                number += 1
            image.append(number)
        else:
            image.append(None)
    if not has_markers:
        return image
    places = [i for i, own in enumerate(image) if own is not None]
    for i in places:
        for beside in (i - 1, i + 1):
            image[beside] = image[i]
    return image


def positions(image: list[int | None], is_shared: bool) -> list[int]:
    """0, 1, 2, …; or all of an image at one position."""
    found: list[int] = []
    for i, own in enumerate(image):
        is_same = is_shared and i > 0 and own is not None and own == image[i - 1]
        found.append(found[-1] + (not is_same) if found else 0)
    return found


def mask(ids: list[int], image_token_id: int) -> list[list[bool]]:
    """Fig. 4: `mask[i][j]` says whether position i sees position j."""
    return mask_of(blocks(ids, image_token_id))


def mask_of(image: list[int | None], hidden: set[int] = frozenset()) -> list[list[bool]]:
    """The same of numbered images, of which those in `hidden` are seen by themselves alone."""
    places = range(len(image))
    same = [[image[i] is not None and image[i] == image[j] for j in places] for i in places]
    return [[same[i][j] or (j <= i and image[j] not in hidden) for j in places] for i in places]


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


def attention(params: Params, config, names: list[str], hidden: list[torch.Tensor], sees: list[list[bool]], at):
    """One softmax over all tokens, whatever weights (`names`) projected each; `at`: their positions."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    projected = {
        p: [linear(params, f"{n}.self_attn.{p}_proj", h) for n, h in zip(names, hidden, strict=True)] for p in "qkv"
    }

    def head(p: str, i: int, h: int) -> torch.Tensor:
        return projected[p][i][h * dim : (h + 1) * dim]

    outputs = []
    for i in range(len(hidden)):
        row = []
        for h in range(heads):
            g = h // (heads // kv_heads)
            query = rotate(head("q", i, h), at[i], theta)
            seen = [j for j in range(len(hidden)) if sees[i][j]]
            scores = torch.stack([query @ rotate(head("k", j, g), at[j], theta) / math.sqrt(dim) for j in seen])
            weights = torch.exp(scores - scores.max())
            weights = weights / weights.sum()
            row.append(sum(w * head("v", j, g) for w, j in zip(weights, seen, strict=True)))
        outputs.append(linear(params, f"{names[i]}.self_attn.o_proj", torch.cat(row)))
    return outputs


def transformer(
    params: Params, config, vectors: list[torch.Tensor], sees: list[list[bool]], is_patch: list[bool], at: list[int]
) -> list[torch.Tensor]:
    """A Llama on the vectors of one document, those of patches by weights of their own where there are any."""
    prefix, eps = "model.language_model", config.rms_norm_eps
    hidden = vectors
    for layer in range(config.num_hidden_layers):
        text = f"{prefix}.layers.{layer}"
        image = f"{text}.image" if f"{text}.image.mlp.up_proj.weight" in params else text
        names = [image if own else text for own in is_patch]

        def norm(which: str, hidden: list[torch.Tensor], names: list[str] = names) -> list[torch.Tensor]:
            return [rms_norm(params[f"{n}.{which}.weight"], h, eps) for n, h in zip(names, hidden, strict=True)]

        attended = attention(params, config, names, norm("input_layernorm", hidden), sees, at)
        hidden = [h + a for h, a in zip(hidden, attended, strict=True)]
        hidden = [
            h
            + linear(
                params,
                f"{name}.mlp.down_proj",
                silu(linear(params, f"{name}.mlp.gate_proj", n)) * linear(params, f"{name}.mlp.up_proj", n),
            )
            for name, h, n in zip(names, hidden, norm("post_attention_layernorm", hidden), strict=True)
        ]
    image = f"{prefix}.image" if f"{prefix}.image.norm.weight" in params else prefix
    names = [image if own else prefix for own in is_patch]
    return [rms_norm(params[f"{n}.norm.weight"], h, eps) for n, h in zip(names, hidden, strict=True)]


def conv(params: Params, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Convolution of a map (channels, height, width), pixel by pixel; zeros around it."""
    weight, bias = params[f"{name}.weight"], params[f"{name}.bias"]
    side = weight.shape[-1]
    padded = torch.nn.functional.pad(x, [side // 2] * 4)
    rows = []
    for top in range(0, x.shape[1], stride):
        row = []
        for left in range(0, x.shape[2], stride):
            window = padded[:, top : top + side, left : left + side]
            row.append((weight * window).sum(dim=(1, 2, 3)) + bias)
        rows.append(torch.stack(row, dim=1))
    return torch.stack(rows, dim=1)


def group_norm(params: Params, name: str, x: torch.Tensor, num_groups: int, eps: float = 1e-6) -> torch.Tensor:
    size = len(x) // num_groups
    groups = []
    for g in range(num_groups):
        group = x[g * size : (g + 1) * size]
        mean = group.sum() / group.numel()
        variance = ((group - mean) ** 2).sum() / group.numel()
        groups.append((group - mean) / torch.sqrt(variance + eps))
    return torch.cat(groups) * params[f"{name}.weight"][:, None, None] + params[f"{name}.bias"][:, None, None]


def resnet(params: Params, name: str, x: torch.Tensor, t: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Norm, convolution, plus the timestep; norm, convolution; plus the input."""
    h = conv(params, f"{name}.conv1", silu(group_norm(params, f"{name}.norm1", x, num_groups)))
    h = h + linear(params, f"{name}.time_emb_proj", silu(t))[:, None, None]
    h = conv(params, f"{name}.conv2", silu(group_norm(params, f"{name}.norm2", h, num_groups)))
    return h + (conv(params, f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in params else x)


def unet_down(params: Params, config, image: torch.Tensor, t: torch.Tensor):
    """The vectors of an image's patches, and the maps of the way down."""
    name, levels = "model.patch_encoder", len(config.unet_block_out_channels)
    x = conv(params, f"{name}.conv_in", image)
    maps = [x]
    for level in range(levels):
        for layer in range(config.unet_layers_per_block):
            block = f"{name}.down_blocks.{level}.resnets.{layer}"
            x = resnet(params, block, x, t, config.unet_norm_num_groups)
            maps.append(x)
        if level < levels - 1:
            x = conv(params, f"{name}.down_blocks.{level}.downsamplers.0.conv", x, stride=2)
            maps.append(x)
    pixels = [x[:, row, column] for row in range(x.shape[1]) for column in range(x.shape[2])]
    return [linear(params, f"{name}.proj", pixel) for pixel in pixels], maps


def unet_up(params: Params, config, vectors: list[torch.Tensor], maps: list[torch.Tensor], t: torch.Tensor):
    """The predicted ε: each block of the way up also sees the map of its counterpart on the way down."""
    name, levels = "model.patch_decoder", len(config.unet_block_out_channels)
    columns = maps[-1].shape[2]
    pixels = [linear(params, f"{name}.proj", vector) for vector in vectors]
    rows = [torch.stack(pixels[i : i + columns], dim=1) for i in range(0, len(pixels), columns)]
    x, maps = torch.stack(rows, dim=1), list(maps)
    for level in range(levels):
        for layer in range(config.unet_layers_per_block + 1):
            block = f"{name}.up_blocks.{level}.resnets.{layer}"
            x = resnet(params, block, torch.cat([x, maps.pop()]), t, config.unet_norm_num_groups)
        if level < levels - 1:
            x = x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
            x = conv(params, f"{name}.up_blocks.{level}.upsamplers.0.conv", x)
    assert not maps
    return conv(
        params, f"{name}.conv_out", silu(group_norm(params, f"{name}.norm_out", x, config.unet_norm_num_groups))
    )


def sincos_position(row: int, column: int, hidden_size: int) -> torch.Tensor:
    """A quarter each: sines and cosines of the column, then of the row."""
    quarter = hidden_size // 4
    values = []
    for position in (column, row):
        angles = [position * 10000 ** (-i / quarter) for i in range(quarter)]
        values += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return torch.tensor(values, dtype=torch.float64)


def document(
    params: Params,
    config,
    ids: list[int],
    images: list[torch.Tensor],
    sinusoids: list[torch.Tensor],
    is_noised: list[bool],
):
    """
    One document without padding.

    Args:
        images: What the transformer sees, x_t (or x_0 with the sinusoids of t = 0).
        sinusoids: Of t, for each image.
        is_noised: Whether the noise of an image is predicted.

    Returns:
        The logits of each position and the predicted ε of each image, `None` where it is not.
    """
    vectors, where, encoded, maps = [], [], [], []
    for image, s in zip(images, sinusoids, strict=True):
        t = timestep_vector(params, s)
        if config.patch_encoder == "unet":
            new, maps_of_image = unet_down(params, config, image, t)
            maps.append((maps_of_image, t))
        elif config.timestep_embedding_level == "hidden":
            new = [linear(params, "model.patch_encoder.proj", p) + t for p in patches(image, config.patch_size)]
        else:
            # Footnote 6: the timestep embedding is added to the patch before the linear layer.
            new = [linear(params, "model.patch_encoder.proj", p + t) for p in patches(image, config.patch_size)]
        if config.pos_embed_type == "sincos":
            columns, size = image.shape[2] // config.patch_size, config.text_config.hidden_size
            new = [v + sincos_position(i // columns, i % columns, size) for i, v in enumerate(new)]
        encoded += new
    iterator = iter(encoded)
    for i, token in enumerate(ids):
        if token == config.image_token_id:
            vectors.append(next(iterator))
            where.append(i)
        else:
            vectors.append(params["model.language_model.embed_tokens.weight"][token])
    is_patch = [token == config.image_token_id for token in ids]
    own_block = blocks(ids, config.image_token_id, config.image_markers_in_block)
    hidden_images = {i for i, noised in enumerate(is_noised) if noised and config.hide_noised_images}
    at = positions(own_block, config.shared_image_position)
    sees = mask_of(own_block, hidden_images)
    hidden = transformer(params, config.text_config, vectors, sees, is_patch, at)
    logits = [linear(params, "lm_head", h) for h in hidden]
    predictions = []
    for number, image in enumerate(images):
        count = len(patches(image, config.patch_size))
        own, where = [hidden[i] for i in where[:count]], where[count:]
        if not is_noised[number]:
            predictions.append(None)
        elif config.patch_encoder == "unet":
            predictions.append(unet_up(params, config, own, *maps[number]))
        else:
            decoded = [linear(params, "model.patch_decoder.proj", h) for h in own]
            predictions.append(unpatched(decoded, config.patch_size, tuple(image.shape)))
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


def diffusion_term(prediction: torch.Tensor, eps: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """Eq. 3: the mean squared error of one image."""
    return weight * ((prediction - eps) ** 2).sum() / eps.numel()


def min_snr_weight(alpha_bar: float) -> float:
    """min(SNR, 5) / SNR for errors of ε (arXiv 2303.09556)."""
    snr = alpha_bar / (1 - alpha_bar)
    return min(snr, 5.0) / snr


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
