"""The discrete baseline of the paper's comparisons, against naive references and on pictures learnt by heart."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from tiny import BOI, BOS, EOI, EOS, PAD, ROUNDING, VOCAB_SIZE
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
from chameleon import (
    ChameleonTwinConfig,
    ChameleonTwinForConditionalGeneration,
    decode_images,
    draw_codes,
    encode_images,
    image_ids,
    write_captions,
    z_loss,
)

NUM_CODES = 16
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "rms_norm_eps": 1e-5,
    "use_cache": False,
}  # fmt: skip
OFF = {"qk_norm": False, "swin_norm": False, "z_loss_weight": 0.0}


def twin(
    seed: int = 0, std: float = 0.2, dtype: torch.dtype = torch.float32, **kwargs
) -> ChameleonTwinForConditionalGeneration:
    """With random weights, norms included, large enough that every part matters."""
    num_codes = kwargs.setdefault("num_image_codes", NUM_CODES)
    ids = {"image_start_token_id": BOI, "image_end_token_id": EOI}
    config = ChameleonTwinConfig(vocab_size=VOCAB_SIZE + num_codes, **{"sample_size": 2, **SIZES, **ids, **kwargs})
    torch.manual_seed(seed)
    model = ChameleonTwinForConditionalGeneration(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * std)
    return model


def random_ids(rows: int, length: int, high: int = VOCAB_SIZE + NUM_CODES) -> torch.Tensor:
    return torch.randint(3, high, (rows, length))


def masked_labels(ids: torch.Tensor) -> torch.Tensor:
    return ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)


# The reference: one sequence after another, written from the equations.


def rms_norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + SIZES["rms_norm_eps"]).sqrt() * weight


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def rotated(x):
    """Rotary positions of `(length, heads, width)`: pair i, of i and i + width / 2, turns by 10000^(−2i / width)."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None].double() / 10_000 ** (torch.arange(half).double() / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def reference_logits(model: ChameleonTwinForConditionalGeneration, ids: torch.Tensor) -> torch.Tensor:
    p, config = dict(model.named_parameters()), model.config
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.hidden_size // 4

    def attend(x, name):
        q, k, v = (
            (x @ p[f"{name}.{part}_proj.weight"].T).view(len(x), -1, width) for part in ("q", "k", "v")
        )  # (length, heads, width)
        if config.qk_norm:
            q = layer_norm(q, p[f"{name}.q_norm.weight"], p[f"{name}.q_norm.bias"])
            k = layer_norm(k, p[f"{name}.k_norm.weight"], p[f"{name}.k_norm.bias"])
        q, k, outputs = rotated(q), rotated(k), []
        for head in range(heads):
            shared = head * kv_heads // heads
            scores = (q[:, head] @ k[:, shared].T / width**0.5).masked_fill(
                ~torch.ones(len(x), len(x)).tril().bool(), -torch.inf
            )
            outputs.append(scores.softmax(-1) @ v[:, shared])
        return torch.cat(outputs, dim=-1) @ p[f"{name}.o_proj.weight"].T

    def feed_forward(x, name):
        gate, up = x @ p[f"{name}.gate_proj.weight"].T, x @ p[f"{name}.up_proj.weight"].T
        return (gate * gate.sigmoid() * up) @ p[f"{name}.down_proj.weight"].T

    rows = []
    for row in ids:
        x = p["model.embed_tokens.weight"][row]
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}"
            for f, name, norm in (
                (attend, "self_attn", "input_layernorm"),
                (feed_forward, "mlp", "post_attention_layernorm"),
            ):
                weight = p[f"{layer}.{norm}.weight"]
                if config.swin_norm:
                    x = x + rms_norm(f(x, f"{layer}.{name}"), weight)
                else:
                    x = x + f(rms_norm(x, weight), f"{layer}.{name}")
        rows.append(rms_norm(x, p["model.norm.weight"]) @ p["lm_head.weight"].T)
    return torch.stack(rows)


def reference_loss(logits: torch.Tensor, labels: torch.Tensor, z_weight: float) -> torch.Tensor:
    terms = []
    for row, targets in zip(logits, labels, strict=True):
        for i in range(len(targets) - 1):
            if targets[i + 1] != -100:
                log_z = row[i].exp().sum().log()
                terms.append(log_z - row[i, targets[i + 1]] + z_weight * log_z**2)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
@pytest.mark.parametrize("swin_norm", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_logits_loss_and_gradients_are_those_of_the_equations(qk_norm, swin_norm, z_loss_weight):
    model = twin(dtype=torch.float64, qk_norm=qk_norm, swin_norm=swin_norm, z_loss_weight=z_loss_weight).train()
    ids = random_ids(2, 9)
    labels = masked_labels(ids)
    output, logits = model(ids, labels=labels), reference_logits(model, ids)
    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
    loss = reference_loss(logits, labels, z_loss_weight)
    torch.testing.assert_close(output.loss.double(), loss, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss, parameters)
    # The norms of transformers compute in float32 in every dtype.
    torch.testing.assert_close(torch.autograd.grad(output.loss, parameters), expected, rtol=1e-5, atol=1e-5)


def test_without_the_stability_changes_it_is_llama():
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, **SIZES)).train()
    model = twin(num_image_codes=0, **OFF).train()
    llama.load_state_dict(model.state_dict())
    ids = random_ids(3, 12, VOCAB_SIZE)
    labels = masked_labels(ids)
    ours, theirs = (one(ids, labels=labels, num_items_in_batch=7) for one in (model, llama))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=ROUNDING, atol=ROUNDING)
    ours.loss.backward()
    theirs.loss.backward()
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-5)


def test_the_z_loss_is_the_mean_of_the_squared_log_denominator_and_has_its_gradient():
    logits = (torch.randn(2, 5, 7, dtype=torch.float64) * 3).requires_grad_()
    labels = torch.tensor([[1, 2, -100, 3, -100], [-100, -100, 0, -100, 6]])
    log_z = {(0, 0), (0, 2), (1, 1), (1, 3)}  # the positions before a label
    expected = sum(logits[place].exp().sum().log() ** 2 for place in log_z) / 4
    torch.testing.assert_close(z_loss(logits, labels), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z_loss(logits, labels, 8), expected / 2, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (z_loss(logits, labels), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_evaluated_loss_is_the_cross_entropy_alone():
    model, ids = twin(z_loss_weight=1.0), random_ids(2, 8)
    trained, evaluated = model.train()(ids, labels=ids).loss, model.eval()(ids, labels=ids).loss
    logits = model(ids).logits
    entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(evaluated, entropy, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(trained, entropy + z_loss(logits, ids), rtol=ROUNDING, atol=ROUNDING)


def test_the_stock_trainer_takes_the_same_loss_in_micro_batches(tmp_path):
    ids = random_ids(4, 10)
    labels = masked_labels(ids)
    samples = [{"input_ids": row, "labels": targets} for row, targets in zip(ids, labels, strict=True)]
    losses = []
    for batch_size in (4, 1):
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            max_steps=1,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
        )
        trainer = Trainer(twin(z_loss_weight=0.1), arguments, train_dataset=samples)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    expected = twin(z_loss_weight=0.1).train()(ids, labels=labels).loss.item()
    assert losses == pytest.approx([expected] * 2, rel=1e-4)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(attn_implementation):
    model = twin(use_cache=True).eval()
    model.set_attn_implementation(attn_implementation)
    rows = [[random_ids(1, length) for length in lengths] for lengths in ((5, 1, 7), (4, 9))]
    packed = torch.cat([torch.cat(row, dim=1) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(ids.shape[1]) for ids in row]) for row in rows])
    alone = torch.cat([torch.cat([model(ids).logits for ids in row], dim=1) for row in rows])
    torch.testing.assert_close(model(packed, position_ids=positions).logits, alone, rtol=1e-5, atol=ROUNDING)


def reference_draw(
    model: ChameleonTwinForConditionalGeneration, prompt: list[int], guidance_scale: float
) -> list[int]:
    """One picture's likeliest codes, without a cache."""
    contexts, first, codes = (prompt, [BOS, BOI]), model.config.first_code_id, []
    for _ in range(4):
        scores, nothing = (
            model(torch.tensor([[*context, *(first + code for code in codes)]])).logits[0, -1].log_softmax(-1)
            for context in contexts
        )
        if guidance_scale != 1:
            scores = nothing + guidance_scale * (scores - nothing)
        codes.append(int(scores[first:].argmax()))
    return codes


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@torch.no_grad()
def test_a_batch_draws_the_codes_that_each_prompt_draws_alone_without_a_cache(guidance_scale):
    model = twin().eval()
    prompts = [[BOS, *random_ids(1, n, BOI)[0].tolist(), BOI] for n in (6, 0, 3)]
    ids = pad_sequence([torch.tensor(p) for p in prompts], True, PAD, padding_side="left")
    codes = draw_codes(model, ids, (ids != PAD).long(), guidance_scale, temperature=0)
    expected = [reference_draw(model, prompt, guidance_scale) for prompt in prompts]
    assert codes.shape == (3, 2, 2) and codes.flatten(1).tolist() == expected


def test_sampling_depends_on_its_seed_alone_and_stays_among_the_codes():
    model, ids = twin(std=0.05).eval(), torch.tensor([[BOS, 5, BOI]] * 8)
    state = torch.get_rng_state()
    codes = draw_codes(model, ids, seed=3, guidance_scale=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(draw_codes(model, ids, seed=3, guidance_scale=1), codes)
    assert not torch.equal(draw_codes(model, ids, seed=4, guidance_scale=1), codes)
    assert 0 <= codes.min() and codes.max() < NUM_CODES and len(codes.unique()) > 10


@pytest.mark.parametrize("setting", [{"top_p": 1e-6}, {"temperature": 1e-6}])
def test_the_limits_of_sampling_take_the_likeliest_code(setting):
    model, ids = twin().eval(), torch.tensor([[BOS, 5, BOI], [BOS, 9, BOI]])
    assert torch.equal(draw_codes(model, ids, **setting), draw_codes(model, ids, temperature=0))


def test_sampled_codes_have_the_guided_probabilities():
    model, ids = twin(std=0.1, sample_size=1).eval(), torch.tensor([[BOS, 5, BOI]])
    with torch.no_grad():
        logits = [model(row).logits[0, -1, VOCAB_SIZE:] for row in (ids, torch.tensor([[BOS, BOI]]))]
    expected = ((3 * logits[0] - 2 * logits[1]) / 0.7).softmax(-1)
    codes = draw_codes(model, ids.expand(4000, -1), guidance_scale=3, temperature=0.7).flatten()
    frequencies = codes.bincount(minlength=NUM_CODES) / 4000
    assert (frequencies - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def tiny_vq(pixel_values: torch.Tensor) -> VQModel:
    """Of 4×4 codes for 8×8 pixels; its codebook is taken from the pictures' own vectors, which sets them apart."""
    vq = VQModel(
        block_out_channels=[4, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=2,
        norm_num_groups=2,
        num_vq_embeddings=NUM_CODES,
    ).eval()
    with torch.no_grad():
        vectors = vq.encode(pixel_values).latents.permute(0, 2, 3, 1).flatten(0, 2)
        vq.quantize.embedding.weight.copy_(vectors[torch.randperm(len(vectors))[:NUM_CODES]])
    return vq


def test_codes_decode_to_the_reconstruction_of_the_autoencoder():
    pixel_values = torch.rand(3, 3, 8, 8) * 2 - 1
    vq = tiny_vq(pixel_values)
    codes = encode_images(vq, pixel_values)
    assert codes.shape == (3, 4, 4) and len(codes.unique()) > 8
    expected = vq(pixel_values).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_images(vq, codes), expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("switches", [{}, OFF], ids=["stable", "plain"])
def test_pictures_and_captions_that_are_learnt_by_heart_come_back_exactly(switches):
    pixel_values = torch.rand(4, 3, 8, 8) * 2 - 1
    vq = tiny_vq(pixel_values)
    codes = encode_images(vq, pixel_values)
    captions = random_ids(4, 3, BOI)
    model = twin(std=0.0, initializer_range=0.1, **switches)
    model.config.sample_size = 4
    images, bos, eos = image_ids(model.config, codes), torch.full((4, 1), BOS), torch.full((4, 1), EOS)
    drawings = torch.cat([bos, captions, images, eos], dim=1)
    ids = torch.cat([drawings, torch.cat([bos, images, captions, eos], dim=1)])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(150):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()
    # What comes first, a caption or an image, cannot be known.
    labels = ids.clone()
    labels[:4, :4], labels[4:, : 1 + images.shape[1]] = -100, -100
    assert model(ids, labels=labels).loss < 0.002
    drawn = draw_codes(model, drawings[:, :5], guidance_scale=2, top_p=0.9)
    assert torch.equal(drawn, codes)
    reconstruction = vq(pixel_values).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_images(vq, drawn), reconstruction, rtol=ROUNDING, atol=ROUNDING)
    assert torch.equal(write_captions(model, codes), torch.cat([captions, eos], dim=1))


def test_captions_hold_neither_codes_nor_images():
    model = twin(seed=1).eval()
    with torch.no_grad():  # makes them the likeliest
        model.lm_head.weight[torch.tensor([BOI, EOI, VOCAB_SIZE, VOCAB_SIZE + 1])] *= 20
    ids = write_captions(model, torch.randint(NUM_CODES, (6, 2, 2)), max_new_tokens=10)
    assert not torch.isin(ids, torch.tensor([BOI, EOI])).any() and ids.max() < VOCAB_SIZE


@torch.no_grad()
def test_captions_are_the_likeliest_words_behind_the_beginning_of_sequence_and_the_image():
    model, codes = twin(eos_token_id=None).eval(), torch.randint(NUM_CODES, (3, 2, 2))
    for caption, row in zip(write_captions(model, codes, max_new_tokens=5), codes, strict=True):
        ids = [BOS, BOI, *(VOCAB_SIZE + row.flatten()).tolist(), EOI]
        for token in caption.tolist():
            scores = model(torch.tensor([ids])).logits[0, -1]
            scores[torch.tensor([BOI, EOI])] = -torch.inf
            assert token == scores[:VOCAB_SIZE].argmax()
            ids.append(token)


def test_the_stability_changes_are_those_of_chameleon_by_default():
    config = ChameleonTwinConfig()
    assert config.qk_norm and config.swin_norm and config.z_loss_weight == 1e-5


def test_a_saved_model_comes_back_with_its_switches_and_without_an_encoder(tmp_path):
    model, ids = twin(**OFF).eval(), random_ids(2, 7)
    model.save_pretrained(tmp_path)
    loaded, info = ChameleonTwinForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.first_code_id == VOCAB_SIZE and loaded.config.z_loss_weight == 0
    assert not [name for name in loaded.state_dict() if "vqmodel" in name or "q_norm" in name]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_bad_input_says_what_to_do():
    model = twin()
    with pytest.raises(ValueError, match=r"`codes` must lie in 0 to 15; got 3 to 16.*Encode the images with"):
        image_ids(model.config, torch.tensor([[[3, 16]]]))
    with pytest.raises(
        ValueError, match=r"must end at `<BOI>` \(61\); the last ids are \[61, 0\]\. .*pad on the left"
    ):
        draw_codes(model, torch.tensor([[BOS, BOI], [BOI, PAD]]))
    with pytest.raises(ValueError, match="`temperature` must be at least 0; got -1"):
        draw_codes(model, torch.tensor([[BOS, BOI]]), temperature=-1)
    with pytest.raises(ValueError, match=r"`image_end_token_id` must be one of the 64 text tokens.*got 70"):
        twin(image_end_token_id=70)
    with pytest.raises(ValueError, match=r"`image_start_token_id` must be one of.*got None"):
        twin(image_start_token_id=None)
