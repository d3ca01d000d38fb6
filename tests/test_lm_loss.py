"""The LM loss that overwrites its logits, in a compiled model."""

import tiny
import torch
from test_trainer import collate_uneven, uneven_samples


def test_a_compiled_model_has_the_same_losses_and_gradients():
    model, batch, found = tiny.model().train(), collate_uneven(uneven_samples()), []
    for forward in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        output = forward(**batch)
        output.loss.backward()
        found.append([output.lm_loss, output.diffusion_loss, *(p.grad.clone() for p in model.parameters())])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=tiny.ROUNDING)
