"""The language model and the autoencoder of a Transfusion, each on its own, are bit for bit what they were in it."""

import sys
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from make_tiny_transfusion import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from transfusion_hf import TransfusionForCausalLMAndDiffusion, TransfusionProcessor
from transfusion_hf.conversion.export import extract_causal_lm, extract_vae

sys.path.append(str(Path(__file__).parent.parent / "conversion"))
import export_causal_lm
import export_vae

IDS = torch.tensor([[1, 5, 9, 3, 20, 7]])
VAE = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 2,
    "norm_num_groups": 2,
    "scaling_factor": 0.7,
    "shift_factor": 0.1,
}


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi", "cohere"])
@pytest.mark.parametrize("vocab_size", [None, 50])
def test_the_language_model_alone_says_the_same(family, vocab_size, tmp_path):
    model = tiny.model(tiny.text_config(family))
    extracted = extract_causal_lm(model, vocab_size)
    extracted.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded).__module__.startswith("transformers.models")
    size = vocab_size or tiny.VOCAB_SIZE
    assert loaded.config.vocab_size == size and loaded.get_input_embeddings().weight.shape[0] == size
    expected = model(input_ids=IDS).logits[..., :size]
    assert torch.equal(loaded(IDS).logits, expected) and torch.equal(extracted(IDS).logits, expected)
    for key, weight in loaded.state_dict().items():
        ours = f"model.language_model.{key.removeprefix('model.')}" if key.startswith("model.") else key
        assert torch.equal(weight, model.state_dict()[ours][: len(weight)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exports_generate_and_keep_dtype_and_weights(dtype, tmp_path):
    text_config = tiny.text_config("qwen3", tie_word_embeddings=True)
    model = tiny.model(text_config, dtype=dtype, vae_config=VAE, untied_modalities=["image"])
    model.generation_config.update(repetition_penalty=1.3, num_inference_steps=3)
    model.set_attn_implementation("transfusion_varlen")
    expected = model.generate(IDS, generation_mode="text", do_sample=False, max_new_tokens=8)
    language_model = extract_causal_lm(model)
    assert language_model.get_input_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    language_model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype and not hasattr(loaded.config, "auto_map")
    assert loaded.generation_config.repetition_penalty == 1.3
    assert not hasattr(loaded.generation_config, "num_inference_steps")
    banned = [[token] for token in (tiny.BOI, tiny.IMG, tiny.EOI)]  # as in the mode for text
    found = loaded.generate(IDS, do_sample=False, max_new_tokens=8, bad_words_ids=banned)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_the_autoencoder_is_that_of_diffusers(tmp_path):
    model = tiny.model(vae_config=VAE)
    extract_vae(model).save_pretrained(tmp_path)
    vae = AutoencoderKL.from_pretrained(tmp_path)
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.7, 0.1)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    latents = (vae.encode(images).latent_dist.mode() - 0.1) * 0.7
    torch.testing.assert_close(latents, model.encode_images(images)[0], rtol=0, atol=tiny.ROUNDING)
    drawn = vae.decode(latents / 0.7 + 0.1).sample
    torch.testing.assert_close(drawn, model.decode_latents(latents), rtol=1e-5, atol=1e-5)
    weights = model.vae.state_dict()
    assert vae.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())


def test_the_scripts_write_what_loads_or_nothing(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    text_config = LlamaConfig(
        vocab_size=size + 3, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    tokens = {"image_start_token_id": size, "image_token_id": size + 1, "image_end_token_id": size + 2}
    model = TransfusionForCausalLMAndDiffusion(tiny.config(text_config, vae_config=VAE, **tokens))
    processor = TransfusionProcessor.for_model(model, tokenizer)
    source = tmp_path / "model"
    model.save_pretrained(source)
    processor.save_pretrained(source)
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")

    export_causal_lm.main([str(source), str(tmp_path / "all")])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "all")) == size + 3
    arguments = ["--vocab_size", str(size), "--tokenizer", str(tmp_path / "tokenizer")]
    export_causal_lm.main([str(source), str(tmp_path / "new" / "cut"), *arguments])
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "cut")
    assert cut.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "new" / "cut")) == size
    assert torch.equal(cut.lm_head.weight, model.lm_head.weight[:size])
    export_causal_lm.main([str(source), str(tmp_path / "bare"), "--vocab_size", str(size)])
    assert capsys.readouterr().out.endswith("without a tokenizer\n")
    assert not list((tmp_path / "bare").glob("tokenizer*"))
    export_vae.main([str(source), str(tmp_path / "vae")])
    assert AutoencoderKL.from_pretrained(tmp_path / "vae").config.latent_channels == 2

    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="is not empty; choose another"):
        export_causal_lm.main([str(source), str(tmp_path / "all")])
    with pytest.raises(SystemExit, match=f"has {size} tokens, and the vocabulary would have 100"):
        small = ["--vocab_size", "100", "--tokenizer", str(tmp_path / "tokenizer")]
        export_causal_lm.main([str(source), str(tmp_path / "wrong"), *small])
    assert set(tmp_path.rglob("*")) == before
    assert not [path for path in before if path.suffix in (".bin", ".pt", ".pth", ".py") and "model" not in path.parts]


def test_what_cannot_be_exported_is_refused():
    model = tiny.model()
    with pytest.raises(ValueError, match="`vocab_size` must lie in 1 to 64; got 65"):
        extract_causal_lm(model, 65)
    with pytest.raises(ValueError, match="`vocab_size` is 2, but `eos_token_id` is 2; leave it in"):
        extract_causal_lm(model, 2)
    with pytest.raises(ValueError, match="`model` has no autoencoder"):
        extract_vae(model)
    del model.model.language_model.layers[1].mlp.up_proj
    with pytest.raises(ValueError, match=r"lacks 1 of the weights of a 'llama'.*: model\.layers\.1\.mlp\.up_proj"):
        extract_causal_lm(model)


def test_a_padding_token_behind_the_vocabulary_is_forgotten():
    model = tiny.model(tiny.text_config(pad_token_id=60))
    model.generation_config.pad_token_id = 60
    kept, cut = extract_causal_lm(model, 61), extract_causal_lm(model, 60)
    assert (kept.config.pad_token_id, cut.config.pad_token_id) == (60, None)
    assert (kept.generation_config.pad_token_id, cut.generation_config.pad_token_id) == (60, None)
    assert model.config.text_config.pad_token_id == 60
