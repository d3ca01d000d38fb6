"""Models in 8 bits, and exported."""

import tiny
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from transfusion_hf import TransfusionForCausalLMAndDiffusion

IMAGE_PARTS = ["model.patch_encoder", "model.patch_decoder", "lm_head"]
IDS = torch.tensor([[5, 6, tiny.BOI, *[tiny.IMG] * 4, tiny.EOI]])


def test_a_decoder_in_8_bits_draws_with_image_parts_in_full(tmp_path):
    model = tiny.model(std=0.1, vae_config=tiny.VAE)
    model.save_pretrained(tmp_path)
    quantisation = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=IMAGE_PARTS)
    small = TransfusionForCausalLMAndDiffusion.from_pretrained(tmp_path, quantization_config=quantisation)
    quantised = {name for name, weight in small.named_parameters() if "Int8" in type(weight).__name__}
    expected = {name for name, _ in model.named_parameters() if name.endswith("_proj.weight")}
    assert quantised == expected and all(name.startswith("model.language_model.layers.") for name in quantised)
    for name, weight in small.state_dict().items():
        if name not in quantised:
            assert torch.equal(weight, model.state_dict()[name]), name
    output = model(input_ids=IDS[:, :2]).logits
    torch.testing.assert_close(
        small(input_ids=IDS[:, :2]).logits, output, rtol=0, atol=0.05 * float(output.abs().max())
    )
    kwargs = {"generation_mode": "image", "num_inference_steps": 3, "attention_mask": torch.ones_like(IDS[:, :2])}
    images = [
        m.generate(IDS[:, :2], generator=torch.Generator().manual_seed(0), **kwargs).images[0][0]
        for m in (model, small)
    ]
    assert not torch.equal(*images)
    torch.testing.assert_close(*images, rtol=0, atol=0.2)


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
