"""Models in 8 and 4 bits, and exported."""

import pytest
import tiny
import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import TorchAoConfig

from transfusion_hf import TransfusionForCausalLMAndDiffusion

IMAGE_PARTS = ["model.patch_encoder", "model.patch_decoder", "lm_head"]
IDS = torch.tensor([[5, 6, tiny.BOI, *[tiny.IMG] * 4, tiny.EOI]])


INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))


@pytest.mark.parametrize(("quantiser", "tolerance"), [(Int8WeightOnlyConfig(), 0.02), (INT4, 0.2)], ids=["8", "4"])
def test_a_decoder_in_few_bits_draws_with_image_parts_in_full(tmp_path, quantiser, tolerance):
    model = tiny.model(std=0.1, vae_config=tiny.VAE)
    model.save_pretrained(tmp_path)
    quantisation = TorchAoConfig(quantiser, modules_to_not_convert=IMAGE_PARTS)
    small = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path, quantization_config=quantisation)
    quantised = {name for name, weight in small.named_parameters() if type(weight) is not torch.nn.Parameter}
    expected = {name for name, _ in model.named_parameters() if name.endswith("_proj.weight")}
    assert quantised == expected and all(name.startswith("model.language_model.layers.") for name in quantised)
    for name, weight in small.state_dict().items():
        if name not in quantised:
            assert torch.equal(weight, model.state_dict()[name]), name
    output = model(input_ids=IDS[:, :2]).logits
    error = (small(input_ids=IDS[:, :2]).logits - output).norm() / output.norm()
    assert 0 < error <= tolerance
    kwargs = {"generation_mode": "image", "num_inference_steps": 3, "attention_mask": torch.ones_like(IDS[:, :2])}
    images = [
        m.generate(IDS[:, :2], generator=torch.Generator().manual_seed(0), **kwargs).images[0][0]
        for m in (model, small)
    ]
    assert not torch.equal(*images)
    torch.testing.assert_close(*images, rtol=0, atol=4 * tolerance)


class Text(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


class DenoisingStep(Text):
    def forward(self, input_ids, latents, timesteps):
        return self.model(input_ids=input_ids, latents=latents, timesteps=timesteps, use_cache=False).image_predictions


def test_a_step_of_text_is_exported_for_any_length():
    text = Text(tiny.model())
    length = torch.export.Dim("length", min=3, max=64)
    exported = torch.export.export(text, (IDS[:, :2].repeat(1, 4),), dynamic_shapes=({1: length},))
    for ids in (torch.randint(3, 60, (1, 5)), torch.randint(3, 60, (1, 40))):
        torch.testing.assert_close(exported.module()(ids), text(ids))


def test_a_denoising_step_is_exported():
    step = DenoisingStep(tiny.model())
    inputs = [(IDS, torch.randn(1, 2, 4, 4), torch.tensor([t])) for t in (500, 20)]
    exported = torch.export.export(step, inputs[0])
    for arguments in inputs:
        torch.testing.assert_close(exported.module()(*arguments), step(*arguments))
