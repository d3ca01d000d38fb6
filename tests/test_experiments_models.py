"""The models of the paper's comparisons: equal transformers, and how parameters and compute are counted."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from tiny import ROUNDING, VAE
from transformers import AutoTokenizer

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("experiments", "examples")]
import train_vae
from data import Data
from models import (
    IMAGES,
    NUM_CODES,
    PAPER_SIZES,
    SMALL_SIZES,
    build_chameleon,
    build_llama,
    build_transfusion,
    decoder_config,
    num_flops,
    num_parameters,
)

TINY = Path(__file__).parent / "fixtures" / "tiny-transfusion"
OFF = {"qk_norm": False, "swin_norm": False, "z_loss_weight": 0.0}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def layer_shapes(model) -> list[tuple[str, torch.Size]]:
    """Names and shapes of what all families have in their layers."""
    return sorted(
        (name[name.index("layers.") :], parameter.shape)
        for name, parameter in model.named_parameters()
        if "layers." in name and not name.startswith(("model.patch_encoder.", "model.patch_decoder."))
        if not name.endswith(("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"))
    )


@pytest.mark.parametrize("size", [*SMALL_SIZES, *PAPER_SIZES])
def test_all_families_have_the_same_transformer(size, tokenizer):
    with torch.device("meta"):
        llama, chameleon = build_llama(size, tokenizer), build_chameleon(size, tokenizer)
        transfusion, _ = build_transfusion(size, tokenizer)
    assert layer_shapes(llama) == layer_shapes(chameleon) == layer_shapes(transfusion) != []
    config = llama.config
    norms = 4 * config.hidden_size * config.num_hidden_layers  # weight and bias, of queries and keys
    assert num_parameters(chameleon) == num_parameters(llama) + norms
    codes = 2 * chameleon.config.num_image_codes * config.hidden_size
    assert chameleon.num_parameters() == llama.num_parameters() + norms + codes
    parts = (transfusion.model.patch_encoder, transfusion.model.patch_decoder)
    image = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert num_parameters(transfusion) == num_parameters(llama) + image
    assert transfusion.num_parameters() == llama.num_parameters() + image
    assert image < (0.1 if size in SMALL_SIZES else 0.01) * num_parameters(llama)


def test_the_names_of_the_sizes_are_their_numbers_of_parameters(tokenizer):
    with torch.device("meta"):
        small = {size: num_parameters(build_llama(size, tokenizer)) / 1e6 for size in SMALL_SIZES}
        paper = {}
        for size in PAPER_SIZES:
            model = build_llama(size, tokenizer)
            paper[size] = (num_parameters(model) + 2 * 32_000 * model.config.hidden_size) / 1e9
    assert small == {size: pytest.approx(float(size[:-1]), rel=0.15) for size in SMALL_SIZES}
    assert paper == {size: pytest.approx(float(size[:-1]), rel=0.05) for size in PAPER_SIZES}


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_autoencoders_pictures_and_models_of_a_scale_fit_each_other(scale):
    data = Data(scale=scale)
    with torch.device("meta"):
        kl, vq = (
            train_vae.build_vae(train_vae.parse_args([*data.autoencoder_flags(kind), "--train_dir", "photos"]))
            for kind in ("kl", "vq")
        )
    for config in (kl.config, vq.config):
        factor = 2 ** (len(config.block_out_channels) - 1)
        assert config.sample_size == factor * IMAGES[scale]["sample_size"]
        assert config.latent_channels == IMAGES[scale]["latent_channels"]
        assert data.pictures("train")[0]["image"].size == (config.sample_size, config.sample_size)
    assert vq.config.num_vq_embeddings == NUM_CODES[scale]


def test_compute_is_six_times_parameters_times_tokens(tokenizer):
    llama = build_llama("0.3M", tokenizer)
    layers, hidden_size, _, width = SMALL_SIZES["0.3M"]
    expected = layers * (4 * hidden_size**2 + 3 * hidden_size * width + 2 * hidden_size) + hidden_size
    assert num_flops(llama, 1000) == 6000 * expected
    vae = AutoencoderKL(**{**VAE, "latent_channels": 4})
    kwargs = {"sample_size": 4, "timestep_embedding_dim": 16}
    with_vae, _ = build_transfusion("0.3M", tokenizer, vae, **kwargs)
    assert num_flops(with_vae, 10) == num_flops(build_transfusion("0.3M", tokenizer, **kwargs)[0], 10)


def test_chameleon_without_its_changes_and_codes_is_the_llama_that_is_built(tokenizer):
    llama = build_llama("0.3M", tokenizer).eval()
    model = build_chameleon("0.3M", tokenizer, num_image_codes=0, **OFF).eval()
    model.load_state_dict(llama.state_dict())
    ids = torch.randint(len(tokenizer), (2, 20))
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=ROUNDING, atol=ROUNDING)


def test_a_word_has_the_same_id_in_all_families_and_codes_come_last(tokenizer):
    llama, chameleon = build_llama("0.3M", tokenizer), build_chameleon("0.3M", tokenizer, 32)
    transfusion, processor = build_transfusion("0.3M", tokenizer)
    config = transfusion.config
    assert (
        len(processor.tokenizer) == llama.vocab_size == config.text_config.vocab_size == chameleon.config.first_code_id
    )
    assert chameleon.config.vocab_size == len(tokenizer) + 32
    for name in ("image_start_token_id", "image_end_token_id"):
        assert getattr(chameleon.config, name) == getattr(config, name)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        expected = getattr(tokenizer, name)
        assert [getattr(one, name) for one in (llama.config, chameleon.config, config.text_config)] == [expected] * 3


@pytest.mark.parametrize("build", [build_llama, build_chameleon])
def test_packed_documents_of_the_baselines_do_not_see_each_other(build, tokenizer):
    model = build("0.3M", tokenizer).eval()
    documents = [torch.randint(len(tokenizer), (1, length)) for length in (5, 1, 8)]
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in documents])[None]
    packed = model(torch.cat(documents, dim=1), position_ids=positions).logits
    alone = torch.cat([model(ids).logits for ids in documents], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=ROUNDING)


def test_options_reach_the_models(tokenizer):
    options = {"patch_size": 4, "patch_encoder": "unet", "bidirectional_image_attention": False}
    config = build_transfusion("0.3M", tokenizer, diffusion_loss_weight=1.0, **options)[0].config
    assert options.items() <= vars(config).items() and config.diffusion_loss_weight == 1.0
    assert IMAGES["small"].items() <= vars(config).items()
    assert build_chameleon("0.3M", tokenizer, 16, **OFF).config.z_loss_weight == 0


def test_an_unknown_size_is_an_error_that_lists_the_sizes(tokenizer):
    with pytest.raises(ValueError, match=r"`size` must be one of 0.1M, 0.3M, 0.8M, 2M, 0.16B, .*; got '3M'"):
        decoder_config("3M", tokenizer)
