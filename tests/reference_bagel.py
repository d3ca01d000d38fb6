"""
BAGEL (arXiv 2505.14683), naively and in float64, written from facts about the released model
and not from its code. Weights have BAGEL's names. A sequence is a list of segments; nothing is cached or batched.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, group_norm, layer_norm, linear, pad, silu

IM_START, IM_END, BOI, EOI = range(4)  # the order of `ids`


@dataclass
class Text:
    """Causal; each token has a position of its own."""

    ids: list[int]


@dataclass
class Latents:
    """
    `windows`: `(rows, columns, 2·2·channels)`, each in the order (row, column, channel). A block between `<BOI>` and
    `<EOI>`: all of it sees all of it, and it has one position. With `is_hidden` nothing outside of it sees it.
    """

    windows: Tensor
    t: float = 0.0
    is_hidden: bool = False


@dataclass
class Seen:
    """`pixels`: `(3, height, width)` for the vision encoder; a block like that of latents."""

    pixels: Tensor


Segments = list[Text | Latents | Seen]


def windows_of(latents: Tensor, size: int = 2) -> Tensor:
    """`(channels, height, width)` → `(rows, columns, size·size·channels)`."""
    channels, height, width = latents.shape
    rows, columns = height // size, width // size
    out = torch.zeros(rows, columns, size * size * channels, dtype=latents.dtype)
    for r in range(rows):
        for c in range(columns):
            out[r, c] = torch.stack(
                [latents[:, r * size + p, c * size + q] for p in range(size) for q in range(size)]
            ).flatten()
    return out


def latents_of(windows: Tensor, size: int = 2) -> Tensor:
    """The inverse of [`windows_of`]."""
    rows, columns, width = windows.shape
    parts = windows.view(rows, columns, size, size, width // size**2)
    return parts.permute(4, 0, 2, 1, 3).reshape(-1, rows * size, columns * size)


def shifted(t: float, shift: float) -> float:
    return shift * t / (1 + (shift - 1) * t)


class Bagel:
    """
    Args:
        state: Weights of `ema.safetensors`.
        llm, vit: The dicts of `llm_config.json` and `vit_config.json`.
        ids: Of `<|im_start|>`, `<|im_end|>`, `<|vision_start|>`, `<|vision_end|>`.
    """

    def __init__(self, state: dict[str, Tensor], llm: dict, vit: dict, ids: tuple[int, int, int, int]):
        self.w, self.llm, self.vit, self.ids = state, llm, vit, ids

    # The vision encoder

    def see(self, pixels: Tensor) -> Tensor:
        """`(patches, hidden)`: SigLIP without its last layer, the connector, and the positions behind it."""
        size, head = self.vit["patch_size"], "vit_model.vision_model."
        rows, columns = pixels.shape[1] // size, pixels.shape[2] // size
        side = math.isqrt(len(self.w["vit_pos_embed.pos_embed"]))  # of both tables
        states = []
        for r in range(rows):
            for c in range(columns):
                patch = pixels[:, r * size : (r + 1) * size, c * size : (c + 1) * size].permute(1, 2, 0).flatten()
                x = self._linear(f"{head}embeddings.patch_embedding", patch)
                states.append(x + self.w[f"{head}embeddings.position_embedding.weight"][r * side + c])
        x = torch.stack(states)
        for i in range(self.vit["num_hidden_layers"] - 1):
            x = self._vision_layer(f"{head}encoder.layers.{i}.", x)
        x = self._layer_norm(f"{head}post_layernorm", x)
        x = self._linear("connector.fc2", gelu(self._linear("connector.fc1", x), approximate="tanh"))
        places = [r * side + c for r in range(rows) for c in range(columns)]
        return x + self.w["vit_pos_embed.pos_embed"][places]

    def _vision_layer(self, name: str, x: Tensor) -> Tensor:
        h = self._layer_norm(f"{name}layer_norm1", x)
        q, k, v = (self._linear(f"{name}self_attn.{part}_proj", h) for part in "qkv")
        dim = q.shape[1] // self.vit["num_attention_heads"]
        heads = []
        for i in range(self.vit["num_attention_heads"]):
            part = slice(i * dim, (i + 1) * dim)
            heads.append((q[:, part] @ k[:, part].T / math.sqrt(dim)).softmax(-1) @ v[:, part])
        x = x + self._linear(f"{name}self_attn.out_proj", torch.cat(heads, 1))
        h = self._layer_norm(f"{name}layer_norm2", x)
        return x + self._linear(f"{name}mlp.fc2", gelu(self._linear(f"{name}mlp.fc1", h), approximate="tanh"))

    # The sequence

    def embed(self, segments: Segments) -> tuple[Tensor, list[int], list[bool], list[int], list[bool]]:
        """
        `(tokens, hidden)`; for each token its position, whether it is a latent, its block (−1: text), and whether
        others must not see it.
        """
        _, _, boi, eoi = self.ids
        states, positions, is_latent, blocks, is_hidden = [], [], [], [], []
        position = 0
        for number, segment in enumerate(segments):
            if isinstance(segment, Text):
                for token in segment.ids:
                    states.append(self._word(token))
                    positions.append(position)
                    is_latent.append(False)
                    blocks.append(-1)
                    is_hidden.append(False)
                    position += 1
                continue
            inner = self.see(segment.pixels) if isinstance(segment, Seen) else self._patches(segment)
            block = [self._word(boi), *inner, self._word(eoi)]
            states += block
            positions += [position] * len(block)
            is_latent += [False, *[isinstance(segment, Latents)] * len(inner), False]
            blocks += [number] * len(block)
            is_hidden += [isinstance(segment, Latents) and segment.is_hidden] * len(block)
            position += 1
        return torch.stack(states), positions, is_latent, blocks, is_hidden

    def _word(self, token: int) -> Tensor:
        return self.w["language_model.model.embed_tokens.weight"][token]

    def _patches(self, segment: Latents) -> Tensor:
        rows, columns, _ = segment.windows.shape
        half = self.w["time_embedder.mlp.0.weight"].shape[1] // 2
        angles = [segment.t * math.exp(-math.log(10_000) * i / half) for i in range(half)]
        waves = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
        t = self._linear("time_embedder.mlp.2", silu(self._linear("time_embedder.mlp.0", waves)))
        side = math.isqrt(len(self.w["latent_pos_embed.pos_embed"]))
        return torch.stack(
            [
                self._linear("vae2llm", segment.windows[r, c]) + t + self.w["latent_pos_embed.pos_embed"][r * side + c]
                for r in range(rows)
                for c in range(columns)
            ]
        )

    def hidden(self, segments: Segments) -> tuple[Tensor, list[bool]]:
        """Behind the final norms: `(tokens, hidden)`, and which tokens are latents."""
        x, positions, is_latent, blocks, is_hidden = self.embed(segments)
        num = len(positions)
        sees = torch.zeros(num, num, dtype=torch.bool)
        for i in range(num):
            for j in range(num):
                same = blocks[i] == blocks[j] != -1
                sees[i, j] = same or (j <= i and not is_hidden[j])
        for i in range(self.llm["num_hidden_layers"]):
            x = self._layer(f"language_model.model.layers.{i}.", x, positions, is_latent, sees)
        return self._norm("language_model.model.norm", x, is_latent), is_latent

    def _layer(self, name: str, x: Tensor, positions: list[int], is_latent: list[bool], sees: Tensor) -> Tensor:
        h = self._norm(f"{name}input_layernorm", x, is_latent)
        q, k, v = (self._each(f"{name}self_attn.{part}_proj", h, is_latent) for part in "qkv")
        num_heads, num_groups = self.llm["num_attention_heads"], self.llm["num_key_value_heads"]
        dim = q.shape[1] // num_heads

        def prepared(states: Tensor, part: str, head: int) -> Tensor:
            states = states[:, head * dim : (head + 1) * dim]
            return self._rotated(self._norm(f"{name}self_attn.{part}_norm", states, is_latent), positions)

        heads = []
        for i in range(num_heads):
            group = i // (num_heads // num_groups)
            scores = prepared(q, "q", i) @ prepared(k, "k", group).T / math.sqrt(dim)
            weights = scores.masked_fill(~sees, -math.inf).softmax(-1)
            heads.append(weights @ v[:, group * dim : (group + 1) * dim])
        x = x + self._each(f"{name}self_attn.o_proj", torch.cat(heads, 1), is_latent)
        h = self._norm(f"{name}post_attention_layernorm", x, is_latent)
        outputs = []
        for mlp in (f"{name}mlp_moe_gen.", f"{name}mlp."):
            gated = silu(self._linear(f"{mlp}gate_proj", h)) * self._linear(f"{mlp}up_proj", h)
            outputs.append(self._linear(f"{mlp}down_proj", gated))
        return x + torch.where(torch.tensor(is_latent)[:, None], *outputs)

    def _rotated(self, states: Tensor, positions: list[int]) -> Tensor:
        half = states.shape[1] // 2
        angles = [[p / self.llm["rope_theta"] ** (i / half) for i in range(half)] for p in positions]
        cos, sin = (torch.tensor(angles, dtype=torch.float64).cos(), torch.tensor(angles, dtype=torch.float64).sin())
        a, b = states[:, :half], states[:, half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], 1)

    # Modules: text's, or with `_moe_gen` those of latents

    def _each(self, name: str, states: Tensor, is_latent: list[bool]) -> Tensor:
        both = (self._linear(f"{name}_moe_gen", states), self._linear(name, states))
        return torch.where(torch.tensor(is_latent)[:, None], *both)

    def _norm(self, name: str, states: Tensor, is_latent: list[bool]) -> Tensor:
        scale = torch.rsqrt(states.square().mean(1, keepdim=True) + self.llm["rms_norm_eps"])
        both = (self.w[f"{name}_moe_gen.weight"], self.w[f"{name}.weight"])
        return states * scale * torch.where(torch.tensor(is_latent)[:, None], *both)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def _layer_norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(
            x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], self.vit["layer_norm_eps"]
        )

    # What it is used for

    def logits(self, segments: Segments) -> Tensor:
        states, _ = self.hidden(segments)
        return linear(states, self.w["language_model.lm_head.weight"])

    def velocity(self, context: Segments, windows: Tensor, t: float) -> Tensor:
        """ε − x_0 of each window, behind a context."""
        states, is_latent = self.hidden([*context, Latents(windows, t)])
        num = windows.shape[0] * windows.shape[1]
        return self._linear("llm2vae", states[is_latent][-num:]).view(windows.shape)

    def draw(
        self,
        context: Segments,
        noise: Tensor,
        num_points: int,
        shift: float = 3.0,
        text_scale: float = 1.0,
        image_scale: float = 1.0,
        without_text: Segments = (),
        without_images: Segments = (),
        interval: tuple[float, float] = (0.0, 1.0),
        renorm: str = "global",
        renorm_min: float = 0.0,
    ) -> Tensor:
        """Windows of x_0, by `num_points` − 1 Euler steps."""
        x = noise
        times = [shifted(1 - i / (num_points - 1), shift) for i in range(num_points)]
        for t, after in pairwise(times):
            v = self.velocity(context, x, t)
            if interval[0] < t <= interval[1]:
                v = self._guided(v, x, t, text_scale, image_scale, without_text, without_images, renorm, renorm_min)
            x = x + (after - t) * v
        return x

    def _guided(self, v, x, t, text_scale, image_scale, without_text, without_images, renorm, renorm_min) -> Tensor:
        if text_scale <= 1:  # nothing else is guided without it
            return v
        u = self.velocity(list(without_text), x, t)
        guided = u + text_scale * (v - u)
        if renorm == "text_channel":
            guided = self._renormed(v, guided, True, renorm_min)
        if image_scale > 1:
            u = self.velocity(list(without_images), x, t)
            guided = u + image_scale * (guided - u)
        return guided if renorm == "text_channel" else self._renormed(v, guided, renorm == "channel", renorm_min)

    @staticmethod
    def _renormed(v: Tensor, guided: Tensor, is_per_patch: bool, minimum: float) -> Tensor:
        dims = (-1,) if is_per_patch else (0, 1, 2)
        squares = [part.square().sum(dims, keepdim=True) for part in (v, guided)]
        return guided * (squares[0] / squares[1]).sqrt().clamp(minimum, 1.0)

    def answer(self, context: Segments, num_tokens: int) -> list[int]:
        ids = [self.ids[IM_START]]
        while len(ids) < num_tokens:
            ids.append(int(self.logits([*context, Text(ids)])[-1].argmax()))
        return ids

    def losses(self, document: Segments, noise: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """
        Squared errors of the windows of hidden latents, noised by `noise`, and the cross entropy of each pair of
        neighbours in a text.
        """
        noised: Segments = []
        for s in document:
            if isinstance(s, Latents) and s.is_hidden:
                s = Latents((1 - s.t) * s.windows + s.t * noise, s.t, True)
            noised.append(s)
        states, _ = self.hidden(noised)
        logits, squared, entropies, start = linear(states, self.w["language_model.lm_head.weight"]), None, [], 0
        for before, s in zip(document, noised, strict=True):
            if isinstance(s, Text):
                for i, target in enumerate(s.ids[1:]):
                    entropies.append(-logits[start + i].log_softmax(-1)[target])
                start += len(s.ids)
                continue
            length = self.see(s.pixels).shape[0] if isinstance(s, Seen) else s.windows.shape[0] * s.windows.shape[1]
            if isinstance(s, Latents) and s.is_hidden:
                predicted = self._linear("llm2vae", states[start + 1 : start + 1 + length])
                squared = (predicted - (noise - before.windows).flatten(0, 1)).square()
            start += length + 2
        return squared, entropies


class FluxAutoencoder:
    """
    The autoencoder of FLUX, in its authors' names: convolutions and group norms of 32 groups, one attention in the
    middle of each half, sides halved by a convolution with a pixel of zeros at the right and below.
    """

    def __init__(self, state: dict[str, Tensor], scale: float = 0.3611, shift: float = 0.1159):
        self.w = {name: value.double() for name, value in state.items()}
        self.scale, self.shift = scale, shift

    def encode(self, image: Tensor) -> Tensor:
        """`(3, height, width)` in [−1, 1] → the mode of the posterior, scaled and shifted, `(channels, …)`."""
        x, level = self._conv("encoder.conv_in", image), 0
        while f"encoder.down.{level}.block.0.conv1.weight" in self.w:
            x = self._blocks(f"encoder.down.{level}.block", x)
            if f"encoder.down.{level}.downsample.conv.weight" in self.w:
                x = self._conv(f"encoder.down.{level}.downsample.conv", pad(x, (0, 1, 0, 1)), stride=2, padding=0)
            level += 1
        x = self._conv("encoder.conv_out", silu(self._norm("encoder.norm_out", self._middle("encoder.mid", x))))
        return (x[: len(x) // 2] - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        x = self._middle("decoder.mid", self._conv("decoder.conv_in", latents / self.scale + self.shift))
        for level in reversed(range(sum(name.endswith(".block.0.conv1.weight") and "up." in name for name in self.w))):
            x = self._blocks(f"decoder.up.{level}.block", x)
            if f"decoder.up.{level}.upsample.conv.weight" in self.w:
                twice = x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
                x = self._conv(f"decoder.up.{level}.upsample.conv", twice)
        return self._conv("decoder.conv_out", silu(self._norm("decoder.norm_out", x)))

    def _middle(self, name: str, x: Tensor) -> Tensor:
        x = self._block(f"{name}.block_1", x)
        h = self._norm(f"{name}.attn_1.norm", x)
        q, k, v = (self._conv(f"{name}.attn_1.{part}", h, padding=0).flatten(1).T for part in "qkv")
        attended = (q @ k.T / math.sqrt(len(x))).softmax(-1) @ v
        x = x + self._conv(f"{name}.attn_1.proj_out", attended.T.reshape(x.shape), padding=0)
        return self._block(f"{name}.block_2", x)

    def _blocks(self, name: str, x: Tensor) -> Tensor:
        number = 0
        while f"{name}.{number}.conv1.weight" in self.w:
            x = self._block(f"{name}.{number}", x)
            number += 1
        return x

    def _block(self, name: str, x: Tensor) -> Tensor:
        h = self._conv(f"{name}.conv1", silu(self._norm(f"{name}.norm1", x)))
        h = self._conv(f"{name}.conv2", silu(self._norm(f"{name}.norm2", h)))
        has_shortcut = f"{name}.nin_shortcut.weight" in self.w
        return h + (self._conv(f"{name}.nin_shortcut", x, padding=0) if has_shortcut else x)

    def _conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return conv2d(x[None], self.w[f"{name}.weight"], self.w[f"{name}.bias"], stride, padding)[0]

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return group_norm(x[None], 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=1e-6)[0]
